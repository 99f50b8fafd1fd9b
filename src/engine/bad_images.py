"""The images that a run could not use: `bad_images.jsonl` in its folder, and the limit `data.bad_limit`."""

from __future__ import annotations

import json

from ..config import plural
from . import parallel
from .contracts import Batches
from .log import RunError, RunFolder, append_line, write_errors

ALWAYS_ALLOWED = 10  # as many unusable images never end a run
AT_ONCE = 200  # images that a rank reports in one call


class BadImages:
    """Collects unusable images of all ranks and lists each once.

    Args:
        folder: output folder; a resumed run continues its list.
        loader: training batches.
    """

    def __init__(self, folder: RunFolder, loader: Batches):
        self.folder = folder
        self.path = folder.path / "bad_images.jsonl"
        self.count = len(loader.source)
        self.limit = max(ALWAYS_ALLOWED, int(loader.config.bad_limit * self.count))
        self.waiting: list[dict[str, str]] = []
        self.training: set[str] = set()  # names of the training images

    def report(self, faults: list[dict[str, str]]) -> int:
        """List new unusable training images; every rank must call this. Returns their number so far.

        Args:
            faults: of this rank, each with `image` (its name), `reason` and `replacement`.

        Raises:
            RunError: more training images than `data.bad_limit` allows are unusable.
        """
        self.waiting += faults
        now, self.waiting = self.waiting[:AT_ONCE], self.waiting[AT_ONCE:]
        found = parallel.gather_faults(now)
        self.training.update(fault["image"] for fault in found)
        self._write(found)
        if len(self.training) > self.limit:
            raise RunError(
                f"data.bad_limit: {len(self.training)} of {plural(self.count, 'training image')} cannot be used, more "
                f"than {self.limit}; {self.path} lists them: repair or remove them, or write a larger data.bad_limit"
            )
        return len(self.training)

    def report_evaluation(self, faults: list[dict[str, str]]) -> list[dict[str, str]]:
        """List unusable images of an evaluation and return those of all ranks; every rank must call this."""
        found = parallel.gather_faults(faults)
        self._write(found)
        return found

    def _write(self, faults: list[dict[str, str]]) -> None:
        if not faults or not self.folder.writes:
            return
        with write_errors(self.path):
            listed = self._listed()
            for fault in faults:
                if fault["image"] not in listed:
                    listed.add(fault["image"])
                    append_line(self.path, json.dumps(fault))

    def _listed(self) -> set[str]:
        """Return the names in the list, which an earlier part of this run may have begun."""
        if not self.path.exists():
            return set()
        names = set()
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                names.add(json.loads(line)["image"])
            except (ValueError, KeyError, TypeError):  # a line that a killed run left incomplete
                continue
        return names
