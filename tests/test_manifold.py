"""Manifold distillation: losses against numpy formulas, which tokens are drawn, and a teacher that stays as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from src.config import ManifoldConfig, Recipe, SwinConfig, TrainConfig, ViTConfig, relation_maps
from src.engine.checkpoint import counters_of, weights_of
from src.engine.optim import build_optimizer
from src.engine.step import TrainStep
from src.methods import build_method
from src.methods.manifold import Relations, draw_tokens, merge, soft_distance
from src.models import build_classifier
from src.models.graph import AsGraph
from tests.helpers import counted, numbers, snapshot

pytestmark = pytest.mark.usefixtures("graph_mode")

BATCH, SIDE, CLASSES = 4, 32, 3
STUDENT = ViTConfig(image_size=(SIDE, SIDE), patch_size=8, embed_dim=16, depth=2, num_heads=2, drop_path=0.3)
TEACHER = ViTConfig(image_size=(SIDE, SIDE), patch_size=8, embed_dim=24, depth=3, num_heads=2, class_token=False)
CONFIG = ManifoldConfig(
    num_classes=CLASSES,
    teacher_encoder=TEACHER,
    student_layers=(0, 1, 1),
    teacher_layers=(0, 2, 1),
    samples=10,
    label_smoothing=0.1,
)


# --- formulas ---------------------------------------------------------------------------------------------------


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def merged(x: np.ndarray, side: int) -> np.ndarray:
    """Tokens of a square map joined to side x side, one by one."""
    whole = int(np.sqrt(x.shape[1]))
    joined = whole // side
    grid = x.reshape(len(x), whole, whole, -1)
    blocks = [
        grid[:, row * joined : (row + 1) * joined, col * joined : (col + 1) * joined].reshape(len(x), -1)
        for row in range(side)
        for col in range(side)
    ]
    return np.stack(blocks, axis=1)


def relation_losses(student: np.ndarray, teacher: np.ndarray, index: np.ndarray) -> np.ndarray:
    """sample, patch, rand: mean squared difference of cosine similarities, in double precision."""
    s, t = unit(student.astype(np.float64)), unit(teacher.astype(np.float64))
    patch = np.einsum("bnc,bmc->bnm", s, s) - np.einsum("bnc,bmc->bnm", t, t)
    sample = np.einsum("bnc,dnc->nbd", s, s) - np.einsum("bnc,dnc->nbd", t, t)
    some_s, some_t = (x.reshape(-1, x.shape[-1])[index] for x in (s, t))
    rand = some_s @ some_s.T - some_t @ some_t.T
    return np.array([np.mean(difference**2) for difference in (sample, patch, rand)])


@pytest.mark.compiles
def test_relations_are_the_written_formula() -> None:
    """Pairs with a class token on one side, on both (then it takes part), with maps of two sizes merged to one, with a
    distillation token besides (the student's surplus is cut off), and with a class token of the teacher alone."""
    maps = tuple((size, (4, 4), (4, 4)) for size in ((4, 4), (4, 4), (8, 8), (4, 4), (4, 4)))
    config = replace(CONFIG, max_patch_num=16, w_sample=0.5, w_patch=2.0, w_rand=0.25, beta=3.0)
    sizes = ((17, 6), (17, 5), (65, 4), (18, 3), (16, 5))
    students = [numbers(number, BATCH, *size) for number, size in enumerate(sizes)]
    teachers = [numbers(number, BATCH, count, number) for number, count in enumerate((16, 17, 17, 17, 17), 5)]
    rng = np.random.default_rng(0)
    indices = [rng.permutation(BATCH * count)[:10] for count in (16, 17, 16, 17, 16)]
    pairs = [
        (students[0][:, 1:], teachers[0]),
        (students[1], teachers[1]),
        (merged(students[2][:, 1:], 4), teachers[2][:, 1:]),
        (students[3][:, 1:], teachers[3]),
        (students[4], teachers[4][:, 1:]),
    ]
    found = [relation_losses(s, t, index) for (s, t), index in zip(pairs, indices, strict=True)]
    expected = 3.0 * np.mean(found, axis=0) * [0.5, 2.0, 0.25]

    def tensors(arrays: list[np.ndarray]) -> tuple[Tensor, ...]:
        return tuple(Tensor(array) for array in arrays)

    given = tuple(Tensor(index.astype(np.int32)) for index in indices)
    ours = Relations(config, maps)(tensors(students), tensors(teachers), given)
    np.testing.assert_allclose([float(part) for part in ours[:3]], expected, rtol=1e-5)
    flat = [np.ones_like(s) for s, _ in pairs]
    constant = [relation_losses(s, t, index) for s, (_, t), index in zip(flat, pairs, indices, strict=True)]
    assert float(ours[3]) == pytest.approx(3.0 * float(np.mean(constant, axis=0) @ [0.5, 2.0, 0.25]), rel=1e-5)


def test_merging_joins_neighbours_and_leaves_small_maps() -> None:
    x = numbers(0, 2, 36, 5)
    np.testing.assert_array_equal(merge(Tensor(x), 10).asnumpy(), merged(x, 3))
    assert merge(Tensor(x), 36).shape == merge(Tensor(x), 0).shape == (2, 36, 5)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    """KL of two tables of log probabilities, summed over classes, mean over rows."""
    return float((np.exp(teacher) * (teacher - student)).sum() / len(teacher))


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_the_written_formula(tau: float) -> None:
    student, teacher = numbers(0, 5, 7), 3 * numbers(1, 5, 7)
    theirs = log_softmax(teacher / tau)
    expected = tau**2 * divergence(theirs, log_softmax(student / tau))
    assert float(soft_distance(Tensor(student), Tensor(teacher), tau)) == pytest.approx(expected, rel=1e-5)
    best = np.log(np.exp(theirs).mean(axis=0, keepdims=True))
    # the baseline of the logits alone, from sums
    method = build(STUDENT, tau=tau, beta=0.0, alpha=1.0, num_classes=7)
    taught = [part.asnumpy() for part in method.distance(Tensor(student), Tensor(teacher))[1:]]
    sums = np.concatenate([[5.0, taught[1], 0.0], np.ones(7), taught[0].sum(axis=0)])
    assert method.baseline(sums) == pytest.approx(tau**2 * divergence(theirs, best), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1, 30, 300])
def test_soft_distillation_of_close_and_of_far_logits(scale: float) -> None:
    """From two log-softmax a divergence of 2e-7 would be rounding; logits 300 apart have no exponential in float32."""
    student, teacher = scale * numbers(0, 5, 7), scale * numbers(1, 5, 7)
    tau = np.float64(3.0)

    def logs(x: np.ndarray) -> np.ndarray:
        return log_softmax((x - x.max(-1, keepdims=True)) / tau)

    expected = tau**2 * divergence(logs(teacher), logs(student))
    value, slope = SoftDistance()(Tensor(student), Tensor(teacher))
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    pull = (np.exp(logs(student)) - np.exp(logs(teacher))) * tau / len(student)
    np.testing.assert_allclose(slope.asnumpy(), pull, atol=max(2e-5 * np.abs(pull).max(), 3e-8))


class SoftDistance(nn.Cell):
    """`soft_distance` at temperature 3 and its gradient for the student's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.both = ops.value_and_grad(soft_distance)

    def construct(self, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return self.both(logits, teacher, 3.0)


# --- tokens drawn -----------------------------------------------------------------------------------------------


def test_tokens_are_drawn_without_repetition_and_all_where_there_are_fewer() -> None:
    noise = np.random.default_rng(0).random((3, 8)).astype(np.float32)
    some = draw_tokens(Tensor(noise), 5).asnumpy()
    assert len(set(some.tolist())) == 5
    assert set(noise.reshape(-1)[some]) == set(np.sort(noise.reshape(-1))[-5:])
    assert sorted(draw_tokens(Tensor(noise), 100).asnumpy()) == list(range(24))


class Drawing(nn.Cell):
    """The draw of a `Relations`."""

    def __init__(self, relations: Relations):
        super().__init__()
        self.relations = relations

    def construct(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        return self.relations.draw((student, student), (teacher, teacher))


@pytest.mark.compiles
def test_every_step_and_pair_draws_its_own_tokens_and_the_counter_gives_them_again() -> None:
    ms.set_seed(3)
    drawing = Drawing(Relations(CONFIG, (((4, 4), (4, 4), (4, 4)),) * 2))
    inputs = Tensor(numbers(0, BATCH, 16, 3)), Tensor(numbers(1, BATCH, 16, 3))
    calls = [[part.asnumpy().tolist() for part in counted(drawing, BATCH, *inputs)] for _ in range(3)]
    drawn = [tuple(part) for call in calls for part in call]
    assert len(set(drawn)) == 6 and all(len(set(part)) == 10 and max(part) < 64 for part in drawn)
    counter = drawing.relations.drawn.draws
    counter.set_data(Tensor(BATCH, counter.dtype))  # after the first step
    assert [part.asnumpy().tolist() for part in drawing(*inputs)] == calls[1]


# --- the Method -------------------------------------------------------------------------------------------------


def build(student: Any = STUDENT, **changes: Any) -> Any:
    ms.set_seed(1)
    return build_method(Recipe(encoder=student, method=replace(CONFIG, **changes)))


def batch() -> tuple[Tensor, Tensor]:
    return Tensor(numbers(0, BATCH, 3, SIDE, SIDE)), Tensor(np.arange(BATCH, dtype=np.int32) % CLASSES)


def parts_of(method: Any) -> dict[str, float]:
    """The outputs of a call on `batch` by name."""
    *scalars, sums = method(*batch())
    return {
        **dict(zip(("loss", *method.parts), [float(value) for value in scalars], strict=True)),
        "baseline": method.baseline(sums.asnumpy()),
    }


def cross_entropy(logits: np.ndarray, target: np.ndarray) -> float:
    return float(-(target * log_softmax(logits)).sum() / len(logits))


@pytest.fixture(scope="module")
def trained(graph_mode: None) -> tuple[Any, list[dict[str, float]], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A distillation with mixed images after 12 steps: outputs of each, and the teacher's weights before and after."""
    method = build(mixup=0.8, cutmix=1.0, alpha=0.5)
    before = snapshot(method.teacher.get_parameters())
    optimizer = build_optimizer(method, TrainConfig(weight_decay=0.05))
    step = TrainStep(method, optimizer, clip_norm=1.0)
    step.set_train(True)
    found = []
    for number in range(12):
        outputs = counted(step, BATCH, optimizer.step_values(lambda scale: 5e-3 * scale, number + 1), *batch())
        *scalars, _, norm = [part.asnumpy() for part in outputs]
        found.append(dict(zip(("loss", *method.parts, "norm"), map(float, (*scalars, norm)), strict=True)))
    return method, found, before, snapshot(method.teacher.get_parameters())


@pytest.mark.compiles
def test_training_lowers_the_loss_and_every_part_is_there(trained: Any) -> None:
    _, found, _, _ = trained
    for outputs in found:
        assert all(np.isfinite(value) for value in outputs.values())
        whole = sum(outputs[name] for name in ("base", "distillation", "sample", "patch", "rand"))
        assert outputs["loss"] == pytest.approx(whole, rel=1e-5)
        assert outputs["patch"] > 0 and outputs["sample"] > 0 and outputs["rand"] > 0
    assert found[-1]["patch"] < 0.9 * found[0]["patch"]


def test_the_teacher_is_never_trained(trained: Any) -> None:
    """Bit-equal weights, no gradients, evaluation mode, and no part of what is saved or optimised."""
    method, _, before, after = trained
    assert before and all(np.array_equal(before[name], after[name]) for name in before)
    assert method.training and method.classifier.training  # set_train(True) reached the student alone
    shared = {id(cell) for _, cell in method.classifier.cells_and_names()}  # operations without state
    assert not any(cell.training for _, cell in method.teacher.cells_and_names() if id(cell) not in shared)
    assert not method.teacher.encoder.blocks[0].attn.attend.training
    assert not any(p.requires_grad for p in method.teacher.get_parameters())
    names = set(weights_of(method))
    plain = {p.name for p in build_classifier(STUDENT, CONFIG).get_parameters() if not p.name.endswith(".draws")}
    assert names == plain
    assert set(counters_of(method)) == {"encoder.drop_path.uniform.draws", "uniform.draws", "drawn.draws"}


@pytest.mark.compiles
def test_a_student_that_is_its_teacher_has_no_loss_on_mixed_images() -> None:
    """So the teacher sees the images of the student, mixed alike, and pairs are matched."""
    encoder = replace(STUDENT, drop_path=0.0)
    method = build(encoder, teacher_encoder=encoder, teacher_layers=(0, 1, 1), mixup=0.8, fc_norm=False, pool="cls")
    given = {p.name.removeprefix("teacher."): p for p in method.teacher.get_parameters()}
    for name, parameter in weights_of(method).items():
        parameter.set_data(Tensor(given[name].asnumpy()))
    method.set_train(True)
    outputs = parts_of(method)
    assert outputs["baseline"] > 1e-3
    assert all(abs(outputs[name]) < 1e-6 for name in ("loss", *method.parts))


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["soft", "hard", "none"])
def test_what_the_logits_cost(kind: str) -> None:
    """alpha shares between labels and teacher; none leaves the labels whole."""
    method = build(replace(STUDENT, drop_path=0.0), distillation=kind, alpha=0.3, tau=2.0, beta=0.0)
    image, label = batch()
    outputs = parts_of(method)
    logits, theirs = method.classifier(image).asnumpy(), method.teacher(image).asnumpy()
    target = np.eye(CLASSES)[label.asnumpy()] * 0.9 + 0.1 / CLASSES
    base = cross_entropy(logits, target)
    if kind == "none":
        expected, weight = 0.0, 1.0
    elif kind == "hard":
        expected, weight = cross_entropy(logits, np.eye(CLASSES)[theirs.argmax(1)]), 0.7
    else:
        expected, weight = 4.0 * divergence(log_softmax(theirs / 2), log_softmax(logits / 2)), 0.7
    assert outputs["base"] == pytest.approx(weight * base, rel=1e-5)
    assert outputs["distillation"] == pytest.approx(0.3 * expected, rel=1e-4, abs=1e-7)
    assert outputs["sample"] == outputs["patch"] == outputs["rand"] == 0
    assert outputs["loss"] == pytest.approx(outputs["base"] + outputs["distillation"], rel=1e-6)


@pytest.mark.compiles
def test_the_second_head_learns_from_the_teacher_and_the_first_from_the_labels() -> None:
    encoder = ViTConfig(
        image_size=(SIDE, SIDE), patch_size=8, embed_dim=16, depth=2, num_heads=2, distilled=True, position="learned"
    )
    method = build(encoder, pool="cls", fc_norm=False, head_std=0.5, alpha=0.5)
    image, label = batch()
    first, second = (logits.asnumpy() for logits in AsGraph(method, both_heads(method))(image))
    assert not np.allclose(first, second)
    outputs = parts_of(method)
    target = np.eye(CLASSES)[label.asnumpy()] * 0.9 + 0.1 / CLASSES
    theirs = method.teacher(image).asnumpy()
    assert outputs["base"] == pytest.approx(0.5 * cross_entropy(first, target), rel=1e-5)
    expected = 0.5 * divergence(log_softmax(theirs), log_softmax(second))
    assert outputs["distillation"] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(method.classifier(image).asnumpy(), (first + second) / 2, rtol=1e-5)


def both_heads(method: Any) -> Any:
    def heads(image: Tensor) -> tuple[Tensor, Tensor]:
        return method.classifier.heads(method.classifier.encoder(image))

    return heads


@pytest.mark.compiles
def test_stages_of_two_networks_are_matched_by_their_maps() -> None:
    """A Swin learns from a deeper and wider one; the 8x8 maps are merged to 4x4."""
    student = SwinConfig(image_size=(SIDE, SIDE), embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
    teacher = replace(student, embed_dim=16, depths=(2, 2))
    method = build(
        student, teacher_encoder=teacher, student_layers=(0, 1), teacher_layers=(1, 2), max_patch_num=16, fc_norm=False
    )
    assert relation_maps(student, replace(CONFIG, **pairing(teacher))) == (
        ((8, 8), (8, 8), (4, 4)),
        ((4, 4), (4, 4), (4, 4)),
    )
    image, _ = batch()
    outputs = parts_of(method)
    sequences = []
    for network, blocks in ((method.classifier, (0, 1)), (method.teacher, (1, 2))):
        encoder = network.encoder
        taken = AsGraph(encoder, encoder.blocks_of, blocks)(encoder.embed(image))
        first, last = (block.asnumpy() for block in taken)
        sequences.append((merged(first, 4), last))
    whole = np.arange(BATCH * 16)
    pairs = list(zip(*sequences, strict=True))
    expected = np.mean([relation_losses(s, t, whole) for s, t in pairs], axis=0)
    assert outputs["sample"] == pytest.approx(0.1 * expected[0], rel=1e-4)
    assert outputs["patch"] == pytest.approx(4.0 * expected[1], rel=1e-4)


def pairing(teacher: SwinConfig) -> dict[str, Any]:
    return {"teacher_encoder": teacher, "student_layers": (0, 1), "teacher_layers": (1, 2), "max_patch_num": 16}
