"""Image folders: list image files and their classes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import plural
from ..errors import UserError

#: formats that MindSpore's decoder reads (WebP and GIF fail)
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}


class DataError(UserError):
    """An unusable data folder; the text is one line for the user."""


@dataclass(frozen=True)
class ImageFolder:
    """The files of one split, sorted by class and name."""

    folder: Path
    files: list[Path]
    labels: list[int]
    classes: list[str]  # empty for an unlabelled folder
    skipped: Counter[str] = field(default_factory=Counter)  # extension -> number of files that are not images

    def __len__(self) -> int:
        return len(self.files)

    def summary(self) -> str:
        """Return a line for the log."""
        kind = plural(len(self.classes), "class", "classes") if self.classes else "no labels"
        text = f"{self.folder}: {plural(len(self), 'image')}, {kind}"
        if self.skipped:
            kinds = ", ".join(f"{count} x {suffix or 'no extension'}" for suffix, count in self.skipped.most_common(5))
            text += f", {plural(self.skipped.total(), 'other file')} skipped ({kinds})"
        return text


def image_folder(folder: Path) -> ImageFolder:
    """List a folder: one subfolder per class, or images directly in it (then without labels).

    Hidden files are ignored; other files that are not images are counted in `skipped`.

    Raises:
        DataError: the folder is missing or empty, or has images both in class folders and next to them.
    """
    if not folder.is_dir():
        raise DataError(f"data: there is no folder {folder}; set data.root (and data.train, data.val) to your images")
    skipped: Counter[str] = Counter()
    flat = _images(folder, skipped)
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files: list[Path] = []
    labels: list[int] = []
    nonempty: list[str] = []
    for name in classes:
        images = _images(folder / name, skipped, recursive=True)
        if images:
            files += images
            labels += [len(nonempty)] * len(images)
            nonempty.append(name)
    if flat and files:
        raise DataError(
            f"data: {folder} has images next to class folders (for example {flat[0].name} next to {nonempty[0]}/); "
            "move them into a class folder, or all images into one flat folder"
        )
    if flat:
        return ImageFolder(folder, flat, [0] * len(flat), [], skipped)
    if not files:
        others = f" ({plural(skipped.total(), 'other file')})" if skipped else ""
        raise DataError(f"data: no image in {folder}{others}; valid formats: {', '.join(sorted(EXTENSIONS))}")
    return ImageFolder(folder, files, labels, nonempty, skipped)


def images_below(folder: Path) -> list[Path]:
    """Return all image files in a folder and its subfolders, sorted."""
    return _images(folder, Counter(), recursive=True)


def _images(folder: Path, skipped: Counter[str], recursive: bool = False) -> list[Path]:
    images = []
    for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix.lower() in EXTENSIONS:
            images.append(path)
        else:
            skipped[path.suffix.lower()] += 1
    return images


def labelled_subset(source: ImageFolder, per_class: int) -> ImageFolder:
    """Return `per_class` images of each class, spread evenly over its sorted files; 0 keeps all."""
    if not per_class:
        return source
    chosen: list[int] = []
    for label, name in enumerate(source.classes):
        indices = [i for i, value in enumerate(source.labels) if value == label]
        if len(indices) < per_class:
            raise DataError(
                f"data.labels_per_class: {per_class}, but {source.folder}/{name} has only "
                f"{plural(len(indices), 'image')}; write {min(Counter(source.labels).values())} or less"
            )
        chosen += [indices[int(i)] for i in np.linspace(0, len(indices) - 1, per_class)]
    files, labels = [source.files[i] for i in chosen], [source.labels[i] for i in chosen]
    return ImageFolder(source.folder, files, labels, source.classes, source.skipped)
