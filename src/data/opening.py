"""Open whatever holds the images of a split: a folder, a list file or a MindRecord file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..config.paths import LISTS, RECORDS
from .folders import image_folder
from .lists import ground_truth, ground_truth_of, is_ground_truth, open_list
from .records import is_mindrecord, open_mindrecord
from .sources import DataError, Labels, Source


def open_source(path: Path, key: str = "data", labels: Labels = "any") -> Source:
    """Return the images of a folder, a list file or a MindRecord file.

    Args:
        path: of the folder or file.
        key: the field or option that names it, for errors.
        labels: what is needed of it.

    Raises:
        DataError: it cannot be used, has no image, or does not have what is needed.
    """
    source = _open(path, key, labels)
    if labels == "any" or source.classes:
        return source
    truth = ground_truth_of(path) if path.is_dir() else None
    if truth is not None:
        return ground_truth(truth, key)
    if path.is_dir():
        raise DataError(
            f"{key}: {path} has no class folders, and accuracy and classifiers need classes; move the images of each "
            f"class into a folder, or name a list with labels ({', '.join(LISTS)})"
        )
    raise DataError(f"{key}: {path} has no labels, and accuracy and classifiers need them; write one after each path")


def _open(path: Path, key: str, labels: Labels) -> Source:
    mode = _mode(path, key)
    if stat.S_ISDIR(mode):
        return image_folder(path, key, labels)
    if not mode or (stat.S_ISREG(mode) and is_mindrecord(path)):
        return open_mindrecord(path, key)
    if stat.S_ISREG(mode) and path.suffix.lower() in LISTS:
        return ground_truth(path, key) if is_ground_truth(path) else open_list(path, key)
    raise DataError(
        f"{key}: {path} is no folder, no list of images ({', '.join(LISTS)}) and no MindRecord file ({RECORDS}); "
        "name one of these"
    )


def _mode(path: Path, key: str) -> int:
    """Return the mode of what a path leads to; 0 for a MindRecord set without a file of its own name.

    Raises:
        DataError: it leads nowhere.
    """
    try:
        return os.stat(path).st_mode  # noqa: PTH116 # Path.is_dir hides why a path cannot be used
    except (FileNotFoundError, NotADirectoryError):
        if path.suffix.startswith(RECORDS):
            return 0
        kind = "file" if path.suffix.lower() in LISTS else "folder"
        link = ", only a link that leads nowhere" if path.is_symlink() else ""
        remedy = "set data.root (and data.train, data.val) to your images"
        if not key.startswith("data"):
            remedy = "name a folder of images, or a list of them"
        raise DataError(f"{key}: there is no {kind} {path}{link}; {remedy}") from None
    except (OSError, ValueError) as error:  # no permission, a name too long, a NUL character
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{key}: {str(path)!r} cannot be used ({reason}); name another folder") from None
