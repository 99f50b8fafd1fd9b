"""From the bytes of an image file to its pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # top, left, height, width


class Undecodable(Exception):
    """An image that cannot be used; the text is the reason, without the name of the file."""


class Picture(Protocol):
    """An image whose header is read, and whose pixels are not decoded before `crop`.

    Attributes:
        height, width: in pixels, after the EXIF orientation if that is applied.
    """

    height: int
    width: int

    def crop(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        """Return the pixels of a box, (rows, cols, channels), uint8, or float32 in the scale 0 to 1.

        A fast decoder may return fewer pixels for the same box: a half, a quarter or an eighth of its sides, but never
        fewer than `least` (height, width).

        Raises:
            Undecodable: the content is damaged.
        """


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
    max_pixels: int = 178_956_970

    def open(self, content: bytes) -> Picture:
        """Read the header of a file; its content decides the format, not its name.

        Raises:
            Undecodable: it is no image, or one that is not used (too large, another number of bands).
        """
        try:
            return PillowPicture(Image.open(io.BytesIO(content)))
        except Exception as error:
            raise Undecodable(str(error)) from None


class PillowPicture:
    """An image that Pillow decodes."""

    def __init__(self, image: Image.Image):
        self.image = image
        self.width, self.height = image.size

    def crop(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        top, left, rows, cols = box
        try:
            return np.asarray(self.image.convert("RGB"))[top : top + rows, left : left + cols]
        except Exception as error:
            raise Undecodable(str(error)) from None
