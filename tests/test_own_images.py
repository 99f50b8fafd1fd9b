"""docs/images.md runs as written, in order, on a few small images; variants of its runs are planned."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, MakeFolder
from tests.markdown import fenced, without_comment
from tests.test_pages import module_of

pytestmark = [pytest.mark.usefixtures("graph_mode"), pytest.mark.compiles]

#: what makes the page's trainings a matter of seconds
SHORT = ("train.epochs=1", "train.warmup_epochs=0", "train.batch_size=4", "encoder.depth=1", "encoder.embed_dim=24")


def commands() -> list[str]:
    """Python commands of the page one by one, and what stands between them as shell scripts."""
    found: list[str] = []
    for block in fenced("docs/images.md", "bash"):
        script = ""
        for line in block.splitlines():
            if line.startswith("python "):
                found += [script, without_comment(line)]
                script = ""
            else:
                script += f"{line}\n"
        found.append(script)
    return [command for command in found if command]


def varied(words: list[str]) -> list[str]:
    """Variants of a run, which write their `output=`, are planned: other files test sizes and channels."""
    return ["--plan"] if any(word.startswith("output=") for word in words) else []


def test_the_page_runs(
    tmp_path: Path,
    image_folder_factory: MakeFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image_folder_factory(tmp_path / "flat", classes=2, train=4, val=1, flat=True)
    image_folder_factory(tmp_path / "classes", classes=3, train=5, val=1)
    (tmp_path / "flat/train").rename(tmp_path / "my_images")
    (tmp_path / "classes/train").rename(tmp_path / "my_labelled")
    (tmp_path / "config").symlink_to(ROOT / "config")
    monkeypatch.chdir(tmp_path)
    for command in commands():
        if not command.startswith("python "):
            subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)
            continue
        _, script, *words = shlex.split(command)
        words += (*SHORT, *varied(words)) if script == "train.py" else ()
        monkeypatch.setattr(sys, "argv", [script, *words])
        assert module_of(script, monkeypatch).main() == 0, f"{command}\n{capsys.readouterr().err}"

    log = capsys.readouterr().out
    assert "my_images: 8 images, no labels" in log
    assert "my_split/train.csv: 12 images, 3 classes" in log and "my_split/val.csv: 3 images, 3 classes" in log
    assert "64 x 96 pixels" in log and "my_images/0_00.jpg  class_" in log
    assert Path("runs/my_finetune/best.mindir").exists()
    exec("\n".join(fenced("docs/images.md", "python")), {})  # the project's own lines
