"""The report of a demo, one HTML file, and the demo's last lines: python scripts/demo_report.py FOLDER

FOLDER is what scripts/run_demo.sh wrote: METHOD-pretrain and METHOD for each method, scratch, and perhaps scratch-long
(more updates). FOLDER/report.html needs no other file and no network.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.config import Recipe
from src.config.files import load_recipe
from src.config.paths import existing_folder
from src.errors import UserError
from src.tasks.command import run_command
from src.visual import html

METHODS = {"fastmim": "FastMIM", "simmim": "SimMIM", "mae": "MAE"}
#: target of pre-training -> what the columns of the gallery show after image and mask
COLUMNS = {
    "hog": "the HOG target (a line is an edge direction of its cell); the prediction in amber on masked cells, "
    "the target in grey on visible cells",
    "pixels": "the prediction for all pixels; the image with the prediction on masked blocks. The loss counts masked "
    "blocks only, so the prediction on visible blocks is noise",
    "features": "the main directions of the target features as colours; the same with the prediction on masked blocks",
}
TOP = 1.5  # of the loss curves
UNKNOWN = "not recorded"
AGAIN = "run bash scripts/run_demo.sh again"
Confusion = tuple[list[str], Any]  # class names, counts of images by true and predicted class


@dataclass(frozen=True)
class Run:
    """What a training run wrote."""

    folder: Path
    label: str
    tone: int  # number of its colour
    recipe: Recipe
    environment: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    seconds: float  # from the first line of train.log to the last

    def values(self, key: str, event: str = "eval") -> list[float]:
        """The values of a key in the lines of an event, in order."""
        found = (line.get(key) for line in self.lines if line.get("event") == event)
        return [value for value in found if isinstance(value, int | float)]

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Updates and loss / baseline."""
        pairs = ((line.get("step"), line.get("relative")) for line in self.lines if line.get("event") == "train")
        return [(x, y) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)]

    @property
    def updates(self) -> int:
        return int(self.values("step", "train")[-1])

    @property
    def top1(self) -> float:
        return self.values("top1")[-1]

    @property
    def count(self) -> int:
        return int(self.values("count")[-1])

    @property
    def error(self) -> float:
        """Standard error of the top-1 as a proportion."""
        return float((self.top1 * (1 - self.top1) / self.count) ** 0.5)


@dataclass(frozen=True)
class Demo:
    """The runs of a demo: pre-training and fine-tuning by method, scratch, scratch with more updates."""

    pretrained: dict[str, Run]
    tuned: dict[str, Run]
    scratch: Run
    longer: Run | None

    @property
    def runs(self) -> list[Run]:
        """All, in the order in which scripts/run_demo.sh makes them."""
        pairs = [run for method in self.tuned for run in (self.pretrained[method], self.tuned[method])]
        return [*pairs, *self.classifiers[len(self.tuned) :]]

    @property
    def classifiers(self) -> list[Run]:
        return [*self.tuned.values(), self.scratch, *([self.longer] if self.longer else [])]


def read_run(folder: Path, label: str, tone: int, *needed: str) -> Run:
    """A finished run; `needed` are metrics that its evaluations must have.

    Raises:
        UserError: a file is missing or broken, or the run has not ended.
    """
    recipe = load_recipe(folder / "config.yaml")
    lines = read(folder / "metrics.jsonl", lambda text: [dict(json.loads(line)) for line in text.splitlines()])
    environment = read(folder / "environment.json", lambda text: dict(json.loads(text)))
    start, end = read(folder / "train.log", lambda text: [moment(text.splitlines()[at]) for at in (0, -1)])
    run = Run(folder, label, tone, recipe, environment, lines, (end - start).total_seconds())
    if not run.values("step", "train") or not all(run.values(key) for key in needed):
        raise UserError(f"{folder}: metrics.jsonl lacks updates or an evaluation; {AGAIN}")
    return run


def read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, IndexError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); {AGAIN}") from None


def moment(line: str) -> datetime:
    """When a line of train.log was written."""
    return datetime.fromisoformat(line[:19])


def read_demo(folder: Path) -> Demo:
    methods = [path.name.removesuffix("-pretrain") for path in sorted(folder.glob("*-pretrain"))]
    if not methods:
        raise UserError(f"{folder}: no folder METHOD-pretrain in it; name a folder that scripts/run_demo.sh wrote")
    names = {method: METHODS.get(method, method) for method in methods}
    pretrained = {m: read_run(folder / f"{m}-pretrain", names[m], tone) for tone, m in enumerate(methods)}
    tuned = {m: read_run(folder / m, names[m], tone, "top1", "count") for tone, m in enumerate(methods)}
    scratch = read_run(folder / "scratch", "random weights", 2, "top1", "count")
    longer = None
    if (folder / "scratch-long").is_dir():
        longer = read_run(folder / "scratch-long", "", 3, "top1", "count")
        longer = replace(longer, label=f"random weights, {longer.updates / scratch.updates:.3g} × the updates")
    return Demo(pretrained, tuned, scratch, longer)


# --- the page ---------------------------------------------------------------------------------------------------


def report(demo: Demo, confusions: dict[str, Confusion]) -> str:
    """The page; `confusions` by label of the run."""
    names = " and ".join(run.label for run in demo.tuned.values())
    recipe, count = demo.scratch.recipe, demo.scratch.count
    lead = (
        f"The encoder {recipe.encoder.name} was pre-trained by {names} without labels, then fine-tuned; the same "
        f"fine-tuning from random weights is the comparison. Accuracy is measured on {count} validation images."
    )
    matrices = [
        html.matrix(f"{label}: {counts.trace()} of {counts.sum()} images correct", classes, counts)
        for label, (classes, counts) in confusions.items()
    ]
    sections = [
        result(demo),
        html.section(
            "k-NN of the frozen encoder",
            "Top-1 of nearest neighbours on the frozen encoder's features, before and after pre-training.",
            html.bars(bar for run in demo.pretrained.values() for bar in probe(run)),
        ),
        html.section(
            "Loss",
            "Loss / baseline; the baseline always predicts the mean target (dashed line at 1). Above 1 the network has "
            "not learned anything yet. Values above the upper edge lie on it.",
            html.side_by_side(
                chart("Pre-training", [*demo.pretrained.values()]), chart("Fine-tuning", demo.classifiers)
            ),
        ),
        html.section("What pre-training predicts", "", html.side_by_side(*map(gallery, demo.pretrained.values()))),
        html.section(
            "Confusion",
            "Rows are true classes, columns predicted classes. Each cell is a percentage of its row; empty means 0.",
            html.side_by_side(*matrices),
        ),
        commands(demo),
        html.section("Every logged value", "The lines of metrics.jsonl of each run.", *map(logged, demo.runs)),
    ]
    return html.page(f"{names} pre-training against random weights", lead, sections)


def result(demo: Demo) -> str:
    gains = [
        f"{run.label} {100 * (run.top1 - demo.scratch.top1):+.1f} points "
        f"(standard error {100 * (run.error**2 + demo.scratch.error**2) ** 0.5:.1f})"
        for run in demo.tuned.values()
    ]
    starts = {run.label: f"{run.updates} updates, {run.seconds:.0f} s" for run in demo.pretrained.values()}
    rows = [
        [
            run.label,
            f"{100 * run.top1:.1f} ± {100 * run.error:.1f} %",
            f"{run.top1 * run.count:.0f} / {run.count}",
            str(run.recipe.data.labels_per_class or "all"),
            str(run.updates),
            f"{run.seconds:.0f}",
            starts.get(run.label, "none"),
        ]
        for run in demo.classifiers
    ]
    return html.section(
        "Result",
        f"Top-1 after fine-tuning, against random weights: {'; '.join(gains).replace('-', '−')}. One seed.",
        html.bars((run.label, run.tone, run.top1, run.error) for run in demo.classifiers),
        html.table(
            "± and whiskers: standard error of a proportion. Seconds include compiling and evaluation.",
            ["Start", "Top-1", "Correct", "Labels per class", "Updates", "Seconds", "Pre-training"],
            rows,
        ),
    )


def probe(run: Run) -> list[tuple[str, int, float, float]]:
    """Bars of the k-NN probe, which a run may not have."""
    shares = run.values("knn_top1")
    after = (f"{run.label}, after", run.tone, shares[-1], 0.0) if len(shares) > 1 else None
    return [(f"{run.label}, before", 2, shares[0], 0.0), after] if after else []


def chart(title: str, runs: Sequence[Run]) -> str:
    return html.chart(title, "updates", [(run.label, run.tone, run.curve) for run in runs], TOP)


def gallery(run: Run) -> str:
    """The latest picture of a pre-training run; nothing where there is none."""
    pictures = sorted((run.folder / "gallery").glob("*.png"))
    if not pictures:
        return ""
    target = getattr(run.recipe.method, "target", None)
    columns = COLUMNS.get(getattr(target, "name", ""), "the target; the prediction")
    caption = (
        "One validation image a row. Columns from the left: the image; the image with masked blocks in grey; "
        f"{columns}."
    )
    epoch = int(re.sub(r"\D", "", pictures[-1].stem) or 0)
    title = f"{run.label}, images and predictions after epoch {epoch}"
    try:
        return html.picture(title, pictures[-1], caption)
    except OSError as error:
        raise UserError(f"{pictures[-1]}: cannot be read ({error.strerror or 'not a picture'}); {AGAIN}") from None


def commands(demo: Demo) -> str:
    lines = [shlex.join(["python", *map(str, run.environment.get("command", []))]) for run in demo.runs]
    made = {"packages": {}, **demo.scratch.environment}
    facts = {
        "This code": made.get("code", UNKNOWN),
        "MindSpore": made["packages"].get("mindspore", UNKNOWN),
        "Python": made.get("python", UNKNOWN),
        "System": made.get("system", UNKNOWN),
        "Device": f"{made.get('device', UNKNOWN)}; CPU cores: {made.get('cpus', UNKNOWN)}",
        "Seed": demo.scratch.recipe.seed,
    }
    return html.section("How it was made", "", html.code(lines), html.facts(facts))


def logged(run: Run) -> str:
    keys = list(dict.fromkeys(key for line in run.lines for key in line if key not in ("event", "time")))
    rows = [[str(line.get("event")), *(show(line.get(key)) for key in keys)] for line in run.lines]
    name = run.folder.name
    return html.folded(f"{name}: {len(rows)} lines", html.table(name, ["event", *keys], rows))


def show(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else str(value or "")


def confusions_of(demo: Demo) -> dict[str, Confusion]:
    """Of the last checkpoints on the validation images, pre-trained and scratch."""
    from src.tasks.evaluate import measure_confusion

    found: dict[str, Confusion] = {}
    for run in [*demo.tuned.values(), demo.scratch]:
        found[run.label] = measure_confusion(str(run.folder / "last.ckpt"), str(run.recipe.data.evaluation_place))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="the report and the last lines of a demo")
    parser.add_argument("folder", metavar="FOLDER", help="what scripts/run_demo.sh wrote")
    args = parser.parse_args()

    def command() -> None:
        folder = existing_folder(args.folder, "FOLDER")
        demo = read_demo(folder)
        path = folder / "report.html"
        text = report(demo, confusions_of(demo))
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); name a folder that can be") from None
        for method, run in demo.pretrained.items():
            shares = [f"{100 * share:.1f}" for _, _, share, _ in probe(run)]
            if shares:
                print(f"demo: k-NN top1 of the frozen {method} encoder before={shares[0]} after={shares[1]}")
        print(f"demo: report {path}")
        names = list(demo.tuned) if len(demo.tuned) > 1 else ["pretrained"]
        scores = zip([*names, "scratch"], [*demo.tuned.values(), demo.scratch], strict=True)
        print("demo: top1 " + " ".join(f"{name}={100 * run.top1:.1f}" for name, run in scores))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
