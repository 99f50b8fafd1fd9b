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

from ..config import Recipe, Teacher, plural, show_size
from ..config.files import ConfigError, parse_recipe
from ..data.loader import Loader
from ..engine import checkpoint
from ..methods import Method
from ..models import build_network
from ..models.graph import AsGraph
from .networks import classifier_recipe, fill, without_drop_path

#: fields of an encoder that its outputs do not depend on
TRAINING_ONLY = ("name", "drop_path", "init")


class TeacherError(ConfigError):
    """A teacher that does not go with the recipe; one line for the user."""


def load_teacher(recipe: Recipe, classes: list[str]) -> nn.Cell | None:
    """The frozen network that a recipe's Method asks, in evaluation mode; None if it asks none.

    Args:
        recipe: of the student.
        classes: names of the training folder's classes, which a classifier must know too.

    Raises:
        TeacherError: no file is named, or it holds another network, other classes or other image statistics than the
            recipe says.
        CheckpointError: it cannot be read, or is from pre-training where a classifier is asked.
    """
    teacher = recipe.method.teacher_network
    if teacher is None:
        return None
    if not teacher.file:
        kind = "a classifier" if teacher.classifier else "a checkpoint"
        raise TeacherError(
            f"{teacher.key}: names no checkpoint; write {teacher.key}=FILE, {kind} trained here or converted by "
            "scripts/convert_weights.py"
        )
    try:
        found = checkpoint.load(Path(teacher.file))
        own = classifier_recipe(found) if teacher.classifier else parse_recipe(found.meta["recipe"], teacher.file)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"{teacher.key}: {error}") from None
    check_teacher(recipe, teacher, own)
    if teacher.classifier:
        check_teacher_classes(teacher, list(found.meta["classes"]), classes)
    return fill(build_network(without_drop_path(own.trained_encoder), own.method.classifier), found)


def check_teacher(recipe: Recipe, teacher: Teacher, own: Recipe) -> None:
    """The file's network is the one the recipe describes, and both see the same images."""
    said, held, encoder_key = teacher.encoder, own.trained_encoder, f"{teacher.key}_encoder"
    if type(said) is not type(held):
        check_equal(teacher, encoder_key, said.name, held.name)
    for item in fields(held):
        if item.name not in TRAINING_ONLY:
            check_equal(teacher, f"{encoder_key}.{item.name}", getattr(said, item.name), getattr(held, item.name))
    if teacher.classifier and own.method.classifier:
        check_equal(teacher, "method.num_classes", teacher.classifier.num_classes, own.method.classifier.num_classes)
    for key in ("mean", "std"):
        check_equal(teacher, f"data.{key}", list(getattr(recipe.data, key)), list(getattr(own.data, key)))


def check_equal(teacher: Teacher, key: str, said: Any, held: Any) -> None:
    if said != held:
        wanted = list(held) if isinstance(held, tuple) else held
        raise TeacherError(
            f"{key}: {show_size(said)}, but the teacher in {teacher.file} has {show_size(held)}; write {wanted}"
        )


def check_teacher_classes(teacher: Teacher, named: list[str], classes: list[str]) -> None:
    """The teacher's classes are the student's, as far as both have names."""
    if named and classes and named != classes:
        odd = sorted(set(named) ^ set(classes))[:3]
        raise TeacherError(
            f"{teacher.key}: {teacher.file} was trained on other classes than data.train has"
            + (f" ({', '.join(odd)})" if odd else ", or in another order")
        )


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --- kept answers -----------------------------------------------------------------------------------------------


def answers_folder(recipe: Recipe, method: Method, batches: Loader) -> Path:
    """Where the answers of this teacher to these images are, or will be: another teacher, block, list of files or
    transform has another folder."""
    return Path(recipe.method.cache) / hashlib.sha256(answers_key(recipe, method, batches).encode()).hexdigest()[:16]


def answers_key(recipe: Recipe, method: Method, batches: Loader) -> str:
    """Everything that the answers depend on, as JSON."""
    teacher = recipe.method.teacher_network
    assert teacher is not None  # only a Method with a teacher keeps answers
    key = {
        "teacher": digest_of(teacher.file),
        "columns": list(method.teacher_columns),
        "files": batches.checksum(),
        "image_size": list(recipe.encoder.image_size),
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
    }
    return json.dumps(key)


def keep_answers(recipe: Recipe, method: Method, batches: Loader) -> str:
    """Ask the teacher about every image once, unless that is done; returns a line for the log.

    One `.npy` file per name in `method.teacher_columns`, one row per file of the source. The folder is written under
    another name first, so that it is complete or missing.
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
    return f"the teacher's answers to {plural(len(batches.source), 'image')}: {size / 1e6:.1f} MB in {folder}"


def write_answers(folder: Path, method: Method, batches: Loader) -> int:
    """Fill a folder with the columns; returns their bytes."""
    asking = AsGraph(method, method.teacher_outputs)
    asking.set_train(False)
    left, size = len(batches.source), 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in method.teacher_columns}
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


def kept_answers(recipe: Recipe, method: Method, batches: Loader) -> dict[str, np.ndarray]:
    """The columns of a folder of answers, mapped into memory."""
    folder = answers_folder(recipe, method, batches)
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in method.teacher_columns}
    except (OSError, ValueError, EOFError) as error:
        raise TeacherError(
            f"method.cache: {folder} cannot be read ({' '.join(str(error).split())}); remove that folder"
        ) from None
