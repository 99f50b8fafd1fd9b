"""Damage of PNG files that Pillow does not notice."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from struct import unpack_from

from .picture import Undecodable

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples of a pixel
PART = 1 << 20  # bytes that are decompressed at a time


def check_png(content: bytes, blank_end: bool) -> None:
    """Check the checksums of the pixel data; and its length if the last row is blank, as rows that are missing are.

    Raises:
        Undecodable: data is lost.
    """
    width, height, bits, colours, _, _, interlaced = unpack_from(">IIBBBBB", content, 16)
    parts = []
    for start, end in data_chunks(content):
        if zlib.crc32(content[start - 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise Undecodable("damaged PNG: a checksum is wrong")
        parts.append((start, end))
    if blank_end and not interlaced:
        missing = height * (1 + (width * bits * SAMPLES[colours] + 7) // 8)
        inflate = zlib.decompressobj()
        for start, end in parts:
            data = content[start:end]
            while data and missing > 0:
                missing -= len(inflate.decompress(data, PART))
                data = inflate.unconsumed_tail
        if missing > 0 and missing > len(inflate.flush()):  # data beyond the last row stays compressed
            raise Undecodable("damaged PNG: rows are missing")


def data_chunks(content: bytes) -> Iterator[tuple[int, int]]:
    """Return where the data of each IDAT chunk starts and ends."""
    place = 8
    while place + 12 <= len(content):
        length, name = unpack_from(">I4s", content, place)
        if name == b"IDAT":
            yield place + 8, place + 8 + length
        place += 12 + length
