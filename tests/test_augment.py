"""RandAugment, colour jitter and random erasing: what is drawn, what it does, and that the pipeline repeats it.

The single operations are compared with the reference in tests/golden (tests/test_parity.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from src.config import DataConfig, parse_auto_augment
from src.data import augment
from src.data.augment import (
    ARGUMENTS,
    ColorJitter,
    RandAugment,
    RandomErasing,
    apply_operation,
)
from src.data.transform import ERASE, PIXELS, Transform, generator

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PUBLISHED = "rand-m9-mstd0.5-inc1"


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Smooth colours with all grey levels, (H, W, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_LINEAR)


# --- RandAugment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "level", "argument"),
    [
        ("Posterize", 9.0, 3),  # without inc1 a higher level is weaker
        ("Solarize", 9.0, 230),
        ("Contrast", 9.0, 1.72),
        ("Contrast", 0.0, 0.1),
        ("SolarizeAdd", 9.0, 99),
        ("PosterizeIncreasing", 9.0, 1),
        ("SharpnessIncreasing", 5.0, 1.45),
        ("ShearY", 5.0, 0.15),
    ],
)
def test_the_argument_of_a_level(name: str, level: float, argument: float) -> None:
    assert ARGUMENTS[name](level, 1) == pytest.approx(argument)


@pytest.mark.parametrize(("text", "increasing"), [(PUBLISHED, True), ("rand-m9", False)])
def test_every_operation_that_is_drawn_can_be_applied(text: str, increasing: bool) -> None:
    names = augment.operations_of(parse_auto_augment(text))
    assert len(names) == 15 and ("PosterizeIncreasing" in names) == increasing == ("Posterize" not in names)
    for name in names:
        for level in (0.0, 5.0, 10.0):
            rule = ARGUMENTS.get(name)
            out = apply_operation(picture(), name, rule(level, -1) if rule else None, (1, 2, 3))
            assert out.shape == (32, 32, 3) and out.dtype == np.uint8, name


def test_zero_bits_are_black() -> None:
    assert not apply_operation(picture(), "PosterizeIncreasing", 0, (1, 2, 3)).any()


def by_pillow(image: Image.Image, name: str, argument: float) -> Image.Image:
    """An operation as timm 0.4.12 has it (data/auto_augment.py)."""
    if name == "SolarizeAdd":
        return image.point([min(255, level + int(argument)) if level < 128 else level for level in range(256)] * 3)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(argument)
    rule = getattr(ImageOps, name.lower())
    return rule(image) if name in ("AutoContrast", "Equalize", "Invert") else rule(image, argument)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("AutoContrast", [0]),
        ("Equalize", [0]),
        ("Invert", [0]),
        ("Posterize", [1, 2, 3, 4]),
        ("Solarize", [0, 1, 26, 230, 256]),
        ("SolarizeAdd", [0, 1, 99, 110]),
        ("Color", [0.0, 0.1, 0.5, 1.0, 1.81, 1.9, 2.5]),
        ("Contrast", [0.0, 0.1, 0.5, 1.0, 1.81, 1.9, 2.5]),
        ("Brightness", [0.0, 0.1, 0.5, 1.0, 1.81, 1.9, 2.5]),
        ("Sharpness", [0.0, 0.1, 0.5, 1.0, 1.81, 1.9, 2.5]),
    ],
)
def test_grey_levels_are_those_of_pillow(name: str, arguments: list[float]) -> None:
    rng = np.random.default_rng(0)
    images = [picture(), picture(1, (224, 160)), np.full((9, 7, 3), 200, np.uint8)]
    images += [rng.choice(np.array([0, 255], np.uint8), (40, 30, 3)), rng.integers(3, 5, (1, 300, 3)).astype(np.uint8)]
    images += [rng.integers(rng.integers(200), 256, (*rng.integers(1, 40, 2), 3)).astype(np.uint8) for _ in range(30)]
    for argument in arguments:
        for image in images:
            before = image.copy()
            wanted = np.asarray(by_pillow(Image.fromarray(image), name, argument))
            np.testing.assert_array_equal(apply_operation(image, name, argument, (0, 0, 0)), wanted)
            np.testing.assert_array_equal(image, before)


def test_what_lies_outside_has_the_mean_colour() -> None:
    assert augment.fill_colour((0.485, 0.456, 0.406)) == (124, 116, 104)
    assert augment.fill_colour((0.5,)) == (128, 128, 128)
    out = apply_operation(picture(), "TranslateXRel", 0.5, (9, 8, 7))
    assert (out[:, 17:] == (9, 8, 7)).all() and not (out[:, :16] == (9, 8, 7)).all(axis=2).any()
    np.testing.assert_array_equal(out[:, :16], picture()[:, 16:])  # a positive share moves to the left


def test_the_published_text_draws_what_it_says() -> None:
    change = RandAugment(parse_auto_augment(PUBLISHED), MEAN)
    rng = np.random.default_rng(1)
    drawn = [change.draw(rng) for _ in range(6000)]
    lengths = Counter(len(steps) for steps in drawn)  # two operations, each with probability 0.5
    for length, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert lengths[length] / 6000 == pytest.approx(share, abs=0.03)
    names = Counter(name for steps in drawn for name, _ in steps)
    assert set(names) == set(change.names)
    assert max(names.values()) / min(names.values()) < 1.5  # 400 each
    assert any(len(steps) == 2 and steps[0][0] == steps[1][0] for steps in drawn)  # with replacement
    shear = np.array([value for steps in drawn for name, value in steps if name == "ShearX"], float) / 0.03
    assert (shear > 0).mean() == pytest.approx(0.5, abs=0.12)
    assert np.abs(shear).mean() == pytest.approx(8.99, abs=0.15) and np.abs(shear).std() == pytest.approx(0.49, abs=0.1)
    assert np.abs(shear).max() == pytest.approx(10)  # clipped


def test_number_of_operations_and_fixed_magnitude() -> None:
    change = RandAugment(parse_auto_augment("rand-m4-n5"), MEAN)
    rng = np.random.default_rng(1)
    drawn = [change.draw(rng) for _ in range(500)]
    assert max(map(len, drawn)) == 5 and np.mean([len(steps) for steps in drawn]) == pytest.approx(2.5, abs=0.25)
    assert {value for steps in drawn for name, value in steps if name == "Posterize"} == {1}


# --- colour jitter ----------------------------------------------------------------------------------------------


def test_colour_jitter_changes_brightness_contrast_and_saturation() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)  # only brightness changes it
    jitter = ColorJitter(dict.fromkeys(("Brightness", "Contrast", "Color"), 0.4))
    levels = np.array([jitter(grey, np.random.default_rng(seed))[0, 0, 0] for seed in range(300)])
    assert levels.min() >= 59 and levels.max() <= 141 and levels.min() < 64 and levels.max() > 136
    assert ColorJitter({"Color": 1.5}).ranges == [("Color", 0.0, 2.5)]
    image, out = picture(), jitter(picture(), np.random.default_rng(3))
    rng = np.random.default_rng(3)  # by hand, from the same numbers: float formulas of contrast and saturation
    expected = image.astype(float)
    for number in rng.permutation(3):
        factor = rng.uniform(0.6, 1.4)
        luma = expected @ [0.299, 0.587, 0.114]
        base = [0.0, luma.mean(), luma[..., None]][number]
        expected = np.clip(base + factor * (expected - base), 0, 255)
    assert np.abs(out - expected).max() < 4  # each of three steps rounds, luminance too


# --- random erasing ---------------------------------------------------------------------------------------------


def erased(image: np.ndarray, seed: int, erasing: RandomErasing) -> tuple[np.ndarray, np.ndarray]:
    out = image.copy()
    erasing(out, np.random.default_rng(seed))
    return out, (out != image).any(axis=0)


def test_an_erased_box_is_noise_of_the_stated_size() -> None:
    image = np.full((3, 48, 64), 7.0, np.float32)
    shares, logs, noise = [], [], []
    for seed in range(300):
        out, changed = erased(image, seed, RandomErasing(1.0, (0.02, 1 / 3)))
        rows, cols = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert changed[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()  # one box
        assert len(rows) < 48 and len(cols) < 64 and out.dtype == np.float32
        shares.append(changed.mean())
        logs.append(np.log(len(rows) / len(cols)))
        noise.append(out[:, changed].ravel())
    assert 0.01 < min(shares) < 0.04 and 0.3 < max(shares) < 0.36
    assert np.mean(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert -1.4 < min(logs) < -0.9 and 0.9 < max(logs) < 1.4
    values = np.concatenate(noise)
    assert abs(values.mean()) < 0.01 and values.std() == pytest.approx(1, abs=0.01)


def test_erasing_has_its_probability() -> None:
    image = np.zeros((1, 16, 16), np.float32)
    hits = [erased(image, seed, RandomErasing(0.25, (0.1, 0.2)))[1].any() for seed in range(1500)]
    assert np.mean(hits) == pytest.approx(0.25, abs=0.04)


def test_a_box_as_large_as_the_image_is_not_erased() -> None:
    assert not erased(np.zeros((3, 16, 16), np.float32), 0, RandomErasing(1.0, (1.0, 1.0)))[1].any()


# --- in the transform -------------------------------------------------------------------------------------------


#: the crop is the whole picture, nothing is flipped
WHOLE = DataConfig(mean=MEAN, std=STD, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0)


def transformed(config: DataConfig, number: int = 0, training: bool = True) -> np.ndarray:
    """(channels, 32, 32) of a picture."""
    content = cv2.imencode(".png", picture(number)[..., ::-1])[1].tobytes()
    out = np.empty((len(config.mean), 32, 32), np.float32)
    Transform(config, (32, 32), len(config.mean), training)(content, (3, 1, number, 0), out)
    return out


def by_hand(config: DataConfig, number: int) -> np.ndarray:
    """An image with NumPy, in the order of the published recipes."""
    key, image = (3, 1, number, 0), picture(number)
    if config.auto_augment:
        image = RandAugment(parse_auto_augment(config.auto_augment), MEAN)(image, generator(key, PIXELS))
    if config.color_jitter:
        names = ("Brightness", "Contrast", "Color")
        image = ColorJitter(dict.fromkeys(names, config.color_jitter))(image, generator(key, PIXELS))
    out = ((image / 255.0 - MEAN) / STD).transpose(2, 0, 1).astype(np.float32)
    if config.erasing:
        RandomErasing(config.erasing, config.erasing_area)(out, generator(key, ERASE))
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_augment": "rand-m9-mstd0.5-n4-inc1", "erasing": 0.5},
        {"color_jitter": 0.4},
        {"erasing": 1.0},
        {"interpolation": "bilinear", "erasing": 1.0},
        {},
    ],
    ids=["randaugment and erasing", "jitter", "erasing", "bilinear, erasing", "nothing"],
)
def test_the_transform_equals_the_steps_by_hand(changes: dict[str, object]) -> None:
    config = replace(WHOLE, **changes)  # type: ignore[arg-type]
    differ = 0
    for number in range(8):
        found = transformed(config, number)
        np.testing.assert_allclose(found, by_hand(config, number), atol=1e-5)
        differ += not np.array_equal(found, transformed(WHOLE, number))
    assert differ >= (4 if changes else 0)


def test_evaluation_is_not_augmented() -> None:
    config = replace(WHOLE, auto_augment=PUBLISHED, erasing=1.0)
    np.testing.assert_array_equal(transformed(config, training=False), transformed(WHOLE, training=False))


def test_grey_images_are_augmented_in_colour_and_erased_in_grey() -> None:
    config = replace(WHOLE, mean=(0.5,), std=(0.25,))
    plain, found = transformed(config), transformed(replace(config, auto_augment=PUBLISHED, erasing=1.0))
    assert found.shape == plain.shape == (1, 32, 32)
    assert not np.array_equal(found, plain)
