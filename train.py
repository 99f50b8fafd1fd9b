"""Train a recipe: python train.py --config FILE [--resume auto|PATH] [--init-from CKPT] [key=value ...]"""

from __future__ import annotations

import argparse
import sys

from src.tasks.command import add_plan_options, run_command, train_or_plan


def main() -> int:
    parser = argparse.ArgumentParser(description="train a recipe")
    parser.add_argument("--config", required=True, help="recipe, a YAML file such as those in config/")
    parser.add_argument("--resume", default="", metavar="auto|PATH", help="continue from a checkpoint of this run")
    parser.add_argument("--init-from", default="", metavar="CKPT", help="initialise the encoder from a checkpoint")
    parser.add_argument("--stop-after", default="", metavar="N", help="end after epoch N; --resume auto continues")
    add_plan_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    args = parser.parse_intermixed_args()
    if args.init_from:
        args.overrides.append(f"init_from={args.init_from}")

    return run_command(lambda: train_or_plan(args))


if __name__ == "__main__":
    sys.exit(main())
