"""The demo's report: one file with every figure of its runs, and one line for a folder that is no demo."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from scripts.demo_report import read_demo, report
from src.errors import UserError
from tests.conftest import class_picture
from tests.helpers import ROOT, Run, assert_one_line_error

WRITTEN = ROOT / "tests" / "written" / "v0_1_0"
RECIPE = """
encoder: {{name: vit, image_size: 32, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}}
method: {method}
data: {{root: {root}, labels_per_class: {labels}}}
seed: 7
"""
PRETRAIN, FINETUNE = "{name: fastmim, mask_block: 8}", "{name: classify, num_classes: 3}"
CLASSES = ["plain", 'a<b> & "c"', "it's"]
COUNTS = np.array([[3, 1, 0], [0, 4, 0], [2, 0, 2]])
#: top-1 of the fine-tuning runs, 12 validation images
TOP1 = {"fastmim": 0.75, "scratch": 0.25, "scratch-long": 0.5}


def write_run(folder: Path, method: str, root: Path, *evaluations: dict[str, float]) -> None:
    folder.mkdir(parents=True)
    updates = 15 if folder.name == "scratch-long" else 5
    steps = [
        {"event": "train", "time": 5.5, "step": n, "loss": 2.345678 / n, "relative": 3.21098 / n, "grad_norm": None}
        for n in range(1, updates + 1)
    ]
    lines = [{"event": "eval", "time": 1.5, **line} for line in evaluations]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines[:-1], *steps, lines[-1]])) + "\n")
    command = ["train.py", "--config", "a <b>.yaml", f"output={folder.name}"]
    environment = {"command": command, "code": "9.8.7", "python": "3.99", "device": "CPU", "cpus": 61}
    (folder / "environment.json").write_text(json.dumps({**environment, "packages": {"mindspore": "2.99"}}))
    labels = 0 if method == PRETRAIN else 20
    (folder / "config.yaml").write_text(RECIPE.format(method=method, root=root, labels=labels))
    (folder / "train.log").write_text("2026-01-02 03:04:05 output\n2026-01-02 03:06:08 done\n")


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """What run_demo.sh leaves, with figures written by hand and without checkpoints."""
    folder, root = tmp_path / "demo", tmp_path / "stripes"
    write_run(folder / "fastmim-pretrain", PRETRAIN, root, {"knn_top1": 0.123456}, {"knn_top1": 0.654321, "loss": 0.9})
    (folder / "fastmim-pretrain/gallery").mkdir()
    for epoch, grey in ((3, 40), (12, 200)):
        picture = np.full((8, 6, 3), grey, np.uint8)
        assert cv2.imwrite(str(folder / f"fastmim-pretrain/gallery/epoch_{epoch:04d}.png"), picture)
    for name, top1 in TOP1.items():
        write_run(folder / name, FINETUNE, root, {"loss": 1.5, "top1": top1, "top5": 0.987654, "count": 12})
    return folder


def page_of(folder: Path) -> str:
    return report(read_demo(folder), {"FastMIM": (CLASSES, COUNTS), "random weights": (CLASSES, COUNTS)})


class Balanced(HTMLParser):
    """Every element that opens closes in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "link", "img", "path", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "circle", "polyline"):
            assert self.open.pop() == tag


def test_the_report_needs_no_other_file(demo: Path) -> None:
    text = page_of(demo)
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert len(parser.loaded) == 2 and all(link.startswith("data:") for link in parser.loaded)
    assert not re.search(r"https?://|url\(|@import|<script|\$", text)
    assert text.count("<svg") == 2 and 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_the_report_holds_every_figure(demo: Path) -> None:
    text = page_of(demo)
    for path in demo.glob("*/metrics.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            figures = [value for key, value in line.items() if key not in ("event", "time") and value is not None]
            assert [value for value in figures if f"<td>{value:.6g}</td>" not in text] == [], path
    words = unescape(re.sub(r"<[^>]+>", " ", text))
    assert "FastMIM +50.0 points (standard error 17.7)" in words
    for row in (
        ["FastMIM", "75.0 ± 12.5 %", "9 / 12", "20", "5", "123", "5 updates, 123 s"],
        ["random weights, 3 × the updates", "50.0 ± 14.4 %", "6 / 12", "20", "15", "123", "none"],
    ):
        assert " ".join(row) in " ".join(words.split())
    for words_of_the_page in ("12.3 %", "65.4 %", "9 of 12 images correct", "after epoch 12", "HOG target"):
        assert words_of_the_page in words
    for fact in ("9.8.7", "3.99", "2.99", "CPU cores: 61", "Seed 7"):
        assert fact in " ".join(words.split())


def test_texts_are_escaped(demo: Path) -> None:
    text = page_of(demo)
    for name in CLASSES:
        assert text.count(f'<th scope="row">{escape(name)}</th>') == 2
        assert text.count(f'<th scope="col">{escape(name)}</th>') == 2
    command = escape("python train.py --config 'a <b>.yaml' output=fastmim-pretrain")
    assert f"<code>{command}</code>" in text and "<b>" not in text
    assert text.count('style="--p:0.750">75</td>') == 2  # rows are normalised
    order = re.findall(r"output=([\w-]+)</code>", text)
    assert order == ["fastmim-pretrain", "fastmim", "scratch", "scratch-long"]


def test_what_a_demo_lacks_is_left_out(demo: Path) -> None:
    shutil.rmtree(demo / "scratch-long")
    shutil.rmtree(demo / "fastmim-pretrain/gallery")
    metrics = demo / "fastmim-pretrain/metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if "knn_top1" not in line))
    text = report(read_demo(demo), {})
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Result", "Loss", "How it was made", "Every logged value"]
    assert "the updates" not in text


def change(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


STEP = '{"event": "train", "step": 1}\n'
BROKEN = {
    "no runs": (lambda folder: [shutil.rmtree(run) for run in folder.iterdir()], "no folder METHOD-pretrain in it"),
    "no scratch": (lambda folder: shutil.rmtree(folder / "scratch"), "scratch/config.yaml"),
    "no environment": (lambda folder: (folder / "scratch/environment.json").unlink(), "environment.json: cannot be"),
    "a list": (change("fastmim/environment.json", "[1, 2]"), "environment.json: cannot be read"),
    "half a line": (change("scratch/metrics.jsonl", '{"event": "ev'), "metrics.jsonl: cannot be read"),
    "a number": (change("scratch/metrics.jsonl", "3\n"), "metrics.jsonl: cannot be read"),
    "no evaluation": (change("scratch/metrics.jsonl", STEP), "lacks updates or"),
    "a word": (
        change("scratch/metrics.jsonl", STEP + '{"event": "eval", "top1": "good", "count": 9}\n'),
        "lacks updates or",
    ),
    "an empty log": (change("fastmim/train.log", ""), "train.log: cannot be read"),
    "no times": (change("fastmim/train.log", "hello\n"), "train.log: cannot be read"),
    "another recipe": (change("fastmim/config.yaml", "encoder: none\n"), "config.yaml"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_is_no_demo_is_one_line(kind: str, demo: Path) -> None:
    harm, words = BROKEN[kind]
    harm(demo)
    with pytest.raises(UserError) as caught:
        read_demo(demo)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_picture_is_one_line(demo: Path) -> None:
    (demo / "fastmim-pretrain/gallery/epoch_0012.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"epoch_0012\.png: cannot be read"):
        page_of(demo)


@pytest.mark.compiles
def test_the_command_refuses_what_is_no_demo(demo: Path, run_entry: Run) -> None:
    assert_one_line_error(run_entry("scripts/demo_report.py", demo / "none"), "FOLDER: there is no folder")
    assert_one_line_error(run_entry("scripts/demo_report.py", demo), "fastmim/last.ckpt: no such checkpoint file")
    assert not (demo / "report.html").exists()


@pytest.mark.compiles
def test_the_command_counts_confusions_of_checkpoints(demo: Path, run_entry: Run) -> None:
    figures = json.loads((WRITTEN / "figures.json").read_text(encoding="utf-8"))["classify"]["evaluate"]
    for label in range(3):
        below = demo.parent / "stripes" / "val" / f"class_{label}"
        below.mkdir(parents=True)
        for number in range(3):
            assert cv2.imwrite(str(below / f"{label}_{number:02d}.png"), class_picture(label, number + 1000, (40, 48)))
    for name in ("fastmim", "scratch"):
        shutil.copy(WRITTEN / "classify.ckpt", demo / name / "last.ckpt")
    done = run_entry("scripts/demo_report.py", demo)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "demo: k-NN top1 of the frozen fastmim encoder before=12.3 after=65.4",
        f"demo: report {demo / 'report.html'}",
        "demo: top1 pretrained=75.0 scratch=25.0",
    ]
    text = (demo / "report.html").read_text(encoding="utf-8")
    assert text.count(f"{9 * figures['top1']:.0f} of 9 images correct</figcaption>") == 2
    assert text.count('<th scope="row">class_2</th>') == 2
