"""Export a checkpoint: python export.py --ckpt FILE [--format mindir] [--batch N] [--output FILE] [key=value ...]"""

from __future__ import annotations

import argparse
import sys

from src.config.paths import existing_file, expanded
from src.tasks.command import check_export, check_overrides, line, run_command


def main() -> int:
    parser = argparse.ArgumentParser(description="write a MindIR, read it back and compare outputs with the checkpoint")
    parser.add_argument("--ckpt", required=True, help="checkpoint of pre-training, fine-tuning or a conversion")
    parser.add_argument("--format", default="mindir", choices=["mindir", "air"], help="air needs Ascend")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="images per call; default: any number")
    parser.add_argument("--output", default="", metavar="FILE", help="default: next to the checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.parse_intermixed_args()

    def command() -> None:
        path, output = str(existing_file(args.ckpt, "--ckpt")), args.output and expanded(args.output, "--output")
        check_overrides(args.overrides)
        check_export(output, args.format, args.batch)

        from src.tasks.export import export_checkpoint

        export = export_checkpoint(path, args.format, output, args.batch, args.overrides)
        count = args.batch or "any number of"
        line(f"{export.path}: for {count} images per call; preprocessing in {export.path.stem}.json")
        if args.format == "mindir":
            sizes = ", ".join(map(str, export.batches))
            line(f"equals the checkpoint within {export.difference:.1e} at batch {sizes} on {export.images}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
