"""Optimiser, step, schedule, checkpoints, loading of encoders, k-NN: the parts of a run."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from src.config import ClassifyConfig, TrainConfig, ViTConfig
from src.engine import checkpoint
from src.engine.checkpoint import CheckpointError
from src.engine.evaluate import knn_accuracy
from src.engine.log import duration
from src.engine.optim import AdamW, Group, build_optimizer, parameter_groups
from src.engine.schedule import effective_batch, learning_rate, peak_rate, position
from src.engine.step import Accumulate, TrainStep
from src.methods import Classify
from src.models import build_classifier
from src.weights import WeightsError
from src.weights.load import load_encoder_weights
from tests.helpers import numbers, snapshot

pytestmark = pytest.mark.usefixtures("graph_mode")


def named(name: str, value: Any) -> Parameter:
    return Parameter(Tensor(np.asarray(value, np.float32)), name=name)


# --- AdamW ------------------------------------------------------------------------------------------------------


class Layered:
    """Two layers of a weight and a bias, and a token: what parameter_groups asks of a Method."""

    num_layers = 3

    def __init__(self) -> None:
        shapes = {"low.weight": (3, 4), "low.bias": (4,), "top.weight": (4, 2), "top.bias": (2,), "token": (1, 1, 4)}
        self.parameters = [named(name, numbers(i, *shape)) for i, (name, shape) in enumerate(shapes.items())]

    def trainable_params(self) -> list[Parameter]:
        return self.parameters

    def layer_of(self, name: str) -> int:
        return {"token": 0, "low": 1, "top": 2}[name.split(".")[0]]

    def no_weight_decay(self) -> set[str]:
        return {"token"}


def settings_of(groups: list[Group]) -> dict[str, tuple[float, float]]:
    """Learning-rate factor and weight decay of each parameter."""
    return {p.name: (group.lr_scale, group.weight_decay) for group in groups for p in group.parameters}


def test_groups_by_layer_and_decay() -> None:
    found = settings_of(parameter_groups(Layered(), TrainConfig(layer_decay=0.5, weight_decay=0.1)))
    assert found == {
        "low.weight": (0.5, 0.1),
        "low.bias": (0.5, 0.0),
        "top.weight": (1.0, 0.1),
        "top.bias": (1.0, 0.0),
        "token": (0.25, 0.0),
    }


def test_groups_without_layer_decay_and_with_decayed_tokens() -> None:
    groups = parameter_groups(Layered(), TrainConfig(weight_decay=0.1, decayed=("token", "table")))
    found = settings_of(groups)
    assert len(groups) == 2 and {scale for scale, _ in found.values()} == {1.0}
    assert {name for name, (_, decay) in found.items() if decay} == {"low.weight", "top.weight", "token"}


@pytest.mark.compiles
def test_adamw_equals_pytorchs_order_of_operations() -> None:
    """Decay first, then moments, bias correction outside the root of v, eps after the root; in float64."""
    method = Layered()
    train = TrainConfig(layer_decay=0.5, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-3)
    values = {p.name: p.asnumpy().astype(np.float64) for p in method.parameters}
    settings = settings_of(parameter_groups(method, train))
    optimizer = build_optimizer(method, train)
    order = [p.name for p in optimizer.weights]
    first = {name: np.zeros_like(value) for name, value in values.items()}
    second = {name: np.zeros_like(value) for name, value in values.items()}
    rates = [0.0, 0.05, 0.1, 0.1, 0.02]  # a warm-up starts at 0
    for step, rate in enumerate(rates, start=1):
        grads = {name: numbers(100 * step + i, *values[name].shape) for i, name in enumerate(order)}
        before = snapshot(optimizer.weights)
        optimizer(
            optimizer.step_values(lambda scale, rate=rate: rate * scale, step),
            None,
            tuple(Tensor(grads[name]) for name in order),
        )
        for name, grad in grads.items():
            scale, decay = settings[name]
            values[name] *= 1 - rate * scale * decay
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad.astype(np.float64) ** 2
            denominator = np.sqrt(second[name]) / math.sqrt(1 - 0.95**step) + 1e-3
            values[name] -= rate * scale / (1 - 0.9**step) * first[name] / denominator
        for parameter in optimizer.weights:
            np.testing.assert_allclose(parameter.asnumpy(), values[parameter.name], atol=2e-6, err_msg=f"{step}")
            if not rate:
                np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])
    state = optimizer.state()
    assert len(state) == 2 * len(order)
    for name in order:
        np.testing.assert_allclose(state[f"adam_m.{name}"].asnumpy(), first[name], atol=1e-6)
        np.testing.assert_allclose(state[f"adam_v.{name}"].asnumpy(), second[name], atol=1e-6)


# --- step -------------------------------------------------------------------------------------------------------


class Dot(nn.Cell):
    """Loss a.x + b.y, so that the gradients are the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = named("a", [1.0, 2.0]), named("b", [[0.5]])

    def construct(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (self.a * x).sum() + (self.b * y).sum(), x.sum()


@pytest.mark.parametrize(
    ("clip", "factor"), [(0.0, 1.0), (6.5, 0.5), (130.0, 1.0)], ids=["off", "half", "above the norm"]
)
def test_clipping_scales_all_gradients_to_the_norm(clip: float, factor: float) -> None:
    method = Dot()
    optimizer = AdamW([Group(0, 1.0, 0.0, [method.a, method.b])], (0.9, 0.999), 1e-8)
    step = TrainStep(method, optimizer, clip)
    x, y = np.array([3.0, 4.0], np.float32), np.array([[12.0]], np.float32)
    loss, part, norm = step(optimizer.step_values(lambda scale: 0.1 * scale, 1), Tensor(x), Tensor(y))
    assert (float(loss), float(part)) == (17.0, 7.0)
    assert float(norm) == pytest.approx(13.0, rel=1e-6)  # before clipping
    np.testing.assert_allclose(optimizer.first[0].asnumpy(), 0.1 * x * factor, rtol=1e-5)
    np.testing.assert_allclose(optimizer.first[1].asnumpy(), 0.1 * y * factor, rtol=1e-5)


def tiny_classifier() -> Classify:
    ms.set_seed(0)
    encoder = ViTConfig(image_size=(32, 32), patch_size=16, embed_dim=16, depth=2, num_heads=2, position="learned")
    method = Classify(build_classifier(encoder, ClassifyConfig(num_classes=4)), 0.1)
    method.classifier.head.weight.set_data(Tensor(0.3 * numbers(5, 4, 16)))  # so that all gradients are of size
    return method


@pytest.mark.compiles
def test_accumulation_equals_the_large_batch() -> None:
    images, labels = numbers(1, 16, 3, 32, 32), np.arange(16, dtype=np.int32) % 4
    train = TrainConfig(eps=1e-3, weight_decay=0.1)
    ends = []
    for accumulate in (1, 2):
        method = tiny_classifier()
        optimizer = build_optimizer(method, train)
        step = TrainStep(method, optimizer, 1.0, accumulate)
        add = Accumulate(step) if accumulate > 1 else None
        norms = []
        for number in range(2):  # the second update shows that the sums are emptied
            x, y = images[8 * number : 8 * number + 8], labels[8 * number : 8 * number + 8]
            values = optimizer.step_values(lambda scale: 0.01 * scale, number + 1)
            if add is not None:
                add(Tensor(x[:4]), Tensor(y[:4]))
                x, y = x[4:], y[4:]
            norms.append(float(step(values, Tensor(x), Tensor(y))[-1]))
        state = {**checkpoint.weights_of(method), **optimizer.state()}
        ends.append((norms, snapshot(state.values())))
    (norms, state), (accumulated_norms, accumulated) = ends
    assert norms[0] > 0.1
    np.testing.assert_allclose(accumulated_norms, norms, rtol=1e-5)
    for name, value in state.items():
        np.testing.assert_allclose(accumulated[name], value, atol=1e-6, err_msg=name)
    start = snapshot(tiny_classifier().get_parameters())
    assert any(np.abs(value - start[name]).max() > 1e-3 for name, value in state.items() if name in start)


# --- schedule ---------------------------------------------------------------------------------------------------


def test_cosine_with_warm_up() -> None:
    train = TrainConfig(epochs=20, warmup_epochs=4, min_lr=0.01)
    assert learning_rate(train, 1.0, 0) == 0
    assert learning_rate(train, 1.0, 1) == pytest.approx(0.25)
    assert learning_rate(train, 1.0, 4) == pytest.approx(1.0)
    assert learning_rate(train, 1.0, 12) == pytest.approx((1 + 0.01) / 2)
    assert learning_rate(train, 1.0, 20) == pytest.approx(0.01)
    rates = [learning_rate(train, 1.0, 4 + i / 8) for i in range(129)]
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_the_groups_factor_multiplies_everything() -> None:
    train = TrainConfig(epochs=20, warmup_epochs=4, min_lr=0.01)
    for epoch in (0, 1, 7.5, 20):
        assert learning_rate(train, 1.0, epoch, 0.3) == pytest.approx(0.3 * learning_rate(train, 1.0, epoch))


def test_step_schedule() -> None:
    train = TrainConfig(epochs=10, warmup_epochs=1, schedule="step", decay_epochs=3, gamma=0.5)
    found = [learning_rate(train, 2.0, epoch) for epoch in (0.5, 1, 2.9, 3, 5.9, 6, 9.9)]
    assert found == pytest.approx([1.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.25])


def test_the_cosine_of_rule_timm_begins_with_the_warm_up_or_after_it() -> None:
    """An update takes the rate of the one before it: number 9 is update 8 of 10 per epoch (timm 0.4.12)."""
    plain = TrainConfig(rule="timm", epochs=4, warmup_epochs=1, warmup_lr=0.1, min_lr=0.2, base_lr=1.0, lr_batch=0)
    after = TrainConfig(
        rule="timm", epochs=4, warmup_epochs=1, warmup_lr=0.1, min_lr=0.2, base_lr=1.0, lr_batch=0, warmup_prefix=True
    )
    for train in (plain, after):
        assert learning_rate(train, 1.0, 0.6, 1.0, 10) == pytest.approx(0.1 + 0.9 * 5 / 10)
    assert learning_rate(plain, 1.0, 1.1, 1.0, 10) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(after, 1.0, 1.1, 1.0, 10) == pytest.approx(1.0)
    assert learning_rate(after, 1.0, 2.6, 0.5, 10) == pytest.approx(0.2 + 0.15)


def recursive_mmengine(train: TrainConfig, peak: float, updates: int, low: float) -> list[float]:
    """mmengine's schedulers step by step, each from the rate before it (optim/scheduler/param_scheduler.py)."""
    warmup, end = int(train.warmup_epochs * updates), train.epochs * updates
    start, total = train.warmup_lr / train.base_lr, warmup - 1
    rates = [peak * start]
    for number in range(1, warmup):
        rates.append(rates[-1] * (1 + (1 - start) / (total * start + (number - 1) * (1 - start))))
    rates.append(rates[-1])  # the first update after the warm-up keeps the rate
    length = (train.cosine_epochs or train.epochs - int(train.warmup_epochs)) * updates
    for number in range(1, end - warmup):
        if train.schedule == "multistep":
            rates.append(rates[-1] * (train.gamma if number in [m * updates for m in train.milestones] else 1))
        else:
            factor = (1 + math.cos(math.pi * number / length)) / (1 + math.cos(math.pi * (number - 1) / length))
            rates.append(factor * (rates[-1] - low) + low)
    return rates


@pytest.mark.parametrize(
    "shape",
    [{}, {"cosine_epochs": 10}, {"schedule": "multistep", "milestones": (2, 5)}],
    ids=["cosine", "longer cosine", "multistep"],
)
def test_rule_mmengine(shape: dict[str, Any]) -> None:
    """mmpretrain's schedules, with layer decay (0.5) and a batch of twice lr_batch."""
    train = TrainConfig(
        rule="mmengine", epochs=8, warmup_epochs=2, warmup_lr=1e-3, min_lr=0.01, base_lr=0.5, lr_batch=64, **shape
    )
    peak = peak_rate(train, devices=2)
    assert peak == 1.0
    expected = recursive_mmengine(train, 0.5 * peak, 5, low=0.02)
    found = [learning_rate(train, peak, number / 5, 0.5, 5) for number in range(40)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_peak_follows_the_effective_batch() -> None:
    train = TrainConfig(base_lr=1e-3, batch_size=64, accumulate=4, lr_batch=256)
    assert effective_batch(train) == 256 and effective_batch(train, devices=8) == 2048
    assert peak_rate(train) == pytest.approx(1e-3) and peak_rate(train, devices=8) == pytest.approx(8e-3)
    assert peak_rate(TrainConfig(base_lr=1e-3, batch_size=64, lr_batch=0), devices=8) == 1e-3


def test_an_update_takes_the_rate_of_its_first_pass() -> None:
    assert [position(2, turn, 8, 4) for turn in range(8)] == [2.0] * 4 + [2.5] * 4


# --- checkpoints ------------------------------------------------------------------------------------------------

META = {"recipe": "seed: 1\n", "method": "fastmim", "epoch": 3, "step": 30, "best": 0.5, "metrics": {"loss": 1.0}}


def network() -> tuple[dict[str, Parameter], dict[str, Parameter]]:
    weights = {"encoder.w": named("encoder.w", numbers(1, 3, 4)), "head.b": named("head.b", numbers(2, 5))}
    draws = Parameter(Tensor(2**40 + 1, ms.int64), name="mask.uniform.draws")
    return weights, {"adam_m.encoder.w": named("adam_m.encoder.w", numbers(3, 3, 4)), draws.name: draws}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, *network(), META)
    return path


def test_a_checkpoint_gives_everything_back(saved: Path) -> None:
    weights, state = network()
    found = checkpoint.load(saved)
    assert found.path == saved
    assert META.items() <= found.meta.items()
    assert found.meta["versions"]["mindspore"] == ms.__version__
    for expected, arrays in ((weights, found.weights), (state, found.state)):
        assert set(arrays) == set(expected)
        for name, value in expected.items():
            assert arrays[name].dtype == value.asnumpy().dtype
            np.testing.assert_array_equal(arrays[name], value.asnumpy())
    assert int(found.state["mask.uniform.draws"]) == 2**40 + 1


def test_a_checkpoint_is_one_readable_file(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]
    assert saved.stat().st_mode & 0o777 == 0o644
    checkpoint.save(saved, *network(), {**META, "epoch": 4})  # over an existing one
    assert checkpoint.load(saved).meta["epoch"] == 4
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(items: Any, path: str, **_: Any) -> None:
        Path(path).write_bytes(before[: len(before) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(ms, "save_checkpoint", fail)
    with pytest.raises(CheckpointError, match=r"no space left on device.*; the previous file is unchanged"):
        checkpoint.save(saved, *network(), {**META, "epoch": 4})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["last.ckpt"]


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


def test_a_damaged_byte_is_noticed_wherever_it_is(saved: Path) -> None:
    content = saved.read_bytes()
    whole = checkpoint.load(saved)
    unnoticed = []
    for place in range(0, len(content), max(1, len(content) // 60)):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        saved.write_bytes(damaged)
        try:
            checkpoint.load(saved)
            unnoticed.append(place)
        except CheckpointError as error:
            assert "damaged" in str(error) or "truncated" in str(error) or "without the recipe" in str(error)
    assert not unnoticed, f"of {len(content)} bytes; {len(whole.weights)} weights"


def test_a_truncated_file_is_refused_wherever_it_is_cut(saved: Path) -> None:
    content = saved.read_bytes()
    for length in [0, 1, *range(len(content) // 40, len(content), max(1, len(content) // 40)), len(content) - 1]:
        saved.write_bytes(content[:length])
        refusal(saved)


def test_a_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone.ckpt") == "no such checkpoint file"


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert refusal(text) == "not a .ckpt file"
    named_so = tmp_path / "x.ckpt"
    named_so.write_text("hello")
    assert refusal(named_so) == "damaged or not a MindSpore checkpoint; its content cannot be read"


def test_a_foreign_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "foreign.ckpt"
    ms.save_checkpoint([{"name": "w", "data": Tensor(np.ones(3, np.float32))}], str(path))
    path.chmod(0o644)
    assert refusal(path) == "a MindSpore checkpoint, but without the recipe that this project stores in it"


def test_a_foreign_meta_is_refused(tmp_path: Path) -> None:
    """Another program may also store a text called meta."""
    for number, text in enumerate(["hello", json.dumps(["a list"]), json.dumps({"epoch": 3})]):
        path = tmp_path / f"{number}.ckpt"
        item = {"name": "w", "data": Tensor(np.ones(3, np.float32))}
        ms.save_checkpoint([item], str(path), append_dict={"meta": text}, crc_check=True)
        refusal(path)


def test_assign_wants_every_name_and_shape() -> None:
    weights, _ = network()
    arrays = {name: value.asnumpy() + 1 for name, value in weights.items()}
    before = snapshot(weights.values())
    cases = {
        "does not fit this recipe: 1 missing (head.b)": {"encoder.w": arrays["encoder.w"]},
        "does not fit this recipe: 1 unknown (x)": {**arrays, "x": arrays["head.b"]},
        "does not fit this recipe: 1 missing (head.b) and 1 unknown (x)": {
            "encoder.w": arrays["encoder.w"],
            "x": arrays["head.b"],
        },
        "head.b has shape [4], this recipe needs [5]": {**arrays, "head.b": arrays["head.b"][:4]},
    }
    for text, given in cases.items():
        with pytest.raises(CheckpointError) as caught:
            checkpoint.assign(weights, given, Path("f.ckpt"))
        assert str(caught.value) == f"f.ckpt: {text}"
        for name, value in weights.items():
            np.testing.assert_array_equal(value.asnumpy(), before[name])
    checkpoint.assign(weights, arrays, Path("f.ckpt"))
    np.testing.assert_array_equal(weights["head.b"].asnumpy(), before["head.b"] + 1)


# --- loading an encoder -----------------------------------------------------------------------------------------


def test_loading_an_encoder_reports_by_name() -> None:
    weights, _ = network()
    head = weights["head.b"].asnumpy().copy()
    arrays = {"encoder.w": np.full((3, 4), 7, np.float32), "decoder.w": np.zeros(2, np.float32)}
    report = load_encoder_weights(weights, arrays, Path("f.ckpt"))
    assert (report.matched, report.missing, report.ignored) == (["encoder.w"], ["head.b"], ["decoder.w"])
    assert str(report) == "1 matched; 0 resized; 1 missing (fresh: head.b); 1 ignored (decoder.w)"
    np.testing.assert_array_equal(weights["encoder.w"].asnumpy(), arrays["encoder.w"])
    np.testing.assert_array_equal(weights["head.b"].asnumpy(), head)


def test_a_shared_position_table_starts_the_table_of_every_block() -> None:
    """SimMIM pre-trains ViT with one table and fine-tunes with one per block (utils.py)."""
    names = [f"encoder.blocks.{block}.attn.relative_position_bias_table" for block in (0, 1)]
    weights = {name: named(name, [0.0, 0.0]) for name in names}
    shared = "encoder.rel_pos_bias.relative_position_bias_table"
    report = load_encoder_weights(weights, {shared: np.array([3, 4], np.float32)}, Path("f.ckpt"))
    assert str(report) == f"0 matched; 0 resized; 2 started from {shared}; 0 missing; 0 ignored"
    for weight in weights.values():
        np.testing.assert_array_equal(weight.asnumpy(), [3, 4])
    # a table of their own in the file wins
    arrays = {shared: np.zeros(2, np.float32)} | {name: np.full(2, 5, np.float32) for name in names}
    report = load_encoder_weights(weights, arrays, Path("f.ckpt"))
    assert (report.matched, report.shared, report.ignored) == (names, [], [shared])
    np.testing.assert_array_equal(weights[names[0]].asnumpy(), [5, 5])


def test_an_encoder_that_does_not_fit_changes_nothing() -> None:
    weights, _ = network()
    weights["encoder.a"] = named("encoder.a", [1.0])
    before = snapshot(weights.values())
    cases = {
        "has no weights for 2 of 2 encoder parameters (encoder.a, encoder.w); is it from another encoder?": {
            "head.b": np.zeros(5, np.float32)
        },
        "encoder.w has shape [4, 3], this recipe needs [3, 4]": {
            "encoder.a": np.zeros(1, np.float32),
            "encoder.w": np.zeros((4, 3), np.float32),
        },
    }
    for text, arrays in cases.items():
        with pytest.raises(WeightsError) as caught:
            load_encoder_weights(weights, arrays, Path("f.ckpt"))
        assert str(caught.value) == f"f.ckpt: {text}"
    for name, value in weights.items():
        np.testing.assert_array_equal(value.asnumpy(), before[name])


# --- k-NN and durations -----------------------------------------------------------------------------------------


def test_knn_separates_what_is_separable() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(4, 8) * 5
    bank_labels, query_labels = np.repeat(np.arange(4), 20), np.repeat(np.arange(4), 5)
    bank = centres[bank_labels] + rng.normal(0, 0.3, (80, 8))
    query = centres[query_labels] + rng.normal(0, 0.3, (20, 8))
    assert knn_accuracy((bank, bank_labels), (10 * query, query_labels), 5) == 1.0  # length does not matter
    assert knn_accuracy((bank, bank_labels), (query, (query_labels + 1) % 4), 5) == 0.0
    assert knn_accuracy((bank, bank_labels), (query, query_labels), 1000) == 1.0  # more neighbours than there are


def test_knn_weighs_near_neighbours_more() -> None:
    """One neighbour at the query outvotes two that are far: exp(1 / 0.07) against 2 exp(0.6 / 0.07)."""
    bank = np.array([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    found = knn_accuracy((bank, np.array([0, 1, 1])), (np.array([[1.0, 0.0]]), np.array([0])), 3)
    assert found == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (59.4, "00:59"), (59.6, "01:00"), (61, "01:01"), (3599.6, "1:00:00"), (3723, "1:02:03")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
