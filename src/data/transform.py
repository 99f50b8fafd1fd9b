"""From the bytes of an image to the network's input: crop, flip, augment, normalise.

Every random change is a pure function of the image's key (seed, epoch, image, copy), whichever process computes it.
Sources: torchvision RandomResizedCrop, Resize, CenterCrop on Pillow images; timm 0.4.12 data/transforms_factory.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np

from ..config import DataConfig, parse_auto_augment
from .augment import ColorJitter, RandAugment, RandomErasing, luminance
from .decode import Box, Decoder, Picture, Undecodable
from .resample import resized

Key = tuple[int, int, int, int]  # seed, epoch, image, copy of the image in the epoch
#: number of each random change, so that its draws do not depend on which others are on
CROP, ENHANCE, PIXELS, ERASE = range(4)
MOST_OF_OPENCV = 128  # channels for which OpenCV is used; it takes 512 at most


@dataclass(frozen=True)
class Transform:
    """The transform of a split.

    Args:
        config: augmentation and evaluation transform.
        size: height and width of the result.
        channels: of the result: 3 (RGB), 1 (luminance) or any number of bands.
        training: crop at random and augment; False resizes and crops the centre.
    """

    config: DataConfig
    size: tuple[int, int]
    channels: int
    training: bool

    def __call__(self, content: bytes, key: Key, out: np.ndarray) -> None:
        """Write the image of a file into `out`, (channels, H, W) float32.

        Raises:
            Undecodable: the file cannot be used.
        """
        picture = self._decoder.open(content)
        if not self.training:
            self._normalise(evaluation_pixels(picture, self.size, self.config.eval_crop), out)
            return
        box, flip = self._draw(picture, key)
        pixels = picture.crop(box, self.size)
        pixels = in_8_bits(pixels) if self._augmentations else pixels
        pixels = resized(pixels, self.size, self.config.interpolation)
        pixels = flipped(pixels) if flip else pixels
        for number, augmentation in self._augmentations:
            rng = generator(key, number)
            pixels = augmentation(pixels, rng)
        self._normalise(pixels, out)
        if self._erasing is not None:
            self._erasing(out, generator(key, ERASE))

    def _draw(self, picture: Picture, key: Key) -> tuple[Box, bool]:
        rng = generator(key, CROP)
        box = draw_box(picture.height, picture.width, self.config.crop_scale, self.config.crop_ratio, rng)
        return box, bool(rng.random() < self.config.hflip)

    @functools.cached_property
    def _decoder(self) -> Decoder:
        return Decoder.of(self.config, self.channels, self.training)

    @functools.cached_property
    def _augmentations(self) -> list[tuple[int, RandAugment | ColorJitter]]:
        """The augmentations of (H, W, 3) uint8, in their order, with their numbers."""
        config = self.config
        found: list[tuple[int, RandAugment | ColorJitter]] = []
        if config.brightness or config.contrast:
            found.append((ENHANCE, ColorJitter({"Brightness": config.brightness, "Contrast": config.contrast})))
        if config.auto_augment:
            found.append((PIXELS, RandAugment(parse_auto_augment(config.auto_augment), config.mean)))
        elif config.color_jitter:
            names = ("Brightness", "Contrast", "Color")
            found.append((PIXELS, ColorJitter(dict.fromkeys(names, config.color_jitter))))
        return found

    @functools.cached_property
    def _erasing(self) -> RandomErasing | None:
        return RandomErasing(self.config.erasing, self.config.erasing_area) if self.config.erasing else None

    @functools.cached_property
    def _tables(self) -> list[np.ndarray]:
        """Normalised value of each grey level, (256,) float32 for each channel, rounded as in torchvision."""
        levels = np.arange(256, dtype=np.float32) / np.float32(255)
        return [
            (levels - np.float32(mean)) / np.float32(std)
            for mean, std in zip(self.config.mean, self.config.std, strict=True)
        ]

    def _normalise(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Write (H, W, C) uint8, or float32 in the scale 0 to 1, into (channels, H, W); one channel is luminance."""
        if self.channels == 1 and pixels.shape[2] == 3:
            pixels = luminance(pixels)
        if pixels.dtype == np.uint8:
            planes = cv2.split(pixels) if pixels.shape[2] <= MOST_OF_OPENCV else np.moveaxis(pixels, 2, 0)
            for plane, table, target in zip(planes, self._tables, out, strict=True):
                cv2.LUT(plane, table, target)
            return
        for number, (mean, std) in enumerate(zip(self.config.mean, self.config.std, strict=True)):
            np.subtract(pixels[..., number], mean, out=out[number], casting="unsafe")
            out[number] /= std


def in_8_bits(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as uint8, which the augmentations of colours need.

    Raises:
        Undecodable: floats outside of 0 to 1.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.min() < 0 or pixels.max() > 1:
        raise Undecodable(
            "has values outside of 0 to 1, which data.auto_augment, color_jitter, brightness and contrast cannot change"
        )
    return np.round(pixels * 255).astype(np.uint8)


def flipped(pixels: np.ndarray) -> np.ndarray:
    """Return (H, W, C) from right to left."""
    if pixels.shape[2] > MOST_OF_OPENCV:
        return pixels[:, ::-1]
    return cv2.flip(pixels, 1).reshape(pixels.shape)


def generator(key: Key, number: int) -> np.random.Generator:
    """Return the random numbers of one random change (`CROP`, ...) of the image with this key."""
    return np.random.default_rng([*key, number])


def draw_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a crop (torchvision RandomResizedCrop): top, left, height and width.

    Args:
        scale: smallest and largest area, as fractions of the image.
        ratio: smallest and largest width / height; its logarithm is drawn uniformly.
    """
    tries = 10
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for share, shape, top, left in rng.random((tries, 4)).tolist():
        area = (scale[0] + share * (scale[1] - scale[0])) * height * width
        aspect = math.exp(low + shape * (high - low))
        cols, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < cols <= width and 0 < rows <= height:
            return int(top * (height - rows + 1)), int(left * (width - cols + 1)), rows, cols
    return central_box(height, width, ratio)


def central_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """Return the largest centred box whose width / height is within `ratio`: top, left, height and width."""
    rows, cols = height, width
    if width < ratio[0] * height:
        rows = max(1, round(width / ratio[0]))
    elif width > ratio[1] * height:
        cols = max(1, round(height * ratio[1]))
    return (height - rows) // 2, (width - cols) // 2, rows, cols


def evaluation_pixels(picture: Picture, size: tuple[int, int], eval_crop: float) -> np.ndarray:
    """Resize so that the crop is `eval_crop` of the shorter side, then take the centre (torchvision on Pillow images).

    For a square crop the longer side becomes floor(shorter * longer / shorter side); another crop's image is resized to
    its own shape. Half a pixel of the centre rounds to even.
    """
    height, width = size
    whole = (int(height / eval_crop), int(width / eval_crop))
    if height == width:
        short, rows, cols = whole[0], picture.height, picture.width
        longer = int(short * max(rows, cols) / min(rows, cols))
        whole = (longer, short) if cols <= rows else (short, longer)
    top, left = round((whole[0] - height) / 2), round((whole[1] - width) / 2)
    pixels = picture.crop((0, 0, picture.height, picture.width), whole)
    return resized(pixels, whole, "bicubic", (top, left, height, width))
