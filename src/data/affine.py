"""Shear, shift and rotate pixels bit for bit as Pillow's affine transform.

With the bicubic filter `affine.cpp` does it several times faster, in the library of `resample`; where that cannot be
had, Pillow does.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .. import native
from ..native import KernelError
from .resample import FILTERS, Filter

#: column and row of the input from those of the output: a x + b y + c and d x + e y + f; pixels have centres at halves
Matrix = tuple[float, float, float, float, float, float]
Fill = tuple[int, int, int]
MOST = 2**24  # pixels of an image beyond which Pillow is used


@dataclass
class State:
    """What this process uses: the function of the library at a path; none: Pillow."""

    path: str = ""
    function: Any = None


_state = State()


def transformed(pixels: np.ndarray, matrix: Matrix, fill: Fill, filter_name: Filter = "bicubic") -> np.ndarray:
    """Transform (rows, cols, 3) uint8 into the same size; what comes from outside gets the colour `fill`."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"{pixels.dtype} {pixels.shape} cannot be transformed")
    if _state.function is None or filter_name != "bicubic" or pixels.size > 3 * MOST:
        return by_pillow(pixels, matrix, fill, filter_name)
    return by_library(_state.function, pixels, matrix, fill)


def rotation(degrees: float, rows: int, cols: int) -> Matrix:
    """Return the matrix of a rotation around the centre, counter-clockwise (Pillow Image.rotate)."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = cols / 2, rows / 2
    return cos, sin, (cos * -x + sin * -y) + x, -sin, cos, (-sin * -x + cos * -y) + y


# --- the library -------------------------------------------------------------------------------------------------


def use(path: str) -> None:
    """Choose what `transformed` uses in this process: a library, or Pillow if it is empty or wrong."""
    if path == _state.path:
        return
    _state.path, _state.function = path, None
    if path:
        try:
            function = function_of(path)
            check(function)
            _state.function = function
        except KernelError:
            return


def function_of(path: str) -> Any:
    """Open a library; returns its function.

    Raises:
        KernelError: it cannot be opened.
    """
    function = native.open_library(path, "affine_bicubic")["affine_bicubic"]
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes, function.restype = [pointer] * 5 + [number, pointer], number
    return function


def check(function: Any) -> None:
    """Compare the library with Pillow on random pixels; takes milliseconds.

    Raises:
        KernelError: they differ.
    """
    rng = np.random.default_rng(0)
    for rows, cols in ((40, 61), (33, 20), (5, 7)):
        pixels = rng.integers(-128, 384, (rows, cols, 3)).clip(0, 255).astype(np.uint8)
        matrices: list[Matrix] = [rotation(float(rng.uniform(-40, 40)), rows, cols) for _ in range(4)]
        for amount in rng.uniform(-0.4, 0.4, 4).tolist():
            matrices += [(1, amount, 0, 0, 1, 0), (1, 0, 0, amount, 1, 0)]
            matrices += [(1, 0, amount * cols, 0, 1, 0), (1, 0, 0, 0, 1, amount * rows)]
        for matrix in matrices:
            result = by_library(function, pixels, matrix, (1, 128, 254))
            if (result != by_pillow(pixels, matrix, (1, 128, 254))).any():
                raise KernelError("the affine transform differs from Pillow's")


def by_library(function: Any, pixels: np.ndarray, matrix: Matrix, fill: Fill) -> np.ndarray:
    """`transformed` by the library."""
    if pixels.strides[1:] != (3, 1):
        pixels = np.ascontiguousarray(pixels)
    shape = (ctypes.c_int64 * 3)(*pixels.shape[:2], pixels.strides[0])
    out = np.empty(pixels.shape, np.uint8)
    memory = np.empty(0, np.uint8)
    for _ in range(2):  # the first call returns what it needs
        arrays = (ctypes.c_double * 6)(*matrix), (ctypes.c_uint8 * 3)(*fill), memory.ctypes.data, memory.nbytes
        needed = function(pixels.ctypes.data, shape, *arrays, out.ctypes.data)
        if needed <= memory.nbytes:
            break
        memory = np.empty(needed, np.uint8)
    return out


def by_pillow(pixels: np.ndarray, matrix: Matrix, fill: Fill, filter_name: Filter = "bicubic") -> np.ndarray:
    """`transformed` by Pillow."""
    image, method = Image.fromarray(pixels), FILTERS[filter_name]
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrix, resample=method, fillcolor=fill))
