"""Train runs with several seeds and make tables of their results: python scripts/experiment.py FILE [TABLE ...]

    python scripts/experiment.py config/experiments/findings.yaml resolution

FILE lists recipes with changes (`runs`) and tables of their results (`tables`). Only the runs of the chosen tables are
trained, once per seed. The command can be repeated: finished runs are not repeated, interrupted runs continue. Tables
are printed as Markdown and drawn into one PNG.

    seeds: [0, 1, 2]
    runs:
      hog: {recipe: ../demo/vit_fastmim_pretrain.yaml, set: {train.epochs: 8}}
      hog-tuned: {recipe: ../demo/vit_finetune.yaml, from: {init_from: hog}}    # key: run whose checkpoint it gets
    tables:
      target:
        title: What is predicted
        columns: [top-1, k-NN before]
        curve: true    # also draw the first column over the epochs, for runs with several evaluations
        rows:
          HOG: [hog-tuned top1, hog knn_top1 first]    # run, metric; the last evaluation unless `first` is written
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.config.files import ConfigError, dump_recipe, load_recipe
from src.config.reading import LONGEST, Refused, parse_yaml, read_text
from src.errors import one_line
from src.tasks.command import run_command


@dataclass(frozen=True)
class Run:
    """A recipe with changes, trained once per seed."""

    recipe: Path
    changes: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()  # recipe key, run of the same seed whose last checkpoint it gets


@dataclass(frozen=True)
class Cell:
    """A table cell: one metric of a run."""

    run: str
    metric: str
    first: bool = False  # from the evaluation before training; false: from the last one


@dataclass(frozen=True)
class Table:
    """A table of results; each row has one cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[Cell, ...]]
    curve: bool = False  # also draw the first column over the epochs


@dataclass(frozen=True)
class Experiment:
    """The content of an experiment file."""

    seeds: tuple[int, ...]
    runs: dict[str, Run]
    tables: dict[str, Table]
    path: Path = field(default_factory=Path)


def load_experiment(path: Path) -> Experiment:
    """Read an experiment file.

    Raises:
        ConfigError: one line with file, key, cause and remedy.
    """
    try:
        tree = parse_yaml(read_text(path, LONGEST))
    except (OSError, Refused) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    tree = keys(tree, f"{path}", "seeds", "runs", "tables")
    runs: dict[str, Any] = {}
    for name, entry in mapping(tree["runs"], f"{path}: runs").items():
        where = f"{path}: runs.{name}"
        entry = keys(entry, where, "recipe", optional=("set", "from"))
        sources = mapping(entry.get("from", {}), f"{where}.from")
        for key, source in sources.items():
            if source not in runs:
                raise ConfigError(f"{where}.from.{key}: there is no run {source!r} above it; valid: {listed(runs)}")
        changes = mapping(entry.get("set", {}), f"{where}.set")
        texts = tuple(f"{key}={json.dumps(value)}" for key, value in changes.items())
        runs[name] = Run(path.parent / entry["recipe"], texts, tuple(sources.items()))
    tables = {}
    for name, entry in mapping(tree["tables"], f"{path}: tables").items():
        where = f"{path}: tables.{name}"
        entry = keys(entry, where, "title", "columns", "rows", optional=("curve",))
        rows = {
            str(label): tuple(cell_of(text, f"{where}.rows.{label}", runs) for text in cells)
            for label, cells in mapping(entry["rows"], f"{where}.rows").items()
        }
        for label, cells in rows.items():
            if len(cells) != len(entry["columns"]):
                columns = len(entry["columns"])
                raise ConfigError(f"{where}.rows.{label}: {len(cells)} cells for {columns} columns; write {columns}")
        tables[name] = Table(entry["title"], tuple(entry["columns"]), rows, entry.get("curve", False))
    seeds = tree["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"{path}: seeds: must be a list of whole numbers, not {seeds!r}; write [0, 1, 2]")
    return Experiment(tuple(seeds), runs, tables, path)


def mapping(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: must be a mapping of keys, not {tree!r}")
    return tree


def keys(tree: Any, where: str, *needed: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check that a mapping has the needed keys and no unknown ones."""
    for key in mapping(tree, where):
        if key not in (*needed, *optional):
            raise ConfigError(f"{where}: unknown key {key}; valid: {listed((*needed, *optional))}")
    for key in needed:
        if key not in tree:
            raise ConfigError(f"{where}: has no {key}; write one")
    return tree


def cell_of(text: Any, where: str, runs: dict[str, Run]) -> Cell:
    """Parse a cell: run, metric and optionally `first`."""
    parts = str(text).split()
    if len(parts) not in (2, 3) or (len(parts) == 3 and parts[2] != "first"):
        raise ConfigError(f"{where}: {text!r} is not a run and a metric; write for example {next(iter(runs))} top1")
    if parts[0] not in runs:
        raise ConfigError(f"{where}: there is no run {parts[0]!r}; valid: {listed(runs)}")
    return Cell(parts[0], parts[1], len(parts) == 3)


def listed(names: Any) -> str:
    return ", ".join(names) or "none"


# --- running ----------------------------------------------------------------------------------------------------


def needed_runs(experiment: Experiment, tables: list[str]) -> list[str]:
    """Return the runs of these tables and the runs they start from, in the order of the file."""
    needed: set[str] = set()
    pending = [cell.run for name in tables for cells in experiment.tables[name].rows.values() for cell in cells]
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += [source for _, source in experiment.runs[name].sources]
    return [name for name in experiment.runs if name in needed]


def train_run(experiment: Experiment, name: str, seed: int, out: Path) -> None:
    """Train a run to its end, unless it is finished."""
    run, folder = experiment.runs[name], out / f"seed{seed}" / name
    sources = [f"{key}={out / f'seed{seed}' / source / 'last.ckpt'}" for key, source in run.sources]
    changes = [*run.changes, *sources, f"seed={seed}", f"output={folder}"]
    recipe = load_recipe(run.recipe, changes)
    previous = folder / "config.yaml"
    if previous.exists() and previous.read_text(encoding="utf-8") != dump_recipe(recipe):
        raise ConfigError(
            f"{experiment.path}: runs.{name}: {folder} was made by another recipe; move it away, or write another --out"
        )
    if (folder / "curves.png").exists():  # a run writes it last
        return
    resume = ["--resume", "auto"] if folder.exists() else []
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(run.recipe), *resume, *changes]
    if subprocess.run(command).returncode:
        raise ConfigError(f"{experiment.path}: runs.{name}: training with seed {seed} failed; see above")


def seed_evaluations(run: str, seed: int, out: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run with one seed, in order."""
    path = out / f"seed{seed}" / run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == "eval"]


def value(cell: Cell, seed: int, out: Path) -> float:
    """Return the number of a cell for one seed."""
    lines = seed_evaluations(cell.run, seed, out)
    line = lines[0 if cell.first else -1] if lines else {}
    if cell.metric not in line:
        raise ConfigError(f"{out / f'seed{seed}' / cell.run}: has no {cell.metric}; valid: {listed(line)}")
    return float(line[cell.metric])


# --- tables and figures -----------------------------------------------------------------------------------------


def is_accuracy(cell: Cell) -> bool:
    return "top" in cell.metric


def show(cell: Cell, values: list[float]) -> str:
    """Format mean and standard deviation, accuracies in per cent."""
    scale, digits = (100, 1) if is_accuracy(cell) else (1, 4)
    spread = f" +- {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}"


def as_markdown(table: Table, seeds: list[int], out: Path) -> str:
    """Format a table: means and standard deviations, then the first column for each seed."""
    lines = [f"| {table.title} | {' | '.join(table.columns)} | seeds {', '.join(map(str, seeds))} |"]
    lines.append("|---" * (len(table.columns) + 2) + "|")
    for label, cells in table.rows.items():
        columns = [[value(cell, seed, out) for seed in seeds] for cell in cells]
        means = " | ".join(show(cell, column) for cell, column in zip(cells, columns, strict=True))
        each = ", ".join(show(cells[0], [number]) for number in columns[0])
        lines.append(f"| {label} | {means} | {each} |")
    return "\n".join(lines)


COLOURS = ("#1f5fa8", "#d9822b", "#4a9a5b", "#888888", "#9a4a8c", "#b8a53a", "#2b9ad9")


def draw(tables: list[Table], seeds: list[int], out: Path, path: Path) -> None:
    """Draw a panel of accuracies per table (a dot per seed, a line for the mean), and one per curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (panel, table) for table in tables for panel in ((draw_dots, draw_curve) if table.curve else (draw_dots,))
    ]
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(5.2 * across, 3.4 * down), layout="constrained", squeeze=False)
    for axis, (panel, table) in zip(axes.flat, panels, strict=False):
        panel(table, seeds, out, axis)
        axis.set_title(table.title, fontsize=9)
        axis.set_ylabel("per cent")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_dots(table: Table, seeds: list[int], out: Path, axis: Any) -> None:
    """Draw the accuracy columns of a table: a dot per seed, a line for the mean."""
    accuracies = [c for c in range(len(table.columns)) if all(is_accuracy(cells[c]) for cells in table.rows.values())]
    for number, column in enumerate(accuracies):
        colour = COLOURS[number % len(COLOURS)]
        for row, cells in enumerate(table.rows.values()):
            x = row + 0.16 * (number - (len(accuracies) - 1) / 2)
            values = [100 * value(cells[column], seed, out) for seed in seeds]
            axis.plot([x] * len(values), values, "o", color=colour, markersize=4, alpha=0.6)
            mean = statistics.mean(values)
            name = table.columns[column] if row == 0 else None
            axis.plot([x - 0.07, x + 0.07], [mean, mean], color=colour, linewidth=2.5, label=name)
    labels = ["\n".join(label.split(", ")) for label in table.rows]
    axis.set_xticks(range(len(labels)), labels, fontsize=8 if len(labels) < 6 else 7)
    axis.set_xlim(-0.5, len(labels) - 0.5)
    if len(accuracies) > 1:
        axis.legend(frameon=False, fontsize=8)
    elif accuracies:
        axis.set_xlabel(table.columns[accuracies[0]], fontsize=8)


def draw_curve(table: Table, seeds: list[int], out: Path, axis: Any) -> None:
    """Draw the first column's metric over the epochs: mean over seeds as a line, range as a shaded area."""
    for number, (label, (cell, *_)) in enumerate(table.rows.items()):
        runs = [seed_evaluations(cell.run, seed, out) for seed in seeds]
        if min(map(len, runs)) < 2:
            continue
        epochs = [line["epoch"] for line in runs[0]]
        values = [[100 * line[cell.metric] for line in lines] for lines in zip(*runs, strict=True)]
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(epochs, list(map(statistics.mean, values)), color=colour, label=label, linewidth=1.5)
        axis.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.12)
    axis.set_xlabel("epoch")
    axis.legend(frameon=False, fontsize=7)


def main() -> int:
    parser = argparse.ArgumentParser(description="train runs with several seeds and make tables of their results")
    parser.add_argument("file", type=Path, help="YAML file of runs and tables")
    parser.add_argument("tables", nargs="*", help="tables of the file; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds; default: those of the file")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/<name of the file>")
    args = parser.parse_intermixed_args()

    def command() -> None:
        experiment = load_experiment(args.file)
        for name in args.tables:
            if name not in experiment.tables:
                raise ConfigError(f"command line: {args.file} has no table {name}; valid: {listed(experiment.tables)}")
        tables, seeds = args.tables or list(experiment.tables), args.seeds or list(experiment.seeds)
        out = args.out or Path("runs") / args.file.stem
        for seed in seeds:
            for run in needed_runs(experiment, tables):
                train_run(experiment, run, seed, out)
        for name in tables:
            sys.stdout.write(f"\n{one_line(name)}\n\n{as_markdown(experiment.tables[name], seeds, out)}\n")
        picture = out / f"{'_'.join(args.tables) or args.file.stem}.png"
        draw([experiment.tables[name] for name in tables], seeds, out, picture)
        sys.stdout.write(f"\nfigure: {one_line(str(picture))}\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
