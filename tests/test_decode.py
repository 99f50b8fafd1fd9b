"""Decoding against Pillow: the expected pixels come from Pillow, never from our code."""

from __future__ import annotations

import base64
import io
import os
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from src.data import jpeg
from src.data.decode import Decoder, Undecodable
from src.data.printed import LIBJPEG, LIBTIFF, printed

tifffile = pytest.importorskip("tifffile")  # comes with scikit-image
pytestmark = pytest.mark.filterwarnings("ignore:Palette images")  # of Pillow, about the expected pixels
ALL = (1, 1)  # `least` of a crop that may shrink to nothing
RNG = np.random.default_rng(0)


def picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return smooth random pixels."""
    small = RNG.integers(0, 256, (max(2, height // 4), max(2, width // 4), channels)).astype(np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow(content: bytes) -> np.ndarray:
    """Return the pixels of `convert("RGB")`."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def whole(content: bytes, **options: object) -> np.ndarray:
    """Return all pixels that we decode."""
    image = Decoder(**options).open(content)
    return image.crop((0, 0, image.height, image.width), (image.height, image.width))


def refused(content: bytes, **options: object) -> str:
    """Return the reason; it is one printable line."""
    with pytest.raises(Undecodable) as error:
        whole(content, **options)
    reason = str(error.value)
    assert reason and reason.isprintable() and len(reason) < 200
    return reason


def modes() -> dict[str, Image.Image]:
    """Return an image of every mode that some format stores."""
    colour = Image.fromarray(picture(19, 23))
    alpha = Image.fromarray(picture(19, 23, 1)[:, :, 0])
    palette = colour.quantize(200)
    clear = palette.copy()
    clear.info["transparency"] = bytes(range(200))
    one = palette.copy()
    one.info["transparency"] = 3
    four = colour.convert("RGBA")
    four.putalpha(alpha)
    return {
        "1": colour.convert("1"),
        "L": colour.convert("L"),
        "LA": Image.merge("LA", (colour.convert("L"), alpha)),
        "P": palette,
        "P with alpha": clear,
        "P with a clear colour": one,
        "RGB": colour,
        "RGBA": four,
        "RGBX": Image.merge("RGBX", (*colour.split(), alpha)),
        "CMYK": Image.merge("CMYK", (*colour.split(), alpha)),
        "YCbCr": colour.convert("YCbCr"),
    }


FORMATS: dict[str, list[dict[str, object]]] = {
    "JPEG": [{}, {"progressive": True}, {"quality": 30, "optimize": True}, {"restart_marker_blocks": 1}],
    "PNG": [{}, {"optimize": True}],
    "BMP": [{}],
    "TIFF": [
        {},
        *({"compression": name} for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "tiff_adobe_deflate")),
    ],
    "WEBP": [{}, {"lossless": True}],
    "GIF": [{}, {"interlace": 0}],
    "MPO": [{}],
}


@pytest.mark.parametrize("library", ["simplejpeg", "opencv"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_mode_of_every_format(kind: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(library, monkeypatch)
    seen = 0
    for image in modes().values():
        for options in FORMATS[kind]:
            try:
                content = saved(image, kind, **options)
            except (OSError, ValueError, KeyError):
                continue  # the format does not store this mode
            try:
                expected = pillow(content)
            except OSError:  # older versions of Pillow write files that they cannot read
                refused(content)
                continue
            assert np.array_equal(whole(content), expected)
            part = Decoder().open(content).crop((3, 5, 11, 13), ALL)
            assert part.dtype == np.uint8 and np.array_equal(part, expected[3:14, 5:18])
            seen += 1
    assert seen >= {"BMP": 4, "GIF": 6, "MPO": 1}.get(kind, 8 if kind != "WEBP" else 6)


def use(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the library that decodes JPEG."""
    if library == "opencv":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    elif jpeg.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")


def jpegs(height: int, width: int) -> dict[str, bytes]:
    """Return JPEG files of one size with every sampling."""
    pixels = picture(height, width)
    files = {"grey": saved(Image.fromarray(pixels).convert("L"), "JPEG")}
    samplings = {
        name: getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}") for name in ("411", "420", "422", "440", "444")
    }
    for name, value in samplings.items():
        for progressive in (0, 1):
            for restart in (0, 1):
                options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, value, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
                options += [cv2.IMWRITE_JPEG_RST_INTERVAL, restart]
                files[f"{name} {progressive} {restart}"] = cv2.imencode(".jpg", pixels, options)[1].tobytes()
    return files


SIZES = [(1, 1), (1, 17), (17, 1), (2, 3), (7, 8), (8, 7), (9, 16), (15, 13), (16, 9), (17, 17), (40, 33)]


@pytest.mark.parametrize("library", ["simplejpeg", "opencv"])
@pytest.mark.parametrize("size", SIZES)
def test_jpeg_is_bit_for_bit_that_of_pillow(
    size: tuple[int, int], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(library, monkeypatch)
    for name, content in jpegs(*size).items():
        assert np.array_equal(whole(content), pillow(content)), name


@pytest.mark.parametrize("library", ["simplejpeg", "opencv"])
def test_fast_keeps_at_least_the_asked_pixels_and_the_region(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(library, monkeypatch)
    rows, cols = np.mgrid[:203, :317].astype(np.float32)
    ramps = np.stack([rows, cols * 0.75, rows * 0], axis=2).astype(np.uint8)
    content = saved(Image.fromarray(ramps), "JPEG", quality=100, subsampling=0)
    for box, least, size in [
        ((0, 0, 203, 317), (100, 100), (102, 159)),
        ((0, 0, 203, 317), (102, 158), (203, 317)),
        ((0, 0, 203, 317), (101, 158), (102, 159)),
        ((0, 0, 203, 317), (103, 159), (203, 317)),
        ((0, 0, 203, 317), (20, 20), (25, 40)),
        ((3, 5, 64, 128), (8, 16), (8, 16)),
        ((3, 5, 64, 128), (9, 16), (16, 32)),
        ((3, 5, 64, 128), (64, 129), (64, 128)),
        ((1, 1, 1, 1), (1, 1), (1, 1)),
    ]:
        part = Decoder(fast=True).open(content).crop(box, least)
        assert part.shape == (*size, 3)
        full = Decoder().open(content).crop(box, least)
        edge = box[2] / size[0]  # an edge moves by half a pixel of the scale
        assert np.abs(part.mean((0, 1)) - full.mean((0, 1))).max() <= edge / 2 + 1.5


def orientations(kind: str) -> list[bytes]:
    """Return one image with each EXIF orientation, and some that are none."""
    files = []
    for value in (*range(10), 65535):
        exif = Image.Exif()
        exif[0x0112] = value
        options = {"lossless": True} if kind == "WEBP" else {}
        files.append(saved(Image.fromarray(picture(21, 34)), kind, exif=exif, **options))
    return files


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_is_applied_like_exif_transpose(kind: str) -> None:
    for content in orientations(kind):
        image = Image.open(io.BytesIO(content))
        # Pillow turns a TIFF when it decodes it; older versions would turn it once more here
        expected = pillow(content) if kind == "TIFF" else np.asarray(ImageOps.exif_transpose(image))
        ours = Decoder(exif=True).open(content)
        assert (ours.height, ours.width) == expected.shape[:2]
        assert np.array_equal(whole(content, exif=True), expected)
        assert np.array_equal(ours.crop((2, 5, 13, 11), ALL), expected[2:15, 5:16])
        assert np.array_equal(whole(content), pillow(content))


# 17 x 9 pixels by cjpeg of libjpeg-turbo 2.1.5: -arithmetic, and -sample 1x1,2x2,1x1
ARITHMETIC = (
    "|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R(ZFhTtf`Lw8jhBplmUD"
    "iAeE-`3Lje^R7akfOJ0T%Ed{ahKe0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0=}O01*fP2>=lT0U`hb5"
    "di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zfEE-?lmU;h9J!nfpA1`?;sG8JALSMQEQ14^;s{jp=FYQ9)h%!Pf0CUeuX7hRzH6YIGD*#"
)
UNUSUAL = (
    "|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R(ZFhTtf`Lw8jhBplmUD"
    "iAeE-`3Lje^R7akfOJ0T%Ed{ahKe0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0=}F01*fP2>=lT0TBQKA"
    "^`&t0sq7R6#xMN00000000000000000097|HJ?s5C8%K0s{a50000000000009F40t6HjAyNOt02u)Q0s{d60000000000000001p)&E2LHq"
    "W9}xfo0s#aA0000000000000010s|og5)?8OK~ewO01N{G00I#M5dc2`tYD?B+_*f{>=_Gab>yp@p@ELCsmt5g6q|8x*xM}jHS!Vo0&q6$NB"
    "`L"
)


@pytest.mark.parametrize("library", ["simplejpeg", "opencv"])
def test_unusual_jpeg_is_that_of_pillow(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(library, monkeypatch)
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
    colour, black = (saved(modes()[mode], "JPEG") for mode in ("RGB", "CMYK"))
    place = black.index(b"Adobe") + 11  # the colour transform
    cases = [base64.b85decode(text) for text in (ARITHMETIC, UNUSUAL)]
    cases += [colour[:2] + adobe + bytes((transform,)) + colour[2:] for transform in (0, 1, 2, 7)]
    cases += [black[:place] + bytes((transform,)) + black[place + 1 :] for transform in (0, 2, 7)]
    for case in cases:
        expected = pillow(case)
        assert np.array_equal(whole(case), expected)
        assert np.abs(whole(case, fast=True).astype(int) - expected).mean() < 16
    frame = colour.index(b"\xff\xc0") + 4
    assert refused(colour[:frame] + b"\x0c" + colour[frame + 1 :]) == "JPEG of 12 bits"
    assert refused(colour[: frame + 1] + b"\0\0" + colour[frame + 3 :]) == "its size is 23 x 0 pixels"


def test_fast_and_exif_together_give_the_turned_region() -> None:
    for content in orientations("JPEG"):
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content)))).astype(float)
        ours = Decoder(exif=True, fast=True).open(content)
        part = ours.crop((0, 0, ours.height, ours.width), (ours.height // 2, ours.width // 2))
        assert part.shape == (-(-ours.height // 2), -(-ours.width // 2), 3)
        again = cv2.resize(part, (ours.width, ours.height), interpolation=cv2.INTER_LINEAR)
        assert np.abs(again - expected).mean() < 12  # another turn gives 40 and more


def test_grey_of_more_than_8_bits_keeps_the_high_bits() -> None:
    values = RNG.integers(0, 65536, (9, 13)).astype(np.uint16)
    expected = np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(whole(saved(Image.fromarray(values), kind)), expected)
    file = io.BytesIO()
    tifffile.imwrite(file, values, byteorder=">", photometric="minisblack")
    assert np.array_equal(whole(file.getvalue()), expected)


def test_tiff_of_32_bit_floats_is_one_band() -> None:
    values = RNG.random((9, 13)).astype(np.float32)
    assert np.array_equal(whole(saved(Image.fromarray(values), "TIFF")), np.repeat(values[:, :, None], 3, axis=2))
    assert "int32" in refused(saved(Image.fromarray(values.astype(np.int32)), "TIFF"))


def test_the_first_frame_of_a_gif() -> None:
    frames = [Image.fromarray(picture(12, 10)).quantize(16) for _ in range(3)]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(whole(content), np.asarray(frames[0].convert("RGB")))


# --- more than 3 bands ---


def tiff(values: np.ndarray, **options: object) -> bytes:
    """Return the TIFF that tifffile writes, (H, W, C), or (C, H, W) if planar."""
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", "planarconfig": "contig", **options})
    return file.getvalue()


def unit(values: np.ndarray) -> np.ndarray:
    """Return what the decoder gives for an array."""
    if values.dtype == np.uint8:
        return values
    scale = np.iinfo(values.dtype).max if values.dtype.kind == "u" else 1
    return (values.astype(np.float64) / scale).astype(np.float32)


TYPES = ["uint8", "uint16", "uint32", "float16", "float32", "float64"]


def values_of(dtype: str, *shape: int) -> np.ndarray:
    """Return random values of a type."""
    high = np.iinfo(dtype).max if "int" in dtype else 1
    return (RNG.random(shape) * high).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 5}, {"tile": (16, 32)}])
@pytest.mark.parametrize("packed", [{}, {"compression": "zlib"}, {"bigtiff": True}, {"byteorder": ">"}])
def test_tiff_of_any_number_of_bands(dtype: str, planar: bool, layout: dict, packed: dict) -> None:
    values = values_of(dtype, 37, 41, 5)
    data, config = (values.transpose(2, 0, 1), "separate") if planar else (values, "contig")
    content = tiff(np.ascontiguousarray(data), planarconfig=config, **layout, **packed)
    image = Decoder(channels=5).open(content)
    assert (image.height, image.width) == (37, 41)
    assert np.array_equal(image.crop((0, 0, 37, 41), ALL), unit(values))
    assert np.array_equal(image.crop((7, 3, 20, 30), ALL), unit(values)[7:27, 3:33])
    for channels in (1, 2, 3, 4, 6):
        assert refused(content, channels=channels) == f"has 5 bands, encoder.in_chans is {channels}"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_npy_of_any_number_of_bands(dtype: str) -> None:
    for bands in (1, 2, 3, 4, 5, 13):
        values = values_of(dtype, 6, 7, bands)
        for array in (values, np.asfortranarray(values), values.astype(values.dtype.newbyteorder(">"))):
            content = npy(array)
            assert np.array_equal(whole(content, channels=bands)[:, :, :bands], unit(values))
            assert np.array_equal(
                Decoder(bands).open(content).crop((1, 2, 3, 4), ALL)[:, :, :bands], unit(values)[1:4, 2:6]
            )
            if bands not in (1, 3):
                assert refused(content, channels=3) == f"has {bands} bands, encoder.in_chans is 3"
    grey = values_of(dtype, 6, 7)
    for channels in (1, 3):
        assert np.array_equal(whole(npy(grey), channels=channels), np.repeat(unit(grey)[:, :, None], 3, axis=2))
    assert refused(npy(grey), channels=5) == "has 1 band, encoder.in_chans is 5"


def strip_of(rows: np.ndarray, compression: str) -> tuple[bytes, int]:
    """Return the bytes of a strip (rows of bytes), compressed by Pillow, and the number of its compression."""
    content = saved(Image.fromarray(rows), "TIFF", compression=compression, strip_size=1 << 20)
    tags = Image.open(io.BytesIO(content)).tag_v2
    (start,), (length,) = tags[273], tags[279]
    return content[start : start + length], tags[259]


def handmade(values: np.ndarray, compression: str, predictor: int, order: str) -> bytes:
    """Return a TIFF of one chunky strip, as TIFF 6.0 and the technical note about predictor 3 describe them."""
    height, width, bands = values.shape
    size = values.dtype.itemsize
    if predictor == 3:  # the high bytes of a row first, then differences of bytes
        planes = values.astype(values.dtype.newbyteorder(">")).view(np.uint8).reshape(height, width * bands, size)
        rows = np.ascontiguousarray(planes.swapaxes(1, 2)).reshape(height, -1)
        rows[:, bands:] = rows[:, bands:] - rows[:, :-bands]
    else:
        whole_numbers = values.view(f"u{size}").copy()
        if predictor == 2:
            whole_numbers[:, 1:] = whole_numbers[:, 1:] - whole_numbers[:, :-1]
        rows = whole_numbers.astype(f"{order}u{size}").view(np.uint8).reshape(height, -1)
    data, number = strip_of(rows, compression)
    kind = 3 if values.dtype.kind == "f" else 1
    tags = {256: width, 257: height, 258: 8 * size, 259: number, 262: 1, 273: 8, 277: bands, 278: height}
    tags |= {279: len(data), 317: predictor, 339: kind}
    data += b"\0" * (len(data) % 2)
    entries = [struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return head + data + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_compressed_bands_and_predictors(compression: str, order: str) -> None:
    for dtype, predictors in {"uint8": (1, 2), "uint16": (1, 2), "float32": (1, 2, 3), "float64": (1, 3)}.items():
        values = np.round(values_of(dtype, 19, 23, 7), 2) if "float" in dtype else values_of(dtype, 19, 23, 7)
        for predictor in predictors:
            content = handmade(values, compression, predictor, order)
            assert np.array_equal(whole(content, channels=7), unit(values)), (dtype, predictor)


def npy(array: np.ndarray) -> bytes:
    """Return the file of `numpy.save`."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_values_without_a_scale_are_refused() -> None:
    for dtype in ("int16", "complex64", "bool", "U5", "datetime64[s]"):
        assert "values; write uint8, uint16, or float32" in refused(npy(np.zeros((3, 4, 5), dtype)), channels=5)
    assert "values; write uint8, uint16, or float32" in refused(tiff(np.zeros((20, 20, 5), "int16")), channels=5)
    broken = np.full((3, 4, 5), 0.5, np.float32)
    for value in (np.nan, np.inf):
        broken[2, 3, 4] = value
        image = Decoder(channels=5).open(npy(broken))
        with pytest.raises(Undecodable, match="NaN or infinite"):
            image.crop((0, 0, 1, 1), ALL)  # a file is bad whichever part of it is used
    refused(npy(np.array([[{}]], object)))
    assert refused(npy(np.full((3, 4, 5), 1e300)), channels=5) == "has values that are NaN or infinite"


def test_pages_are_not_bands() -> None:
    pages = tiff(np.zeros((5, 20, 20), np.uint8), planarconfig=None)
    assert refused(pages, channels=5) == "has 1 band on each page, encoder.in_chans is 5; pages are not bands"


def test_alpha_and_black_are_bands_where_four_are_asked() -> None:
    for kind in ("PNG", "TIFF"):
        image = modes()["RGBA"]
        assert np.array_equal(whole(saved(image, kind), channels=4), np.asarray(image))
    assert refused(saved(modes()["RGB"], "JPEG"), channels=5) == "has 3 bands, encoder.in_chans is 5"
    assert refused(saved(modes()["P"], "PNG"), channels=4) == "has 1 band, encoder.in_chans is 4"


# --- damaged files ---


def test_sizes_are_checked_before_pixels_take_memory() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">II", 65000, 65000)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + b"\x08\x02\0\0\0")
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    frame = saved(Image.new("RGB", (8, 8)), "JPEG")
    at = frame.index(b"\xff\xc0") + 5
    jpeg_file = frame[:at] + struct.pack(">HH", 65000, 65000) + frame[at + 4 :]
    gif = saved(Image.new("P", (8, 8)), "GIF")
    gif = gif[:6] + struct.pack("<HH", 65000, 65000) + gif[10:]
    bmp = saved(Image.new("RGB", (8, 8)), "BMP")
    bmp = bmp[:18] + struct.pack("<ii", 65000, 65000) + bmp[26:]
    for content in (png, jpeg_file, gif, bmp):
        assert refused(content) == "65000 x 65000 pixels are more than data.max_pixels 178956970"
    webp = bytearray(
        saved(
            Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP", lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"
        )
    )
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff\x3f\0\xff\x3f\0"
    assert refused(bytes(webp)) == "16384 x 16384 pixels are more than data.max_pixels 178956970"
    for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"):
        content = saved(Image.new("RGB", (8, 7)), kind)
        assert refused(content, max_pixels=55) == "8 x 7 pixels are more than data.max_pixels 55"
        assert whole(content, max_pixels=56).shape == (7, 8, 3)
    header = npy(np.zeros((1, 1, 5), np.float32)).replace(b"(1, 1, 5), }    ", b"(9999, 9999, 5), }"[:16])
    refused(header, channels=5)


def test_bombs_take_no_memory() -> None:
    bomb = zlib.compress(bytes(1 << 20) * 100, 9)  # of 100 MB
    image = saved(Image.new("RGB", (8, 8)), "PNG")
    for name, data in ((b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb)):
        chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        within_memory(image[:33] + chunk + image[33:], 3)
    within_memory(image[:33] + struct.pack(">I4s", 0x7FFFFFFF, b"tEXt") + image[33:], 3)
    rows = struct.pack(">I", len(bomb)) + b"IDAT" + bomb + struct.pack(">I", zlib.crc32(b"IDAT" + bomb))
    within_memory(image[:33] + rows + image[-12:], 3)
    strip = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 273: 8, 277: 5, 278: 8, 279: len(bomb)}
    tile = {tag: value for tag, value in strip.items() if tag not in (273, 278, 279)} | {324: 8, 325: len(bomb)}
    for bands in (1, 5):
        for tags in (
            strip,
            strip | {256: 13000, 257: 13000},
            strip | {278: 0},
            strip | {273: 1 << 31},
            tile | {322: 1 << 16, 323: 1 << 16},
            tile | {322: 0, 323: 0},
        ):
            within_memory(page(tags | {277: bands}, bomb), bands)
    loop = page(strip | {259: 1, 279: 320}, bytes(320), loops=True)
    assert not whole(loop, channels=5).any()
    for shape in ("(13000, 13000, 5)", "(-3, 4, 5)", "(3, 4, 0)", "(3, 4, 5, 1)", "3", "(" * 50):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"
        refused(b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(99), channels=5)


def page(tags: dict[int, int], data: bytes, loops: bool = False) -> bytes:
    """Return a TIFF with these tags, whose page follows itself if it loops."""
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    following = struct.pack("<I", 8 + len(data) if loops else 0)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + following


def within_memory(content: bytes, channels: int) -> None:
    """Decode a file with little memory to spare; that it is refused is as good."""
    with limited_memory(64 << 20):
        try:
            assert whole(content, channels=channels, max_pixels=1 << 20).shape[:2] == (8, 8)
        except Undecodable as error:
            assert "memory" not in str(error) or "MAX_TEXT" in str(error)


@contextmanager
def limited_memory(spare: int) -> Iterator[None]:
    """Let this process take only so many more bytes."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF"])
def test_a_lack_of_memory_is_no_damage(kind: str) -> None:
    content = saved(Image.new("RGB", (6000, 6000)), kind, **({"compression": "tiff_deflate"} if kind == "TIFF" else {}))
    with limited_memory(16 << 20), pytest.raises(Undecodable, match=r"^does not fit into memory$"):
        whole(content)


def test_damaged_png_is_not_used() -> None:
    for shape in ((40, 30), (40, 30, 3), (40, 30, 4)):
        pixels = RNG.integers(1, 256, shape).astype(np.uint8)
        content = saved(Image.fromarray(pixels), "PNG")
        start = content.index(b"IDAT") + 4
        for place in range(start + 2, len(content) - 24, 97):
            changed = content[:place] + bytes((content[place] ^ 16,)) + content[place + 1 :]
            assert refused(changed).startswith("damaged PNG")
        rows = pixels[:25].tobytes()
        lines = b"".join(b"\0" + rows[at : at + len(rows) // 25] for at in range(0, len(rows), len(rows) // 25))
        for data, whole_image in ((lines, False), (lines + bytes(len(lines) // 25 * 15), True)):
            chunk = b"IDAT" + zlib.compress(data)
            chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
            short = content[: start - 8] + chunk + content[-12:]
            if whole_image:
                assert np.array_equal(whole(short), pillow(short))
            else:
                assert refused(short) == "damaged PNG: rows are missing"
    black = saved(Image.new("RGB", (30, 40)), "PNG")
    assert not whole(black).any()


def test_no_other_format_is_reached() -> None:
    assert refused(b"") == "the file is empty"
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"text", b"P6 1 1 255 abc", b"\0" * 99):
        assert refused(content) == "no JPEG, PNG, BMP, TIFF, WebP, GIF or npy file"
    for kind in ("PPM", "ICO", "JPEG2000", "TGA"):
        refused(saved(Image.new("RGB", (16, 16)), kind))


def photograph(**options: object) -> bytes:
    """Return a JPEG of some size."""
    return saved(Image.fromarray(picture(150, 200)), "JPEG", quality=90, **options)


def scan(content: bytes) -> int:
    """Return where the coded data begins."""
    at = content.index(b"\xff\xda")
    return at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")


@pytest.mark.parametrize("library", ["simplejpeg", "opencv"])
def test_a_damaged_scan_is_not_used(
    library: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    use(library, monkeypatch)
    four = Image.fromarray(picture(150, 200)).convert("CMYK")
    kinds = [photograph(**options) for options in ({}, {"progressive": True}, {"restart_marker_blocks": 4})]
    for content in (*kinds, saved(four, "JPEG", quality=90)):
        start, end = scan(content), len(content)
        middle = (start + end) // 2
        random = np.random.default_rng(1)
        cases = [content[:middle], content[:-2], content[:middle] + b"\xff\xd9"]
        cases += [content[:middle] + random.bytes(300) + content[middle + 300 :] for _ in range(20)]
        cases += [content[:middle] + content[middle + (end - start) // 4 :]]
        for case in cases:
            for fast in (False, True):
                with pytest.raises(Undecodable, match="damaged JPEG"):
                    image = Decoder(fast=fast).open(case)
                    image.crop((0, 0, 20, 20), (10, 10))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("library", ["simplejpeg", "opencv"])
def test_harmless_oddities_are_used(
    library: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    use(library, monkeypatch)
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 4}):
        content = photograph(**options)
        expected = pillow(content)
        version, start = content.index(b"JFIF\0") + 5, content.index(b"\xff\xda")
        odd = [
            content + b"after the end",
            content[:-2] + b"\0" * 40 + content[-2:],
            content[:-2] + b"\xff" * 40 + content[-2:],
            content[:-2] + b"\x55" * 999 + content[-2:],
            content[:version] + b"\0\0" + content[version + 2 :],
            content[:2] + b"\xff\xe1\0\x10Exif\0\0garbled!" + content[2:],
            content[:2] + b"\xff\xfe\0\x05\0\xff\xd9" + content[2:],
            content[:start] + b"between segments" + content[start:],
        ]
        both = odd[4][:-2] + b"\0" * 40 + odd[4][-2:]
        for case in (*odd, both):
            assert np.array_equal(pillow(case), expected)
            for exif in (False, True):
                assert np.array_equal(whole(case, exif=exif), expected)
        version_and_damage = odd[4][: len(content) // 2] + odd[4][-2:]  # the second warning of libjpeg counts too
        assert "damaged JPEG" in refused(version_and_damage)
    assert capfd.readouterr() == ("", "")


def test_what_others_print_meanwhile_is_passed_on(capfd: pytest.CaptureFixture) -> None:
    with printed(LIBJPEG, LIBTIFF) as texts:
        os.write(2, b"of another thread\n")
    assert texts and capfd.readouterr().err == "of another thread\n"


def samples() -> dict[str, tuple[bytes, int]]:
    """Return small files of every format, and the channels that they are opened with."""
    image = Image.fromarray(picture(11, 13))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        f"{kind} {mode} {number}": (content, 3)
        for kind in FORMATS
        for number, options in enumerate(FORMATS[kind])
        for mode in ("RGB", "RGBA", "P", "CMYK")
        if options.get("compression") != "jpeg" or mode == "RGB"  # libtiff prints that it cannot
        if (content := written(modes()[mode].crop((0, 0, 13, 11)), kind, options))
    }
    files["JPEG with EXIF"] = saved(image, "JPEG", exif=exif), 3
    files["PNG with text"] = saved(image, "PNG", exif=exif, icc_profile=b"x" * 50), 3
    files["npy"] = npy(values_of("float32", 4, 3, 5)), 5
    files["grey TIFF"] = saved(Image.fromarray(values_of("uint16", 4, 3)), "TIFF"), 3
    for compression in (None, "zlib"):
        files[f"bands {compression}"] = tiff(values_of("uint16", 16, 17, 5), compression=compression), 5
        files[f"tiles {compression}"] = tiff(values_of("uint8", 16, 17, 5), compression=compression, tile=(16, 16)), 5
    return files


def written(image: Image.Image, kind: str, options: dict) -> bytes | None:
    """Return a file, None if the format does not store the mode."""
    try:
        return saved(image, kind, **options)
    except (OSError, ValueError, KeyError):
        return None


FUZZ = """
import sys
from tests import test_decode
test_decode.fuzz({truncations}, {flips}, {opencv})
"""


def fuzz(truncations: int, flips: int, opencv: bool) -> None:
    """Decode damaged files, with a bound on the memory of the process; print what was not refused as it should be."""
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    if opencv:
        jpeg.simplejpeg = None
    random = np.random.default_rng(3)
    counts = {"refused": 0, "used": 0}
    for name, (content, channels) in samples().items():
        for number, case in enumerate(damaged(content, truncations, flips, random)):
            decoder = Decoder(channels, fast=bool(number % 2), exif=bool(number % 3), max_pixels=1 << 22)
            try:
                counts[outcome(decoder, case)] += 1
            except BaseException as error:
                print(name, number, repr(error))
    print("done", counts["refused"], counts["used"])


def damaged(content: bytes, truncations: int, flips: int, random: np.random.Generator) -> list[bytes]:
    """Return shortened and changed copies of a file."""
    cases = [content[:cut] for cut in np.unique(np.linspace(0, len(content) - 1, truncations).astype(int))]
    for _ in range(flips):
        case = bytearray(content)
        early = random.random() < 0.5  # headers are short, and hold most of what can go wrong
        for place in random.integers(0, min(len(case), 200) if early else len(case), random.integers(1, 4)):
            case[place] = random.integers(256)
        cases.append(bytes(case))
    return cases


def outcome(decoder: Decoder, case: bytes) -> str:
    """Return whether a file is refused or used."""
    try:
        image = decoder.open(case)
        pixels = image.crop((0, 0, image.height, image.width), (image.height, image.width))
    except Undecodable as error:
        assert str(error).isprintable() and len(str(error)) < 200 and " at 0x" not in str(error), str(error)
        return "refused"
    assert pixels.shape == (image.height, image.width, decoder.channels) and pixels.dtype in (np.uint8, np.float32)
    return "used"


@pytest.mark.compiles
@pytest.mark.parametrize("opencv", [False, True])
def test_nothing_but_undecodable_is_raised(opencv: bool) -> None:
    code = FUZZ.format(truncations=40, flips=120, opencv=opencv)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith("done"), run.stdout[:2000]
    bad, good = map(int, lines[0].split()[1:])
    assert bad > 1000 and good > 100
