"""The list of a large folder, kept in the user's cache folder, so that a million paths start in seconds.

A list is used again only if no folder in it has changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..native import KernelError, cache_folder
from .listing import NOWHERE, UNLISTED, Tree, list_folder, stamp
from .sources import Names

RULES = 1  # changes with the rules of `listing` and the form of the file
LEAST = 10_000  # images; smaller folders are listed as fast
MARGIN = 2_000_000_000  # ns: a folder that changed this shortly before its listing may change again unnoticed


def indexed(folder: Path) -> Tree:
    """Return the images below a folder, from the stored list if that is still true; stores the list of a large folder.

    Raises:
        OSError: the folder cannot be listed.
    """
    path = index_file(folder)
    tree = read_index(path, folder) if path else None
    if tree is None:
        tree = list_folder(folder)
        if path and len(tree) >= LEAST:
            write_index(path, folder, tree)
    return tree


def index_file(folder: Path) -> Path | None:
    """Return the path of a folder's stored list; None for a user without a home folder."""
    name = f"{hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:24]}.npz"
    try:
        return cache_folder() / "index" / name
    except KernelError:
        return None


def read_index(path: Path, folder: Path) -> Tree | None:
    """Return the stored list of a folder; None without one, or if it is damaged, foreign or no longer true."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            parts = {name: stored[name] for name in stored.files}
        tree = _tree(parts, folder)
        return tree if tree is not None and is_current(tree, folder) else None
    except Exception:  # whatever the file holds, the folder can be listed again
        return None


def write_index(path: Path, folder: Path, tree: Tree) -> None:
    """Store the list of a folder; not one that can change without a change of its folders."""
    if any(skipped[NOWHERE] or skipped[UNLISTED] for skipped in tree.skipped):
        return
    stamps = tree.stamps.copy()
    stamps[stamps[:, 0] > tree.started - MARGIN] = -1  # such a list is made again
    about = {
        "rules": RULES,
        "folder": os.fsencode(folder.absolute()).hex(),
        "top_names": tree.top_names,
        "skipped": tree.skipped,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(
                file,
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                text=tree.names.text,
                ends=tree.names.ends,
                top=tree.top,
                folder_text=tree.folders.text,
                folder_ends=tree.folders.ends,
                stamps=stamps,
            )
        partial.replace(path)
    except OSError:  # the cache folder is full or read-only: the next start lists the folder again
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def is_current(tree: Tree, folder: Path) -> bool:
    """Whether no folder of a list has changed.

    Raises:
        OSError: one has gone.
    """
    root = os.fsencode(folder)
    paths = (os.path.join(root, os.fsencode(tree.folders[i])) for i in range(len(tree.folders)))  # noqa: PTH118
    states = map(stamp, map(os.stat, paths))
    return all(state == tuple(stored) for state, stored in zip(states, tree.stamps, strict=True))


def _tree(parts: dict[str, np.ndarray], folder: Path) -> Tree | None:
    """Return the list in a file; None if it is that of another folder or version, or inconsistent."""
    about: dict[str, Any] = json.loads(parts["about"].tobytes())
    if about["rules"] != RULES or about["folder"] != os.fsencode(folder.absolute()).hex():
        return None
    names, folders = _names(parts["text"], parts["ends"]), _names(parts["folder_text"], parts["folder_ends"])
    top, stamps = parts["top"], parts["stamps"]
    skipped = [Counter(counts) for counts in about["skipped"]]
    whole = (
        (len(top), stamps.shape, len(skipped)) == (len(names), (len(folders), 3), len(about["top_names"]) + 1)
        and len(folders) > 0
        and (top.dtype, stamps.dtype) == (np.int32, np.int64)
        and top.min() >= -1
        and top.max() < len(about["top_names"])
    )
    return Tree(names, top, about["top_names"], skipped, folders, stamps, 0) if whole else None


def _names(text: np.ndarray, ends: np.ndarray) -> Names:
    """Return a table.

    Raises:
        ValueError: its two parts do not fit.
    """
    if (
        (text.dtype, ends.dtype) != (np.uint8, np.int64)
        or ends[-1] != len(text)
        or np.any(np.diff(ends, prepend=0) < 0)
    ):
        raise ValueError("not a table of names")
    return Names(text, ends)
