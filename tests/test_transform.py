"""Crops, flips and the evaluation transform of one image: equal to torchvision on Pillow images."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

from src.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from src.data.transform import CROP, Key, Transform, central_box, draw_box, evaluation_pixels, generator

KEY: Key = (3, 1, 7, 0)  # seed, epoch, image, copy
PLAIN = DataConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
#: the crop is the whole picture, nothing is flipped
WHOLE = replace(PLAIN, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0)


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def transformed(
    pixels: np.ndarray, config: DataConfig, size: tuple[int, int], training: bool = True, key: Key = KEY
) -> np.ndarray:
    """(channels, H, W) of a PNG file with these pixels, (H, W, 3) RGB."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    channels = len(config.mean)
    out = np.full((channels, *size), np.nan, np.float32)
    Transform(config, size, channels, training)(file.getvalue(), key, out)
    return out


def grey_levels(image: np.ndarray) -> np.ndarray:
    """(3, H, W) in the scale 0 to 1 -> (H, W, 3) grey levels."""
    return np.round(image.transpose(1, 2, 0) * 255).astype(np.uint8)


# --- crops and flips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 400), (0, 133, 100, 133)),
        ((300, 90), (90, 0, 120, 90)),
        ((200, 333), (0, 33, 200, 267)),
        ((1, 3000), (0, 1499, 1, 1)),
        ((3000, 1), (1499, 0, 1, 1)),
    ],
)
def test_a_box_that_never_fits_becomes_torchvisions_central_one(
    size: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert draw_box(*size, (1.0, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == expected
    assert central_box(*size, (3 / 4, 4 / 3)) == expected


def test_boxes_have_the_stated_areas_and_shapes_and_reach_every_edge() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([draw_box(90, 120, (0.2, 0.6), (3 / 4, 4 / 3), rng) for _ in range(4000)])
    top, left, rows, cols = boxes.T
    area, aspect = rows * cols / (90 * 120), cols / rows
    assert 0.19 < area.min() < 0.21 and 0.59 < area.max() < 0.61 and abs(area.mean() - 0.4) < 0.01
    assert 0.73 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.36 and abs(np.log(aspect).mean()) < 0.01
    assert top.min() == left.min() == 0 and (top + rows).max() == 90 and (left + cols).max() == 120


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_training_image_is_the_resized_box_of_its_key_flipped_or_not(interpolation: str) -> None:
    pixels, flipped = noise((60, 80)), []
    config = replace(PLAIN, interpolation=interpolation)  # type: ignore[arg-type]
    for number in range(20):
        key = (3, 1, number, 0)
        top, left, rows, cols = draw_box(60, 80, config.crop_scale, config.crop_ratio, generator(key, CROP))
        part = Image.fromarray(pixels[top : top + rows, left : left + cols])
        method = Image.Resampling[interpolation.upper()]
        expected = np.asarray(part.resize((16, rows), method).resize((16, 24), method))
        found = grey_levels(transformed(pixels, config, (24, 16), key=key))
        flipped.append(np.array_equal(found, expected[:, ::-1]))
        assert flipped[-1] or np.array_equal(found, expected)
    assert 3 < sum(flipped) < 17


def test_every_part_of_the_key_changes_the_image() -> None:
    pixels = noise((60, 80))
    keys: list[Key] = [KEY, (4, 1, 7, 0), (3, 2, 7, 0), (3, 1, 8, 0), (3, 1, 7, 1)]
    images = [transformed(pixels, PLAIN, (16, 16), key=key).tobytes() for key in keys]
    assert len(set(images)) == 5
    assert transformed(pixels, PLAIN, (16, 16)).tobytes() == images[0]


def test_a_random_change_does_not_depend_on_the_others() -> None:
    """Erasing leaves the crop as it is, and the crop the erased box."""
    pixels = noise((60, 80))
    boxes = []
    for config in (PLAIN, WHOLE):
        erased = transformed(pixels, replace(config, erasing=1.0), (16, 16))
        boxes.append((transformed(pixels, config, (16, 16)) != erased).any(axis=0))
    assert 0 < boxes[0].mean() < 0.5
    np.testing.assert_array_equal(*boxes)


def test_brightness_and_contrast_are_drawn_for_each_image() -> None:
    pixels, found = noise((16, 16), 4) // 2 + 60, []
    for number in range(12):
        config = replace(WHOLE, brightness=0.4, contrast=0.4)
        found.append(transformed(pixels, config, (16, 16), key=(0, 0, number, 0)).mean() * 255 / pixels.mean())
    assert len(set(np.round(found, 2))) > 8 and 0.6 <= min(found) < 0.9 and 1.1 < max(found) <= 1.4


# --- the evaluation transform -----------------------------------------------------------------------------------


def pillow_evaluation(pixels: np.ndarray, size: tuple[int, int], crop: float, mode: str = "RGB") -> np.ndarray:
    """torchvision's Resize (bicubic) and CenterCrop on a Pillow image, to (H, W, C) uint8."""
    image = Image.fromarray(pixels)
    width, height = image.size
    if size[0] == size[1]:
        short = int(size[0] / crop)
        resized = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    else:
        resized = (int(size[1] / crop), int(size[0] / crop))
    # in two calls: Pillow 13 changes the order of the directions for some sizes
    image = image.resize((resized[0], height), Image.Resampling.BICUBIC)
    whole = np.asarray(image.resize(resized, Image.Resampling.BICUBIC).convert(mode))
    top, left = round((resized[1] - size[0]) / 2.0), round((resized[0] - size[1]) / 2.0)
    part = whole[top : top + size[0], left : left + size[1]]
    return part if part.ndim == 3 else part[..., None]


@pytest.mark.parametrize(
    ("file_size", "size", "crop"),
    [
        ((50, 71), (32, 32), 0.875),  # 36 x 51: 19 / 2 rounds to 10, which flooring misses
        ((75, 50), (32, 32), 0.875),  # 54 x 36: 22 / 2
        ((50, 71), (32, 32), 1.0),  # 32 x 45: 13 / 2 rounds to 6
        ((50, 71), (32, 48), 0.875),  # 36 x 54 whatever the file's shape
        ((20, 30), (32, 32), 0.9),  # enlarged to 35 x 52
        ((488, 26), (39, 39), 1.0),  # 732 x 39, not 731, hence 346 rows above, not 345
        ((26, 488), (39, 39), 1.0),
        ((50, 71), (28, 28), 0.875),
        ((9, 70), (24, 24), 0.875),  # wide and enlarged
    ],
)
def test_evaluation_equals_pillow(file_size: tuple[int, int], size: tuple[int, int], crop: float) -> None:
    pixels = noise(file_size, 7)
    ours = transformed(pixels, DataConfig(eval_crop=crop), size, training=False)
    theirs = pillow_evaluation(pixels, size, crop).transpose(2, 0, 1) / 255.0
    expected = (theirs - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(IMAGENET_STD, (3, 1, 1))
    np.testing.assert_allclose(ours, expected, atol=1e-6)  # one grey level is 0.017


def test_grey_evaluation_is_pillows_luminance() -> None:
    pixels = noise((40, 40), 8)
    ours = transformed(pixels, DataConfig(mean=(0.5,), std=(0.25,), eval_crop=1.0), (40, 40), training=False)
    assert ours.shape == (1, 40, 40)
    expected = (pillow_evaluation(pixels, (40, 40), 1.0, "L").transpose(2, 0, 1) / 255.0 - 0.5) / 0.25
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_grey_training_images_have_one_channel() -> None:
    image = transformed(noise((40, 48)), DataConfig(mean=(0.5,), std=(0.5,), brightness=0.2), (16, 32))
    assert image.shape == (1, 16, 32) and -1 <= image.min() < -0.1 and 0.1 < image.max() <= 1


@dataclass
class Whole:
    """A picture that keeps what it was asked for."""

    height: int
    width: int
    asked: tuple[int, int] = (0, 0)

    def crop(self, box: tuple[int, int, int, int], least: tuple[int, int]) -> np.ndarray:
        assert box == (0, 0, self.height, self.width)
        self.asked = least
        return np.zeros((self.height, self.width, 3), np.uint8)


@pytest.mark.parametrize(
    ("side", "short", "long", "longer"),
    [
        (39, 26, 488, 732),
        (224, 112, 117, 234),
        (224, 140, 155, 248),
        (248, 248, 997, 997),
        (438, 102, 119, 511),
        (256, 375, 500, 341),
        (256, 192, 333, 444),
        (32, 48, 51, 34),
        (32, 47, 47, 32),
    ],
)
def test_the_longer_side_of_an_evaluation_is_torchvisions(side: int, short: int, long: int, longer: int) -> None:
    assert longer == int(side * long / short)
    for picture, expected in ((Whole(long, short), (longer, side)), (Whole(short, long), (side, longer))):
        evaluation_pixels(picture, (side, side), 1.0)
        assert picture.asked == expected


def test_evaluation_is_not_augmented() -> None:
    pixels = noise((40, 48))
    changes = replace(PLAIN, auto_augment="rand-m9-mstd0.5-inc1", erasing=1.0, brightness=0.5, decode="fast")
    plain = transformed(pixels, PLAIN, (16, 16), training=False)
    np.testing.assert_array_equal(transformed(pixels, changes, (16, 16), training=False), plain)


def test_pixels_are_normalised_with_the_rounding_of_torchvision() -> None:
    """In float32: x / 255 - mean, divided by std."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    found = transformed(pixels, DataConfig(eval_crop=1.0), (16, 16), training=False)
    mean, std = (np.float32(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (np.float32(pixels.transpose(2, 0, 1)) / np.float32(255) - mean) / std
    np.testing.assert_array_equal(found, expected)
