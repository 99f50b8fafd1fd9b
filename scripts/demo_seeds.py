"""The demo over several seeds, HOG and pixel targets, short and long fine-tuning: the tables of config/demo/README.md.

    python scripts/demo_seeds.py [--seeds 0 1 2] [--out runs/demo-seeds]

Each seed varies pre-training, fine-tuning and data order. Finished runs are kept, so that the command can be repeated
after an interruption; about 10 minutes a seed on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT, LONG = 30, 90  # epochs of 10 updates
STARTS = ("hog", "pixels", "scratch")


def train(config: str, output: Path, seed: int, *arguments: str) -> None:
    """Run a recipe to its end unless that is done."""
    if (output / "curves.png").exists():
        return
    resume = ["--resume", "auto"] if output.exists() else []
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "config/demo" / config), *arguments]
    subprocess.run([*command, *resume, f"seed={seed}", f"output={output}"], check=True)


def fine_tunings() -> list[tuple[str, int]]:
    """(start, epochs) of every fine-tuning: all short ones, and the long ones of the best target and of scratch."""
    return [(start, SHORT) for start in STARTS] + [("hog", LONG), ("scratch", LONG)]


def run_seed(out: Path, seed: int) -> None:
    """All runs of a seed."""
    folder = out / f"seed{seed}"
    for target in ("hog", "pixels"):
        train("vit_fastmim_pretrain.yaml", folder / f"{target}-pretrain", seed, f"method.target={target}")
    for start, epochs in fine_tunings():
        init = [] if start == "scratch" else ["--init-from", str(folder / f"{start}-pretrain" / "last.ckpt")]
        train("vit_finetune.yaml", folder / f"{start}-{epochs}", seed, *init, f"train.epochs={epochs}")


def evaluations(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "eval"]


def cell(values: list[float]) -> str:
    """Mean and standard deviation in per cent."""
    spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def print_tables(out: Path, seeds: list[int]) -> None:
    """Markdown: top-1 after short and long fine-tuning, k-NN of the frozen encoder, then every seed."""

    def values(run: str, metric: str, which: int = -1) -> list[float]:
        return [evaluations(out / f"seed{seed}" / run)[which][metric] for seed in seeds]

    print(f"| top-1, 20 labels a class | {' | '.join(STARTS)} |\n|---|{'---|' * len(STARTS)}")
    for epochs in (SHORT, LONG):
        done = [(start, epochs) in fine_tunings() for start in STARTS]
        row = [cell(values(f"{s}-{epochs}", "top1")) if d else "" for s, d in zip(STARTS, done, strict=True)]
        print(f"| {10 * epochs} updates | {' | '.join(row)} |")
    after = [cell(values(f"{target}-pretrain", "knn_top1")) for target in ("hog", "pixels")]
    print(f"| k-NN, frozen encoder | {' | '.join(after)} | {cell(values('hog-pretrain', 'knn_top1', 0))} |")
    print("\n| seed | " + " | ".join(f"{start} {10 * epochs}" for start, epochs in fine_tunings()) + " |")
    print("|---|" + "---|" * len(fine_tunings()))
    columns = [values(f"{start}-{epochs}", "top1") for start, epochs in fine_tunings()]
    for seed, row in zip(seeds, zip(*columns, strict=True), strict=True):
        print(f"| {seed} | " + " | ".join(f"{100 * value:.1f}" for value in row) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description="the demo over several seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-seeds"))
    args = parser.parse_args()
    for seed in args.seeds:
        run_seed(args.out, seed)
    print_tables(args.out, args.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
