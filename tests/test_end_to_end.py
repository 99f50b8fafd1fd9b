"""The entry points as a user runs them, on a few pictures and a very small network."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from src import __version__
from src.config.files import load_recipe
from src.engine import checkpoint
from tests.helpers import MakeFolder, Run, assert_one_line_error

pytestmark = pytest.mark.compiles

RECIPE = """
encoder: {{name: vit, image_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, drop_path: 0.3}}
data: {{root: {root}, workers: 1, contrast: 0.2}}
train: {{epochs: 4, batch_size: 8, base_lr: 2e-3, lr_batch: 0, warmup_epochs: 1, log_every: 1}}
device: CPU
"""
PRETRAIN = "method: {name: fastmim, mask_block: 8, target: {cell: 4}, decoder: {width: 32, depth: 1}}\n"
FINETUNE = "method: {name: classify, num_classes: 3}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def data(folder: Path, image_folder_factory: MakeFolder) -> Path:
    return image_folder_factory(folder / "data")


@pytest.fixture(scope="module")
def pretrain_recipe(folder: Path, data: Path) -> Path:
    path = folder / "pretrain.yaml"
    path.write_text(PRETRAIN + RECIPE.format(root=data) + f"output: {folder / 'pretrain'}\n")
    return path


@pytest.fixture(scope="module")
def finetune_recipe(folder: Path, data: Path) -> Path:
    path = folder / "finetune.yaml"
    path.write_text(FINETUNE + RECIPE.format(root=data) + f"output: {folder / 'finetune'}\n")
    return path


@pytest.fixture(scope="module")
def pretrained(folder: Path, pretrain_recipe: Path, run_entry: Run) -> Path:
    """The output of four epochs of pre-training, with the k-NN probe."""
    done = run_entry("train.py", "--config", pretrain_recipe, "train.knn=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return folder / "pretrain"


@pytest.fixture(scope="module")
def finetuned(folder: Path, finetune_recipe: Path, pretrained: Path, run_entry: Run) -> Path:
    done = run_entry("train.py", "--config", finetune_recipe, "--init-from", pretrained / "last.ckpt", "train.epochs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "finetune"


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_a_run_leaves_its_files(pretrained: Path, pretrain_recipe: Path) -> None:
    assert set(contents(pretrained)) == {
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "environment.json",
        "last.ckpt",
        "best.ckpt",
        "gallery/epoch_0004.png",
        "curves.png",
    }
    assert load_recipe(pretrained / "config.yaml") == load_recipe(pretrain_recipe, ["train.knn=3"])
    for picture in ("gallery/epoch_0004.png", "curves.png"):
        image = cv2.imread(str(pretrained / picture))
        assert image is not None and image.std() > 5
    environment = json.loads((pretrained / "environment.json").read_text())
    assert environment["device"] == "CPU" and "train.knn=3" in environment["command"]
    assert environment["code"] == __version__ and environment["cpus"] == os.cpu_count()


def test_the_log_says_what_happens(pretrained: Path) -> None:
    log = (pretrained / "train.log").read_text()
    for words in ("compiling the graph", "x baseline", "data wait", "24 images, 3 classes", "knn_top1"):
        assert words in log, words
    steps = events(pretrained, "train")
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert all(np.isfinite([step["loss"], step["grad_norm"]]).all() and step["baseline"] > 0 for step in steps)
    assert steps[0]["lr"] == 0 and max(step["lr"] for step in steps) == 2e-3
    evaluations = events(pretrained, "eval")
    assert evaluations[0]["epoch"] == 0  # the probe before training
    assert len(evaluations) == 5 and all(line["count"] == 9 for line in evaluations[1:])
    best = checkpoint.load(pretrained / "best.ckpt").meta
    assert best["best"] == pytest.approx(min(line["loss"] for line in evaluations[1:]), abs=1e-6)


def test_an_existing_run_is_not_overwritten(pretrained: Path, pretrain_recipe: Path, run_entry: Run) -> None:
    before = contents(pretrained)
    done = run_entry("train.py", "--config", pretrain_recipe)
    assert_one_line_error(done, f"output: {pretrained} already contains a run; continue it with --resume auto")
    assert contents(pretrained) == before


def test_fine_tuning_reports_what_it_took(pretrained: Path, finetuned: Path) -> None:
    before = set(checkpoint.load(pretrained / "last.ckpt").weights)
    after = set(checkpoint.load(finetuned / "last.ckpt").weights)
    matched = {name for name in after if name.startswith("encoder.")}
    assert matched <= before and "encoder.patch_embed.proj.weight" in matched
    expected = (
        f"encoder from {pretrained / 'last.ckpt'} (epoch 4): {len(matched)} matched; 0 resized; "
        "4 missing (fresh: fc_norm.bias, fc_norm.weight, head.bias, head.weight); "
        f"{len(before - matched)} ignored ({', '.join(sorted(before - matched)[:6])}, ...)"
    )
    assert expected in (finetuned / "train.log").read_text()


def test_eval_gives_the_accuracy_training_reported(finetuned: Path, run_entry: Run) -> None:
    done = run_entry("eval.py", "--ckpt", finetuned / "last.ckpt")
    assert done.returncode == 0, done.stderr
    text, line = done.stdout.strip().splitlines()[-2:]
    result = json.loads(line)
    last = events(finetuned, "eval")[-1]
    assert {key: round(result[key], 6) for key in ("loss", "top1", "top5", "count")} == {
        key: last[key] for key in ("loss", "top1", "top5", "count")
    }
    assert result["count"] == 9 and result["ckpt"] == str(finetuned / "last.ckpt")
    measured = {"top1", "top5", "top1_correct", "top5_correct", "loss"}
    assert set(result) == {"ckpt", "data", "classes", "count", "unusable", *measured}
    percent, correct = f"{100 * result['top1']:.2f} %", result["top1_correct"]
    assert text == f"top-1 {percent} ({correct} of 9 images)"  # top-5 of three classes tells nothing
    assert re.findall(r"evaluation: .*top1 (\S+ %)", (finetuned / "train.log").read_text())[-1] == percent


def test_export_writes_a_network_and_its_preprocessing(finetuned: Path, tmp_path: Path, run_entry: Run) -> None:
    target = tmp_path / "deep" / "net.mindir"
    done = run_entry("export.py", "--ckpt", finetuned / "best.ckpt", "--output", target)
    assert done.returncode == 0, done.stderr
    assert set(contents(target.parent)) == {"net.mindir", "net.json"}
    first, second = done.stdout.strip().splitlines()[-2:]
    assert first == f"{target}: for any number of images per call; preprocessing in net.json"
    assert second.startswith("equals the checkpoint within ") and second.endswith("val")
    info = json.loads((target.parent / "net.json").read_text())
    assert info["input"] == ["batch", 3, 32, 32] and info["centre_crop"] == [32, 32]
    assert info["resize_short_side"] == 36 and info["classes"] == ["class_0", "class_1", "class_2"]


# --- resuming ---------------------------------------------------------------------------------------------------


def test_resuming_needs_a_training_state(
    pretrained: Path, pretrain_recipe: Path, tmp_path: Path, run_entry: Run
) -> None:
    best = pretrained / "best.ckpt"
    done = run_entry("train.py", "--config", pretrain_recipe, "--resume", best, f"output={tmp_path / 'run'}")
    assert_one_line_error(done, f"{best}: has weights but no training state; resume from last.ckpt")


# --- errors -----------------------------------------------------------------------------------------------------


def test_eval_of_a_pre_training_checkpoint(pretrained: Path, run_entry: Run) -> None:
    path = pretrained / "last.ckpt"
    done = run_entry("eval.py", "--ckpt", path)
    assert_one_line_error(done, f"{path}: a pre-training checkpoint (fastmim) has no classifier", "--init-from")


def test_eval_of_a_text_file(tmp_path: Path, run_entry: Run) -> None:
    path = tmp_path / "x.ckpt"
    path.write_text("hello")
    done = run_entry("eval.py", "--ckpt", path)
    assert_one_line_error(done, f"{path}: damaged or not a MindSpore checkpoint")


def test_eval_on_other_classes(
    finetuned: Path, tmp_path: Path, image_folder_factory: MakeFolder, run_entry: Run
) -> None:
    other = image_folder_factory(tmp_path, classes=5, train=1, val=1) / "val"
    done = run_entry("eval.py", "--ckpt", finetuned / "last.ckpt", "--data", other)
    words = f"--data: {other} has images of 2 classes that the checkpoint does not have (class_3, class_4)"
    assert_one_line_error(done, words)


def test_an_encoder_that_does_not_fit(pretrained: Path, finetune_recipe: Path, tmp_path: Path, run_entry: Run) -> None:
    path, output = pretrained / "last.ckpt", tmp_path / "run"
    overrides = ["encoder.depth=3", f"output={output}"]
    done = run_entry("train.py", "--config", finetune_recipe, "--init-from", path, *overrides)
    assert_one_line_error(done, f"{path}: has no weights for 12 of 40 encoder parameters (encoder.blocks.2.")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.root=gone"], "data.train: there is no folder gone/train; set data.root"),
        (["method.num_classes=5"], "method.num_classes: 5, but {data}/train has 3 classes; write 3"),
        (["device=Ascend"], "finds no Ascend here; write device=CPU or auto"),
        (["train.batch_size=25"], "train.batch_size: 25 is more than the 24 images of {data}/train; write 24 or less"),
        (["train.accumulate=4"], "train.accumulate: 4 passes of 8 images are more than an epoch; write 3 or less"),
        (["train.epoch=3"], "command line: train.epoch: unknown key of TrainConfig; did you mean epochs?"),
        (
            ["data.labels_per_class=9"],
            "data.labels_per_class: 9, but class class_0 of {data}/train has only 8 images; write 8 or less",
        ),
    ],
    ids=["no data", "classes", "device", "batch", "accumulate", "unknown key", "labels"],
)
def test_a_recipe_that_cannot_be_trained(
    finetune_recipe: Path, data: Path, tmp_path: Path, run_entry: Run, overrides: list[str], words: str
) -> None:
    done = run_entry("train.py", "--config", finetune_recipe, *overrides, f"output={tmp_path / 'run'}")
    assert_one_line_error(done, words.format(data=data))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_air_needs_ascend(finetuned: Path, run_entry: Run) -> None:
    before = contents(finetuned)
    done = run_entry("export.py", "--ckpt", finetuned / "last.ckpt", "--format", "air")
    words = "--format air: MindSpore writes AIR on Ascend only, not on CPU; write --format mindir"
    assert_one_line_error(done, words)
    assert contents(finetuned) == before
