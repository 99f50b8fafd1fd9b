"""Graphs of earlier runs are taken if nothing that they are made from differs, and never otherwise."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from src.config.files import load_recipe
from src.engine import compile_cache, device
from src.engine.compile_cache import ENABLE, UncoveredError, compile_graph, key_of
from src.engine.optim import build_optimizer
from src.engine.step import Accumulate, TrainStep
from src.methods import build_method
from tests.helpers import MakeFolder, Run, numbers

pytestmark = pytest.mark.usefixtures("graph_mode")

RECIPE = """
encoder: {{name: vit, image_size: 32, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2, drop_path: 0.3}}
method: {{name: fastmim, mask_block: 8, target: {{cell: 4}}, decoder: {{width: 32, depth: 1}}}}
data: {{root: {root}, workers: 0}}
train: {{epochs: 2, batch_size: 4, base_lr: 4e-3, lr_batch: 16, warmup_epochs: 0, log_every: 1, knn: 3}}
device: CPU
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache is on, with a folder of its own."""
    monkeypatch.delenv(ENABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return compile_cache.folder()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(root=tmp_path / "data"))
    return path


def step_of(path: Path, *overrides: str, passes: int = 1, batch: int = 4) -> tuple[TrainStep, list[Tensor]]:
    """The training step of a recipe with its first inputs."""
    recipe = load_recipe(path, list(overrides))
    device.set_up("CPU", recipe.seed, recipe.train)
    method = build_method(recipe)
    optimizer = build_optimizer(method, recipe.train)
    step = TrainStep(method, optimizer, recipe.train.clip_norm, passes)
    step.set_train(True)
    image = Tensor(numbers(0, batch, 3, *recipe.encoder.image_size))
    return step, [optimizer.step_values(lambda scale: 1e-3 * scale, 1), image]


def losses(step: TrainStep, inputs: list[Tensor]) -> list[float]:
    return [float(step(*inputs)[0]) for _ in range(3)]


def graphs(store: Path) -> list[Path]:
    return sorted(store.glob("*.graph"))


@pytest.mark.compiles
def test_the_second_step_of_a_recipe_takes_the_graph_of_the_first(store: Path, recipe: Path) -> None:
    step, inputs = step_of(recipe)
    assert not compile_graph(step, *inputs)
    expected = losses(step, inputs)
    assert len(graphs(store)) == 1 and len(list(store.iterdir())) == 1
    step, inputs = step_of(recipe)
    assert compile_graph(step, *inputs)
    assert not compile_graph(step, *inputs)  # it is compiled
    assert losses(step, inputs) == expected and len(set(expected)) == 3
    step, inputs = step_of(recipe, "seed=1")
    assert not compile_graph(step, *inputs)
    assert losses(step, inputs) != expected and len(graphs(store)) == 2


@pytest.mark.compiles
def test_accumulation_has_a_graph_of_its_own(store: Path, recipe: Path) -> None:
    taken, results = [], []
    for _ in range(2):
        step, inputs = step_of(recipe, passes=2)
        accumulate = Accumulate(step)
        accumulate.set_train(True)
        taken.append([compile_graph(accumulate, *inputs[1:]), compile_graph(step, *inputs)])
        results.append([[float(accumulate(*inputs[1:])[0]), float(step(*inputs)[0])] for _ in range(2)])
    assert taken == [[False, False], [True, True]]
    assert results[0] == results[1]


class Shift(nn.Cell):
    """w * x + constant, where the constant is part of the graph."""

    def __init__(self, constant: Any):
        super().__init__()
        self.constant = constant
        self.weight = Parameter(np.full(3, 2, np.float32), name="weight")
        self.mul = ops.Mul()

    def construct(self, x: Tensor) -> Tensor:
        return self.mul(self.weight, x) + self.constant


X = np.arange(3, dtype=np.float32)


@pytest.mark.compiles
@pytest.mark.parametrize(
    "kind", [float, int, lambda v: Tensor(np.full(3, v, np.float32))], ids=["float", "int", "tensor"]
)
def test_another_constant_gives_its_own_numbers(store: Path, kind: Callable[[int], Any]) -> None:
    """MindSpore's own cache takes the graph with the first constant here."""
    for value, taken in ((1, False), (5, False), (1, True), (5, True)):
        cell = Shift(kind(value))
        assert compile_graph(cell, Tensor(X)) is taken
        np.testing.assert_array_equal(cell(Tensor(X)).asnumpy(), 2 * X + value)


@pytest.mark.compiles
@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "rubbish"])
def test_a_damaged_graph_is_compiled_again(store: Path, damage: str) -> None:
    """Rubbish has the right checksum, so only MindSpore can notice it."""
    assert not compile_graph(Shift(1.0), Tensor(X))
    path = graphs(store)[0]
    content = bytearray(path.read_bytes())
    if damage == "rubbish":
        compile_cache.write(path, b"rubbish" * 100)
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"byte": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    for taken in (False, True):
        cell = Shift(1.0)
        assert compile_graph(cell, Tensor(X)) is taken
        np.testing.assert_array_equal(cell(Tensor(X)).asnumpy(), 2 * X + 1)


@pytest.mark.compiles
def test_values_of_parameters_are_not_part_of_the_graph(store: Path) -> None:
    for weight, taken in ((2, False), (3, True)):
        cell = Shift(1.0)
        cell.weight.set_data(Tensor(np.full(3, weight, np.float32)))
        assert compile_graph(cell, Tensor(X)) is taken
        np.testing.assert_array_equal(cell(Tensor(X)).asnumpy(), weight * X + 1)


@pytest.mark.parametrize(
    "change",
    [
        ["seed=1"],
        ["train.betas=[0.9, 0.99]"],
        ["train.clip_norm=1"],
        ["method.mask_ratio=0.5"],
        ["encoder.drop_path=0.2"],
        ["encoder.image_size=64"],
        ["method.target.normalize=false"],
        ["train.weight_decay=0.1"],
    ],
    ids=lambda change: change[0],
)
def test_a_recipe_with_a_change_in_the_graph_has_another_key(recipe: Path, change: list[str]) -> None:
    step, inputs = step_of(recipe)
    same, same_inputs = step_of(recipe)
    other, other_inputs = step_of(recipe, *change)
    assert key_of(step, *inputs) == key_of(same, *same_inputs)
    assert key_of(step, *inputs) != key_of(other, *other_inputs)


def changed_constant(step: TrainStep) -> None:
    step.method.target.of_steps = Tensor(step.method.target.of_steps.asnumpy() * 2)


def changed_primitive(step: TrainStep) -> None:
    step.method.target.matmul = ops.MatMul(transpose_b=True)


def changed_hidden_cell(step: TrainStep) -> None:
    step.method.__dict__["hidden"] = nn.ReLU()


def changed_mode(step: TrainStep) -> None:
    step.method.set_train(False)


def changed_parameter(step: TrainStep) -> None:
    step.method.trainable_params()[0].requires_grad = False


def changed_function(step: TrainStep) -> None:
    step.method.extra = changed_mode


@pytest.mark.parametrize(
    "change",
    [changed_constant, changed_primitive, changed_hidden_cell, changed_mode, changed_parameter, changed_function],
)
def test_a_changed_part_has_another_key(recipe: Path, change: Callable[[TrainStep], None]) -> None:
    step, inputs = step_of(recipe)
    before = key_of(step, *inputs)
    change(step)
    assert key_of(step, *inputs) != before


def test_inputs_versions_ranks_and_sources_are_part_of_the_key(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, inputs = step_of(recipe)
    keys = [key_of(step, *inputs), key_of(step, *step_of(recipe, batch=8)[1])]
    for target, name, value in (
        (ms, "__version__", "9.9"),
        (compile_cache.parallel, "rank", lambda: 1),
        (compile_cache.parallel, "size", lambda: 2),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            keys.append(key_of(step, *inputs))
    shutil.copytree(compile_cache.SOURCE, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compile_cache, "SOURCE", tmp_path / "src")
    assert key_of(step, *inputs) == keys[0]
    with (tmp_path / "src" / "models" / "rows.py").open("a") as file:
        file.write("#")
    keys.append(key_of(step, *inputs))
    assert len(set(keys)) == 6


@pytest.mark.compiles
@pytest.mark.parametrize("part", [object(), np.random.default_rng(0), os], ids=["object", "generator", "module"])
def test_a_part_without_a_rule_turns_the_cache_off(store: Path, part: Any) -> None:
    cell = Shift(1.0)
    cell.__dict__["part"] = [part]
    with pytest.raises(UncoveredError):
        key_of(cell, Tensor(X))
    assert not compile_graph(cell, Tensor(X))
    np.testing.assert_array_equal(cell(Tensor(X)).asnumpy(), 2 * X + 1)
    assert list(store.iterdir()) == []


class Hidden(nn.Cell):
    """A cell with the weights of another, as a Method with its teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["teacher"] = Shift(1.0)
        self.teacher.weight.name = "teacher"

    def construct(self, x: Tensor) -> Tensor:
        return self.teacher(x)


@pytest.mark.compiles
def test_weights_that_are_not_of_the_cell_turn_the_cache_off(store: Path) -> None:
    """MindSpore leaves them without values when it loads the graph."""
    for _ in range(2):
        cell = Hidden()
        assert not compile_graph(cell, Tensor(X))
        np.testing.assert_array_equal(cell(Tensor(X)).asnumpy(), 2 * X + 1)
    assert list(store.iterdir()) == []


@pytest.mark.compiles
@pytest.mark.parametrize("value", ["0", "1"])
def test_the_users_setting_of_mindspores_cache_counts(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(ENABLE, value)
    assert not compile_graph(Shift(1.0), Tensor(X))
    assert os.environ[ENABLE] == value and list(store.iterdir()) == []


@pytest.mark.compiles
def test_without_a_folder_nothing_is_stored(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cell = Shift(1.0)
    assert not compile_graph(cell, Tensor(X))
    np.testing.assert_array_equal(cell(Tensor(X)).asnumpy(), 2 * X + 1)


@pytest.mark.compiles
def test_a_graph_with_an_error_raises_it_at_its_first_call(store: Path) -> None:
    cell = Shift("text")
    assert not compile_graph(cell, Tensor(X))
    with pytest.raises(TypeError):
        cell(Tensor(X))


def test_old_graphs_are_removed(tmp_path: Path) -> None:
    now = time.time()
    for number in range(compile_cache.KEPT + 2):
        compile_cache.write(tmp_path / f"{number}.graph", b"graph")
        os.utime(tmp_path / f"{number}.graph", (now - number, now - number))
    month = now - (compile_cache.DAYS + 1) * 86400
    os.utime(tmp_path / "3.graph", (month, month))
    (tmp_path / "process-x").mkdir()
    compile_cache.prune(tmp_path)
    numbers_left = {int(path.stem) for path in graphs(tmp_path)}
    assert numbers_left == set(range(compile_cache.KEPT + 1)) - {3}
    assert (tmp_path / "process-x").exists()


@pytest.mark.compiles
def test_a_second_run_uses_the_graph_and_has_the_same_losses(
    store: Path, recipe: Path, tmp_path: Path, image_folder_factory: MakeFolder, run_entry: Run
) -> None:
    image_folder_factory(tmp_path / "data", train=4)
    metrics = []
    for name in ("one", "two"):
        done = run_entry("train.py", "--config", recipe, f"output={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert ("the graph is that of an earlier run" in done.stdout) is (name == "two"), done.stdout
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        metrics.append([json.loads(line).get("loss") for line in lines])
    assert metrics[0] == metrics[1] and len(set(metrics[0])) > 3
