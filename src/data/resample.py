"""Resize pixels bit for bit like Pillow 9.1 to 12.3."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

Filter = Literal["bicubic", "bilinear"]
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def resized(
    pixels: np.ndarray,
    size: tuple[int, int],
    filter_name: Filter = "bicubic",
    part: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Resize (rows, cols, channels) of uint8 or float32 to (H, W, channels): first the width, then the height.

    Args:
        size: height and width of the whole result.
        part: top, left, height and width of the part of the result that is returned; None is all of it.
    """
    image = Image.fromarray(pixels)
    image = image.resize((size[1], image.height), FILTERS[filter_name])
    result = np.asarray(image.resize((size[1], size[0]), FILTERS[filter_name]))
    top, left, rows, cols = part or (0, 0, *size)
    return result[top : top + rows, left : left + cols]
