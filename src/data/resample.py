"""Resize pixels bit for bit like Pillow 9.1 to 12.3, which later versions do in another order.

`resample.cpp` does it, compiled once for a machine; where it cannot be had, Pillow does, with the same numbers.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from .. import native
from ..native import KernelError

Filter = Literal["bicubic", "bilinear"]
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Part = tuple[int, int, int, int]  # top, left, height and width

SOURCE = Path(__file__).with_name("resample.cpp")
FURTHER = SOURCE.with_name("affine.cpp")  # in the same library, for `affine`
#: of the compiler; each operation is rounded, as in Pillow
FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
WIDE = ("-mprefer-vector-width=512",)  # x86-64 only
KEPT = 2**24  # bytes of memory that a thread keeps for the next image
MOST = 2**28  # bytes that the library may take; beyond that Pillow is used
LONG = 2**15  # pixels of a side before or after, beyond which Pillow takes memory without bound
MOST_PIXELS = 2**29  # between the two directions
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}  # pixels on each side, of a result of the same size
BITS = 22  # of the fraction of a weight for 8-bit pixels
UNUSED = "no library was asked for"


@dataclass
class State:
    """What this process uses; `set_up` changes it.

    Attributes:
        functions: of the library, by type of the pixels; none: Pillow is used.
        reason: why it is.
        path: of the library that was asked for.
    """

    path: str = ""
    functions: dict[str, Any] = field(default_factory=dict)
    reason: str = UNUSED


class Memory(threading.local):
    """Memory of a thread for the library."""

    def __init__(self) -> None:
        self.kept = np.empty(0, np.uint8)


_state = State()
_memory = Memory()


def resized(
    pixels: np.ndarray, size: tuple[int, int], filter_name: Filter = "bicubic", part: Part | None = None
) -> np.ndarray:
    """Resize (rows, cols, channels) of uint8 or float32 to (H, W, channels): first the width, then the height.

    Args:
        pixels: of any strides; if those of a row are dense, they are not copied.
        size: height and width of the whole result.
        part: top, left, height and width of the part of the result that is returned; None is all of it.

    Raises:
        MemoryError: there are too many pixels (a hundred million rows that become wider).
    """
    part = part or (0, 0, *size)
    top, left, rows, cols = part
    inside = 0 <= top < top + rows <= size[0] and 0 <= left < left + cols <= size[1]
    if not inside or pixels.ndim != 3 or not pixels.size or pixels.dtype not in (np.uint8, np.float32):
        raise ValueError(f"{pixels.dtype} {pixels.shape} cannot be resized to part {part} of {size}")
    if _state.functions:
        result = by_library(_state.functions, pixels, size, filter_name, part)
        if result is not None:
            return result
    return by_pillow(pixels, size, filter_name, part)


# --- the library -------------------------------------------------------------------------------------------------


def library() -> str:
    """Return the path of the library for `set_up`; compiles it on first use on a machine. Empty: Pillow is used."""
    flags = FLAGS + WIDE * (platform.machine() == "x86_64")
    try:
        return str(native.Source(SOURCE, flags, (str(FURTHER),), FURTHER.read_text(encoding="utf-8")).compiled())
    except (KernelError, ImportError) as error:
        _state.reason = str(error)
        return ""


def use(path: str) -> None:
    """`set_up`, unless this path was the last one."""
    if path != _state.path:
        set_up(path)


def set_up(path: str) -> str:
    """Choose what `resized` uses in this process: the library at a path, or Pillow if it is empty or wrong.

    Returns:
        Why Pillow is used; empty if the library is.
    """
    _state.path, _state.functions, _state.reason = path, {}, _state.reason or UNUSED
    if path:
        try:
            functions = functions_of(path)
            check(functions)
            _state.functions, _state.reason = functions, ""
        except KernelError as error:
            _state.reason = str(error)
    return _state.reason


def functions_of(path: str) -> dict[str, Any]:
    """Open a library; returns its functions by type of the pixels.

    Raises:
        KernelError: it cannot be opened.
    """
    opened = native.open_library(path, "resample_float32")
    functions = {name: opened[f"resample_{name}"] for name in ("uint8", "float32")}
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    for function in functions.values():
        function.argtypes, function.restype = [pointer, pointer, number, pointer, number, pointer], number
    return functions


def check(functions: dict[str, Any]) -> None:
    """Compare the library with Pillow on random pixels; takes milliseconds.

    Raises:
        KernelError: they differ.
    """
    rng = np.random.default_rng(0)
    sizes = [((83, 70), (40, 61)), ((21, 90), (64, 33)), ((9, 5), (40, 70)), ((33, 47), (33, 20)), ((50, 31), (24, 31))]
    names: tuple[Filter, ...] = ("bicubic", "bilinear")
    for number, (before, size) in enumerate(sizes):
        for filter_name in names:
            for kind in ("uint8", "float32"):
                pixels = rng.integers(0, 256, (*before, 1 + number)).astype(kind)
                part = (number, 2 * number, 8, 9)
                for asked in ((0, 0, *size), part):
                    result = by_library(functions, pixels, size, filter_name, asked)
                    if result is None or (result != by_pillow(pixels, size, filter_name, asked)).any():
                        raise KernelError(f"the {filter_name} resize of {kind} differs from Pillow's")


def by_library(
    functions: dict[str, Any], pixels: np.ndarray, size: tuple[int, int], filter_name: Filter, part: Part
) -> np.ndarray | None:
    """`resized` by the library; None if that takes too much memory."""
    rows, cols, channels = pixels.shape
    item = pixels.itemsize
    if pixels.strides[1:] != (channels * item, item) or pixels.strides[0] % item or not pixels.flags.aligned:
        pixels = np.ascontiguousarray(pixels)
    shape = (ctypes.c_int64 * 10)(rows, cols, channels, pixels.strides[0] // item, *size, *part)
    out = np.empty((part[2], part[3], channels), pixels.dtype)
    memory = _memory.kept
    while True:
        needed = functions[pixels.dtype.name](
            pixels.ctypes.data, shape, filter_name == "bicubic", memory.ctypes.data, memory.nbytes, out.ctypes.data
        )
        if needed <= memory.nbytes:
            return out
        if needed > MOST:
            return None
        memory = np.empty(needed, np.uint8)
        if needed <= KEPT:
            _memory.kept = memory


# --- Pillow ------------------------------------------------------------------------------------------------------


def by_pillow(pixels: np.ndarray, size: tuple[int, int], filter_name: Filter, part: Part) -> np.ndarray:
    """`resized` by Pillow: one direction at a time, since it chooses the order from version 13 on."""
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return bands_by_pillow(pixels, size, filter_name, part)
    bands = [bands_by_pillow(pixels[:, :, band], size, filter_name, part) for band in range(pixels.shape[2])]
    return np.stack(bands, axis=-1)


def bands_by_pillow(pixels: np.ndarray, size: tuple[int, int], filter_name: Filter, part: Part) -> np.ndarray:
    """`by_pillow` for (rows, cols) or (rows, cols, 3)."""
    top, left, rows, cols = part
    (height, width), method = size, FILTERS[filter_name]
    axis = Axis(len(pixels), height, filter_name)
    long = max(height, len(pixels)) > LONG
    low, high = (axis.reach(top)[0], axis.reach(top + rows - 1)[1]) if long else (0, len(pixels))
    pixels = pixels[low:high]
    if (high - low) * min(width, LONG) > MOST_PIXELS:
        raise MemoryError(f"{high - low} rows of {width} pixels are too many")
    if max(width, pixels.shape[1]) > LONG:
        across = Axis(pixels.shape[1], width, filter_name)
        pixels = across.resized(pixels.swapaxes(0, 1), 0, left, cols).swapaxes(0, 1)
    else:
        image = Image.fromarray(pixels).resize((width, len(pixels)), method)
        pixels = np.asarray(image)[:, left : left + cols]
    if long:
        return axis.resized(pixels, low, top, rows)
    return np.asarray(Image.fromarray(pixels).resize((cols, height), method))[top : top + rows]


@dataclass(frozen=True)
class Axis:
    """A direction that is resized as Pillow does it (libImaging/Resample.c), but only where it is asked for.

    Attributes:
        size, length: pixels before and after.
    """

    size: int
    length: int
    filter_name: Filter

    @property
    def scale(self) -> float:
        return self.size / self.length

    def reach(self, index: int) -> tuple[int, int]:
        """Return the first pixel that a pixel of the result is made from, and the one after the last."""
        if self.size == self.length:
            return index, index + 1
        center, support = (index + 0.5) * self.scale, SUPPORT[self.filter_name] * max(self.scale, 1.0)
        return max(int(center - support + 0.5), 0), min(int(center + support + 0.5), self.size)

    def weights(self, index: int) -> np.ndarray:
        """Return the weights of these pixels."""
        first, end = self.reach(index)
        distances = np.arange(first, end) - (index + 0.5) * self.scale + 0.5
        weights = weights_at(distances * (1.0 / max(self.scale, 1.0)), self.filter_name)
        total = float(np.cumsum(weights)[-1])  # np.sum adds in another order
        return weights / total if total else weights

    def resized(self, pixels: np.ndarray, low: int, begin: int, count: int) -> np.ndarray:
        """Return `count` rows of the result, from `begin` on; `pixels` (rows, ...) are those from `low` on."""
        if self.size == self.length:
            return pixels[begin - low : begin - low + count]
        out = np.empty((count, *pixels.shape[1:]), pixels.dtype)
        for row in range(count):
            first, end = self.reach(begin + row)
            values, weights = pixels[first - low : end - low], self.weights(begin + row)
            if pixels.dtype == np.uint8:
                weights = (np.where(weights < 0, -0.5, 0.5) + weights * 2**BITS).astype(np.int32)
                sums = np.tensordot(weights, values.astype(np.int32), 1) + 2 ** (BITS - 1)
                out[row] = (sums >> BITS).clip(0, 255)
            else:
                out[row] = sum(w * v for w, v in zip(weights, values.astype(np.float64), strict=True))
        return out


def weights_at(x: np.ndarray, filter_name: Filter) -> np.ndarray:
    """The filter at distances in pixels."""
    x = np.abs(x)
    if filter_name == "bilinear":
        return np.where(x < 1, 1.0 - x, 0.0)
    a = -0.5
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
