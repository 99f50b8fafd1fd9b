"""Loss and learning-rate curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path


def draw_curves(folder: Path) -> Path:
    """Write curves.png next to metrics.jsonl: training loss, baseline, validation loss and learning rate."""
    from matplotlib.figure import Figure  # takes a fifth of a second

    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    evaluations = [line for line in lines if line["event"] == "eval" and line.get("loss") is not None]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, rate = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in steps]
    loss.plot(epochs, [line["loss"] for line in steps], label="training loss", color="#1f5fa8")
    baseline = [line["baseline"] for line in steps]
    loss.plot(epochs, baseline, label="baseline", color="#888888", linestyle="--", linewidth=1)
    if evaluations:
        positions, values = [line["epoch"] for line in evaluations], [line["loss"] for line in evaluations]
        loss.plot(positions, values, label="validation loss", color="#d9822b", marker="o", markersize=3)
    loss.set(xlabel="epoch", ylabel="loss")
    values = [line["loss"] for line in steps] + [line["loss"] for line in evaluations]
    # the first losses can be many times the baseline and would flatten the rest of the curve
    top = min(max(values), 1.5 * max(baseline)) if steps else 1.0
    loss.set_ylim(0, 1.08 * max(top, max(baseline, default=0)) or 1.0)
    loss.legend(frameon=False, fontsize=8)
    rate.plot(epochs, [line["lr"] for line in steps], color="#1f5fa8")
    rate.set(xlabel="epoch", ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axis in (loss, rate):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path = folder / "curves.png"
    figure.savefig(path, dpi=140)
    return path
