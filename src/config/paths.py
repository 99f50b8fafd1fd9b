"""Expand `~` and variables in paths, and check that files and folders exist.

Needs neither MindSpore nor NumPy, so a mistyped path is reported at once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import UserError

if TYPE_CHECKING:
    from .recipe import Recipe

#: endings of list files (data/lists.py) and of MindRecord files (data/records.py)
LISTS = (".txt", ".csv", ".tsv", ".jsonl")
RECORDS = ".mindrecord"

#: type of the fields of a recipe that are paths
PathText = Annotated[str, "path"]


def expanded(text: str, key: str) -> str:
    """Replace `~`, `~user`, `$NAME` and `${NAME}` in a path; `key` names the path in errors.

    Raises:
        UserError: the variable or the user does not exist, or the path is empty.
    """
    if not text:  # as of a shell variable that is not set; it must not mean the working folder
        raise UserError(f"{key}: the path is empty; write one, or . for the working folder")

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(f"{key}: {text!r}: there is no variable {name}; set it, or write the path out")
        return os.environ[name]

    path = re.sub(r"\$(?:(\w+)|\{([^}]*)\})", value, text)
    whole = os.path.expanduser(path)  # noqa: PTH111 # of any text, not of a path
    if path.startswith("~") and whole == path and path.split("/")[0] != "~":
        raise UserError(f"{key}: {text!r}: there is no user {path.split('/')[0][1:]}; write ./{path} for a folder")
    return whole


def existing_file(text: str, key: str) -> Path:
    """Return the expanded path of a file that exists; `key` names it in errors."""
    path = Path(expanded(text, key))
    check(path, key, "file")
    return path


def existing_folder(text: str, key: str) -> Path:
    """Return the expanded path of a folder that exists; `key` names it in errors."""
    path = Path(expanded(text, key))
    check(path, key, "folder")
    return path


def existing_images(text: str, key: str) -> Path:
    """Return the expanded path of a folder, list or MindRecord file that exists; `key` names it in errors."""
    path = Path(expanded(text, key))
    check_images(path, key)
    return path


def check_images(path: Path, key: str, remedy: str = "") -> None:
    """Check that a folder of images, a list or a MindRecord file exists; what it holds is found when it is opened.

    Raises:
        UserError: it does not exist, or is no valid path.
    """
    suffix = path.suffix.lower()
    if suffix.startswith(RECORDS):  # a set may have no file of its own name, only numbered ones
        return
    if os.path.isdir(path) or not (os.path.isfile(path) or suffix in LISTS):  # noqa: PTH112, PTH113 # never raise
        check(path, key, "folder", remedy)
    else:
        check(path, key, "file", remedy)


def check(path: Path, key: str, kind: str, remedy: str = "") -> None:
    """Check that a file or folder exists. `remedy` replaces the hint about the nearest existing folder.

    Raises:
        UserError: it does not exist, is of the other kind, or is no valid path.
    """
    try:
        exists, is_folder = path.exists(), path.is_dir()
        nearest = next((folder for folder in path.parents if folder.is_dir()), None)
    except (OSError, ValueError) as error:  # a name too long, a NUL character
        raise UserError(
            f"{key}: {str(path)!r} is not a valid path ({getattr(error, 'strerror', None) or error})"
        ) from None
    if not exists:
        hint = remedy or (f"the nearest existing folder is {nearest}" if nearest not in (None, Path()) else "")
        raise UserError(f"{key}: there is no {kind} {path}" + (f"; {hint}" if hint else ""))
    if is_folder != (kind == "folder"):
        raise UserError(f"{key}: {path} is a {'folder' if is_folder else 'file'}; name a {kind}")


def check_training_paths(recipe: Recipe, resume: str) -> None:
    """Check that all files and folders of a training exist, before slow imports.

    Ranks of a distributed run skip this and check together later: a rank that ended here would leave the others
    waiting.
    """
    if "MS_ROLE" in os.environ:
        return
    data = recipe.data
    for part, key in ((data.train, "data.train"), (data.val, "data.val")):
        if part:
            remedy = "set data.root (and data.train, data.val) to your images"
            check_images(Path(data.root) / part, key, remedy)
    if recipe.init_from:
        existing_file(recipe.init_from, "init_from")
    teacher = recipe.method.teacher_network
    if teacher is not None and teacher.file:
        existing_file(teacher.file, teacher.key)
    if resume and resume != "auto":
        existing_file(resume, "--resume")
