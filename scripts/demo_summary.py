"""Print the last lines of the demo from the metrics of its runs: python scripts/demo_summary.py FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def read_evaluations(run: Path) -> list[dict[str, float]]:
    """Return the evaluation lines in the metrics.jsonl of a run, in order."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "eval"]


def main() -> int:
    folder = Path(sys.argv[1])
    methods = [run.name.removesuffix("-pretrain") for run in sorted(folder.glob("*-pretrain"))]
    for method in methods:
        probe = read_evaluations(folder / f"{method}-pretrain")
        before, after = (100 * line["knn_top1"] for line in (probe[0], probe[-1]))
        print(f"demo: k-NN top1 of the frozen {method} encoder before={before:.1f} after={after:.1f}")
    names = {methods[0]: "pretrained"} if len(methods) == 1 else {method: method for method in methods}
    scores = {
        name: 100 * read_evaluations(folder / run)[-1]["top1"] for run, name in (names | {"scratch": "scratch"}).items()
    }
    print("demo: top1 " + " ".join(f"{name}={score:.1f}" for name, score in scores.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
