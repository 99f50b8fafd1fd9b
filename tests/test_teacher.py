"""A distillation as a run: resumed, evaluated without its teacher, with stored teacher outputs, and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src import load_model
from src.config.files import ConfigError, load_recipe
from src.engine import checkpoint
from src.tasks.evaluate import evaluate_checkpoint
from src.tasks.teacher import outputs_folder, store_outputs, stored_outputs
from src.tasks.train import train, training_parts
from tests.helpers import MakeFolder, Run, assert_one_line_error

pytestmark = pytest.mark.usefixtures("graph_mode")

#: the teacher is the tiny run of a ViT; the student is thinner
RECIPE = """
encoder: {{name: vit, image_size: 32, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2, drop_path: 0.2}}
method:
  name: manifold
  num_classes: 6
  teacher: {teacher}
  teacher_encoder: {{name: vit, image_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}}
  student_layers: [0, 0]
  teacher_layers: [0, 1]
  samples: 20
  alpha: 0.5
data: {{root: {root}, val: '', workers: 0}}
train: {{epochs: 2, batch_size: 12, base_lr: 5e-3, lr_batch: 0, log_every: 1, eval_every: 0}}
device: CPU
output: {output}
"""
#: a transform that gives the same image in every epoch
STILL = ("data.crop_scale=[1, 1]", "data.crop_ratio=[1, 1]", "data.hflip=0")


@pytest.fixture(scope="module")
def teacher(tiny_run: Callable[[str], Path]) -> Path:
    return tiny_run("vit")


@pytest.fixture
def recipe_file(tmp_path: Path, teacher: Path, tiny_data: Path) -> Path:
    path = tmp_path / "student.yaml"
    text = RECIPE.format(teacher=teacher, root=tiny_data, output=tmp_path / "run")
    path.write_text(text, encoding="utf-8")
    return path


def losses(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "train"]


@pytest.mark.compiles
def test_a_run_resumes_bit_for_bit_and_leaves_a_student_alone(recipe_file: Path, tmp_path: Path, teacher: Path) -> None:
    """What is saved is a plain classifier, which needs no teacher any more."""
    mixed = ["method.mixup=0.5", "data.auto_augment=rand-m9-mstd0.5-inc1", "data.erasing=0.25"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(load_recipe(recipe_file, [*mixed, f"output={whole}"]))
    train(load_recipe(recipe_file, [*mixed, f"output={stopped}"]), stop_after=1)
    assert checkpoint.load(stopped / "last.ckpt").meta["epoch"] == 1
    train(load_recipe(recipe_file, [*mixed, f"output={stopped}"]), resume="auto")
    first, second = (checkpoint.load(path / "last.ckpt") for path in (whole, stopped))
    assert any(name.endswith(checkpoint.DRAWS) for name in first.state)  # of the mixing
    assert first.weights.keys() == second.weights.keys() and first.state.keys() == second.state.keys()
    for ours, theirs in ((first.weights, second.weights), (first.state, second.state)):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert all(name.startswith(("encoder.", "fc_norm.", "head.")) for name in first.weights)
    assert first.weights["encoder.cls_token"].shape == (1, 1, 16)
    moved = teacher.rename(teacher.with_suffix(".away"))
    try:
        result = evaluate_checkpoint(str(whole / "last.ckpt"), "", [])
        assert result["count"] == 72
        assert load_model(whole / "last.ckpt").head.weight.shape == (6, 16)
    finally:
        moved.rename(teacher)


@pytest.mark.compiles
def test_stored_outputs_give_the_losses_of_a_teacher_that_runs(recipe_file: Path, tmp_path: Path) -> None:
    running, stored = tmp_path / "running", tmp_path / "stored"
    cache = f"method.cache={tmp_path / 'answers'}"
    train(load_recipe(recipe_file, [*STILL, f"output={running}"]))
    train(load_recipe(recipe_file, [*STILL, cache, f"output={stored}"]))
    expected, found = losses(running), losses(stored)
    assert len(found) == len(expected) == 12
    for ours, theirs in zip(found, expected, strict=True):
        for part in ("loss", "base", "distillation", "sample", "patch", "rand"):
            assert ours[part] == pytest.approx(theirs[part], rel=1e-5, abs=1e-7)
    (folder,) = (tmp_path / "answers").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "key.json",
        "teacher_block_0.npy",
        "teacher_block_1.npy",
        "teacher_logits.npy",
    ]
    assert np.load(folder / "teacher_block_1.npy").shape == (72, 17, 32)
    again = load_recipe(recipe_file, [*STILL, cache])
    method, batches, _ = training_parts(again)
    assert store_outputs(again, method, batches) == f"the teacher's outputs are in {folder}"
    # other layers have another folder; the error names a truncated one
    recipe = load_recipe(recipe_file, [*STILL, cache, "method.teacher_layers=[1, 1]"])
    method, batches, _ = training_parts(recipe)
    store_outputs(recipe, method, batches)
    assert len(list((tmp_path / "answers").iterdir())) == 2
    assert sorted(stored_outputs(recipe, method, batches)) == ["teacher_block_1", "teacher_logits"]
    (outputs_folder(recipe, method, batches) / "teacher_logits.npy").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot be read .* remove that folder"):
        stored_outputs(recipe, method, batches)
    (tmp_path / "file").write_text("")
    nowhere = load_recipe(recipe_file, [*STILL, f"method.cache={tmp_path / 'file'}"])
    with pytest.raises(ConfigError, match=r"method.cache: .* cannot be written \(Not a directory\)"):
        store_outputs(nowhere, method, batches)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.teacher="], ["method.teacher: names no checkpoint"]),
        (["method.teacher=gone.ckpt"], ["method.teacher: gone.ckpt: no such checkpoint file"]),
        (
            ["method.teacher_encoder.num_heads=4"],
            ["method.teacher_encoder.num_heads: 4, but the teacher in", "has 2; write 2"],
        ),
        (
            ["method.teacher_encoder={name: swin, image_size: 32, patch_size: 8, depths: [2], num_heads: [3]}"],
            ["method.teacher_encoder: swin, but the teacher in", "write vit"],
        ),
        (["data.mean=[0.5, 0.5, 0.5]"], ["data.mean: [0.5, 0.5, 0.5], but the teacher", "0.485"]),
    ],
    ids=lambda value: str(value[0])[:40],
)
def test_a_teacher_that_does_not_fit_is_one_line(recipe_file: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises((ConfigError, checkpoint.CheckpointError)) as caught:
        train(load_recipe(recipe_file, overrides))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value
    assert not (recipe_file.parent / "run").exists()


def test_a_teacher_of_other_classes_is_refused(
    recipe_file: Path, tmp_path: Path, image_folder_factory: MakeFolder
) -> None:
    root = image_folder_factory(tmp_path / "others", classes=6, train=2, val=1)
    for split in ("train", "val"):
        (root / split / "class_3").rename(root / split / "zebra")
    with pytest.raises(ConfigError, match=r"^method\.teacher: .* data\.train has \(class_3, zebra\)"):
        train(load_recipe(recipe_file, [f"data.root={root}"]))


@pytest.mark.compiles
def test_entry_point_refuses_in_one_line(run_entry: Run, recipe_file: Path) -> None:
    done = run_entry("train.py", "--config", recipe_file, "method.num_classes=5")
    assert_one_line_error(done, "method.num_classes")
    done = run_entry("train.py", "--config", recipe_file, "method.cache=answers")
    assert_one_line_error(done, "method.cache", "data.crop_scale: [1.0, 1.0]", "data.hflip: 0")
