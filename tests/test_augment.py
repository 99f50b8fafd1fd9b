"""RandAugment, colour jitter and random erasing: what is drawn, what it does, and that the pipeline repeats it.

The single operations are compared with the reference in tests/golden (tests/test_parity.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from src.config import DataConfig, parse_auto_augment
from src.data import augment
from src.data.augment import (
    ARGUMENTS,
    ColorJitter,
    RandAugment,
    RandomErasing,
    ResizedCrop,
    apply_operation,
    resized_crop,
)
from src.data.loader import Loader, _FileReader
from src.data.sources import ImageFolder, image_folder

pytestmark = pytest.mark.usefixtures("graph_mode")

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
    image = Image.fromarray(picture())
    for name in names:
        for level in (0.0, 5.0, 10.0):
            rule = ARGUMENTS.get(name)
            out = np.asarray(apply_operation(image, name, rule(level, -1) if rule else None, (1, 2, 3)))
            assert out.shape == (32, 32, 3) and out.dtype == np.uint8, name


def test_zero_bits_are_black() -> None:
    assert not np.asarray(apply_operation(Image.fromarray(picture()), "PosterizeIncreasing", 0, (1, 2, 3))).any()


def test_what_lies_outside_has_the_mean_colour() -> None:
    assert augment.fill_colour((0.485, 0.456, 0.406)) == (124, 116, 104)
    assert augment.fill_colour((0.5,)) == (128, 128, 128)
    out = np.asarray(apply_operation(Image.fromarray(picture()), "TranslateXRel", 0.5, (9, 8, 7)))
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
    grey = Image.fromarray(np.full((4, 4, 3), 100, np.uint8))  # only brightness changes it
    jitter = ColorJitter(0.4)
    levels = np.array([np.asarray(jitter(grey, np.random.default_rng(seed)))[0, 0, 0] for seed in range(300)])
    assert levels.min() >= 59 and levels.max() <= 141 and levels.min() < 64 and levels.max() > 136
    assert ColorJitter(1.5).low == 0
    image, out = picture(), np.asarray(jitter(Image.fromarray(picture()), np.random.default_rng(3)))
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
    out = erasing(image, np.random.default_rng(seed))
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
    assert (image == 7).all()  # the input is left alone
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


# --- bilinear crops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((100, 400), (1.0, 1.0), (0, 133, 100, 133)),
        ((300, 90), (1.0, 1.0), (90, 0, 120, 90)),
        ((120, 160), (1.2, 1.3), (0, 0, 120, 160)),
        ((200, 333), (1.0, 1.0), (0, 33, 200, 267)),
    ],
)
def test_a_box_that_never_fits_becomes_torchvisions_central_one(
    size: tuple[int, int], scale: tuple[float, float], expected: tuple[int, ...]
) -> None:
    crop = ResizedCrop((8, 8), scale, (3 / 4, 4 / 3))
    assert crop.draw(*size, np.random.default_rng(0)) == expected


def test_boxes_have_the_stated_areas_and_shapes_and_reach_every_edge() -> None:
    crop, rng = ResizedCrop((8, 8), (0.2, 0.6), (3 / 4, 4 / 3)), np.random.default_rng(0)
    boxes = np.array([crop.draw(90, 120, rng) for _ in range(4000)])
    top, left, rows, cols = boxes.T
    area, aspect = rows * cols / (90 * 120), cols / rows
    assert 0.19 < area.min() < 0.21 and 0.59 < area.max() < 0.61 and abs(area.mean() - 0.4) < 0.01
    assert 0.73 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.36 and abs(np.log(aspect).mean()) < 0.01
    assert top.min() == left.min() == 0 and (top + rows).max() == 90 and (left + cols).max() == 120


def test_nothing_outside_the_box_has_an_influence() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:30, 20:50] = 200
    found = resized_crop(Image.fromarray(image), (10, 20, 20, 30), (7, 9))
    assert found.size == (9, 7) and (np.asarray(found) == 200).all()


# --- in the pipeline --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    root = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        folder = root / f"class_{number % 2}"
        folder.mkdir(exist_ok=True)
        assert cv2.imwrite(str(folder / f"{number}.png"), picture(number))
    return image_folder(root)


#: the crop is the whole picture, nothing is flipped
WHOLE = DataConfig(mean=MEAN, std=STD, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0, workers=2)


def images_of(source: ImageFolder, config: DataConfig, epoch: int = 0, **more: object) -> np.ndarray:
    channels = len(config.mean)
    loader = Loader(source, config, (32, 32), channels, 4, ("image",), seed=3, **more)  # type: ignore[arg-type]
    return np.concatenate([batch[0].asnumpy() for batch in loader.epoch(epoch)])


def by_hand(source: ImageFolder, config: DataConfig, epoch: int) -> np.ndarray:
    """The images of an epoch with Pillow and NumPy, in the order of the published recipes."""
    loader = Loader(source, config, (32, 32), 3, 4, ("image",), seed=3)
    files = _FileReader(source, loader.order(epoch), loader._operation_seed(epoch))
    rows = []
    for position, index in enumerate(loader.order(epoch)):
        image, key = np.asarray(Image.open(source.files[index])), files[position][3]
        cut, pixels, normalised = (
            augment.crop_augmentation(config, (32, 32)),
            augment.pixel_augmentation(config),
            augment.erasing_augmentation(config),
        )
        image = image if cut is None else cut(image, key)[0]
        image = image if pixels is None else pixels(image, key)[0]
        image = ((image / 255.0 - MEAN) / STD).transpose(2, 0, 1).astype(np.float32)
        rows.append(image if normalised is None else normalised(image, key)[0])
    return np.stack(rows)


BILINEAR = {"interpolation": "bilinear", "crop_scale": (0.3, 0.8)}


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_augment": "rand-m9-mstd0.5-n4-inc1", "erasing": 0.5},
        {"color_jitter": 0.4},
        {"erasing": 1.0},
        BILINEAR,
        BILINEAR | {"erasing": 1.0},
        {},
    ],
    ids=["randaugment and erasing", "jitter", "erasing", "bilinear", "bilinear, erasing", "nothing"],
)
def test_the_pipeline_equals_the_steps_by_hand(source: ImageFolder, changes: dict[str, object]) -> None:
    config = replace(WHOLE, **changes)  # type: ignore[arg-type]
    found = images_of(source, config, epoch=1)
    np.testing.assert_allclose(found, by_hand(source, config, 1), atol=2e-5)
    plain = images_of(source, WHOLE, epoch=1)
    assert [not np.array_equal(a, b) for a, b in zip(found, plain, strict=True)].count(True) >= (4 if changes else 0)


def test_augmentation_repeats_whatever_the_number_of_workers(source: ImageFolder) -> None:
    config = replace(WHOLE, auto_augment=PUBLISHED, erasing=0.5)
    first = images_of(source, config, epoch=1)
    other = images_of(source, config, epoch=2)
    np.testing.assert_array_equal(images_of(source, config, epoch=1), first)  # what resuming needs
    np.testing.assert_array_equal(images_of(source, replace(config, workers=1), epoch=1), first)
    assert not np.allclose(np.sort(first.mean(axis=(1, 2, 3))), np.sort(other.mean(axis=(1, 2, 3))), atol=1e-4)


def test_evaluation_is_not_augmented(source: ImageFolder) -> None:
    config = replace(WHOLE, auto_augment=PUBLISHED, erasing=1.0)
    np.testing.assert_array_equal(images_of(source, config, training=False), images_of(source, WHOLE, training=False))


def test_grey_images_are_augmented_in_colour_and_erased_in_grey(source: ImageFolder) -> None:
    config = replace(WHOLE, mean=(0.5,), std=(0.25,))
    plain = images_of(source, config)
    found = images_of(source, replace(config, auto_augment=PUBLISHED, erasing=1.0))
    assert found.shape == plain.shape == (8, 1, 32, 32)
    assert all(not np.array_equal(a, b) for a, b in zip(found, plain, strict=True))


def test_two_places_of_an_image_in_an_epoch_differ(source: ImageFolder) -> None:
    files = _FileReader(source, np.array([5, 5, 2]), 11)
    keys = [tuple(files[position][3]) for position in range(3)]
    assert len(set(keys)) == 3
    assert Path(source.files[5]).read_bytes() == files[0][0].tobytes() == files[1][0].tobytes()
