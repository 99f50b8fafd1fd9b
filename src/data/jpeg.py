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

from .picture import Box, Undecodable
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
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers that start a frame
HUFFMAN = (0xC0, 0xC1, 0xC2)  # frames that every libjpeg decodes; arithmetic ones are left to Pillow
ALONE = frozenset(range(0xD0, 0xD8)) | {0x01}  # markers without a length
EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
MOST_OCCURRENCES = 64
MOST_PADDING = 1 << 16
MOST_REPAIRS = 8


@dataclass(frozen=True)
class Header:
    """What the segments before the first scan say; `jfif`, `adobe` and `scan` are the places of segments, 0 is none."""

    frame: int
    bits: int
    height: int
    width: int
    components: int
    jfif: int
    adobe: int
    scan: int
    described: bool  # it may have an EXIF orientation

    @property
    def plain(self) -> bool:
        """Return whether OpenCV and simplejpeg give what Pillow gives."""
        return self.frame in HUFFMAN and self.components in (1, 3)


def read_header(content: bytes) -> Header | None:
    """Read the segments before the first scan; None if they are damaged."""
    place, found = 2, {0xE0: 0, 0xEE: 0, 0xE1: 0}
    frame: tuple[int, int, int, int, int] | None = None
    while (place := content.find(b"\xff", place)) >= 0 and place + 4 <= len(content):
        marker = content[place + 1]
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
            return Header(*frame, found[0xE0], found[0xEE], place, bool(found[0xE1]))
        elif marker in found:
            found[marker] = found[marker] or place
        place += 2 + length
    return None


class JpegPicture:
    """A JPEG file of 1 or 3 components.

    With `fast`, the box is decoded at the largest of the factors 1/8, 1/4 and 1/2 for which it has at least `least`
    pixels. Its edges are rounded to the nearest pixel of that scale, so each moves by at most half of such a pixel.
    """

    def __init__(self, content: bytes, header: Header, fast: bool):
        self.content, self.header, self.fast = content, header, fast
        self.height, self.width = header.height, header.width

    def crop(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        factor, (top, left, bottom, right) = self.scale(box, least)
        pixels = decode(self.content, self.header, factor)
        return pixels[top:bottom, left:right]

    def scale(self, box: Box, least: tuple[int, int]) -> tuple[int, tuple[int, int, int, int]]:
        """Return the factor and the edges of the box at that scale."""
        top, left, rows, cols = box
        edges = (top, left, top + rows, left + cols)
        for factor in FACTORS if self.fast else ():
            small = tuple((edge + factor // 2) // factor for edge in edges)
            if small[2] - small[0] >= least[0] and small[3] - small[1] >= least[1]:
                return factor, (small[0], small[1], small[2], small[3])
        return 1, edges


def decode(content: bytes, header: Header, factor: int = 1) -> np.ndarray:
    """Return all pixels, (rows, cols, 3) uint8, divided by a factor and rounded up.

    Raises:
        Undecodable: data is lost.
    """
    size = (-(-header.height // factor), -(-header.width // factor))
    for _ in range(MOST_REPAIRS):
        pixels, warning = (by_simplejpeg if simplejpeg else by_opencv)(content, header, factor)
        if pixels is not None and not warning:
            if pixels.shape[:2] != size:
                raise Undecodable(f"damaged JPEG: its size is {pixels.shape[1]} x {pixels.shape[0]} pixels")
            return pixels
        repaired = without_oddity(content, header, warning)
        if repaired is None:
            break
        content = repaired
    raise Undecodable(f"damaged JPEG: {warning.removeprefix('Corrupt JPEG data: ')}")


def by_simplejpeg(content: bytes, header: Header, factor: int) -> tuple[np.ndarray | None, str]:
    """Return the pixels or the first warning of libjpeg. Four components stay as they are."""
    colours = "CMYK" if header.components == 4 else "RGB"
    try:
        if factor == 1:
            return simplejpeg.decode_jpeg(content, colours), ""
        low = (-(-header.height // factor), -(-header.width // factor))
        return simplejpeg.decode_jpeg(content, colours, False, False, *low, factor), ""
    except Exception as error:
        return None, str(error)


def by_opencv(content: bytes, header: Header, factor: int) -> tuple[np.ndarray | None, str]:
    """Return the pixels, and the first warning of libjpeg, which OpenCV prints."""
    if content.rfind(b"\xff\xd9", header.scan) < 0:  # OpenCV does not read as far as the end
        return None, "Premature end of JPEG file"
    try:
        with printed(LIBJPEG, OPENCV) as texts:
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), REDUCED[factor] | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        return None, str(error.err)
    if texts and (warned := LIBJPEG.search(texts[0])):
        return None, warned[0].strip()
    if pixels is None:
        return None, "OpenCV cannot decode it"
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels), ""


def without_oddity(content: bytes, header: Header, warning: str) -> bytes | None:
    """Return the content without the harmless oddity of a warning, or None if data is lost.

    libjpeg tells only its first warning, so the content is decoded again to hear the others. Bytes that nobody reads
    before a marker are harmless if they are padding (all equal), else they are the rest of a damaged scan.
    """
    if "unknown JFIF revision" in warning and header.jfif:
        return replaced(content, header.jfif + 9, b"\x01\x01")
    if "Unknown Adobe color transform" in warning and header.adobe:  # libjpeg takes YCbCr or YCCK
        return replaced(content, header.adobe + 15, b"\x01" if header.components == 3 else b"\x02")
    if "Invalid SOS parameters" in warning:  # of a sequential scan, which has none
        end = header.scan + 2 + int.from_bytes(content[header.scan + 2 : header.scan + 4], "big")
        return replaced(content, end - 3, b"\x00\x3f\x00")
    if found := EXTRANEOUS.search(warning):
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
