"""Evaluate a checkpoint with the recipe stored in it: python eval.py --ckpt FILE [--data PATH] [key=value ...]"""

from __future__ import annotations

import argparse
import json
import sys

from src.config.files import load_recipe
from src.config.paths import existing_file, existing_images
from src.tasks.command import check_overrides, line, run_command


def main() -> int:
    parser = argparse.ArgumentParser(description="measure top-1 and top-5 accuracy of a checkpoint")
    parser.add_argument("--ckpt", required=True, help="checkpoint of a classifier")
    parser.add_argument("--data", default="", metavar="PATH", help="folder or list of images; default: the recipe's")
    parser.add_argument("--config", default="", metavar="FILE", help="recipe to use instead of the checkpoint's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.parse_intermixed_args()

    def command() -> None:
        path = str(existing_file(args.ckpt, "--ckpt"))
        data = str(existing_images(args.data, "--data")) if args.data else ""
        config = str(existing_file(args.config, "--config")) if args.config else ""
        check_overrides(args.overrides)
        if config:
            load_recipe(config, args.overrides)

        from src.tasks.evaluate import measure_checkpoint

        result, summary = measure_checkpoint(path, data, args.overrides, config)
        line(summary)
        print(json.dumps(result))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
