"""Sources of images: a number of images, the label, name and bytes of each."""

from __future__ import annotations

import os
import stat
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ..config import plural
from ..errors import UserError


class DataError(UserError):
    """Unusable images; the text is one line for the user."""


class Source(Protocol):
    """The images of one split. Worker processes get a copy, so its large parts are NumPy arrays.

    Attributes:
        place: the folder or file that messages name.
        classes: class names; empty without labels.
        labels: (n,) int32, an index into `classes`; 0 without classes.
        skipped: what was left out and why -> number of entries.
    """

    @property
    def place(self) -> Path: ...

    @property
    def classes(self) -> list[str]: ...

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def skipped(self) -> Counter[str]: ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the path or key of an image as messages print it."""

    def read(self, index: int) -> bytes:
        """Return the content of an image.

        Raises:
            OSError: it cannot be read.
        """

    def subset(self, indices: Sequence[int] | np.ndarray) -> Source:
        """Return these images, in this order, with the same classes."""

    def checksum(self) -> int:
        """Return a CRC-32 of all names and labels."""

    def summary(self) -> str:
        """Return a line for the log."""


@dataclass(frozen=True)
class Names:
    """A table of texts in two arrays, which many processes share; a million paths take about 60 MB.

    Attributes:
        text: all texts in UTF-8 (surrogates escaped) one after the other, (bytes,) uint8.
        ends: end of each text, (n,) int64.
    """

    text: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> Names:
        """Build the table."""
        encoded = [os.fsencode(text) for text in texts]
        ends = np.cumsum([len(part) for part in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.text[start : int(self.ends[index])].tobytes())

    def subset(self, indices: Sequence[int] | np.ndarray) -> Names:
        """Return these entries, in this order."""
        return Names.of([self[int(index)] for index in indices])


@dataclass(frozen=True)
class Files:
    """Image files below a folder (a `Source`).

    Attributes:
        place: folder or list file that messages name.
        folder: the names are relative to it.
        names: paths of the files.
        labels, classes, skipped: as in `Source`.
    """

    place: Path
    folder: Path
    names: Names
    labels: np.ndarray
    classes: list[str]
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.path(index))

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.folder / self.names[index]

    def read(self, index: int) -> bytes:
        return read_file(self.path(index))

    def subset(self, indices: Sequence[int] | np.ndarray) -> Files:
        chosen = np.asarray(indices, np.int64)
        return replace(self, names=self.names.subset(chosen), labels=self.labels[chosen])

    def checksum(self) -> int:
        return zlib.crc32(
            self.labels.astype(np.int32).tobytes(), zlib.crc32(self.names.ends, zlib.crc32(self.names.text))
        )

    def summary(self) -> str:
        kind = plural(len(self.classes), "class", "classes") if self.classes else "no labels"
        text = f"{self.place}: {plural(len(self), 'image')}, {kind}"
        if self.skipped:
            kinds = ", ".join(f"{count} x {why}" for why, count in self.skipped.most_common(5))
            text += f", {plural(self.skipped.total(), 'other file')} skipped ({kinds})"
        return text


def read_file(path: Path) -> bytes:
    """Return the content of a regular file; a pipe or a device is an error at once, not an endless read.

    Raises:
        OSError: it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(0, "not a regular file", str(path))
        return file.read()


def plain_files(files: Sequence[Path]) -> Files:
    """Return single files without labels as a source."""
    folder = files[0].parent
    return Files(folder, Path(), Names.of([str(path) for path in files]), np.zeros(len(files), np.int32), [])
