"""Same data, same figure: what the log says does not depend on how a batch is split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from src.config.files import load_recipe
from src.engine import checkpoint
from src.methods import build_method
from src.models.graph import AsGraph
from src.tasks.train import train
from tests.helpers import MakeFolder, numbers

pytestmark = [pytest.mark.usefixtures("graph_mode"), pytest.mark.compiles]

VIT = "{name: vit, image_size: 32, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}"
METHODS = {
    "hog": "{name: fastmim, mask_block: 8, target: {cell: 4}, decoder: {width: 32}}",
    "fine mask": "{name: fastmim, mask_block: 4, target: {name: pixels, normalize: patch}, decoder: {width: 32}}",
    "absolute": "{name: simmim, mask_block: 8}",
    "classify": "{name: classify, num_classes: 3, pool: cls, fc_norm: false, label_smoothing: 0.1}",
    "logits": "{name: manifold, num_classes: 3, pool: cls, fc_norm: false, beta: 0, alpha: 0.5, tau: 2.0, "
    f"teacher: TEACHER, teacher_encoder: {VIT}}}",
}
RECIPE = """
encoder: {encoder}
method: {method}
data: {{root: {root}, crop_scale: [1.0, 1.0], crop_ratio: [1.0, 1.0], hflip: 0.0, workers: 0}}
train: {{epochs: 1, batch_size: {batch}, effective_batch: 8, base_lr: 1e-3, lr_batch: 0, log_every: 1}}
device: CPU
output: {output}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, image_folder_factory: MakeFolder) -> Path:
    return image_folder_factory(tmp_path_factory.mktemp("same") / "stripes")


def run_of(kind: str, batch: int, data: Path, folder: Path, *changes: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of 3 updates of 8 images, `batch` in each pass."""
    teacher = folder / "teacher.ckpt"
    if kind == "logits" and not teacher.exists():
        run_of("classify", 8, data, folder, *changes)
        (folder / "classify_8" / "last.ckpt").rename(teacher)
    method = METHODS[kind].replace("TEACHER", str(teacher))
    output, path = folder / f"{kind}_{batch}", folder / f"{kind}_{batch}.yaml"
    path.write_text(RECIPE.format(encoder=VIT, method=method, root=data, batch=batch, output=output))
    train(load_recipe(path, [*changes]))
    return [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["absolute", "logits"])  # the sums of the others have the form of one of these
def test_passes_change_no_figure(kind: str, data: Path, tmp_path: Path) -> None:
    no_evaluation = "data.val="  # the next test has evaluations
    whole, split = (run_of(kind, batch, data, tmp_path, no_evaluation) for batch in (8, 2))
    assert len(whole) == len(split) == 3 and whole[0]["relative"] is not None
    for one, other in zip(whole, split, strict=True):
        for key in ("loss", "baseline", "relative"):
            assert other[key] == pytest.approx(one[key], rel=2e-4), key
    # before the first update both have the same weights
    for key in ("loss", "baseline", "relative"):
        assert split[0][key] == pytest.approx(whole[0][key], rel=2e-6), key


@pytest.mark.parametrize("kind", ["fine mask", "absolute", "classify"])
def test_the_batch_changes_no_evaluation(kind: str, data: Path, tmp_path: Path) -> None:
    """Sums of 8 images at once, and of 3, 3 and 2 with a padded image."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(encoder=VIT, method=METHODS[kind], root=data, batch=8, output=tmp_path / "run"))
    method = build_method(load_recipe(path))
    method.prepare([numbers(1, 4, 3, 32, 32)])
    measure = AsGraph(method, method.measure).set_train(False)
    image, label = numbers(0, 8, 3, 32, 32), np.arange(8, dtype=np.int32) % 3

    def sums_of(size: int) -> np.ndarray:
        total = np.zeros(0)
        for start in range(0, 8, size):
            place = np.arange(start, start + size)
            counted = np.where(place < 8, label[place % 8], -1).astype(np.int32)
            number = Tensor((place % 8).astype(np.int32))
            sums = measure(Tensor(image[place % 8]), Tensor(counted), number).asnumpy().astype(np.float64)
            total = sums if not total.size else total + sums
        return total

    whole, split = method.metrics(sums_of(8)), method.metrics(sums_of(3))
    assert whole["count"] == split["count"] == 8
    for key, value in whole.items():
        assert split[key] == pytest.approx(value, rel=2e-6), key


def test_black_images_have_no_baseline_to_compare_with(
    tmp_path: Path, image_folder_factory: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so no NaN: every line is JSON, and the log says nothing of a ratio."""
    import cv2

    root = image_folder_factory(tmp_path / "black")
    for path in root.rglob("*.*g"):
        cv2.imwrite(str(path), np.zeros((40, 48, 3), np.uint8))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in metrics.jsonl")

    for kind in ("fine mask",):
        run_of(kind, 8, root, tmp_path)
        for text in (tmp_path / f"{kind}_8" / "metrics.jsonl").read_text().splitlines():
            line = json.loads(text, parse_constant=refuse)
            assert line["event"] == "eval" or line["relative"] is None
        told = capsys.readouterr()
        assert "x baseline" not in told.out and "Warning" not in told.err + told.out
        assert (tmp_path / f"{kind}_8" / "gallery").is_dir() and (tmp_path / f"{kind}_8" / "curves.png").exists()


def test_a_single_class_has_no_baseline_either(tmp_path: Path, image_folder_factory: MakeFolder) -> None:
    root = image_folder_factory(tmp_path / "one", classes=1, train=16)
    one = METHODS["classify"].replace("num_classes: 3", "num_classes: 1").replace("0.1", "0.0")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(encoder=VIT, method=one, root=root, batch=8, output=tmp_path / "run"))
    metrics = train(load_recipe(path))
    assert metrics["top1"] == 1.0
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["relative"] for line in lines if line["event"] == "train"] == [None, None]
    assert checkpoint.load(tmp_path / "run" / "last.ckpt").meta["metrics"]["top1"] == 1.0
