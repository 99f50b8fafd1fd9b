"""Augmentation of training images as in timm: RandAugment, colour jitter, random erasing.

The first two act on Pillow images, because other libraries round, resample and fill differently.

Sources: timm 0.4.12 data/auto_augment.py, data/random_erasing.py, data/transforms_factory.py; torchvision ColorJitter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..config import RandAugmentConfig

LEVELS = 10  # the highest magnitude
#: timm's operations in timm's order; with `inc1` those in STRONGER_WITH_LEVEL have another rule and name
OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
STRONGER_WITH_LEVEL = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
#: probability of each drawn operation
APPLY = 0.5

Fill = tuple[int, int, int]


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


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    """Posterize to 0 bits gives black, as in older versions of Pillow; newer ones raise an error."""
    return ImageOps.posterize(image, int(bits)) if bits >= 1 else Image.new(image.mode, image.size)


def _solarize_add(image: Image.Image, amount: float) -> Image.Image:
    return image.point([min(255, level + int(amount)) if level < 128 else level for level in range(256)] * 3)


def _affine(image: Image.Image, matrix: tuple[float, ...], **options: Any) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **options)


_PLAIN: dict[str, Callable[..., Image.Image]] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Posterize": _posterize,
    "Solarize": lambda image, threshold: ImageOps.solarize(image, threshold),
    "SolarizeAdd": _solarize_add,
    "Color": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "Contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "Brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "Sharpness": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}
_GEOMETRIC: dict[str, Callable[..., Image.Image]] = {
    "Rotate": lambda image, degrees, **options: image.rotate(degrees, **options),
    "ShearX": lambda image, factor, **options: _affine(image, (1, factor, 0, 0, 1, 0), **options),
    "ShearY": lambda image, factor, **options: _affine(image, (1, 0, 0, factor, 1, 0), **options),
    "TranslateXRel": lambda image, share, **options: _affine(image, (1, 0, share * image.width, 0, 1, 0), **options),
    "TranslateYRel": lambda image, share, **options: _affine(image, (1, 0, 0, 0, 1, share * image.height), **options),
}


def apply_operation(
    image: Image.Image,
    name: str,
    argument: float | None,
    fill: Fill,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Apply one operation of RandAugment to an RGB image.

    Args:
        argument: from `ARGUMENTS`; None for operations without one.
        fill: colour outside the image, for geometric operations.
        resample: filter of geometric operations.
    """
    name = name.removesuffix("Increasing")
    if name in _GEOMETRIC:
        return _GEOMETRIC[name](image, argument, resample=resample, fillcolor=fill)
    return _PLAIN[name](image, argument)


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

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for name, argument in self.draw(rng):
            image = apply_operation(image, name, argument, self.fill)
        return image


class ColorJitter:
    """Multiply brightness, contrast and saturation by factors in [1 - strength, 1 + strength], in random order.

    Args:
        strengths: of `Brightness`, `Contrast` and `Color`; any of them.
    """

    def __init__(self, strengths: Mapping[str, float]):
        self.ranges = [(name, max(0.0, 1.0 - strength), 1.0 + strength) for name, strength in strengths.items()]

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for number in rng.permutation(len(self.ranges)):
            name, low, high = self.ranges[number]
            image = _PLAIN[name](image, rng.uniform(low, high))
        return image


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
