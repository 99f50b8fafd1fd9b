"""Mixup and CutMix: what is drawn, what is mixed, that evaluation never mixes and a resumed run mixes the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from scipy.stats import beta, kstest

from src.config import ClassifyConfig, Recipe, TrainConfig, ViTConfig
from src.engine import checkpoint
from src.methods import Classify, build_method
from src.methods.mixing import BetaQuantile, Mixing, cut_box, mix
from src.models.graph import AsGraph
from tests.helpers import counted, numbers

pytestmark = pytest.mark.usefixtures("graph_mode")

CLASSES, SMOOTHING = 6, 0.1
BOTH = ClassifyConfig(num_classes=CLASSES, mixup=0.8, cutmix=1.0)


def mixing(**changes: Any) -> Mixing:
    ms.set_seed(0)
    return Mixing(dataclasses.replace(BOTH, **changes))


# --- what is drawn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.4, 1e-6), (0.8, 1e-5), (1.0, 1e-6), (2.0, 3e-3)])
def test_quantiles_of_the_beta_distribution(alpha: float, tolerance: float) -> None:
    uniform = np.concatenate([[0], np.random.default_rng(0).random(20000), [1 - 2**-24]]).astype(np.float32)
    ours = BetaQuantile(alpha)(Tensor(uniform)).asnumpy()
    assert ours.min() >= 0 and ours.max() <= 1
    np.testing.assert_allclose(ours, beta(alpha, alpha).ppf(uniform), atol=tolerance)


class Draws(nn.Cell):
    """What a `Mixing` draws for a batch."""

    def __init__(self, cell: Mixing):
        super().__init__()
        self.cell = cell

    def construct(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.cell.draw(image)


def draws(cell: Mixing, count: int, size: tuple[int, int] = (32, 48)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    graph, image = Draws(cell), Tensor(np.zeros((2, 1, *size), np.float32))
    rows = [[part.asnumpy().copy() for part in counted(graph, 2, image)] for _ in range(count)]
    lam, box, cutmix = (np.array(column) for column in zip(*rows, strict=True))
    return lam, box, cutmix


@pytest.fixture(scope="module")
def many(graph_mode: None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return draws(mixing(mixup_prob=0.8, mixup_switch_prob=0.3), 3000)


@pytest.mark.compiles
def test_lambda_has_its_distribution_and_both_probabilities(many: tuple[np.ndarray, ...]) -> None:
    lam, _, cutmix = many
    mixed = lam < 1
    assert mixed.mean() == pytest.approx(0.8, abs=0.03)
    assert cutmix.mean() == pytest.approx(0.3, abs=0.03)
    assert kstest(lam[mixed & ~cutmix], beta(0.8, 0.8).cdf).pvalue > 1e-3
    assert kstest(lam[mixed & cutmix], beta(1.0, 1.0).cdf).pvalue > 1e-3


def test_boxes_cover_one_minus_lambda_and_stay_inside(many: tuple[np.ndarray, ...]) -> None:
    lam, box, cutmix = many
    top, bottom, left, right = box[cutmix & (lam < 1)].T
    assert (top >= 0).all() and (top <= bottom).all() and (bottom <= 32).all()
    assert (left >= 0).all() and (left <= right).all() and (right <= 48).all()
    whole = (top > 0) & (left > 0) & (bottom < 32) & (right < 48)  # not cut off at a border
    area = ((bottom - top) * (right - left) / (32 * 48))[whole]
    wanted = (1 - lam[cutmix & (lam < 1)])[whole]
    assert whole.sum() > 100 and (area <= wanted + 1e-6).all() and np.abs(area - wanted).max() < 0.12
    centre = (top + bottom)[whole & (bottom > top)] / 2
    assert centre.min() < 5 and centre.max() > 27
    assert (box[lam == 1][:, 0] == box[lam == 1][:, 1]).all()  # nothing is cut where nothing is mixed


@pytest.mark.compiles
@pytest.mark.parametrize(("off", "cutmix"), [("mixup", True), ("cutmix", False)])
def test_one_kind_alone(off: str, cutmix: bool) -> None:
    lam, _, found = draws(mixing(**{off: 0.0}), 40)
    assert (found == cutmix).all() and (lam < 1).all() and len(set(lam.tolist())) == 40


@pytest.mark.compiles
def test_the_sequence_repeats_and_continues() -> None:
    first = draws(mixing(), 6)
    for ours, again in zip(first, draws(mixing(), 6), strict=True):
        np.testing.assert_array_equal(ours, again)
    assert len(set(first[0].tolist())) == 6
    resumed = mixing()
    resumed.uniform.draws.set_data(Tensor(4, ms.int64))
    for ours, later in zip(first, draws(resumed, 2), strict=True):
        np.testing.assert_array_equal(ours[4:], later)


class Box(nn.Cell):
    def construct(self, lam: Tensor, centre: Tensor) -> Tensor:
        return cut_box(lam, centre, 9, 30)


@pytest.mark.parametrize(
    ("lam", "centre", "box"),
    [
        (0.75, (4, 10), (2, 6, 3, 17)),  # 4.5 x 15: 4 rows, 15 columns less one
        (0.75, (0, 29), (0, 2, 22, 30)),
        (0.0, (4, 15), (0, 8, 0, 30)),
        (1.0, (4, 15), (4, 4, 15, 15)),
        (0.99, (4, 15), (4, 4, 14, 16)),  # no whole row
    ],
)
def test_boxes_round_as_in_timm(lam: float, centre: tuple[int, int], box: tuple[int, ...]) -> None:
    found = Box()(Tensor(lam, ms.float32), Tensor(centre, ms.float32)).asnumpy()
    assert tuple(found) == box


# --- what is mixed ----------------------------------------------------------------------------------------------


class Mix(nn.Cell):
    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return mix(*inputs)


@pytest.mark.compiles
@pytest.mark.parametrize("cutmix", [False, True])
def test_images_and_targets_are_mixed_in_the_same_share(cutmix: bool) -> None:
    image, target = numbers(0, 4, 3, 6, 10), np.random.default_rng(1).dirichlet(np.ones(5), 4).astype(np.float32)
    box = (1, 4, 2, 9)
    inputs = (Tensor(image), Tensor(target), Tensor(0.3, ms.float32), Tensor(box, ms.int32), Tensor(cutmix))
    mixed, soft = (part.asnumpy() for part in Mix()(*inputs))
    for number in range(4):
        partner = 3 - number
        share = 1 - 3 * 7 / 60 if cutmix else 0.3
        expected = image[number] * 0.3 + image[partner] * 0.7
        if cutmix:
            expected = image[number].copy()
            expected[:, 1:4, 2:9] = image[partner][:, 1:4, 2:9]
        np.testing.assert_allclose(mixed[number], expected, atol=0 if cutmix else 1e-6)
        np.testing.assert_allclose(soft[number], target[number] * share + target[partner] * (1 - share), atol=1e-6)


@pytest.mark.compiles
def test_soft_targets_sum_to_one_and_smooth_both_labels() -> None:
    cell = mixing(cutmix=0.0)
    label = np.array([0, 1, 2, 1], np.int32)
    (lam,), *_ = draws(mixing(cutmix=0.0), 1, (8, 8))
    _, soft = cell(Tensor(numbers(0, 4, 3, 8, 8)), Tensor(label))
    hot = np.eye(CLASSES)[label]
    expected = (hot * lam + hot[::-1] * (1 - lam)) * (1 - SMOOTHING) + SMOOTHING / CLASSES
    np.testing.assert_allclose(soft.asnumpy(), expected, atol=1e-6)
    np.testing.assert_allclose(soft.asnumpy().sum(axis=1), 1, atol=1e-6)


# --- in the method ----------------------------------------------------------------------------------------------


def recipe_of(method: ClassifyConfig) -> Recipe:
    encoder = ViTConfig(image_size=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2)
    return Recipe(encoder=encoder, method=dataclasses.replace(method, head_std=0.5), train=TrainConfig(batch_size=4))


def method_of(config: ClassifyConfig) -> Classify:
    ms.set_seed(0)
    method = build_method(recipe_of(config))
    assert isinstance(method, Classify)
    return method


def test_without_mixing_nothing_is_drawn() -> None:
    for config in (dataclasses.replace(BOTH, mixup_prob=0.0), dataclasses.replace(BOTH, mixup=0.0, cutmix=0.0)):
        method = method_of(config)
        assert method.mixing is None and not checkpoint.counters_of(method)
    assert len(checkpoint.counters_of(method_of(BOTH))) == 1


def flat(outputs: tuple[Tensor, ...]) -> list[float]:
    """All numbers of several tensors."""
    return [float(number) for part in outputs for number in part.asnumpy().reshape(-1)]


@pytest.mark.compiles
def test_training_mixes_and_evaluation_does_not() -> None:
    plain, mixes = method_of(ClassifyConfig(num_classes=CLASSES)), method_of(BOTH)
    image, label = Tensor(numbers(0, 4, 3, 32, 32)), Tensor(np.array([0, 1, 2, 3], np.int32))
    mixed, soft = mixing()(image, label)  # the same seed
    wanted = flat(plain.set_train(True)(mixed, soft))
    found = flat(counted(mixes.set_train(True), 4, image, label))
    assert found == pytest.approx(wanted, rel=1e-5)
    unmixed = flat(plain(image, label))
    assert abs(found[0] - unmixed[0]) > 1e-3
    assert found[1:] == pytest.approx(unmixed[1:], rel=1e-5)  # the mean target and so the baseline stay
    assert flat(mixes.set_train(False)(image, label)) == pytest.approx(unmixed, rel=1e-6)
    count = int(mixes.mixing.uniform.draws.asnumpy())
    number, methods = Tensor(np.arange(4, dtype=np.int32)), (plain, mixes.set_train(True))
    sums = [AsGraph(method, method.measure)(image, label, number).asnumpy().tolist() for method in methods]
    assert sums[0] == sums[1] and int(mixes.mixing.uniform.draws.asnumpy()) == count
