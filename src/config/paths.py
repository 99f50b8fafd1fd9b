"""Paths as people write them: `~` and variables expanded, and whether what must be there is there.

Needs neither MindSpore nor NumPy, so that a mistyped path is answered at once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import UserError

if TYPE_CHECKING:
    from .recipe import Recipe

#: type of the fields of a recipe that are paths
PathText = Annotated[str, "path"]


def expanded(text: str, key: str) -> str:
    """A path with `~`, `~user`, `$NAME` and `${NAME}` replaced; `key` says in errors where it stands.

    Raises:
        UserError: a variable or a user that is not known.
    """

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
    """The path of a file that is there; `key` says in errors where it was written."""
    path = Path(expanded(text, key))
    check(path, key, "file")
    return path


def existing_folder(text: str, key: str) -> Path:
    """Likewise of a folder."""
    path = Path(expanded(text, key))
    check(path, key, "folder")
    return path


def check(path: Path, key: str, kind: str, remedy: str = "") -> None:
    """A file or folder is there; `remedy` says what to write else, where the nearest folder would not help."""
    try:
        there, found = path.exists(), path.is_dir()
        near = next((folder for folder in path.parents if folder.is_dir()), None)
    except (OSError, ValueError) as error:  # a name too long, a NUL character
        raise UserError(f"{key}: {str(path)!r} is no path ({getattr(error, 'strerror', None) or error})") from None
    if not there:
        beside = f"{near} is the nearest folder that is there" if near not in (None, Path()) else ""
        told = remedy or beside
        raise UserError(f"{key}: there is no {kind} {path}" + (f"; {told}" if told else ""))
    if found != (kind == "folder"):
        raise UserError(f"{key}: {path} is a {'folder' if found else 'file'}; name a {kind}")


def check_training_paths(recipe: Recipe, resume: str) -> None:
    """What a training needs to be there, before anything slow is imported.

    Ranks of one run look for themselves later on, together: one that ended here would leave the others waiting.
    """
    if "MS_ROLE" in os.environ:
        return
    data = recipe.data
    for part, key in ((data.train, "data.train"), (data.val, "data.val")):
        if part:
            remedy = "set data.root (and data.train, data.val) to your images"
            check(Path(data.root) / part, key, "folder", remedy)
    if recipe.init_from:
        existing_file(recipe.init_from, "init_from")
    teacher = recipe.method.teacher_network
    if teacher is not None and teacher.file:
        existing_file(teacher.file, teacher.key)
    if resume and resume != "auto":
        existing_file(resume, "--resume")
