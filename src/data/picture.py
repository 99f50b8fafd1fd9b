"""What every decoder of images shares: the interface, the error, the limits and the orientation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np

Box = tuple[int, int, int, int]  # top, left, height, width

# EXIF orientation -> whether rows and columns change places, then whether the rows and the columns run backwards
TURNS: dict[int, tuple[bool, bool, bool]] = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
LONGEST_REASON = 160  # characters
TOO_LARGE = "does not fit into memory"


class Undecodable(Exception):  # noqa: N818
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

        The result may be a view, or read-only. A fast decoder may return fewer pixels for the same box: a half, a
        quarter or an eighth of its sides, but never fewer than `least` (height, width).

        Raises:
            Undecodable: the content is damaged.
        """


class Turned:
    """A picture turned as its EXIF orientation says, like `PIL.ImageOps.exif_transpose`."""

    def __init__(self, picture: Picture, orientation: int):
        self.picture = picture
        self.swap, self.rows_back, self.cols_back = TURNS[orientation]
        self.height, self.width = picture.height, picture.width
        if self.swap:
            self.height, self.width = self.width, self.height

    def crop(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        top, left, rows, cols = box
        top = self.height - top - rows if self.rows_back else top
        left = self.width - left - cols if self.cols_back else left
        if self.swap:
            pixels = self.picture.crop((left, top, cols, rows), (least[1], least[0])).swapaxes(0, 1)
        else:
            pixels = self.picture.crop((top, left, rows, cols), least)
        pixels = pixels[::-1] if self.rows_back else pixels
        pixels = pixels[:, ::-1] if self.cols_back else pixels
        return np.ascontiguousarray(pixels)


def turned(picture: Picture, orientation: object) -> Picture:
    """Return a picture in its EXIF orientation; values that are none (as in many files) leave it as it is."""
    return Turned(picture, orientation) if isinstance(orientation, int) and orientation in TURNS else picture


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse an empty image, or one that is too large, before its pixels take memory."""
    size = f"{str(width)[:20]} x {str(height)[:20]}"
    if height < 1 or width < 1:
        raise Undecodable(f"its size is {size} pixels")
    if height * width > max_pixels:
        raise Undecodable(f"{size} pixels are more than data.max_pixels {max_pixels}")


@contextmanager
def only_undecodable(kind: str) -> Iterator[None]:
    """Turn every error of a library into `Undecodable`, and print none of its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Undecodable:
            raise
        except Exception as error:  # whatever a library raises, MemoryError and SystemError too
            raise Undecodable(reason(error, kind)) from None


def reason(error: Exception, kind: str) -> str:
    """Return one short printable line for the error of a library."""
    text = "" if "object at 0x" in str(error) else " ".join(re.sub(r"[^\x20-\x7e]", " ", str(error)).split())
    if isinstance(error, MemoryError):
        return TOO_LARGE
    if isinstance(error, KeyError | IndexError | AttributeError):  # their texts say nothing to a user
        text = ""
    return f"damaged {kind}: {text[:LONGEST_REASON]}" if text else f"damaged {kind}"
