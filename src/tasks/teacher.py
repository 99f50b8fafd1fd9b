"""The teacher of a distillation or feature target: its checkpoint, checked against the recipe, and stored outputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn

from ..config import Recipe, Teacher, plural, show_size
from ..config.files import ConfigError
from ..data.loader import Loader
from ..engine import checkpoint
from ..methods import Method
from ..models import build_network
from ..models.graph import AsGraph
from .networks import classifier_recipe, fill, recipe_in, without_drop_path

#: fields of an encoder that do not affect its outputs
TRAINING_ONLY = ("name", "drop_path", "init")


class TeacherError(ConfigError):
    """A teacher that does not fit the recipe; the text is one line for the user."""


def load_teacher(recipe: Recipe, classes: list[str]) -> nn.Cell | None:
    """Return the frozen teacher of a recipe in evaluation mode; None if its Method has no teacher.

    Args:
        recipe: of the student.
        classes: class names of the training folder, which a teacher with a classifier must share.

    Raises:
        TeacherError: no file is named, or its network, classes or image statistics differ from the recipe.
        CheckpointError: the file cannot be read, or has no classifier where one is needed.
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
        loaded = checkpoint.load(Path(teacher.file))
        stored = classifier_recipe(loaded) if teacher.classifier else recipe_in(loaded)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"{teacher.key}: {error}") from None
    check_teacher(recipe, teacher, stored)
    if teacher.classifier:
        check_teacher_classes(teacher, list(loaded.meta["classes"]), classes)
    return fill(build_network(without_drop_path(stored.trained_encoder), stored.method.classifier), loaded)


def check_teacher(recipe: Recipe, teacher: Teacher, stored: Recipe) -> None:
    """Check that the recipe describes the teacher's network and that both see the same images.

    Args:
        recipe: of the student.
        teacher: the teacher as the recipe describes it.
        stored: the recipe in the teacher's checkpoint.
    """
    described, actual = teacher.encoder, stored.trained_encoder
    encoder_key = f"{teacher.key}_encoder"
    if type(described) is not type(actual):
        check_as_described(teacher, encoder_key, described.name, actual.name)
    for item in fields(actual):
        if item.name not in TRAINING_ONLY:
            key = f"{encoder_key}.{item.name}"
            check_as_described(teacher, key, getattr(described, item.name), getattr(actual, item.name))
    if teacher.classifier and stored.method.classifier:
        check_as_described(
            teacher, "method.num_classes", teacher.classifier.num_classes, stored.method.classifier.num_classes
        )
    for key in ("mean", "std"):
        check_as_described(teacher, f"data.{key}", list(getattr(recipe.data, key)), list(getattr(stored.data, key)))


def check_as_described(teacher: Teacher, key: str, described: Any, actual: Any) -> None:
    """Raise `TeacherError` if a value in the recipe differs from that of the teacher's checkpoint."""
    if described != actual:
        legal = list(actual) if isinstance(actual, tuple) else actual
        raise TeacherError(
            f"{key}: {show_size(described)}, but the teacher in {teacher.file} has {show_size(actual)}; write {legal}"
        )


def check_teacher_classes(teacher: Teacher, names: list[str], classes: list[str]) -> None:
    """Check that teacher and student have the same class names, unless one of them has none."""
    if names and classes and names != classes:
        different = sorted(set(names) ^ set(classes))[:3]
        raise TeacherError(
            f"{teacher.key}: {teacher.file} was trained with other class names than data.train has"
            + (f" ({', '.join(different)})" if different else ", or in another order")
        )


def digest_of(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --- stored outputs ---------------------------------------------------------------------------------------------


def outputs_folder(recipe: Recipe, method: Method, batches: Loader) -> Path:
    """Return the folder for the outputs of this teacher for these images.

    It differs for another teacher, another set of blocks, another list of files, transform or precision.
    """
    return Path(recipe.method.cache) / hashlib.sha256(outputs_key(recipe, method, batches).encode()).hexdigest()[:16]


def outputs_key(recipe: Recipe, method: Method, batches: Loader) -> str:
    """Return everything that the teacher's outputs depend on, as JSON."""
    teacher = recipe.method.teacher_network
    assert teacher is not None  # only a Method with a teacher has a cache
    key = {
        "teacher": digest_of(teacher.file),
        "columns": list(method.teacher_columns),
        "files": batches.checksum(),
        "image_size": list(recipe.encoder.image_size),
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
    }
    if (recipe.data.decode, recipe.data.exif) != ("exact", "ignore"):
        key["pixels"] = [recipe.data.decode, recipe.data.exif]
    precision = recipe.train.precision.on(ms.get_context("device_target"))
    if precision != "float32":
        key["precision"] = precision
    return json.dumps(key)


def store_outputs(recipe: Recipe, method: Method, batches: Loader) -> str:
    """Run the teacher on every image once, unless its outputs are stored already; returns a line for the log.

    Each column of `method.teacher_columns` becomes a `.npy` file with one entry per file of the source. The folder is
    written under a temporary name and renamed, so it is always complete.
    """
    folder = outputs_folder(recipe, method, batches)
    if folder.is_dir():
        return f"the teacher's outputs are in {folder}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        size = write_outputs(temporary, method, batches)
        (temporary / "key.json").write_text(outputs_key(recipe, method, batches) + "\n", encoding="utf-8")
        temporary.rename(folder)
    except OSError as error:
        raise TeacherError(f"method.cache: {folder} cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"the teacher's outputs for {plural(len(batches.source), 'image')}: {size / 1e6:.1f} MB in {folder}"


def write_outputs(folder: Path, method: Method, batches: Loader) -> int:
    """Write the columns into a folder; returns their size in bytes."""
    teacher = AsGraph(method, method.teacher_outputs)
    teacher.set_train(False)
    remaining, size = len(batches.source), 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in method.teacher_columns}
        for (image,) in batches.every(("image",)):
            for file, output in zip(files.values(), teacher(image), strict=True):
                values = output.asnumpy()
                if not file.tell():
                    shape = (len(batches.source), *values.shape[1:])
                    header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                size += file.write(values[:remaining].tobytes())
            remaining -= image.shape[0]
    return size


def stored_outputs(recipe: Recipe, method: Method, batches: Loader) -> dict[str, np.ndarray]:
    """Return the columns of a folder of teacher outputs, memory-mapped.

    Raises:
        TeacherError: the folder cannot be read.
    """
    folder = outputs_folder(recipe, method, batches)
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in method.teacher_columns}
    except (OSError, ValueError, EOFError) as error:
        raise TeacherError(
            f"method.cache: {folder} cannot be read ({' '.join(str(error).split())}); remove that folder"
        ) from None
