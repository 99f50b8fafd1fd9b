"""The README's commands run as written, in order, in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: what makes the demo's recipes a matter of seconds; everything else runs as printed
SHORT = {"train.py": "train.epochs=1 train.warmup_epochs=0 train.log_every=5"}


def quick_start() -> list[str]:
    """The commands of the README's Quick Start."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Quick Start")[1]
    return re.findall(r"```bash\n(.*?)```", section, re.S)[0].strip().splitlines()


def test_quick_start_runs(tmp_path: Path) -> None:
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns(".git", ".venv*", "data", "runs", "__pycache__")
    shutil.copytree(ROOT, project, ignore=lambda folder, names: ignored(folder, names) if Path(folder) == ROOT else [])
    for command in quick_start():
        extra = next((text for name, text in SHORT.items() if name in command), "")
        words = [sys.executable, *command.split()[1:], *extra.split()]
        done = subprocess.run(words, cwd=project, capture_output=True, text=True, env={**os.environ, "GLOG_v": "3"})
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (project / "runs/vit_finetune/last.mindir").exists()
    assert list((project / "runs/hub").glob("vit_finetune_cpu_*_demo_research_cv_top1acc*.ckpt"))
    assert list((project / "runs/vit_fastmim_pretrain/gallery").glob("*.png"))


def test_every_script_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`?((?:scripts|benchmarks|config|src|hub|tests)/[\w/.]+\.(?:py|sh|yaml|md))", text))
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


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
