"""From the bytes of an image file to its pixels.

The content decides the format, never the name: JPEG (and MPO), PNG, BMP, TIFF, WebP, GIF (the first frame) and NumPy's
`.npy`. Pixels are those of Pillow's `convert("RGB")`: alpha is dropped, palettes are looked up, CMYK is converted
without a colour profile. What differs:

- Grey images of 9 to 16 bits keep their highest 8 bits; Pillow cuts all values above 255.
- TIFF of 32-bit floats or integers, which Pillow cuts too, and of floats with 3 bands are read by `bands.py`. TIFF of
  more than 4 bands is no RGB image, and 16-bit grey whose zero is white is refused.
- JPEG whose scan is damaged is refused (`jpeg.py`), and PNG whose checksums are wrong or that lacks rows (`png.py`);
  Pillow fills in what it can. BMP, GIF, TIFF and WebP have no checksums of pixels: only what cannot be read is noticed.
- JPEG of 12 and more bits is refused, and PNG with texts or a colour profile of more than a megabyte.

A TIFF is turned as its orientation says whatever `exif` is, since Pillow turns it while it decodes.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from ..config import DataConfig
from . import bands
from .jpeg import HUFFMAN, Header, JpegPicture, decode, read_header
from .picture import Box, Picture, Undecodable, check_size, only_undecodable, turned
from .png import check_png
from .printed import LIBTIFF, printed

__all__ = ["Box", "Decoder", "Picture", "Undecodable"]

Image.MAX_IMAGE_PIXELS = None  # `Decoder.max_pixels` takes its place, and is checked before anything is decoded
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it reports odd TIFF files, which are counted as bad anyway

# a plugin is registered when it is imported; for a missing one Pillow would import all that it has
PLUGINS = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
STARTS = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    bands.NPY: "npy",
}
ORIENTATION, BITS, PHOTOMETRIC, SAMPLES, TILE_WIDTH, TILE_ROWS = 274, 258, 262, 277, 322, 323  # tags of TIFF and EXIF
MODE_BANDS = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}  # modes that are used as bands


@dataclass(frozen=True)
class Decoder:
    """How files become pixels.

    Args:
        channels: 1 and 3 give RGB (a grey image is made from it after the augmentation); any other number needs files
            with that many bands.
        fast, exif, max_pixels: as `decode`, `exif` and `max_pixels` in `DataConfig`.
    """

    channels: int = 3
    fast: bool = False
    exif: bool = False
    max_pixels: int = DataConfig.max_pixels

    @classmethod
    def of(cls, config: DataConfig, channels: int, training: bool = False) -> Decoder:
        """Return the decoder of a recipe's images; only those of a training are decoded fast."""
        return cls(channels, training and config.decode == "fast", config.exif == "apply", config.max_pixels)

    def open(self, content: bytes) -> Picture:
        """Read the header of a file; its content decides the format, not its name.

        Raises:
            Undecodable: it is no image, or one that is not used (too large, another number of bands).
        """
        kind = kind_of(content)
        if kind == "npy":
            return bands.open_npy(content, self.channels, self.max_pixels)
        if kind == "JPEG":
            return self.open_jpeg(content)
        if kind == "WEBP":
            check_size(*webp_size(content), self.max_pixels)  # Pillow allocates its pixels when it opens the file
        if kind == "TIFF" and self.channels not in (1, 3):
            return bands.open_tiff(content, self.channels, self.max_pixels)
        return self.open_with_pillow(content, kind)

    def open_jpeg(self, content: bytes) -> Picture:
        """Open a JPEG; Pillow opens those that are not plain."""
        header = read_header(content)
        if header is None:
            return self.open_with_pillow(content, "JPEG")
        check_size(header.height, header.width, self.max_pixels)
        if header.bits != 8:
            raise Undecodable(f"JPEG of {header.bits} bits")
        if not header.plain or self.channels not in (1, 3):
            return self.open_with_pillow(content, "JPEG", header)
        picture = JpegPicture(content, header, self.fast)
        if self.exif and header.described:
            with only_undecodable("JPEG"):
                return turned(picture, orientation_of(Image.open(io.BytesIO(content), formats=("JPEG",))))
        return picture

    def open_with_pillow(self, content: bytes, kind: str, header: Header | None = None) -> Picture:
        """Open a file with Pillow."""
        with only_undecodable(kind):
            try:
                image = Image.open(io.BytesIO(content), formats=(kind,))
            except Exception:
                if kind != "TIFF":
                    raise
                return bands.open_tiff(content, self.channels, self.max_pixels)
            check_size(image.height, image.width, self.max_pixels)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                check_size(image.tag_v2.get(TILE_ROWS, 1), image.tag_v2.get(TILE_WIDTH, 1), self.max_pixels)
                if (samples := image.tag_v2.get(SAMPLES, 1)) > 4:  # Pillow would drop some, or read them wrongly
                    bands.check_bands(samples, self.channels)
                if image.mode in ("F", "I"):
                    return bands.open_tiff(content, self.channels, self.max_pixels)
            if self.channels not in (1, 3):
                bands.check_bands(MODE_BANDS.get(image.mode, 1), self.channels)
            if header and (header.frame not in HUFFMAN or header.components == 2):
                header = None
            picture = PillowPicture(image, kind, self.channels, content, header)
            return turned(picture, orientation_of(image)) if self.exif and kind != "TIFF" else picture


class PillowPicture:
    """An image that Pillow decodes, and in which we look for damage; of a JPEG with the `header` that libjpeg needs."""

    def __init__(self, image: Image.Image, kind: str, channels: int, content: bytes, header: Header | None):
        self.image, self.kind, self.channels, self.content, self.header = image, kind, channels, content, header
        if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(ORIENTATION, 1) in range(5, 9):
            self.load()  # Pillow before version 11 knows the size of a turned TIFF only then
        self.width, self.height = image.size

    def crop(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        top, left, rows, cols = box
        with only_undecodable(self.kind):
            self.load()
            self.check()
            part = self.image.crop((left, top, left + cols, top + rows))
            if self.channels not in (1, 3):
                return np.asarray(part)
            if part.mode.startswith("I"):
                high = np.asarray(part) >> (self.bits() - 8)
                return np.repeat(high.astype(np.uint8)[:, :, None], 3, axis=2)
            return np.asarray(part if part.mode == "RGB" else part.convert("RGB"))

    def check(self) -> None:
        """Look for damage that Pillow does not notice."""
        if self.kind == "PNG":
            end = self.image.crop((0, self.height - 1, self.width, self.height))
            check_png(self.content, not np.asarray(end).any())
        elif self.header:
            decode(self.content, self.header)

    def load(self) -> None:
        """Decode all pixels, once."""
        if self.kind == "TIFF":
            with printed(LIBTIFF):
                self.image.load()
        else:
            self.image.load()

    def bits(self) -> int:
        """Return the bits of a grey value of more than 8 bits."""
        if isinstance(self.image, TiffImagePlugin.TiffImageFile):
            if self.image.tag_v2.get(PHOTOMETRIC) == 0:
                raise Undecodable("TIFF of 16-bit grey whose zero is white")
            return int(self.image.tag_v2.get(BITS, (16,))[0])
        return 16


def kind_of(content: bytes) -> str:
    """Return the format of a content by its first bytes."""
    if not content:
        raise Undecodable("the file is empty")
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    for start, kind in STARTS.items():
        if content.startswith(start):
            return kind
    raise Undecodable("no JPEG, PNG, BMP, TIFF, WebP, GIF or npy file")


def orientation_of(image: Image.Image) -> object:
    """Return the EXIF orientation, 1 if it cannot be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # of an image that can be used without it
        return 1


def webp_size(content: bytes) -> tuple[int, int]:
    """Return height and width of a WebP file (RFC 9649)."""
    chunk = content[12:16]
    if len(content) < 30:
        raise Undecodable("damaged WebP: it is truncated")
    if chunk == b"VP8X":
        return int.from_bytes(content[27:30], "little") + 1, int.from_bytes(content[24:27], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return int.from_bytes(content[28:30], "little") & 0x3FFF, int.from_bytes(content[26:28], "little") & 0x3FFF
