"""What the three entry points share: quiet framework, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from ..errors import UserError


def run_command(command: Callable[[], None]) -> int:
    """Run a command.

    Returns:
        0 when done, 2 with one line for what the user can mend, 130 when interrupted, 141 when nobody reads its output
        any more (`| head`).
    """
    os.environ.setdefault("GLOG_v", "4")  # MindSpore's errors arrive as exceptions; GLOG_v=2 shows its warnings

    try:
        command()
        sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush has no reader either
        return 141
    return 0


def one_line(text: str) -> str:
    """Names in files may hold line ends and worse, which a terminal would act on."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """`--plan` and what goes with it."""
    parser.add_argument("--plan", action="store_true", help="say what the recipe costs and write nothing")
    parser.add_argument("--devices", default="", metavar="N", help="with --plan: devices that train together")
    parser.add_argument("--images", default="", metavar="N", help="with --plan: training images, if not in data.root")
    parser.add_argument("--measure", action="store_true", help="with --plan: run two steps on random images")
    parser.add_argument("--json", action="store_true", help="with --plan: one line of JSON")


def run_plan(args: argparse.Namespace) -> bool:
    """Print the plan of a recipe if `--plan` asks for it.

    Raises:
        ConfigError: an option that goes with the other of plan and training.
    """
    from ..config.files import ConfigError, load_recipe

    if not args.plan:
        for option in ("devices", "images", "measure", "json"):
            if getattr(args, option):
                raise ConfigError(f"command line: --{option} goes with --plan; add --plan, or leave it out")
        return False
    if args.resume:
        raise ConfigError("command line: --resume goes with training, not with --plan; leave it out")
    from .plan import print_plan

    print_plan(load_recipe(args.config, args.overrides), args.devices or "1", args.images, args.measure, args.json)
    return True
