"""Augmentation of training images as in timm: RandAugment, colour jitter, random erasing.

The first two have the numbers of Pillow, which rounds, resamples and fills in its own way.

Sources: timm 0.4.12 data/auto_augment.py, data/random_erasing.py, data/transforms_factory.py; torchvision ColorJitter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ..config import RandAugmentConfig
from .affine import Fill, Matrix, rotation, transformed
from .resample import Filter

LEVELS = 10  # the highest magnitude
#: timm's operations in timm's order; with `inc1` those in STRONGER_WITH_LEVEL have another rule and name
OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
STRONGER_WITH_LEVEL = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
#: probability of each drawn operation
APPLY = 0.5


def operations_of(config: RandAugmentConfig) -> tuple[str, ...]:
    """Return the names of the operations to draw from."""
    if not config.increasing:
        return OPERATIONS
    return tuple(f"{name}Increasing" if name in STRONGER_WITH_LEVEL else name for name in OPERATIONS)


def fill_colour(mean: tuple[float, ...]) -> Fill:
    """Return the fill colour of geometric operations: the mean in 8 bits; a grey mean is used for all channels."""
    red, green, blue = (min(255, round(255 * value)) for value in (mean * 3 if len(mean) == 1 else mean[:3]))
    return red, green, blue


def _enhancement(level: float, sign: int) -> float:
    return max(0.1, 1.0 + sign * (level / LEVELS * 0.9))


#: operation -> its argument for a level from 0 to 10 and a sign of 1 or -1 (some ignore it); others take no argument
ARGUMENTS: dict[str, Callable[[float, int], float]] = {
    "Rotate": lambda level, sign: sign * (level / LEVELS * 30.0),  # degrees counter-clockwise
    "Posterize": lambda level, _: int(level / LEVELS * 4),  # remaining bits
    "PosterizeIncreasing": lambda level, _: 4 - int(level / LEVELS * 4),
    "Solarize": lambda level, _: int(level / LEVELS * 256),  # grey levels from this value on are inverted
    "SolarizeIncreasing": lambda level, _: 256 - int(level / LEVELS * 256),
    "SolarizeAdd": lambda level, _: int(level / LEVELS * 110),  # grey levels added to dark pixels
    **{name: lambda level, _: level / LEVELS * 1.8 + 0.1 for name in STRONGER_WITH_LEVEL[2:]},
    **{f"{name}Increasing": _enhancement for name in STRONGER_WITH_LEVEL[2:]},
    "ShearX": lambda level, sign: sign * (level / LEVELS * 0.3),
    "ShearY": lambda level, sign: sign * (level / LEVELS * 0.3),
    "TranslateXRel": lambda level, sign: sign * (level / LEVELS * 0.45),  # fraction of the width, to the left
    "TranslateYRel": lambda level, sign: sign * (level / LEVELS * 0.45),  # fraction of the height, upwards
}


# --- operations on (rows, cols, 3) uint8, with the numbers of Pillow ----------------------------------------------

_LEVELS = np.arange(256)


def _blend(base: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    """Return base + factor x (pixels - base), rounded as Pillow's ImageEnhance does."""
    first, second = (Image.fromarray(part.reshape(len(part), -1)) for part in (base, pixels))
    return np.asarray(Image.blend(first, second, factor)).reshape(pixels.shape)


def luminance(pixels: np.ndarray) -> np.ndarray:
    """Return the luminance (H, W, 1) of RGB (H, W, 3): Pillow's for uint8, of the same weights for floats."""
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)[..., None]


def _colour(pixels: np.ndarray, factor: float) -> np.ndarray:
    return _blend(cv2.cvtColor(luminance(pixels), cv2.COLOR_GRAY2RGB), pixels, factor)


def _sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """The smooth image is the mean of 3 x 3 pixels, where the central one counts five times; its edge is unchanged."""
    smooth = pixels.copy()
    if min(pixels.shape[:2]) > 2:
        # never half a grey level: rounding in float32 cannot differ from Pillow's
        smooth[1:-1, 1:-1] = cv2.filter2D(pixels, -1, _SMOOTH)[1:-1, 1:-1]
    return _blend(smooth, pixels, factor)


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def _enhanced(base: int, factor: float) -> np.ndarray:
    """The table of a blend with one grey level."""
    levels = _LEVELS.astype(np.uint8)
    return _blend(np.full_like(levels, base), levels, factor)


def _contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    grey = luminance(pixels)
    return _enhanced(int(int(grey.sum()) / grey.size + 0.5), factor)


def _autocontrast(counts: np.ndarray) -> np.ndarray:
    """The table that spreads the levels of a channel over all."""
    low, high = counts.nonzero()[0][[0, -1]].tolist()
    if high <= low:
        return _LEVELS
    scale = 255.0 / (high - low)
    return (_LEVELS * scale - low * scale).astype(int)


def _equalize(counts: np.ndarray) -> np.ndarray:
    """The table that makes the levels of a channel equally frequent."""
    step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
    return (step // 2 + np.cumsum(counts) - counts) // step if step else _LEVELS


def _of_counts(rule: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """The tables of the channels, each from the number of pixels of each level."""
    counts = np.array(Image.fromarray(pixels).histogram()).reshape(-1, 256)
    return np.stack([rule(channel) for channel in counts], axis=-1)


#: operations that replace each grey level by another one: (pixels, argument) -> the new levels, (256,) or (256, 3);
#: posterize to 0 bits gives black, as in Pillow before version 13
_TABLES: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "AutoContrast": lambda pixels, _: _of_counts(_autocontrast, pixels),
    "Equalize": lambda pixels, _: _of_counts(_equalize, pixels),
    "Invert": lambda _, __: 255 - _LEVELS,
    "Posterize": lambda _, bits: _LEVELS & ~(2 ** (8 - bits) - 1),
    "Solarize": lambda _, threshold: np.where(threshold <= _LEVELS, 255 - _LEVELS, _LEVELS),
    "SolarizeAdd": lambda _, amount: np.where(_LEVELS < 128, _LEVELS + amount, _LEVELS),
    "Contrast": _contrast,
    "Brightness": lambda _, factor: _enhanced(0, factor),
}
_BLENDS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {"Color": _colour, "Sharpness": _sharpness}
#: geometric operations: (argument, rows, columns) -> matrix
_MATRICES: dict[str, Callable[[float, int, int], Matrix]] = {
    "Rotate": rotation,
    "ShearX": lambda factor, _, __: (1, factor, 0, 0, 1, 0),
    "ShearY": lambda factor, _, __: (1, 0, 0, factor, 1, 0),
    "TranslateXRel": lambda share, _, cols: (1, 0, share * cols, 0, 1, 0),
    "TranslateYRel": lambda share, rows, _: (1, 0, 0, 0, 1, share * rows),
}


def apply_operation(
    pixels: np.ndarray, name: str, argument: Any, fill: Fill, filter_name: Filter = "bicubic"
) -> np.ndarray:
    """Apply one operation of RandAugment to (rows, cols, 3) uint8.

    Args:
        argument: from `ARGUMENTS`; None for operations without one.
        fill, filter_name: colour outside the image and filter of geometric operations.
    """
    name = name.removesuffix("Increasing")
    if name in _MATRICES:
        return transformed(pixels, _MATRICES[name](argument, *pixels.shape[:2]), fill, filter_name)
    if name in _BLENDS:
        return _BLENDS[name](pixels, argument)
    table = _TABLES[name](pixels, argument).clip(0, 255).astype(np.uint8)
    return cv2.LUT(pixels, table.reshape(256, 1, -1))


class RandAugment:
    """Draw `config.operations` operations with replacement and apply each with probability 0.5.

    Args:
        config: magnitude, its standard deviation, number and kind of operations.
        mean: of pixels scaled to 0..1; the fill colour outside the image.
    """

    def __init__(self, config: RandAugmentConfig, mean: tuple[float, ...]):
        self.config = config
        self.fill = fill_colour(mean)
        self.names = operations_of(config)

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float | None]]:
        """Draw operations with their arguments, in the order of application."""
        drawn = []
        for number in rng.integers(len(self.names), size=self.config.operations):
            if rng.random() < APPLY:
                level = min(max(rng.normal(self.config.magnitude, self.config.std), 0.0), LEVELS)
                sign = 1 if rng.random() < 0.5 else -1
                name = self.names[number]
                rule = ARGUMENTS.get(name)
                drawn.append((name, rule(level, sign) if rule else None))
        return drawn

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augment (rows, cols, 3) uint8."""
        for name, argument in self.draw(rng):
            pixels = apply_operation(pixels, name, argument, self.fill)
        return pixels


class ColorJitter:
    """Multiply brightness, contrast and saturation by factors in [1 - strength, 1 + strength], in random order.

    Args:
        strengths: of `Brightness`, `Contrast` and `Color`; any of them.
    """

    def __init__(self, strengths: Mapping[str, float]):
        self.ranges = [(name, max(0.0, 1.0 - strength), 1.0 + strength) for name, strength in strengths.items()]

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augment (rows, cols, 3) uint8."""
        for number in rng.permutation(len(self.ranges)):
            name, low, high = self.ranges[number]
            pixels = apply_operation(pixels, name, rng.uniform(low, high), (0, 0, 0))
        return pixels


class RandomErasing:
    """Replace a box of a normalised image by standard normal noise (timm's mode pixel, one box).

    Args:
        probability: of erasing a box in an image.
        area: smallest and largest box, as fractions of the image.
    """

    log_aspect = math.log(10 / 3)  # height / width is from 0.3 to 1 / 0.3; its logarithm is drawn uniformly
    tries = 10  # boxes drawn until one is smaller than the image

    def __init__(self, probability: float, area: tuple[float, float]):
        self.probability, self.area = probability, area

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> None:
        """Erase a box of (C, H, W) float32 in place."""
        if rng.random() >= self.probability:
            return
        chans, rows, cols = image.shape
        for _ in range(self.tries):
            area, log_aspect = rng.uniform(*self.area), rng.uniform(-self.log_aspect, self.log_aspect)
            box = erased_size(rows, cols, area, log_aspect)
            if box is not None:
                top, left = rng.integers(rows - box[0] + 1), rng.integers(cols - box[1] + 1)
                image[:, top : top + box[0], left : left + box[1]] = rng.standard_normal((chans, *box), np.float32)
                return


def erased_size(rows: int, cols: int, area: float, log_aspect: float) -> tuple[int, int] | None:
    """Return height and width of a box with this fraction of the image's area; None unless both sides are smaller."""
    pixels, aspect = area * rows * cols, math.exp(log_aspect)
    height, width = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
    return (height, width) if height < rows and width < cols else None
