"""What is below a folder: its images, and what is left out and why."""

from __future__ import annotations

import os
import stat
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import one_line
from .sources import Names, NameTable

#: file names of images; the content decides the format
EXTENSIONS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".npy"})
_SUFFIXES = frozenset(map(os.fsencode, EXTENSIONS))
#: folders of systems, which hold small copies of images or deleted ones
SYSTEM_FOLDERS = frozenset({"@eaDir", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN"})

NOWHERE = "link that leads nowhere"
UNLISTED = "folder that cannot be listed"
LOOP = "link to a folder that its class has already"
SECONDS = 3.0  # between two lines about a listing that takes long


@dataclass(frozen=True, eq=False)
class Tree:
    """The images below a folder, in the order of their paths; files of a folder come before its subfolders.

    Attributes:
        names: paths of the images, relative to the folder.
        top: the folder directly in it that has the image, (n,) int32, index into `top_names`; -1: the folder itself.
        top_names: names of the folders directly in it, sorted.
        skipped: for each of `top_names`, and last for the folder itself, what was left out -> number.
        folders: all folders that were listed, relative; "" is the folder itself.
        stamps: state of each when it was listed, as `stamp` returns it, (folders, 3) int64.
        started: when the listing began, in ns.
    """

    names: Names
    top: np.ndarray
    top_names: list[str]
    skipped: list[Counter[str]]
    folders: Names
    stamps: np.ndarray
    started: int

    def __len__(self) -> int:
        return len(self.names)

    def subfolders(self) -> dict[str, set[str]]:
        """Return the names of the folders directly in each of `top_names`."""
        found: dict[str, set[str]] = {name: set() for name in self.top_names}
        for index in range(len(self.folders)):
            name, _, below = self.folders[index].partition("/")
            if below and "/" not in below:
                found[name].add(below)
        return found


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Return what changes with the entries of a folder or the right to list them: times in ns, and the inode."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def list_folder(folder: Path) -> Tree:
    """List all images below a folder; links to files and folders are followed.

    Hidden files and folders, and those of `SYSTEM_FOLDERS`, are left out.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    return _Listing(folder).tree()


class _Listing:
    def __init__(self, folder: Path):
        self.folder = folder
        self.root = os.fsencode(folder)
        self.names, self.folders = NameTable(), NameTable()
        self.top, self.stamps = array("i"), array("q")
        self.top_names: list[bytes] = []
        self.skipped: list[Counter[str]] = []
        self.started = time.time_ns()
        self.said = time.monotonic()

    def tree(self) -> Tree:
        others: Counter[str] = Counter()
        seen: set[tuple[int, int]] = set()
        self.top_names = self._list(b"", -1, others, seen)
        (self.own,) = seen
        for number, name in enumerate(self.top_names):
            skipped: Counter[str] = Counter()
            self._descend(name, number, skipped)
            self.skipped.append(skipped)
        return Tree(
            self.names.names(),
            np.frombuffer(self.top, np.int32),
            [os.fsdecode(name) for name in self.top_names],
            [*self.skipped, others],
            self.folders.names(),
            np.frombuffer(self.stamps, np.int64).reshape(-1, 3),
            self.started,
        )

    def _descend(self, name: bytes, number: int, skipped: Counter[str]) -> None:
        """List a folder and all below it; a stack instead of recursion, since folders may be very deep."""
        seen = {self.own}
        waiting = [name]
        while waiting:
            path = waiting.pop()
            try:
                below = self._list(path, number, skipped, seen)
            except OSError:
                skipped[UNLISTED] += 1
                continue
            waiting += [os.path.join(path, part) for part in reversed(below)]  # noqa: PTH118

    def _list(self, path: bytes, number: int, skipped: Counter[str], seen: set[tuple[int, int]]) -> list[bytes]:
        """Add the images directly in a folder; returns its folders, sorted.

        A folder in `seen` is left out, so that links cannot lead in circles, or to ever more paths of few folders.

        Raises:
            OSError: it cannot be listed.
        """
        whole = os.path.join(self.root, path)  # noqa: PTH118
        status = os.stat(whole)  # noqa: PTH116
        own = status.st_dev, status.st_ino
        if own in seen:
            skipped[LOOP] += 1
            return []
        seen.add(own)
        images: list[bytes] = []
        folders: list[bytes] = []
        for name, kind in entries(whole):
            if kind == "image":
                images.append(name)
            elif kind == "folder":
                folders.append(name)
            else:
                skipped[kind] += 1
        images.sort()
        prefix = path + b"/" if path else b""
        self.names.add(prefix + name for name in images)
        self.top.extend([number] * len(images))
        self.folders.add([path])
        self.stamps.extend(stamp(status))
        self._say()
        return sorted(folders)

    def _say(self) -> None:
        """Write a line about a listing that takes long, on the first rank only."""
        now = time.monotonic()
        if now - self.said >= SECONDS and os.environ.get("RANK_ID", "0") == "0":
            self.said = now
            sys.stderr.write(f"listing {one_line(str(self.folder))}: {len(self.names):,} images so far\n")
            sys.stderr.flush()


def entries(folder: bytes) -> Iterator[tuple[bytes, str]]:
    """Yield the names in a folder, each with `image`, `folder` or the reason why it is left out.

    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(folder) as found:
        for entry in found:
            name = entry.name
            dot = name.rfind(b".")
            image = dot > 0 and name[dot:].lower() in _SUFFIXES
            try:
                if image and not name.startswith(b".") and entry.is_file():
                    yield name, "image"
                else:
                    yield name, _kind(entry, image)
            except OSError:  # a link to itself, or an entry that has gone
                yield name, NOWHERE


def _kind(entry: os.DirEntry[bytes], image: bool) -> str:
    """Return `folder`, or why an entry that is no image file is left out."""
    name = os.fsdecode(entry.name)
    hidden = name.startswith(".")
    if entry.is_dir():
        if hidden or name in SYSTEM_FOLDERS:
            return "hidden folder" if hidden else "system folder"
        return "folder with the name of an image" if image else "folder"
    if hidden:
        return "hidden file"
    if entry.is_file():
        suffix = Path(name).suffix.lower()
        return suffix if suffix and len(suffix) <= 12 and suffix.isprintable() else "no extension"
    mode = entry.stat().st_mode  # of a link: of what it leads to
    return NOWHERE if stat.S_ISLNK(mode) else "pipe, socket or device"
