"""The demo over several seeds, HOG and pixel targets, short and long fine-tuning: the tables of config/demo/README.md.

    python scripts/demo_seeds.py [--seeds 0 1 2] [--out runs/demo-seeds]

Each seed varies pre-training, fine-tuning and data order. Finished runs are kept, so that the command can be repeated
after an interruption; about 12 minutes a seed on 2 CPU cores.
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


def run_seed(out: Path, seed: int) -> None:
    """All runs of a seed."""
    folder = out / f"seed{seed}"
    for target in ("hog", "pixels"):
        train("vit_fastmim_pretrain.yaml", folder / f"{target}-pretrain", seed, f"method.target={target}")
    for start in STARTS:
        init = [] if start == "scratch" else ["--init-from", str(folder / f"{start}-pretrain" / "last.ckpt")]
        for epochs in (SHORT, LONG):
            train(
                "vit_finetune.yaml",
                folder / f"{start}-{epochs}",
                seed,
                *init,
                f"train.epochs={epochs}",
            )


def evaluations(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "eval"]


def cell(values: list[float]) -> str:
    """Mean and standard deviation in per cent."""
    spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def print_tables(out: Path, seeds: list[int]) -> None:
    """Markdown: top-1 after short and long fine-tuning, and k-NN of the frozen encoder."""
    print(f"| top-1, 20 labels a class | {' | '.join(STARTS)} |\n|---|{'---|' * len(STARTS)}")
    for epochs in (SHORT, LONG):
        row = [
            cell([evaluations(out / f"seed{s}" / f"{start}-{epochs}")[-1]["top1"] for s in seeds]) for start in STARTS
        ]
        print(f"| {10 * epochs} updates | {' | '.join(row)} |")
    after = [
        [evaluations(out / f"seed{s}" / f"{t}-pretrain")[-1]["knn_top1"] for s in seeds] for t in ("hog", "pixels")
    ]
    before = [evaluations(out / f"seed{s}" / "hog-pretrain")[0]["knn_top1"] for s in seeds]
    print(f"| k-NN, frozen encoder | {cell(after[0])} | {cell(after[1])} | {cell(before)} |")
    print("\n| seed | " + " | ".join(f"{s} {10 * e}" for e in (SHORT, LONG) for s in STARTS) + " |")
    print("|---|" + "---|" * 6)
    for s in seeds:
        row = [evaluations(out / f"seed{s}" / f"{start}-{e}")[-1]["top1"] for e in (SHORT, LONG) for start in STARTS]
        print(f"| {s} | " + " | ".join(f"{100 * value:.1f}" for value in row) + " |")


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
