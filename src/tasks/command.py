"""Shared by all commands: quiet framework, one-line errors, exit codes, checks of arguments."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from types import FrameType

from ..config.files import load_recipe, split_override
from ..config.paths import check_training_paths, expanded
from ..errors import UserError, one_line

#: the MindSpore that requirements.txt pins and the tests run with
TESTED_MINDSPORE = "2.10.0"


def run_command(command: Callable[[], None]) -> int:
    """Run a command.

    Returns:
        0 on success; 2 for an error that the user can fix, printed as one line; 130 when interrupted; 141 when the
        reader of its output has closed the pipe (`| head`).
    """
    open_streams()
    os.environ.setdefault("GLOG_v", "4")  # MindSpore also raises its errors as exceptions; GLOG_v=2 shows warnings

    if is_first_process():
        sys.stderr.write(version_warning(mindspore_version()))
    try:
        with quiet_imports():
            check_working_folder()
            command()
        sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        return 2
    except MemoryError as error:
        reason = one_line(str(error)) or "out of memory"
        sys.stderr.write(f"error: more memory is needed than there is ({reason}); write a smaller network or batch\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        discard_output()
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        discard_output()
        sys.stderr.write("error: stdout: the disk is full; print to another one\n")
        return 2
    return 0


def check_working_folder() -> None:
    """Check that the working folder exists; MindSpore cannot be imported without it.

    Raises:
        UserError: it has been removed.
    """
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        raise UserError("the working folder has been removed; change to another one") from None


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """End at once on Ctrl-C while MindSpore is imported, which would print a traceback or crash."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if getattr(getattr(sys.modules.get("mindspore"), "__spec__", None), "_initializing", False):
            os.write(2, b"interrupted\n")
            os._exit(130)
        raise KeyboardInterrupt

    replaced = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not replaced or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def discard_output() -> None:
    """Print nothing more; the final flush of stdout would fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_first_process() -> bool:
    """Whether this is rank 0, or the only process, of a run; reads what msrun sets, before MindSpore is imported."""
    return os.environ.get("MS_ROLE") != "MS_SCHED" and os.environ.get("RANK_ID", "0") == "0"


def mindspore_version() -> str:
    """Version of the installed MindSpore, which is not imported; empty if there is none."""
    try:
        return metadata.version("mindspore") or ""  # None where its metadata are damaged
    except metadata.PackageNotFoundError:
        return ""


def version_warning(version: str) -> str:
    """A line about a MindSpore that is not the tested one; empty for the tested one, and for no version at all.

    Only the release number counts: 2.10.0rc1 and 2.10.0.post1 are 2.10.0.
    """
    found, tested = release(version), release(TESTED_MINDSPORE)
    if not found or found == tested:
        return ""
    age = "newer" if found > tested else "older"
    return (
        f"mindspore {one_line(version)} is {age} than the tested {TESTED_MINDSPORE}; if something fails, "
        f"pip install mindspore=={TESTED_MINDSPORE}\n"
    )


def release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version; empty if it does not start with a number."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    return tuple([*numbers, 0, 0][:3]) if numbers else ()


def line(text: str) -> None:
    """Print a line, whatever characters file names have."""
    sys.stdout.write(f"{one_line(text)}\n")
    sys.stdout.flush()


def open_streams() -> None:
    """Make the standard streams usable: closed ones lead nowhere, and no character ends a command.

    Without this the next file that is opened would get the number of a closed stream, and what libraries print.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 # stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add `--plan` and its options."""
    parser.add_argument("--plan", action="store_true", help="print what the recipe costs and write nothing")
    parser.add_argument("--devices", default="", metavar="N", help="with --plan: devices that train together")
    parser.add_argument("--images", default="", metavar="N", help="with --plan: training images, if not in data.root")
    parser.add_argument("--measure", action="store_true", help="with --plan: run two steps on random images")
    parser.add_argument("--json", action="store_true", help="with --plan: one line of JSON")


def train_or_plan(args: argparse.Namespace) -> None:
    """Run `train.py`. Recipe, options and paths are checked before MindSpore is imported, which takes seconds.

    Raises:
        UserError: the recipe, an option or a path is wrong.
    """
    for option in ("devices", "images", "measure", "json"):
        if getattr(args, option) and not args.plan:
            raise UserError(f"command line: --{option} needs --plan; add --plan, or leave --{option} out")
    for option in ("resume", "stop_after"):
        if getattr(args, option) and args.plan:
            name = option.replace("_", "-")
            raise UserError(f"command line: --{name} does not work with --plan; leave --{name} out")
    recipe = load_recipe(args.config, args.overrides)
    devices = whole_number("--devices", args.devices or "1")
    images = whole_number("--images", args.images) if args.images else 0
    stop_after = whole_number("--stop-after", args.stop_after) if args.stop_after else 0
    if args.plan:
        from .plan import print_plan

        print_plan(recipe, devices, images, args.measure, args.json)
        return
    resume = args.resume if args.resume in ("", "auto") else expanded(args.resume, "--resume")
    check_training_paths(recipe, resume)
    from .train import train

    train(recipe, resume, stop_after)


def whole_number(option: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise UserError(f"command line: {option}: {text[:99]!r} is not a whole number above 0; write for example 8")
    return int(text)


def check_overrides(overrides: list[str]) -> None:
    """Check the form of `key=value` arguments, before slow imports."""
    for text in overrides:
        split_override(text)


def check_export(output: str, file_format: str, batch: int) -> None:
    """Check the options of an export, before slow imports."""
    if batch < 0:
        raise UserError(f"--batch: {batch} is negative; write 0 for any batch size")
    if output and not output.endswith(f".{file_format}"):
        raise UserError(f"--output: {output} does not end in .{file_format}; write NAME.{file_format}")
