"""Methods: losses against numpy, gradients for every parameter, learning on a fixed batch, evaluation sums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from src.config import (
    ClassifyConfig,
    DataConfig,
    HOGConfig,
    MIMConfig,
    PixelsConfig,
    Recipe,
    TrainConfig,
    TransformerDecoderConfig,
    ViTConfig,
)
from src.engine.evaluate import evaluate
from src.engine.optim import build_optimizer
from src.engine.step import TrainStep
from src.methods import build_method
from src.models.graph import AsGraph
from tests.helpers import counted, numbers, snapshot

pytestmark = pytest.mark.usefixtures("graph_mode")

BATCH, SIDE, CLASSES = 4, 32, 3
ENCODER = ViTConfig(image_size=(SIDE, SIDE), patch_size=8, embed_dim=32, depth=2, num_heads=2)
DECODER = TransformerDecoderConfig(width=32, depth=1)
METHODS: dict[str, MIMConfig | ClassifyConfig] = {
    "hog": MIMConfig(mask_block=8, target=HOGConfig(cell=4), decoder=DECODER),
    "pixels": MIMConfig(mask_block=16, target=PixelsConfig(), decoder=DECODER),
    "patch pixels": MIMConfig(mask_block=4, target=PixelsConfig(normalize="patch"), decoder=DECODER),
    "classify": ClassifyConfig(num_classes=CLASSES, label_smoothing=0.1),
}


def build(name: str) -> Any:
    ms.set_seed(1)
    return build_method(Recipe(encoder=ENCODER, method=METHODS[name], data=DataConfig()))


def batch_of(name: str) -> tuple[Tensor, ...]:
    image = Tensor(numbers(0, BATCH, 3, SIDE, SIDE))
    return (image, Tensor(np.arange(BATCH, dtype=np.int32) % CLASSES)) if name == "classify" else (image,)


def masks_of(method: Any) -> Tensor:
    """The masks of images 0, 1, ... in evaluation."""
    return method.mask.of_numbers(Tensor(np.arange(BATCH, dtype=np.int32)))


# --- training ---------------------------------------------------------------------------------------------------


class Course:
    """Thirty steps on one batch: what a method's training tests look at."""

    def __init__(self, name: str):
        self.method = build(name)
        train = TrainConfig(betas=(0.9, 0.95), weight_decay=0.0)
        optimizer = build_optimizer(self.method, train)
        step = TrainStep(self.method, optimizer)
        step.set_train(True)
        self.names = [p.name for p in optimizer.weights]
        self.start = snapshot(optimizer.weights)
        self.losses, self.norms = [], []
        for number in range(30):
            values = optimizer.step_values(lambda scale: 3e-3 * scale, number + 1)
            loss, sums, norm = counted(step, BATCH, values, *batch_of(name))
            assert self.method.baseline(sums.asnumpy()) > 0
            self.losses.append(float(loss))
            self.norms.append(float(norm))
            if number == 0:  # the first moment is then a tenth of the gradient
                moments = zip(self.names, optimizer.first, strict=True)
                self.gradients = {key: moment.asnumpy() / 0.1 for key, moment in moments}
            if number == 1:
                self.second = snapshot(optimizer.weights)


@pytest.fixture(scope="module", params=list(METHODS))
def course(request: pytest.FixtureRequest, graph_mode: None, compiled: None) -> Iterator[Course]:
    yield Course(request.param)


def test_two_steps_are_finite_and_change_every_parameter(course: Course) -> None:
    assert np.isfinite(course.losses).all() and np.isfinite(course.norms).all()
    for name in course.names:
        assert np.isfinite(course.second[name]).all()
        assert not np.array_equal(course.second[name], course.start[name]), name


def test_every_trained_parameter_has_a_gradient_except_key_biases(course: Course) -> None:
    assert any(name.endswith("qkv.bias") for name in course.names)
    for name, gradient in course.gradients.items():
        if name.endswith("qkv.bias"):
            query, key, value = np.split(gradient, 3)
            assert np.abs(key).max() < 1e-3 * np.abs(value).max()  # softmax does not see a shift of the keys
            assert np.abs(query).max() > 0 and np.abs(value).max() > 0
        else:
            assert (gradient != 0).mean() > 0.9, name
    total = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in course.gradients.values()))
    assert course.norms[0] == pytest.approx(total, rel=1e-4)


def test_the_loss_falls_on_a_fixed_batch(course: Course) -> None:
    first, last = np.mean(course.losses[:3]), np.mean(course.losses[-3:])
    assert last < 0.93 * first, course.losses


def test_positions_with_a_fixed_table_are_not_trained(course: Course) -> None:
    assert not any(name.endswith("pos_embed") for name in course.names)


# --- losses against numpy ---------------------------------------------------------------------------------------


def expected_weights(name: str, mask: np.ndarray, method: Any) -> np.ndarray:
    """1 where a target value lies under a masked block, by asking the layout of the target itself."""
    side = SIDE // mask.shape[1]
    pixels = mask.repeat(side, axis=1).repeat(side, axis=2)
    if name == "hog":  # hidden cells; a block holds whole cells
        cells = pixels[:, ::4, ::4]
        tokens = cells.reshape(BATCH, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(BATCH, 16, 1, 4)
        return np.broadcast_to(tokens, (BATCH, 16, 27, 4)).reshape(BATCH, 16, 108)
    planes = np.broadcast_to(pixels[:, None], (BATCH, 3, SIDE, SIDE))
    tokens = planes.reshape(BATCH, 3, 4, 8, 4, 8).transpose(0, 2, 4, 3, 5, 1)
    return tokens.reshape(BATCH, 16, method.target.dim)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["hog", "pixels", "patch pixels"])
def test_loss_and_constant_predictor_equal_numpy(name: str) -> None:
    method = build(name)
    (image,) = batch_of(name)
    mask = masks_of(method)
    run = AsGraph(method, method.run)
    loss, sums, prediction, target = (part.asnumpy().astype(np.float64) for part in run(image, mask))
    weights = expected_weights(name, mask.asnumpy(), method)
    assert prediction.shape == target.shape == weights.shape
    assert 0 < weights.mean() < 1
    assert loss == pytest.approx((weights * (prediction - target) ** 2).sum() / weights.sum(), rel=1e-5)
    mean = (weights * target).sum(axis=(0, 1)) / np.maximum(weights.sum(axis=(0, 1)), 1)
    assert method.baseline(sums) == pytest.approx((weights * (target - mean) ** 2).sum() / weights.sum(), rel=1e-5)
    # a network that predicts the mean target whatever it sees has exactly the constant predictor's loss
    method.decoder.pred.weight.set_data(ms.ops.zeros_like(method.decoder.pred.weight))
    method.decoder.pred.bias.set_data(Tensor(mean.astype(np.float32)))
    loss, sums, _, _ = run(image, mask)
    assert float(loss) / method.baseline(sums.asnumpy().astype(np.float64)) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.compiles
def test_masked_pixels_do_not_reach_the_encoder() -> None:
    method = build("hog")
    (image,) = batch_of("hog")
    mask = masks_of(method)
    pixels = mask.asnumpy().repeat(8, axis=1).repeat(8, axis=2)[:, None]
    hide = AsGraph(method, method.hide)
    hidden = hide(image, mask).asnumpy().copy()
    colour = method.mask_token.asnumpy()
    assert np.abs(colour).min() > 0
    np.testing.assert_allclose(hidden, image.asnumpy() * (1 - pixels) + colour * pixels, atol=1e-7)
    other = Tensor(image.asnumpy() + 5 * pixels)
    np.testing.assert_array_equal(hide(other, mask).asnumpy(), hidden)


@pytest.mark.compiles
def test_the_mask_changes_from_step_to_step_but_not_in_evaluation() -> None:
    method = build("hog")
    first, second = (masks_of(method).asnumpy().copy() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (BATCH, 4, 4) and len({sample.tobytes() for sample in first}) == BATCH
    np.testing.assert_array_equal(first.sum(axis=(1, 2)), 12)
    (image,) = batch_of("hog")
    losses = {float(counted(method, BATCH, image)[0]) for _ in range(3)}
    assert len(losses) == 3


@pytest.mark.compiles
def test_classification_loss_equals_numpy() -> None:
    method = build("classify")
    method.classifier.head.weight.set_data(Tensor(numbers(2, CLASSES, 32)))
    image, label = batch_of("classify")
    logits = method.classifier(image).asnumpy().astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.eye(CLASSES)[label.asnumpy()] * 0.9 + 0.1 / CLASSES
    loss, sums = method(image, label)
    assert float(loss) == pytest.approx(-(target * log_p).sum(axis=1).mean(), rel=1e-5)
    mean = target.mean(axis=0)
    assert method.baseline(sums.asnumpy()) == pytest.approx(-(mean * np.log(mean)).sum(), rel=1e-5)
    soft = np.random.default_rng(0).dirichlet(np.ones(CLASSES), BATCH).astype(np.float32)
    loss, _ = method(image, Tensor(soft))  # soft targets are taken as they are
    assert float(loss) == pytest.approx(-(soft * log_p).sum(axis=1).mean(), rel=1e-5)


# --- evaluation -------------------------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["hog", "classify"])
def test_padding_does_not_count(name: str) -> None:
    method = build(name)
    if name == "classify":
        method.classifier.head.weight.set_data(Tensor(numbers(2, CLASSES, 32)))
    measure = AsGraph(method, method.measure)
    image = numbers(0, BATCH, 3, SIDE, SIDE)
    label = np.array([0, 1, -1, -1], np.int32)
    number = Tensor(np.arange(BATCH, dtype=np.int32))

    def sums_of(image: np.ndarray) -> np.ndarray:
        return measure(Tensor(image), Tensor(label), number).asnumpy().copy()

    sums = sums_of(image)
    assert sums[0] == 2
    other = image.copy()
    other[2:] = 3 * numbers(7, 2, 3, SIDE, SIDE)
    np.testing.assert_array_equal(sums_of(other), sums)
    other[0] = image[3]  # a change in an image that counts is seen
    assert not np.allclose(sums_of(other)[1:], sums[1:])
    # the counted loss is the mean over the counted images alone
    if name == "classify":
        logits = method.classifier(Tensor(image)).asnumpy()[:2].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert sums[1] == pytest.approx(-log_p[[0, 1], [0, 1]].sum(), rel=1e-4)
    else:
        mask = masks_of(method)
        loss, *_ = AsGraph(method, method.run)(Tensor(image[:2]), Tensor(mask.asnumpy()[:2]))
        assert method.metrics(sums)["loss"] == pytest.approx(float(loss), rel=1e-4)


class CountingMethod(ms.nn.Cell):
    """measure() gives sums that are easy to follow."""

    def measure(self, image: Tensor, label: Tensor) -> Tensor:
        counted = (label >= 0).astype(ms.float32)
        return ms.ops.stack((counted.sum(), (image * counted).sum(), (label == 1).astype(ms.float32).sum()))


def test_evaluate_adds_over_all_images() -> None:
    method = CountingMethod()
    measure = AsGraph(method, method.measure)
    method.set_train(True)
    batches = [([1.0, 2.0], [0, 1]), ([6.0, 100.0], [1, -1])]
    tensors = [(Tensor(np.array(x, np.float32)), Tensor(np.array(y, np.int32))) for x, y in batches]
    assert evaluate(measure, tensors).tolist() == [3.0, 9.0, 2.0]
    assert not method.training


@pytest.mark.compiles
def test_top_five_of_fewer_classes_is_everything() -> None:
    method = build("classify")
    image, label = batch_of("classify")
    number = Tensor(np.arange(BATCH, dtype=np.int32))
    found = method.metrics(AsGraph(method, method.measure)(image, label, number).asnumpy())
    assert (found["count"], found["top5"]) == (BATCH, 1.0) and found["top1"] <= 1.0


def test_layers_and_spared_names_exist() -> None:
    for name in METHODS:
        method = build(name)
        names = {p.name for p in method.get_parameters()}
        assert method.no_weight_decay() <= names
        layers = {key: method.layer_of(key) for key in names}
        assert set(layers.values()) == set(range(method.num_layers))
        tops = [key for key in names if not key.startswith("encoder.")]
        assert tops and {layers[key] for key in tops} == {method.num_layers - 1}
