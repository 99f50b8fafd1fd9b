"""Export a checkpoint: python export.py --ckpt FILE [--format mindir] [--output FILE] [key=value ...]"""

from __future__ import annotations

import argparse
import sys

from src.cli import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description="write a MindIR, read it back and compare its outputs")
    parser.add_argument("--ckpt", required=True, help="a checkpoint written by train.py")
    parser.add_argument("--format", default="mindir", choices=["mindir", "air"], help="air needs Ascend")
    parser.add_argument("--output", default="", metavar="FILE", help="default: beside the checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.parse_intermixed_args()

    def command() -> None:
        from src.run import export_checkpoint

        path, difference = export_checkpoint(args.ckpt, args.format, args.output, args.overrides)
        print(f"{path}: outputs equal the checkpoint's within {difference:.1e}; preprocessing in {path.stem}.json")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
