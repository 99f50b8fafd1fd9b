"""Sources of images: a number of images, the label, name and bytes of each."""

from __future__ import annotations

import functools
import os
import stat
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..config import plural
from ..errors import UserError

#: what a task needs of a source: any images; a class for each image; also an image for each class folder
Labels = Literal["any", "needed", "complete"]

CHUNK = 1 << 16  # texts that `Names.subset` copies at once, which bounds its memory


class DataError(UserError):
    """Unusable images; the text is one line for the user."""

    longest = 10**7  # one lists every image that cannot be used


class Source(Protocol):
    """The images of one split. Worker processes get a copy, so its large parts are NumPy arrays.

    A source is a frozen dataclass with the fields `classes`, `labels` and `numbered`, which `with_classes` replaces.

    Attributes:
        place: the folder or file that messages name.
        classes: class names; empty without labels.
        labels: (n,) int32, an index into `classes`; 0 without classes.
        numbered: the labels are numbers, which count the classes of whatever the images are used with; `classes` are
            these numbers as texts.
        skipped: what was left out and why -> number of entries.
    """

    @property
    def place(self) -> Path: ...

    @property
    def classes(self) -> list[str]: ...

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def numbered(self) -> bool: ...

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


@dataclass(frozen=True, eq=False)
class Names:
    """A table of texts in two arrays, which many processes share; a million paths take about 60 MB.

    Attributes:
        text: all texts in UTF-8 (surrogates escaped) one after the other, (bytes,) uint8.
        ends: end of each text, (n,) int64.
    """

    text: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str]) -> Names:
        """Build the table."""
        table = NameTable()
        table.add(map(os.fsencode, texts))
        return table.names()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.text[start : int(self.ends[index])].tobytes())

    def subset(self, indices: Sequence[int] | np.ndarray) -> Names:
        """Return these entries, in this order."""
        chosen = np.asarray(indices, np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])[chosen]
        lengths = self.ends[chosen] - starts
        ends = np.cumsum(lengths)
        text = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        for first in range(0, len(chosen), CHUNK):
            part = slice(first, first + CHUNK)
            begin, end = int(ends[first] - lengths[first]), int(ends[part][-1])
            shift = starts[part] - (ends[part] - lengths[part])  # from a place in the new text to one in the old
            text[begin:end] = self.text[np.arange(begin, end) + np.repeat(shift, lengths[part])]
        return Names(text, ends)


class NameTable:
    """A `Names` that grows."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.ends = array("q")

    def __len__(self) -> int:
        return len(self.ends)

    def add(self, names: Iterable[bytes]) -> None:
        """Append texts."""
        text, ends = self.text, self.ends
        for name in names:
            text += name
            ends.append(len(text))

    def names(self) -> Names:
        """Return the table; it must not grow any more."""
        return Names(np.frombuffer(self.text, np.uint8), np.frombuffer(self.ends, np.int64))


@dataclass(frozen=True, eq=False)
class Files:
    """Image files below a folder (a `Source`).

    Attributes:
        place: folder or list file that messages name.
        folder: the names are relative to it.
        names: paths of the files.
        labels, classes, skipped, numbered: as in `Source`.
        base: a relative `folder` begins here; worker processes have another working folder.
    """

    place: Path
    folder: Path
    names: Names
    labels: np.ndarray
    classes: list[str]
    skipped: Counter[str] = field(default_factory=Counter)
    numbered: bool = False
    base: Path = field(default_factory=Path.cwd)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.path(index))

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.folder / self.names[index]

    def read(self, index: int) -> bytes:
        return read_file(self.base / self.path(index))

    def subset(self, indices: Sequence[int] | np.ndarray) -> Files:
        chosen = np.asarray(indices, np.int64)
        return replace(self, names=self.names.subset(chosen), labels=self.labels[chosen])

    def checksum(self) -> int:
        parts = (self.names.text, self.names.ends, self.labels.astype(np.int32))
        return functools.reduce(lambda value, part: zlib.crc32(part.tobytes(), value), parts, 0)

    def summary(self) -> str:
        text = f"{self.place}: {plural(len(self), 'image')}, {count_classes(self)}"
        if self.skipped:
            text += f", {plural(self.skipped.total(), 'other')} skipped ({list_kinds(self.skipped)})"
        return text


def list_kinds(skipped: Counter[str]) -> str:
    """Return what was left out, the most frequent kinds first: `3 x .txt, 1 x hidden file`."""
    kinds = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} x {why}" for why, count in kinds[:5]) + (", ..." if len(kinds) > 5 else "")


def count_classes(source: Source) -> str:
    """Return how many classes have images: `3 classes`, `200 of 1000 classes` or `no labels`."""
    if not source.classes:
        return "no labels"
    count, present = len(source.classes), len(np.unique(source.labels))
    part = f"{present} of " if present < count else ""
    return part + plural(count, "class", "classes")


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
    return Files(folder, Path(), Names.of(map(str, files)), np.zeros(len(files), np.int32), [])


def with_classes(source: Source, classes: list[str], owner: str, key: str = "data") -> Source:
    """Return the source with its labels as indices into `classes`, found by name.

    The numbers of a list file count the classes, unless the class names are numbers themselves.

    Args:
        source: its classes may be a part of `classes`.
        classes: of a checkpoint or of the training images.
        owner: whose classes they are, for the error.
        key: of the source, for the error.

    Raises:
        DataError: images of a class that is not in `classes`.
    """
    if source.classes == classes:
        return source
    place = _places(classes)
    found = [place.get(name, place.get(_composed(name), -1)) for name in source.classes]
    counts = source.numbered and not any(name.isdecimal() for name in classes)
    used = np.unique(source.labels)
    unknown = [source.classes[i] for i in used if (i >= len(classes) if counts else found[i] < 0)]
    if unknown:
        names = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise DataError(
            f"{key}: {source.place} has images of {plural(len(unknown), 'class', 'classes')} that {owner} does not "
            f"have ({names}); leave these out, or use the class names of {owner}, for example {classes[0]}"
        )
    table = np.zeros(len(source.classes), np.int32)
    table[used] = used if counts else [found[i] for i in used]
    return _replaced(source, table[source.labels], list(classes))


def _places(classes: list[str]) -> dict[str, int]:
    """Return the index of each class name, and of each as other file systems write its accents."""
    composed = {_composed(name): index for index, name in enumerate(classes)}
    return composed | {name: index for index, name in enumerate(classes)}


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def without_labels(source: Source) -> Source:
    """Return the images without their labels."""
    return _replaced(source, np.zeros(len(source), np.int32), [])


def _replaced(source: Any, labels: np.ndarray, classes: list[str]) -> Source:
    result: Source = replace(source, labels=labels, classes=classes, numbered=False)
    return result


def labelled_subset(source: Source, per_class: int) -> Source:
    """Return `per_class` images of each class, spread evenly over its images; 0 keeps all.

    Raises:
        DataError: there are no labels, or a class has fewer images.
    """
    if not per_class:
        return source
    if not source.classes:
        raise DataError(f"data.labels_per_class: {per_class}, but {source.place} has no labels; write 0")
    order = np.argsort(source.labels, kind="stable")
    counts = np.bincount(source.labels, minlength=len(source.classes))
    present = np.flatnonzero(counts)
    fewest = present[np.argmin(counts[present])]
    if counts[fewest] < per_class:
        raise DataError(
            f"data.labels_per_class: {per_class}, but class {source.classes[fewest]} of {source.place} has only "
            f"{plural(int(counts[fewest]), 'image')}; write {counts[fewest]} or less"
        )
    starts = np.cumsum(counts) - counts
    spread = [starts[label] + np.linspace(0, counts[label] - 1, per_class).astype(np.int64) for label in present]
    return source.subset(order[np.concatenate(spread)])
