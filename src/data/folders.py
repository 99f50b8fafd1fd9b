"""Folders of images, with one folder per class or without labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import plural
from .index import indexed
from .listing import EXTENSIONS, Tree
from .sources import DataError, Files, Labels, list_kinds

#: names of the parts of a data set; a folder with nothing but these is one level too high
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})


def image_folder(folder: Path, key: str = "data", labels: Labels = "any") -> Files:
    """List a folder: one folder per class with images at any depth, or images without labels.

    With `any`, images next to folders, and a folder of the parts of a data set (train, val), are images without labels.

    Args:
        folder: the folder.
        key: names it in errors.
        labels: what is needed; with `needed` and `complete` a folder without class folders is returned without labels
            too, for `open_source` to look for them elsewhere.

    Raises:
        DataError: it cannot be listed, has no image, or does not have what is needed.
    """
    tree = _listed(folder, key)
    if not len(tree):
        raise DataError(f"{key}: no image in {folder}{_left_out(sum(tree.skipped, Counter()))}; {formats()}")
    present = np.unique(tree.top)
    skipped = sum(tree.skipped, Counter())
    flat = Files(folder, folder, tree.names, np.zeros(len(tree), np.int32), [], skipped)
    if present[-1] < 0:
        return flat
    problem = _mixed(folder, tree, present) or _too_high(folder, tree, present)
    if problem and labels != "any":
        raise DataError(f"{key}: {problem}")
    if problem:
        return flat
    if labels == "complete":
        _check_empty(folder, key, tree, present)
    numbers = np.zeros(len(tree.top_names), np.int32)
    numbers[present] = np.arange(len(present))
    classes = [tree.top_names[index] for index in present]
    empty = len(tree.top_names) - len(present)
    if empty:
        skipped = skipped + Counter({"folder without an image": empty})
    return replace(flat, labels=numbers[tree.top], classes=classes, skipped=skipped)


def images_below(folder: Path, key: str = "data") -> Files:
    """Return all images below a folder, without labels.

    Raises:
        DataError: there is none.
    """
    source = image_folder(folder, key)
    return replace(source, labels=np.zeros_like(source.labels), classes=[])


def formats() -> str:
    """Return which file names are images, for errors."""
    return f"valid formats: {', '.join(sorted(EXTENSIONS))}"


def _listed(folder: Path, key: str) -> Tree:
    try:
        return indexed(folder)
    except OSError as error:
        raise DataError(f"{key}: {folder} cannot be listed ({error.strerror or error})") from None


def _left_out(skipped: Counter[str]) -> str:
    return f" ({list_kinds(skipped)})" if skipped else ""


def _mixed(folder: Path, tree: Tree, present: np.ndarray) -> str:
    """Return what is wrong if there are images both in class folders and next to them."""
    if present[0] >= 0:
        return ""
    stray = tree.names[int(np.argmin(tree.top))]
    return (
        f"{folder} has images next to class folders (for example {stray} next to {tree.top_names[present[1]]}/); "
        "move them into a class folder, or all images into one flat folder"
    )


def _too_high(folder: Path, tree: Tree, present: np.ndarray) -> str:
    """Return what is wrong if the folders are no classes, but parts of a data set or data sets."""
    names = [tree.top_names[index] for index in present]
    listed = ", ".join(names[:5])
    below = tree.subfolders()
    splits = [name for name in names if name.lower() in SPLITS]
    if len(splits) == len(names) or (len(splits) > 1 and all(below[name] for name in splits)):
        return f"the folders in {folder} are parts of a data set ({listed}), not classes; {_remedy(folder, splits[0])}"
    parts = [{part.lower() for part in below[name]} for name in names]
    whole = [name for name, part in zip(names, parts, strict=True) if part and part <= SPLITS]
    if len(whole) == len(names) or any(len(below[name]) > 1 for name in whole):
        first = f"{whole[0]}/{sorted(below[whole[0]])[0]}"
        return f"the folders in {folder} are data sets ({listed}), not classes; {_remedy(folder, first)}"
    if len(names) == 1 and len(parts[0]) > 1:
        return (
            f"{folder} has a single class folder, {names[0]}, with {plural(len(parts[0]), 'folder')} in it; "
            f"{_remedy(folder, names[0])}"
        )
    return ""


def _remedy(folder: Path, below: str) -> str:
    return f"name the folder whose folders are the classes, for example {folder / below}"


def _check_empty(folder: Path, key: str, tree: Tree, present: np.ndarray) -> None:
    """Check that each class folder has an image: without one, the network would lack the class."""
    empty = sorted(set(range(len(tree.top_names))) - set(present.tolist()))
    if empty:
        others = f" and {plural(len(empty) - 1, 'other class folder')}" if len(empty) > 1 else ""
        why = _left_out(tree.skipped[empty[0]]) or " (it is empty)"
        raise DataError(
            f"{key}: no image in class folder {folder / tree.top_names[empty[0]]}{others}{why}; "
            f"put images into it, or remove it; {formats()}"
        )
