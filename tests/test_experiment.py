"""Experiments: what is read, which runs a table needs, tables and figures, and runs kept after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.experiment import Cell, as_markdown, load_experiment, needed_runs, show
from src.config.files import ConfigError, load_recipe
from tests.helpers import ROOT, MakeFolder, Run, assert_one_line_error

EXPERIMENTS = sorted((ROOT / "config/experiments").glob("*.yaml"))

TEXT = """
seeds: [0, 1]
runs:
  pre: {recipe: recipe.yaml, set: {method.mask_ratio: 0.5}}
  tuned: {recipe: recipe.yaml, from: {init_from: pre}, set: {method: {name: classify, num_classes: 3}}}
  other: {recipe: recipe.yaml}
tables:
  start:
    title: start
    columns: [top-1, loss]
    rows:
      pre-trained: [tuned top1, pre loss]
  rest: {title: rest, columns: [loss], rows: {all: [other loss]}}
"""
RECIPE = """
encoder: {{name: vit, image_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}}
method: {{name: fastmim, mask_block: 8, target: {{cell: 4}}, decoder: {{width: 32}}}}
data: {{root: {root}, workers: 0}}
train: {{epochs: 1, batch_size: 8, eval_every: 0}}
device: CPU
"""


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_names_recipes_that_are_legal(path: Path) -> None:
    experiment = load_experiment(path)
    assert needed_runs(experiment, list(experiment.tables)) == list(experiment.runs)  # no run without a use
    for run in experiment.runs.values():
        load_recipe(run.recipe, run.changes)
    assert f"python scripts/experiment.py {path.relative_to(ROOT)}" in path.read_text(encoding="utf-8")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_table_needs_its_runs_and_those_they_start_from(file: Path) -> None:
    experiment = load_experiment(file)
    assert needed_runs(experiment, ["start"]) == ["pre", "tuned"]
    assert needed_runs(experiment, ["rest"]) == ["other"]


def test_means_and_deviations_of_the_last_evaluations(file: Path, tmp_path: Path) -> None:
    for seed, (top1, loss) in enumerate([(0.5, 2.0), (0.7, 3.0)]):
        for run, line in {"tuned": {"top1": top1}, "pre": {"loss": loss}}.items():
            folder = tmp_path / f"seed{seed}" / run
            folder.mkdir(parents=True)
            lines = [{"event": "eval", "top1": 0.1, "loss": 9.0}, {"event": "eval", **line}, {"event": "train"}]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    table = load_experiment(file).tables["start"]
    last = as_markdown(table, [0, 1], tmp_path).splitlines()[-1]
    assert last == "| pre-trained | 60.0 +- 14.1 | 2.5000 +- 0.7071 | 50.0, 70.0 |"
    assert show(Cell("pre", "top1"), [0.25]) == "25.0"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{init_from: pre},",
            "{init_from: pro},",
            "runs.tuned.from.init_from: there is no run 'pro' above it; valid: pre",
        ),
        ("set: {method.mask", "sett: {method.mask", "runs.pre: unknown key sett; valid: recipe, set, from"),
        ("[tuned top1, pre loss]", "[tuned top1]", "tables.start.rows.pre-trained: 1 cells for 2 columns"),
        ("pre loss]", "pre]", "rows.pre-trained: 'pre' is not a run and a metric; write for example pre top1"),
        ("pre loss]", "pro loss]", "rows.pre-trained: there is no run 'pro'; valid: pre, tuned, other"),
        ("seeds: [0, 1]", "seeds: 3", "seeds: must be a list of whole numbers, not 3; write [0, 1, 2]"),
        ("seeds: [0, 1]", "", "has no seeds"),
        ("seeds: [0, 1]", "seeds: [0, 1", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(file: Path, old: str, new: str, message: str) -> None:
    file.write_text(TEXT.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_experiment(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.compiles
def test_an_experiment_runs_keeps_what_is_done_and_refuses_runs_of_other_recipes(
    file: Path, tmp_path: Path, image_folder_factory: MakeFolder, run_entry: Run
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=image_folder_factory(tmp_path / "data")), encoding="utf-8")
    command = ("scripts/experiment.py", file, "start", "--seeds", "4", "--out", tmp_path / "out")
    done = run_entry(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| pre-trained | " in done.stdout and (tmp_path / "out/start.png").stat().st_size > 5000
    assert "encoder from" in (tmp_path / "out/seed4/tuned/train.log").read_text(encoding="utf-8")
    assert not (tmp_path / "out/seed4/other").exists()
    kept = (tmp_path / "out/seed4/pre/last.ckpt").stat().st_mtime_ns
    done = run_entry(*command)
    assert done.returncode == 0 and (tmp_path / "out/seed4/pre/last.ckpt").stat().st_mtime_ns == kept
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("batch_size: 8", "batch_size: 4"), encoding="utf-8")
    assert_one_line_error(run_entry(*command), "runs.pre", "was made by another recipe")


def test_an_unknown_table_ends_in_one_line(file: Path, run_entry: Run) -> None:
    done = run_entry("scripts/experiment.py", file, "stat")
    assert_one_line_error(done, "has no table stat; valid: start, rest")
