"""Evaluate a checkpoint, which knows its own recipe: python eval.py --ckpt FILE [--data DIR] [key=value ...]"""

from __future__ import annotations

import argparse
import json
import sys

from src.cli import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description="top-1 and top-5 of a checkpoint")
    parser.add_argument("--ckpt", required=True, help="a checkpoint written by train.py")
    parser.add_argument("--data", default="", metavar="DIR", help="image folder; default: the recipe's validation data")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.parse_intermixed_args()

    def command() -> None:
        from src.run import evaluate_checkpoint

        result = evaluate_checkpoint(args.ckpt, args.data, args.overrides)
        print(f"top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} % of {result['count']} images")
        print(json.dumps(result))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
