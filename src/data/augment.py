"""Random changes of training images as timm makes them: crops, RandAugment, colour jitter, random erasing.

They act on Pillow images, because MindSpore's own operations round, resample and fill differently. What an image gets
is a pure function of its key (seed, epoch, image), whichever worker it falls to.

Sources: timm 0.4.12 data/auto_augment.py, data/random_erasing.py, data/transforms_factory.py; torchvision ColorJitter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..config import DataConfig, RandAugmentConfig, parse_auto_augment

LEVELS = 10  # the highest magnitude
#: timm's operations in their order; under `inc1` those of STRONGER_WITH_LEVEL have another rule and name
OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
STRONGER_WITH_LEVEL = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
#: probability of each drawn operation
APPLY = 0.5

Fill = tuple[int, int, int]


def operations_of(config: RandAugmentConfig) -> tuple[str, ...]:
    """Names of the operations to draw from."""
    if not config.increasing:
        return OPERATIONS
    return tuple(f"{name}Increasing" if name in STRONGER_WITH_LEVEL else name for name in OPERATIONS)


def fill_colour(mean: tuple[float, ...]) -> Fill:
    """What geometric operations put outside the image: the mean in 8 bits; a grey mean stands for all three."""
    red, green, blue = (min(255, round(255 * value)) for value in (mean * 3 if len(mean) == 1 else mean[:3]))
    return red, green, blue


def _enhancement(level: float, sign: int) -> float:
    return max(0.1, 1.0 + sign * (level / LEVELS * 0.9))


#: operation -> its argument at a level from 0 to 10 and a sign of 1 or -1, which some ignore; the others have none
ARGUMENTS: dict[str, Callable[[float, int], float]] = {
    "Rotate": lambda level, sign: sign * (level / LEVELS * 30.0),  # degrees counter-clockwise
    "Posterize": lambda level, _: int(level / LEVELS * 4),  # bits that stay
    "PosterizeIncreasing": lambda level, _: 4 - int(level / LEVELS * 4),
    "Solarize": lambda level, _: int(level / LEVELS * 256),  # grey levels from here on are inverted
    "SolarizeIncreasing": lambda level, _: 256 - int(level / LEVELS * 256),
    "SolarizeAdd": lambda level, _: int(level / LEVELS * 110),  # grey levels added to dark pixels
    **{name: lambda level, _: level / LEVELS * 1.8 + 0.1 for name in STRONGER_WITH_LEVEL[2:]},
    **{f"{name}Increasing": _enhancement for name in STRONGER_WITH_LEVEL[2:]},
    "ShearX": lambda level, sign: sign * (level / LEVELS * 0.3),
    "ShearY": lambda level, sign: sign * (level / LEVELS * 0.3),
    "TranslateXRel": lambda level, sign: sign * (level / LEVELS * 0.45),  # share of the width, to the left
    "TranslateYRel": lambda level, sign: sign * (level / LEVELS * 0.45),  # share of the height, upwards
}


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    """Level 10 asks for 0 bits: black in older versions of Pillow, an error in newer ones."""
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
    """One operation of RandAugment on an RGB image.

    Args:
        argument: of `ARGUMENTS`; None for the operations that have none.
        fill: colour outside the image, of the geometric operations.
        resample: of the geometric operations.
    """
    name = name.removesuffix("Increasing")
    if name in _GEOMETRIC:
        return _GEOMETRIC[name](image, argument, resample=resample, fillcolor=fill)
    return _PLAIN[name](image, argument)


class ResizedCrop:
    """A random part of the image in another size, bilinear with antialiasing (torchvision RandomResizedCrop).

    MindSpore's bilinear filter has no antialiasing, hence Pillow's. Its bicubic one has: those crops stay in MindSpore.

    Args:
        size: height and width of the result.
        scale: smallest and largest area, as shares of the image.
        ratio: smallest and largest width / height, drawn evenly in its logarithm.
    """

    tries = 10  # boxes drawn until one fits

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]):
        self.size, self.scale, self.ratio = size, scale, ratio

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a box."""
        for _ in range(self.tries):
            area = rng.uniform(*self.scale) * height * width
            aspect = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            cols, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < cols <= width and 0 < rows <= height:
                return int(rng.integers(height - rows + 1)), int(rng.integers(width - cols + 1)), rows, cols
        return central_box(height, width, self.ratio)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return resized_crop(image, self.draw(image.height, image.width, rng), self.size)


def central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest box in the middle whose width / height is in the range."""
    rows, cols = height, width
    if width < ratio[0] * height:
        rows = round(width / ratio[0])
    elif width > ratio[1] * height:
        cols = round(height * ratio[1])
    return (height - rows) // 2, (width - cols) // 2, rows, cols


def resized_crop(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """The box (top, left, height, width) of an image in (height, width) pixels; nothing outside it has an influence."""
    top, left, rows, cols = box
    part = image.crop((left, top, left + cols, top + rows))
    return part.resize((size[1], size[0]), Image.Resampling.BILINEAR)


class RandAugment:
    """Draw `config.operations` operations with replacement, apply each with probability 0.5 at a level of its own.

    Args:
        config: magnitude, its deviation and the list of operations.
        mean: of pixels scaled to 0..1; the colour outside the image.
    """

    def __init__(self, config: RandAugmentConfig, mean: tuple[float, ...]):
        self.config, self.fill = config, fill_colour(mean)
        self.names = operations_of(config)

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float | None]]:
        """Operations with their arguments, in the order in which they are applied."""
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
    """Brightness, contrast and saturation times numbers from 1 - strength to 1 + strength, in random order."""

    names = ("Brightness", "Contrast", "Color")

    def __init__(self, strength: float):
        self.low, self.high = max(0.0, 1.0 - strength), 1.0 + strength

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for number in rng.permutation(len(self.names)):
            image = _PLAIN[self.names[number]](image, rng.uniform(self.low, self.high))
        return image


class RandomErasing:
    """A box of standard normal noise in a normalised image (timm's mode pixel, one box).

    Args:
        probability: of erasing in an image.
        area: smallest and largest box, as shares of the image.
    """

    log_aspect = math.log(10 / 3)  # height / width is from 0.3 to 1 / 0.3, evenly in its logarithm
    tries = 10  # boxes drawn until one is smaller than the image

    def __init__(self, probability: float, area: tuple[float, float]):
        self.probability, self.area = probability, area

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(C, H, W) float32 -> the same with the box erased."""
        if rng.random() >= self.probability:
            return image
        chans, rows, cols = image.shape
        for _ in range(self.tries):
            share, log_aspect = rng.uniform(*self.area), rng.uniform(-self.log_aspect, self.log_aspect)
            box = erased_size(rows, cols, share, log_aspect)
            if box is not None:
                top, left = rng.integers(rows - box[0] + 1), rng.integers(cols - box[1] + 1)
                image = image.copy()
                noise = rng.standard_normal((chans, *box), np.float32)
                image[:, top : top + box[0], left : left + box[1]] = noise
                break
        return image


def erased_size(rows: int, cols: int, share: float, log_aspect: float) -> tuple[int, int] | None:
    """Height and width of an erased box; None if it is not smaller than the image on both sides."""
    area, aspect = share * rows * cols, math.exp(log_aspect)
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return (height, width) if height < rows and width < cols else None


# --- in the pipeline --------------------------------------------------------------------------------------------


class Change:
    """Changes in the form the pipeline takes: (image, key) -> (image, key).

    Args:
        changes: called with a Pillow image (`pillow`) or an array, and a random generator.
        stream: number that keeps the draws of this step apart from those of others with the same key.
    """

    def __init__(self, changes: list[Callable[[Any, np.random.Generator], Any]], stream: int, pillow: bool):
        self.changes, self.stream, self.pillow = changes, stream, pillow

    def __call__(self, image: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([*key.tolist(), self.stream])
        changed: Any = Image.fromarray(image) if self.pillow else image
        for change in self.changes:
            changed = change(changed, rng)
        return np.asarray(changed), key


def crops(config: DataConfig, size: tuple[int, int]) -> Change | None:
    """Bilinear crops of (H, W, 3) uint8; None where MindSpore makes them."""
    crop = ResizedCrop(size, config.crop_scale, config.crop_ratio)
    return Change([crop], 2, pillow=True) if config.interpolation == "bilinear" else None


def on_pixels(config: DataConfig) -> Change | None:
    """RandAugment or colour jitter, of (H, W, 3) uint8; None when both are off."""
    if config.auto_augment:
        return Change([RandAugment(parse_auto_augment(config.auto_augment), config.mean)], 0, pillow=True)
    return Change([ColorJitter(config.color_jitter)], 0, pillow=True) if config.color_jitter else None


def on_normalised(config: DataConfig) -> Change | None:
    """Random erasing, of (C, H, W) float32; None when it is off."""
    return Change([RandomErasing(config.erasing, config.erasing_area)], 1, pillow=False) if config.erasing else None
