"""Images with any number of bands: TIFF and NumPy's `.npy`.

The values become uint8 as they are, or float32: unsigned integers divided by their largest value, floats unchanged.
Signed integers and complex numbers have no scale, so they are refused, and so are NaN and infinite values.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from struct import pack

import numpy as np
from PIL import Image, TiffImagePlugin

from .picture import Box, Picture, Undecodable, check_size, only_undecodable, turned
from .printed import LIBTIFF, printed

NPY = b"\x93NUMPY"
# tags of TIFF 6.0
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, ORIENTATION, SAMPLES = 256, 257, 258, 259, 262, 266, 274, 277
STRIPS, STRIP_ROWS, STRIP_BYTES, PLANES, PREDICTOR = 273, 278, 279, 284, 317
TILE_WIDTH, TILE_ROWS, TILES, TILE_BYTES, FORMATS = 322, 323, 324, 325, 339
USED: tuple[int, ...] = (WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, ORIENTATION, SAMPLES, PLANES)
USED += (STRIPS, STRIP_ROWS, STRIP_BYTES, PREDICTOR, TILE_WIDTH, TILE_ROWS, TILES, TILE_BYTES, FORMATS)
KINDS = {1: "u", 2: "i", 3: "f"}  # SampleFormat
BIT_COUNTS = {"u": (8, 16, 32, 64), "i": (8, 16, 32, 64), "f": (16, 32, 64)}
INTENSITIES = (1, 2, 5)  # black is zero, RGB, separated
NOT_BYTES = {2: "CCITT", 3: "CCITT", 4: "CCITT", 6: "JPEG", 7: "JPEG", 34712: "JPEG 2000", 34887: "LERC"}
NOT_BYTES |= {33003: "JPEG 2000", 33005: "JPEG 2000", 50001: "WebP", 50002: "JPEG XL"}
ADVICE = "write uint8, uint16, or float32 in the scale 0 to 1"
MOST_BYTES = 3  # of all bands, for each pixel that data.max_pixels allows


class Lazy:
    """A picture of several bands that is decoded when it is cropped."""

    def __init__(self, image: Npy | Tiff, channels: int):
        self.image, self.channels = image, channels
        self.height, self.width = image.height, image.width

    def crop(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        top, left, rows, cols = box
        with only_undecodable(self.image.format):
            values = finite(self.image.read())
            pixels = scaled(values[top : top + rows, left : left + cols])
            return np.repeat(pixels, 3, axis=2) if self.channels in (1, 3) and pixels.shape[2] == 1 else pixels


def check_bands(bands: int, channels: int) -> None:
    """Refuse another number of bands; 1 and 3 channels are both made from 1 or 3 bands."""
    if bands != channels and not {bands, channels} <= {1, 3}:
        raise Undecodable(f"has {bands} band{'s' * (bands != 1)}, encoder.in_chans is {channels}")


def check_bytes(height: int, width: int, bands: int, dtype: np.dtype, max_pixels: int) -> None:
    """Refuse values that take more memory than the largest RGB image."""
    taken = height * width * bands * dtype.itemsize
    if taken > MOST_BYTES * max_pixels:
        size = f"{width} x {height} pixels of {bands} bands of {dtype.itemsize} bytes"
        raise Undecodable(f"{size} are more than {MOST_BYTES} bytes x data.max_pixels {max_pixels}")


def finite(values: np.ndarray) -> np.ndarray:
    """Return floats as float32; all of them must be finite, whichever part of the image is used."""
    if values.dtype.kind != "f":
        return values
    with np.errstate(over="ignore"):
        floats = values.astype(np.float32)
    if not np.isfinite(floats).all():
        raise Undecodable("has values that are NaN or infinite")
    return floats


def scaled(values: np.ndarray) -> np.ndarray:
    """Return uint8 and floats as they are, and other unsigned integers in the scale 0 to 1."""
    if values.dtype == np.uint8 or values.dtype.kind == "f":
        return values
    return (values / np.iinfo(values.dtype).max).astype(np.float32)


def check_type(dtype: np.dtype) -> np.dtype:
    """Refuse values without a scale, before any is read."""
    if dtype.kind not in "uf" or dtype.itemsize > 8:
        raise Undecodable(f"has {dtype.name[:40]} values; {ADVICE}")
    return dtype


@dataclass(frozen=True)
class Npy:
    """An array (H, W, C), or (H, W) for one band, in a file of `numpy.save`."""

    content: bytes
    start: int
    shape: tuple[int, ...]
    columns_first: bool
    dtype: np.dtype
    format = "npy"

    @property
    def height(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        return self.shape[1]

    def read(self) -> np.ndarray:
        """Return the values, (H, W, C)."""
        values = np.frombuffer(self.content, self.dtype, int(np.prod(self.shape)), self.start)
        pixels = values.reshape(self.shape, order="F" if self.columns_first else "C")
        return pixels if pixels.ndim == 3 else pixels[:, :, None]


def open_npy(content: bytes, channels: int, max_pixels: int) -> Picture:
    """Open a file of `numpy.save`; one that contains Python objects is refused."""
    with only_undecodable("npy"):
        file = io.BytesIO(content)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(file)
        if version not in read:
            raise Undecodable(f"npy of version {version[0]}.{version[1]}")
        shape, columns_first, dtype = read[version](file)
        if len(shape) not in (2, 3):
            raise Undecodable(f"npy of {len(shape)} axes; write (H, W, C)")
        check_size(shape[0], shape[1], max_pixels)
        bands = shape[2] if len(shape) == 3 else 1
        check_bands(bands, channels)
        check_bytes(shape[0], shape[1], bands, check_type(dtype), max_pixels)
        image = Npy(content, file.tell(), shape, columns_first, dtype)
        if len(content) - image.start < shape[0] * shape[1] * bands * dtype.itemsize:
            raise Undecodable("damaged npy: it is truncated")
        return Lazy(image, channels)


@dataclass(frozen=True)
class Tiff:
    """The first page of a TIFF, chunky or planar, in strips or tiles.

    Attributes:
        block: rows and columns of a strip or tile.
        places: start and length of each in the content, in the order of TIFF 6.0: from left to right, from top to
            bottom, and for planar files all those of the first band first.
    """

    content: bytes
    height: int
    width: int
    bands: int
    dtype: np.dtype
    planar: bool
    compression: int
    predictor: int
    tiled: bool
    block: tuple[int, int]
    places: list[tuple[int, int]]
    orientation: int
    format = "TIFF"

    def read(self) -> np.ndarray:
        """Return the values, (H, W, C)."""
        rows, cols = self.block
        down, across = -(-self.height // rows), -(-self.width // cols)
        planes = self.bands if self.planar else 1
        if len(self.places) != down * across * planes:
            raise Undecodable(f"damaged TIFF: {len(self.places)} strips or tiles, not {down * across * planes}")
        whole = np.empty((self.height, self.width, self.bands), self.dtype.newbyteorder("="))
        for number, (start, length) in enumerate(self.places):
            plane, block = divmod(number, down * across)
            top, left = block // across * rows, block % across * cols
            part = whole[top : top + rows, left : left + cols]
            part = part[:, :, plane : plane + 1] if self.planar else part
            values = self.values(start, length, rows if self.tiled else len(part))  # the last strip is shorter
            part[...] = values[: part.shape[0], : part.shape[1]]
        return whole

    def values(self, start: int, length: int, rows: int) -> np.ndarray:
        """Return the values of a strip or tile, (rows, columns, bands of it)."""
        bands = 1 if self.planar else self.bands
        row_bytes = self.block[1] * bands * self.dtype.itemsize
        data = decompressed(self.content[start : start + length], self.compression, rows, row_bytes)
        if self.predictor == 3:
            data = undo_float_predictor(data.reshape(rows, row_bytes), bands, self.dtype.itemsize)
            return data.view(self.dtype.newbyteorder(">")).reshape(rows, self.block[1], bands)
        values = data.view(self.dtype).reshape(rows, self.block[1], bands)
        if self.predictor == 2:
            unsigned = values.astype(values.dtype.newbyteorder("=")).view(f"u{self.dtype.itemsize}")
            return np.cumsum(unsigned, axis=1, dtype=unsigned.dtype).view(self.dtype.newbyteorder("="))
        return values


def undo_float_predictor(data: np.ndarray, bands: int, itemsize: int) -> np.ndarray:
    """Undo the predictor of Adobe's TIFF technical note 3: differences of bytes, the high bytes of a row first."""
    rows, row_bytes = data.shape
    sums = np.cumsum(data.reshape(rows, row_bytes // bands, bands), axis=1, dtype=np.uint8)
    return np.ascontiguousarray(sums.reshape(rows, itemsize, row_bytes // itemsize).swapaxes(1, 2)).reshape(-1)


def decompressed(data: bytes, compression: int, rows: int, row_bytes: int) -> np.ndarray:
    """Return the bytes of a strip or tile.

    Pillow's libtiff decompresses them as a grey image of one strip, so every lossless compression of it is read, and
    no more memory is taken than the image says.
    """
    if compression == 1:
        if len(data) < rows * row_bytes:
            raise Undecodable("damaged TIFF: it is truncated")
        return np.frombuffer(data, np.uint8, rows * row_bytes)
    tags = {
        WIDTH: row_bytes,
        HEIGHT: rows,
        BITS: 8,
        COMPRESSION: compression,
        PHOTOMETRIC: 1,
        STRIPS: 8,
        SAMPLES: 1,
        STRIP_ROWS: rows,
        STRIP_BYTES: len(data),
    }
    directory = pack("<H", len(tags)) + b"".join(pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    padding = b"\0" * (len(data) % 2)
    file = pack("<2sHI", b"II", 42, 8 + len(data) + len(padding)) + data + padding + directory + b"\0\0\0\0"
    with printed(LIBTIFF), Image.open(io.BytesIO(file), formats=("TIFF",)) as image:
        if image.size != (row_bytes, rows) or image.mode != "L":
            raise Undecodable("damaged TIFF: strips of another size")
        return np.asarray(image).reshape(-1)


def open_tiff(content: bytes, channels: int, max_pixels: int) -> Picture:
    """Open a TIFF of any number of bands; it is turned as its orientation says, as Pillow turns it."""
    with only_undecodable("TIFF"):
        image = read_tiff(content, channels, max_pixels)
        return turned(Lazy(image, channels), image.orientation)


def read_tiff(content: bytes, channels: int, max_pixels: int) -> Tiff:
    """Read the tags of the first page."""
    tags, further = read_tags(content)
    height, width, bands = tags.one(HEIGHT, 0), tags.one(WIDTH, 0), tags.one(SAMPLES, 1)
    check_size(height, width, max_pixels)
    if bands == 1 and channels not in (1, 3) and further:
        raise Undecodable(f"has 1 band on each page, encoder.in_chans is {channels}; pages are not bands")
    check_bands(bands, channels)
    dtype = tags.dtype(content[:2] == b"II")
    check_bytes(height, width, bands, dtype, max_pixels)
    compression, predictor = tags.one(COMPRESSION, 1), tags.one(PREDICTOR, 1)
    if compression in NOT_BYTES:
        raise Undecodable(f"TIFF of {bands} bands with {NOT_BYTES[compression]} compression")
    if tags.one(PHOTOMETRIC, 1) not in INTENSITIES or tags.one(FILL_ORDER, 1) != 1 or predictor not in (1, 2, 3):
        raise Undecodable(f"TIFF of {bands} bands with an unusual photometric interpretation, fill order or predictor")
    tiled = TILES in tags.values
    block = (min(height, tags.one(STRIP_ROWS, height)), width)
    if tiled:
        block = (tags.one(TILE_ROWS, 0), tags.one(TILE_WIDTH, 0))
        check_bytes(*block, bands, dtype, max_pixels)
    check_size(*block, max_pixels)
    starts, lengths = (TILES, TILE_BYTES) if tiled else (STRIPS, STRIP_BYTES)
    return Tiff(
        content=content,
        height=height,
        width=width,
        bands=bands,
        dtype=dtype,
        planar=tags.one(PLANES, 1) == 2 and bands > 1,
        compression=compression,
        predictor=predictor,
        tiled=tiled,
        block=block,
        places=list(zip(tags.all(starts), tags.all(lengths), strict=True)),
        orientation=tags.one(ORIENTATION, 1),
    )


class Tags:
    """Tags of a page."""

    def __init__(self, values: dict[int, object]):
        self.values = values

    def all(self, tag: int, default: object = ()) -> tuple[int, ...]:
        """Return all values of a tag."""
        value = self.values.get(tag, default)
        values = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(one, int) for one in values):
            raise Undecodable(f"damaged TIFF: tag {tag} is no whole number")
        return values

    def one(self, tag: int, default: int) -> int:
        """Return the value of a tag, the same for all bands."""
        values = set(self.all(tag, default))
        if len(values) != 1:
            raise Undecodable(f"TIFF whose tag {tag} is not the same for all bands")
        return values.pop()

    def dtype(self, little: bool) -> np.dtype:
        """Return the type of the values."""
        kind, bits = KINDS.get(self.one(FORMATS, 1), ""), self.one(BITS, 1)
        if bits not in BIT_COUNTS.get(kind, ()):
            raise Undecodable(f"has {bits}-bit values of sample format {self.one(FORMATS, 1)}; {ADVICE}")
        return check_type(np.dtype(f"{'<' if little else '>'}{kind}{bits // 8}"))


def read_tags(content: bytes) -> tuple[Tags, bool]:
    """Return the tags of the first page, and whether another page follows."""
    big = content[2:4] in (b"\x2b\0", b"\0\x2b")
    directory = TiffImagePlugin.ImageFileDirectory_v2(content[: 16 if big else 8])
    file = io.BytesIO(content)
    file.seek(directory.next)
    directory.load(file)
    return Tags({tag: directory[tag] for tag in USED if tag in directory}), bool(directory.next)
