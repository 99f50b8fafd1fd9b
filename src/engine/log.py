"""What a run leaves behind: one folder with config, log, metrics, environment; progress on the terminal."""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError


class RunError(UserError):
    """A run that cannot start or go on; one line for the user."""


class RunFolder:
    """The output folder of a run.

    Holds config.yaml, train.log, metrics.jsonl, environment.json and the checkpoints. A folder that already holds a
    run is only taken to resume it. Only rank 0 `writes`; the other ranks' lines go to their terminal alone.
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
        if not resume and (path / "metrics.jsonl").exists():
            raise RunError(
                f"output: {path} already holds a run; go on with --resume auto, or write output=ANOTHER_FOLDER"
            )
        path.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path / "train.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.log.addHandler(file)

    def info(self, text: str) -> None:
        """A line for terminal and train.log."""
        self.log.info(text)

    def metrics(self, event: str, **values: Any) -> None:
        """A line of metrics.jsonl."""
        if not self.writes:
            return
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n")

    def forget_after(self, epoch: int, step: int) -> None:
        """Drop metrics of updates that a resumed run does again."""
        path = self.path / "metrics.jsonl"
        if not self.writes or not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _is_past(json.loads(line), epoch, step)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)

    def write_environment(self, device: str, ranks: int) -> None:
        """Versions and machine, for whoever asks later what made these numbers."""
        packages = {}
        for name in ("mindspore", "numpy", "opencv-python-headless", "PyYAML", "tqdm", "matplotlib"):
            try:
                packages[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                packages[name] = "not installed"
        content = {
            "command": sys.argv,
            "python": platform.python_version(),
            "system": platform.platform(),
            "device": device,
            "ranks": ranks,
            "packages": packages,
        }
        (self.path / "environment.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        for handler in list(self.log.handlers):
            handler.close()
            self.log.removeHandler(handler)


def _is_past(line: dict[str, Any], epoch: int, step: int) -> bool:
    return bool(line["step"] <= step if line["event"] == "train" else line["epoch"] <= epoch)


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

    def report(self) -> tuple[float, float]:
        """Images per second, and the share of the time spent waiting for data; starts anew."""
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        speed, share = self.images / elapsed, self.waited / elapsed
        self.reset()
        return speed, share


def duration(seconds: float) -> str:
    """1:02:03 or 02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
