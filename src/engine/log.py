"""The output folder of a run (config, log, metrics, environment) and its progress on the terminal."""

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
from ..errors import UserError, one_line

PROBE_BYTES = 4096  # written and removed again at the start of a run, to test for free space


class RunError(UserError):
    """A run that cannot start or continue; the text is one line for the user."""


class RunFolder:
    """The output folder of a run: config.yaml, train.log, metrics.jsonl, environment.json and checkpoints.

    A folder that already contains a run is accepted only for resuming. Only rank 0 `writes`; other ranks log to their
    terminal only.

    Nothing is written before `open`, so a run can fail until then without leaving files. Earlier log lines are buffered
    and written to train.log by `open`.

    Raises:
        RunError: the folder contains a run, or cannot be created or written.
    """

    def __init__(self, path: Path, resume: bool, writes: bool = True):
        self.path = path
        self.writes = writes
        self.log = logging.getLogger(f"run.{path}")
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self.log.handlers.clear()
        self.log.addHandler(TerminalHandler())
        if not writes:
            return
        with write_errors(path):
            if not resume and (path / "metrics.jsonl").exists():
                raise RunError(
                    f"output: {path} already contains a run; continue it with --resume auto, or write "
                    "output=ANOTHER_FOLDER"
                )
            check_writable(path)
        self.buffer = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL)
        self.log.addHandler(self.buffer)

    def open(self, recipe: str, device: str, ranks: int) -> None:
        """Create the folder with config.yaml, environment.json and train.log, or nothing if one of them fails.

        Args:
            recipe: the resolved recipe as YAML, with all its stages.
            device, ranks: for environment.json.
        """
        if not self.writes:
            return
        environment = json.dumps(environment_of(device, ranks), indent=2) + "\n"
        with write_errors(self.path), created_folder(self.path):
            file = logging.FileHandler(self.path / "train.log", encoding="utf-8")
            try:
                replace_text(self.path / "config.yaml", recipe)
                replace_text(self.path / "environment.json", environment)
            except OSError:
                file.close()
                raise
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.buffer.setTarget(file)
        self.buffer.flush()
        self.log.removeHandler(self.buffer)
        self.log.addHandler(file)

    def info(self, text: str) -> None:
        """Log a line to terminal and train.log."""
        self.log.info(one_line(text))

    def metrics(self, event: str, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        if not self.writes:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **finite(values)}, allow_nan=False)
        with write_errors(self.path / "metrics.jsonl", "output"):
            append_line(self.path / "metrics.jsonl", line)

    def drop_metrics_after(self, epoch: int, step: int) -> None:
        """Remove metrics of updates that a resumed run repeats, and an incomplete last line."""
        path = self.path / "metrics.jsonl"
        if not self.writes or not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        past = [line for line in lines if _is_past(line, epoch, step)]
        with write_errors(path):
            replace_text(path, "".join(past))

    def close(self) -> None:
        for handler in list(self.log.handlers):
            handler.close()
            self.log.removeHandler(handler)


def environment_of(device: str, ranks: int) -> dict[str, Any]:
    """Return command, versions and machine of this run."""
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
def write_errors(path: Path, key: str = "output") -> Iterator[None]:
    """Turn file system errors into a `RunError` that names `key` and `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"{key}: {path} cannot be written ({reason}); write {key}=ANOTHER_FOLDER") from None
    except ValueError as error:  # a NUL character
        if isinstance(error, RunError):
            raise
        raise RunError(f"{key}: {str(path)!r} is not a valid path ({error}); write {key}=ANOTHER_FOLDER") from None


@contextlib.contextmanager
def created_folder(path: Path) -> Iterator[None]:
    """Create a folder and its parents; if the `with` block fails, remove the new folders and files again."""
    missing = missing_folders(path)
    before = set() if path in missing else {item.name for item in path.iterdir()}
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        created = [folder for folder in missing if folder not in missing_folders(path)]
        for item in path.iterdir() if path in created or not missing else ():
            if item.name not in before and item.is_file():
                item.unlink()
        for folder in created:
            folder.rmdir()
        raise


def missing_folders(path: Path) -> list[Path]:
    """Return the folders among `path` and its parents that do not exist, the deepest first."""
    return [folder for folder in (path, *path.parents) if not os.path.isdir(folder)]  # noqa: PTH112 # too long names


def check_writable(path: Path) -> None:
    """Create a folder and a file in it, then remove again what did not exist before.

    Raises:
        OSError: one of them cannot be created.
    """
    missing = missing_folders(path)
    probe = path / f".probe.{os.getpid()}"
    with created_folder(path):
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    for folder in missing:
        folder.rmdir()


def replace_text(path: Path, text: str) -> None:
    """Write a file completely or not at all.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append a line; if that fails, for example on a full disk, the file stays unchanged.

    A last line that a killed run left incomplete stays a line of its own.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab+") as file:
            file.seek(-min(size, 1), os.SEEK_END)
            begin = b"" if file.read() in (b"", b"\n") else b"\n"
            file.write(begin + line.encode() + b"\n")
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace numbers that are not finite by None, since JSON has no infinity or NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _is_past(text: str, epoch: int, step: int) -> bool:
    """Whether a line of metrics.jsonl belongs to updates up to `step` or evaluations up to `epoch`."""
    try:
        line = json.loads(text)
        return bool(line["step"] <= step if line["event"] == "train" else line["epoch"] <= epoch)
    except (ValueError, KeyError, TypeError):
        return False


class TerminalHandler(logging.Handler):
    """Print log lines above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """A progress bar on a terminal; nothing otherwise, since the log lines show the progress there."""

    def __init__(self, total: int):
        self.bar = tqdm(total=total, unit="step", disable=not sys.stdout.isatty(), leave=False)

    def advance(self, **figures: str) -> None:
        self.bar.set_postfix(figures, refresh=False) if figures else None
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


class Clock:
    """Throughput and data waiting time since the last report."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def report(self) -> tuple[float, float] | None:
        """Return images per second and the fraction of time spent waiting for data, and reset; None without images."""
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        rates = (self.images / elapsed, self.waited / elapsed) if self.images else None
        self.reset()
        return rates


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03 or 02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
