"""What a run leaves behind: one folder with config, log, metrics, environment; progress on the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import __version__
from ..errors import UserError

PROBE = 4096  # bytes that a folder must have room for at the start of a run


class RunError(UserError):
    """A run that cannot start or go on; one line for the user."""


class RunFolder:
    """The output folder of a run.

    Holds config.yaml, train.log, metrics.jsonl, environment.json and the checkpoints. A folder that already holds a
    run is only taken to resume it. Only rank 0 `writes`; the other ranks' lines go to their terminal alone.

    Nothing is written before `open`: until then a run can be refused without a trace. Lines said before it reach
    train.log with it.

    Raises:
        RunError: the folder holds a run, or cannot be made or written.
    """

    def __init__(self, path: Path, resume: bool, writes: bool = True):
        self.path, self.writes = path, writes
        self.log = logging.getLogger(f"run.{path}")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self.log.handlers.clear()
        self.log.addHandler(TerminalHandler())
        if not writes:
            return
        with refusing(path):
            if not resume and (path / "metrics.jsonl").exists():
                raise RunError(
                    f"output: {path} already holds a run; go on with --resume auto, or write output=ANOTHER_FOLDER"
                )
            check_writable(path)
        self.early = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL)
        self.log.addHandler(self.early)

    def open(self, recipe: str, device: str, ranks: int) -> None:
        """Make the folder and write what a run starts with, all of it or nothing.

        Args:
            recipe: the resolved recipe as YAML, with all its stages.
            device, ranks: for environment.json.
        """
        if not self.writes:
            return
        environment = json.dumps(environment_of(device, ranks), indent=2) + "\n"
        with refusing(self.path), made(self.path):
            file = logging.FileHandler(self.path / "train.log", encoding="utf-8")
            try:
                self._replace("config.yaml", recipe)
                self._replace("environment.json", environment)
            except OSError:
                file.close()
                raise
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.early.setTarget(file)
        self.early.flush()
        self.log.removeHandler(self.early)
        self.log.addHandler(file)

    def info(self, text: str) -> None:
        """A line for terminal and train.log."""
        self.log.info(text)

    def metrics(self, event: str, **values: Any) -> None:
        """A line of metrics.jsonl."""
        if not self.writes:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **finite(values)}, allow_nan=False)
        with refusing(self.path / "metrics.jsonl", "output"):
            append_line(self.path / "metrics.jsonl", line)

    def forget_after(self, epoch: int, step: int) -> None:
        """Drop metrics of updates that a resumed run does again, and a last line that was cut short."""
        path = self.path / "metrics.jsonl"
        if not self.writes or not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _is_past(line, epoch, step)]
        with refusing(path):
            self._replace(path.name, "".join(kept))

    def _replace(self, name: str, text: str) -> None:
        """Write a file of the folder whole or not at all."""
        temporary = self.path / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path / name)
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        for handler in list(self.log.handlers):
            handler.close()
            self.log.removeHandler(handler)


def environment_of(device: str, ranks: int) -> dict[str, Any]:
    """Versions and machine, for whoever asks later what made these numbers."""
    packages = {}
    for name in ("mindspore", "numpy", "opencv-python-headless", "PyYAML", "tqdm", "matplotlib"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "command": sys.argv,
        "code": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
        "ranks": ranks,
        "packages": packages,
    }


@contextlib.contextmanager
def refusing(path: Path, key: str = "output") -> Iterator[None]:
    """Turn what the file system says into a line for the user."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"{key}: {path} cannot be written ({reason}); write {key}=ANOTHER_FOLDER") from None
    except ValueError as error:  # a NUL character
        if isinstance(error, RunError):
            raise
        raise RunError(f"{key}: {str(path)!r} is no path ({error}); write {key}=ANOTHER_FOLDER") from None


@contextlib.contextmanager
def made(path: Path) -> Iterator[None]:
    """A folder with those above it, which are removed again where what is done in it fails."""
    absent = absent_folders(path)
    before = set() if path in absent else {item.name for item in path.iterdir()}
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        there = [folder for folder in absent if folder not in absent_folders(path)]
        for item in path.iterdir() if path in there or not absent else ():
            if item.name not in before and item.is_file():
                item.unlink()
        for folder in there:
            folder.rmdir()
        raise


def absent_folders(path: Path) -> list[Path]:
    """Those of a folder and the folders above it that are not there, the lowest first."""
    return [folder for folder in (path, *path.parents) if not os.path.isdir(folder)]  # noqa: PTH112 # long names too


def check_writable(path: Path) -> None:
    """Make a folder and a file in it, and remove again what was not there.

    Raises:
        OSError: one of them cannot be made.
    """
    absent = absent_folders(path)
    probe = path / f".probe.{os.getpid()}"
    with made(path):
        try:
            probe.write_bytes(bytes(PROBE))
        finally:
            probe.unlink(missing_ok=True)
    for folder in absent:
        folder.rmdir()


def append_line(path: Path, line: str) -> None:
    """Add a line whole; where that fails, as on a full disk, the file is what it was."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with None for numbers that are not finite, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _is_past(text: str, epoch: int, step: int) -> bool:
    """Whether a line of metrics.jsonl is of updates that are done."""
    try:
        line = json.loads(text)
        return bool(line["step"] <= step if line["event"] == "train" else line["epoch"] <= epoch)
    except (ValueError, KeyError, TypeError):
        return False


class TerminalHandler(logging.Handler):
    """Prints above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """A bar on a terminal; plain lines otherwise (the loop's own log lines are those)."""

    def __init__(self, total: int):
        self.bar = tqdm(total=total, unit="step", disable=not sys.stdout.isatty(), leave=False)

    def advance(self, **shown: str) -> None:
        self.bar.set_postfix(shown, refresh=False) if shown else None
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


class Clock:
    """Where the time of the last steps went."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def report(self) -> tuple[float, float] | None:
        """Images per second, and the share of the time spent waiting for data; starts anew. None: nothing to tell."""
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        told = (self.images / elapsed, self.waited / elapsed) if self.images else None
        self.reset()
        return told


def duration(seconds: float) -> str:
    """1:02:03 or 02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
