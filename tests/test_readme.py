"""The README's Quick Start runs as written, in order, in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.markdown import fenced, read, without_comment

#: what makes the demo's recipes a matter of seconds; everything else runs as printed
SHORT = {"train.py": "train.epochs=1 train.warmup_epochs=0 train.log_every=1 data.labels_per_class=5 encoder.depth=1"}


def quick_start() -> list[str]:
    """The commands that the README gives one by one."""
    (block,) = [block for block in fenced("README.md", "bash") if "prepare_demo.py" in block]
    return [without_comment(line) for line in block.splitlines() if not line.startswith("pip ")]


def copy_of_the_project(target: Path) -> Path:
    ignored = shutil.ignore_patterns(".git", ".venv*", "data", "runs", "__pycache__")
    shutil.copytree(ROOT, target, ignore=lambda folder, names: ignored(folder, names) if Path(folder) == ROOT else [])
    return target


def run(words: list[str], project: Path) -> str:
    """What a Python command of the project prints; it must end well."""
    environment = {**os.environ, "GLOG_v": "3"}
    done = subprocess.run([sys.executable, *words], cwd=project, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def shape(line: str) -> str:
    """A line of a log with every number as 0, up to `...` where it is cut short."""
    return re.sub(r"\d+", "0", line.removesuffix("..."))


@pytest.mark.compiles
def test_quick_start_runs(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path / "project")
    printed = []
    for command in quick_start():
        extra = next((text for name, text in SHORT.items() if name in command), "")
        printed.append(run([*command.split()[1:], *extra.split()], project))
    assert (project / "runs/vit_finetune/last.mindir").exists()
    assert list((project / "runs/hub").glob("vit_finetune_cpu_*_demo_research_cv_top1acc*.ckpt"))
    assert list((project / "runs/vit_fastmim_pretrain/gallery").glob("*.png"))

    training = next(text for text, command in zip(printed, quick_start(), strict=True) if "train.py" in command)
    lines = [shape(line) for line in training.splitlines()]
    (shown,) = fenced("README.md", "text")
    for line in shown.splitlines():
        assert any(other.startswith(shape(line)) for other in lines), f"the log has no line like: {line}"

    check_backbone(project)


def check_backbone(project: Path) -> None:
    """The README's Python lines, with the checkpoints of the Quick Start."""
    (lines,) = fenced("README.md", "python")
    images = (
        "import numpy as np\nfrom mindspore import Tensor\n\nimages = Tensor(np.zeros((1, 3, 128, 128), np.float32))\n"
    )
    check = "print([m.shape for m in maps], backbone.channels, backbone.strides, backbone.report)\n"
    (project / "backbone.py").write_text(images + lines + check, encoding="utf-8")
    assert "[(1, 96, 16, 16)] (96,) (8,)" in run(["backbone.py"], project)


def test_no_trace_of_a_machine() -> None:
    """No absolute path of somebody's machine in any shipped file."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home|Users|tmp)/\w")
    found = []
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".sh", ".md", ".yaml", ".toml", ".txt"} and pattern.search(path.read_text("utf-8")):
            found.append(name)
    assert found == []


def test_the_install_line_comes_first() -> None:
    first, *_ = fenced("README.md", "bash")
    assert first.startswith("pip install -r requirements.txt\n")
    assert read("README.md").index("## Quick Start") < read("README.md").index("## Model Architecture")
