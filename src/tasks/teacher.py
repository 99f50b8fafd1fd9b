"""The teacher of a distillation: its checkpoint, held against the recipe, and its answers kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn

from ..config import ManifoldConfig, Recipe, show_size
from ..config.files import ConfigError
from ..data.loader import Loader
from ..engine import checkpoint
from ..engine.graph import AsGraph
from ..models import build_classifier
from .networks import classifier_recipe, fill, without_drop_path

#: fields of an encoder that its outputs do not depend on
TRAINING_ONLY = ("name", "drop_path", "init")


class TeacherError(ConfigError):
    """A teacher that does not go with the recipe; one line for the user."""


def load_teacher(recipe: Recipe, classes: list[str]) -> nn.Cell:
    """The teacher's classifier in evaluation mode.

    Args:
        recipe: of the student.
        classes: names of the training folder's classes.

    Raises:
        TeacherError: no file is named, or it holds another network, other classes or other image statistics than the
            recipe says.
        CheckpointError: it cannot be read, or is from pre-training.
    """
    method = recipe.method
    assert isinstance(method, ManifoldConfig)
    if not method.teacher:
        raise TeacherError(
            "method.teacher: names no checkpoint; write method.teacher=FILE, a classifier trained here or converted by "
            "scripts/convert_weights.py"
        )
    try:
        found = checkpoint.load(Path(method.teacher))
        own = classifier_recipe(found)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"method.teacher: {error}") from None
    check_encoder(method, own)
    compare(method.teacher, "method.num_classes", method.num_classes, own.method.num_classes)  # type: ignore[union-attr]
    for key in ("mean", "std"):  # one image serves both
        compare(method.teacher, f"data.{key}", list(getattr(recipe.data, key)), list(getattr(own.data, key)))
    named = list(found.meta["classes"])
    if named and classes and named != classes:
        odd = sorted(set(named) ^ set(classes))[:3]
        raise TeacherError(
            f"method.teacher: {method.teacher} was trained on other classes than data.train has"
            + (f" ({', '.join(odd)})" if odd else ", or in another order")
        )
    return fill(build_classifier(without_drop_path(own.encoder), own.method), found)  # type: ignore[arg-type]


def check_encoder(method: ManifoldConfig, own: Recipe) -> None:
    """The file's network is the one the recipe describes."""
    said, held = method.teacher_encoder, own.encoder
    if type(said) is not type(held):
        compare(method.teacher, "method.teacher_encoder", said.name, held.name)
    for item in fields(held):
        if item.name not in TRAINING_ONLY:
            ours, theirs = getattr(said, item.name), getattr(held, item.name)
            compare(method.teacher, f"method.teacher_encoder.{item.name}", ours, theirs)


def compare(file: str, key: str, said: Any, held: Any) -> None:
    if said != held:
        wanted = list(held) if isinstance(held, tuple) else held
        raise TeacherError(f"{key}: {show_size(said)}, but the teacher in {file} has {show_size(held)}; write {wanted}")


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --- kept answers -----------------------------------------------------------------------------------------------


def answers_folder(recipe: Recipe, method: Any, batches: Loader) -> Path:
    """Where the answers of this teacher to these images are, or will be: another teacher, block, list of files or
    transform has another folder."""
    return Path(recipe.method.cache) / hashlib.sha256(answers_key(recipe, method, batches).encode()).hexdigest()[:16]  # type: ignore[union-attr]


def answers_key(recipe: Recipe, method: Any, batches: Loader) -> str:
    """Everything that the answers depend on, as JSON."""
    assert isinstance(recipe.method, ManifoldConfig)
    key = {
        "teacher": digest_of(recipe.method.teacher),
        "columns": list(method.answers),
        "files": batches.checksum(),
        "image_size": list(recipe.encoder.image_size),
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
    }
    return json.dumps(key)


def keep_answers(recipe: Recipe, method: Any, batches: Loader) -> str:
    """Ask the teacher about every image once, unless that is done; returns a line for the log.

    One `.npy` file for each column of `method.answers`, a row per file of the source; written under another name first,
    so that there is always a whole folder or none.
    """
    folder = answers_folder(recipe, method, batches)
    if folder.is_dir():
        return f"the teacher's answers are in {folder}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        size = write_answers(temporary, method, batches)
        (temporary / "key.json").write_text(answers_key(recipe, method, batches) + "\n", encoding="utf-8")
        temporary.rename(folder)
    except OSError as error:
        raise TeacherError(f"method.cache: {folder} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"the teacher's answers to {len(batches.source)} images: {size / 1e6:.1f} MB in {folder}"


def write_answers(folder: Path, method: Any, batches: Loader) -> int:
    """Fill a folder with the columns; returns their bytes."""
    asking = AsGraph(method, method.ask)
    asking.set_train(False)
    left, size = len(batches.source), 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in method.answers}
        for (image,) in batches.every(("image",)):
            for file, answer in zip(files.values(), asking(image), strict=True):
                rows = answer.asnumpy()
                if not file.tell():
                    shape = (len(batches.source), *rows.shape[1:])
                    described = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, described)
                size += file.write(rows[:left].tobytes())
            left -= image.shape[0]
    return size


def kept_answers(recipe: Recipe, method: Any, batches: Loader) -> dict[str, np.ndarray]:
    """The columns of a folder of answers, mapped into memory."""
    folder = answers_folder(recipe, method, batches)
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in method.answers}
    except (OSError, ValueError, EOFError) as error:
        raise TeacherError(
            f"method.cache: {folder} cannot be read ({' '.join(str(error).split())}); remove that folder"
        ) from None
