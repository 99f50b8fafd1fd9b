"""Split a folder of class folders into lists of training and validation images.

    python scripts/split_dataset.py FOLDER [--val 0.2 | --per-class N] [--seed 0] [--out DIR]

Writes train.csv and val.csv (path and class of each image) into --out, by default FOLDER itself; train with
data.root=DIR data.train=train.csv data.val=val.csv. --val is the fraction of each class, rounded, that is for
validation, at least one image and not all; with --per-class, N images of each class are for training and the rest for
validation. Which images these are depends only on --seed and their paths in FOLDER. Existing lists are not replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from src.config import plural
from src.config.paths import existing_folder, expanded
from src.data.folders import image_folder
from src.data.sources import DataError, Files
from src.errors import UserError
from src.tasks.command import line, run_command, whole_number


def main() -> int:
    parser = argparse.ArgumentParser(description="write lists of training and validation images")
    parser.add_argument("folder", metavar="FOLDER", help="has a folder for each class")
    parser.add_argument("--val", default="", metavar="F", help="fraction of each class for validation; default: 0.2")
    parser.add_argument("--per-class", default="", metavar="N", help="instead: training images of each class")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another split (default: 0)")
    parser.add_argument("--out", default="", metavar="DIR", help="folder of the lists; default: FOLDER")
    args = parser.parse_args()

    def command() -> None:
        if args.val and args.per_class:
            raise UserError("command line: --val and --per-class exclude each other; write one of them")
        fraction = number_between("--val", args.val or "0.2")
        per_class = whole_number("--per-class", args.per_class) if args.per_class else 0
        folder = existing_folder(args.folder, "FOLDER")
        out = Path(expanded(args.out, "--out")) if args.out else folder
        source = image_folder(folder, "FOLDER", "complete")
        if not source.classes:
            raise DataError(f"FOLDER: {folder} has no class folders; move the images of each class into a folder")
        training = training_images(source, fraction, per_class, args.seed)
        parts = {"train": np.flatnonzero(training), "val": np.flatnonzero(~training)}
        line(source.summary())
        for path, count in write_lists(source, parts, out).items():
            line(f"{path}: {plural(count, 'image')}")

    return run_command(command)


def number_between(option: str, text: str) -> float:
    """Return the fraction in `text`.

    Raises:
        UserError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise UserError(f"command line: {option}: {text!r} is not a number between 0 and 1; write for example 0.2")
    return value


def training_images(source: Files, fraction: float, per_class: int, seed: int) -> np.ndarray:
    """Return which images are for training, (n,) bool.

    An image's place in the order of its class is drawn from the seed and its path, so a new image moves few others.

    Raises:
        DataError: a class has too few images.
    """
    training = np.zeros(len(source), bool)
    order = np.argsort(source.labels, kind="stable")
    counts = np.bincount(source.labels)
    for label, members in enumerate(np.split(order, np.cumsum(counts)[:-1])):
        count = len(members)
        kept = per_class or count - min(max(round(fraction * count), 1), count - 1)
        if not 0 < kept < count:
            more = f"more than {per_class}" if per_class else "2 or more"
            raise DataError(
                f"FOLDER: class {source.classes[label]} of {source.place} has {plural(count, 'image')}, and a split "
                f"needs {more}; add images, or " + ("write a smaller --per-class" if per_class else "remove the folder")
            )
        drawn = sorted(members, key=lambda index: (draw(seed, source.names[int(index)]), int(index)))
        training[drawn[:kept]] = True
    return training


def draw(seed: int, name: str) -> bytes:
    """Return a value that looks random, a function of seed and path only."""
    return hashlib.sha256(f"{seed}/".encode() + os.fsencode(name)).digest()


def write_lists(source: Files, parts: dict[str, np.ndarray], out: Path) -> dict[Path, int]:
    """Write the lists into a folder; returns their paths and numbers of images.

    Raises:
        DataError: a list exists, or cannot be written.
    """
    paths = {out / f"{name}.csv": indices for name, indices in parts.items()}
    for path in paths:
        if os.path.lexists(path):
            raise DataError(f"--out: {path} exists; remove it, or write --out DIR with another folder")
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in paths}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, indices in paths.items():
            write_list(source, indices, partials[path])
        for path, partial in partials.items():
            partial.rename(path)
    except OSError as error:
        for partial in partials.values():
            with contextlib.suppress(OSError):
                partial.unlink()
        raise DataError(f"--out: {out} cannot be written ({error.strerror or error}); write --out DIR") from None
    return {path: len(indices) for path, indices in paths.items()}


def write_list(source: Files, indices: np.ndarray, path: Path) -> None:
    """Write paths, relative to the list where the images are below it, and classes."""
    folder, near = source.folder.resolve(), path.parent.resolve()
    prefix = folder.relative_to(near) if folder.is_relative_to(near) else folder
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "class"])
        rows.writerows([prefix / source.names[int(i)], source.classes[source.labels[i]]] for i in indices)


if __name__ == "__main__":
    sys.exit(main())
