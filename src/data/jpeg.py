"""JPEG through libjpeg-turbo: simplejpeg if it is installed, else OpenCV. Both give the pixels of Pillow, bit for bit.

Damage is noticed where libjpeg warns about it: a bad Huffman code, a premature end, a restart marker that is not found,
or data of a scan that nobody reads. Pillow notices only that a file is too short. Some damage is noticed by no decoder,
since Huffman codes fall into step again: about half of all single changed or missing bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from struct import unpack_from

import cv2
import numpy as np

from .picture import TOO_LARGE, Box, Undecodable, reason
from .printed import LIBJPEG, OPENCV, printed

try:
    import simplejpeg
except ImportError:  # it is optional
    simplejpeg = None

FACTORS = (8, 4, 2)
REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
RGB = getattr(cv2, "IMREAD_COLOR_RGB", 0)  # since OpenCV 4.11
FLAGS = cv2.IMREAD_IGNORE_ORIENTATION | RGB
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers that start a frame
HUFFMAN = (0xC0, 0xC1, 0xC2)  # frames that every libjpeg decodes; arithmetic ones are left to Pillow
ALONE = frozenset(range(0xD0, 0xD8)) | {0x01}  # markers without a length
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
MOST_OCCURRENCES = 64
MOST_PADDING = 1 << 16
MOST_REPAIRS = 8


@dataclass(frozen=True)
class Header:
    """What the segments before the first scan say.

    Attributes:
        jfif, adobe, scan: places of segments, 0 is none.
        gap: start and end of the last bytes between segments, (0, 0) is none.
    """

    frame: int
    bits: int
    height: int
    width: int
    components: int
    jfif: int
    adobe: int
    scan: int
    gap: tuple[int, int]
    described: bool  # it may have an EXIF orientation

    @property
    def plain(self) -> bool:
        """Return whether OpenCV and simplejpeg give what Pillow gives."""
        return self.frame in HUFFMAN and self.components in (1, 3)


def read_header(content: bytes) -> Header | None:
    """Read the segments before the first scan; None if they are damaged."""
    place, found = 2, {0xE0: 0, 0xEE: 0, 0xE1: 0}
    frame: tuple[int, int, int, int, int] | None = None
    gap = (0, 0)
    while (start := content.find(b"\xff", place)) >= 0 and start + 4 <= len(content):
        if start > place:
            gap = (place, start)
        place, marker = start, content[start + 1]
        if marker in (0xFF, 0x00) or marker in ALONE:  # fill bytes and markers without a segment
            place += 1 if marker == 0xFF else 2
            continue
        length = content[place + 2] << 8 | content[place + 3]
        if marker in FRAMES and place + 10 <= len(content) and frame is None:
            bits, height, width, components = unpack_from(">BHHB", content, place + 4)
            frame = (marker, bits, height, width, components)
        elif marker == 0xDA:
            if frame is None:
                return None
            return Header(*frame, found[0xE0], found[0xEE], place, gap, bool(found[0xE1]))
        elif marker in found:
            found[marker] = found[marker] or place
        place += 2 + length
    return None


class JpegPicture:
    """A JPEG file of 1 or 3 components.

    With `fast`, the box is decoded at the largest of the factors 1/8, 1/4 and 1/2 that leaves it at least `least`
    pixels. Its edges are rounded to the nearest pixel of that scale, halves to the outside, so that none moves by more
    than half of such a pixel, and the box keeps its place.
    """

    def __init__(self, content: bytes, header: Header, fast: bool):
        self.content, self.header, self.fast = content, header, fast
        self.height, self.width = header.height, header.width

    def crop(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        factor, (top, left, bottom, right) = self.scale(box, least)
        pixels = decode(self.content, self.header, factor, self.fast)
        return pixels[top:bottom, left:right]

    def scale(self, box: Box, least: tuple[int, int]) -> tuple[int, tuple[int, int, int, int]]:
        """Return the factor and the edges of the box at that scale (top, left, bottom, right)."""
        top, left, rows, cols = box
        factor = next((factor for factor in FACTORS if rows >= factor * least[0] and cols >= factor * least[1]), 1)
        if factor == 1 or not self.fast:
            return 1, (top, left, top + rows, left + cols)
        half = factor // 2
        first = (top + half - 1) // factor, (left + half - 1) // factor
        return factor, (*first, (top + rows + half) // factor, (left + cols + half) // factor)


def decode(content: bytes, header: Header, factor: int = 1, fast: bool = False) -> np.ndarray:
    """Return all pixels, (rows, cols, 3) uint8; the size is divided by a factor and rounded up.

    Args:
        fast: whether simplejpeg repeats colours that are stored at half size, and does not interpolate them.

    Raises:
        Undecodable: data is lost.
    """
    size = (-(-header.height // factor), -(-header.width // factor))
    for _ in range(MOST_REPAIRS):
        pixels, warning = (
            by_simplejpeg(content, header, factor, fast) if simplejpeg else by_opencv(content, header, factor)
        )
        if pixels is not None:
            if pixels.shape[:2] != size:
                raise Undecodable(f"damaged JPEG: its size is {pixels.shape[1]} x {pixels.shape[0]} pixels")
            return pixels
        repaired = without_oddity(content, header, warning)
        if repaired is None:
            break
        content, header = repaired, read_header(repaired) or header
    raise Undecodable(reason(ValueError(warning.removeprefix("Corrupt JPEG data: ")), "JPEG"))


def by_simplejpeg(content: bytes, header: Header, factor: int, fast: bool) -> tuple[np.ndarray | None, str]:
    """Return the pixels or the first warning of libjpeg. Four components stay as they are."""
    colours = "CMYK" if header.components == 4 else "RGB"
    try:
        low = (-(-header.height // factor), -(-header.width // factor)) if factor > 1 else (0, 0)
        return simplejpeg.decode_jpeg(content, colours, False, fast, *low, factor), ""
    except MemoryError:
        raise Undecodable(TOO_LARGE) from None
    except Exception as error:
        if "subsampling" in str(error):  # TurboJPEG refuses unusual ones
            return by_opencv(content, header, factor)
        return None, str(error) or type(error).__name__


def by_opencv(content: bytes, header: Header, factor: int) -> tuple[np.ndarray | None, str]:
    """Return the pixels, and the first warning of libjpeg, which OpenCV prints."""
    if content.rfind(b"\xff\xd9", header.scan) < 0:  # OpenCV does not read as far as the end
        return None, "Premature end of JPEG file"
    try:
        with printed(LIBJPEG, OPENCV) as texts:
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), REDUCED[factor] | FLAGS)
    except Exception as error:
        return None, str(error) or type(error).__name__
    if texts and (warned := LIBJPEG.search(texts[0])):
        return None, warned[0].strip()
    if pixels is None:
        return None, "OpenCV cannot decode it"
    return pixels if RGB else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels), ""


def without_oddity(content: bytes, header: Header, warning: str) -> bytes | None:
    """Return the content without the harmless oddity of a warning, or None if data is lost.

    libjpeg tells only its first warning, so the content is decoded again to hear the others. Bytes that nobody reads
    before a marker are harmless between segments, and after a scan if they are padding (all equal); else they are the
    rest of a damaged scan.
    """
    if "unknown JFIF revision" in warning and header.jfif:
        return replaced(content, header.jfif + 9, b"\x01\x01")
    if "Unknown Adobe color transform" in warning and header.adobe:  # libjpeg takes YCbCr or YCCK
        return replaced(content, header.adobe + 15, b"\x01" if header.components == 3 else b"\x02")
    if "Invalid SOS parameters" in warning:  # of a sequential scan, which has none
        end = header.scan + 2 + int.from_bytes(content[header.scan + 2 : header.scan + 4], "big")
        return replaced(content, end - 3, b"\x00\x3f\x00")
    if found := EXTRANEOUS.search(warning):
        if header.gap[1]:
            return content[: header.gap[0]] + content[header.gap[1] :]
        return without_padding(content, int(found[1]), bytes((0xFF, int(found[2], 16))))
    return None


def replaced(content: bytes, place: int, new: bytes) -> bytes | None:
    """Return the content with other bytes at a place; None if it has them already."""
    changed = content[:place] + new + content[place + len(new) :]
    return None if changed == content else changed


def without_padding(content: bytes, count: int, marker: bytes) -> bytes | None:
    """Remove `count` equal bytes before a marker; before a restart marker they are the rest of a damaged interval."""
    if count > MOST_PADDING or marker[1] in ALONE:
        return None
    place = -1
    for _ in range(MOST_OCCURRENCES):
        place = content.find(marker, place + 1)
        if place < 0:
            break
        padding = content[max(0, place - count) : place]
        if len(padding) == count == padding.count(padding[:1]):
            return content[: place - count] + content[place:]
    return None
