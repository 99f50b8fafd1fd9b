"""Self-describing checkpoints: weights, resolved recipe, versions, and the training state for resuming.

A checkpoint is one MindSpore `.ckpt` file. Weights have their parameter names, the training state (AdamW moments, draw
counters) has the prefix `state/`, and the JSON text `meta` contains the rest. A file is written under a temporary name,
synced and renamed, so an interrupted write never leaves a damaged file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from .. import __version__
from ..config.checks import shown
from ..errors import UserError
from .ckpt_file import MOST_AXES, read_file

STATE = "state/"
UNUSED = "kept/"  # below `state/`: arrays of a converted file without a counterpart here, for converting it back
DRAWS = ".draws"  # suffix of the draw counters of random cells: training state, not weights


class CheckpointError(UserError):
    """An unusable checkpoint; the text is one line for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        meta: recipe (YAML text), method, epoch, step, versions, metrics, classes, names.
        weights: of the network.
        state: of the training; empty if the file is not for resuming.
        unused: arrays of a converted file that no network here uses.
    """

    path: Path
    meta: dict[str, Any]
    weights: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    unused: dict[str, np.ndarray]


def weights_of(network: nn.Cell) -> dict[str, Parameter]:
    """Return the parameters of the network without draw counters, by name."""
    return {p.name: p for p in network.get_parameters() if not p.name.endswith(DRAWS)}


def counters_of(network: nn.Cell) -> dict[str, Parameter]:
    """Return the draw counters of the random cells, by name."""
    return {p.name: p for p in network.get_parameters() if p.name.endswith(DRAWS)}


def save(path: Path, weights: dict[str, Parameter], state: dict[str, Parameter], meta: dict[str, Any]) -> None:
    """Write a checkpoint completely or not at all.

    Raises:
        CheckpointError: it cannot be written, for example on a full disk.
    """
    items = [{"name": name, "data": value} for name, value in weights.items()]
    items += [{"name": STATE + name, "data": value} for name, value in state.items()]
    versions = {"mindspore": ms.__version__, "numpy": np.__version__, "code": __version__}
    text = json.dumps({"format": 1, "versions": versions, "names": [i["name"] for i in items], **meta})
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.ckpt")
    try:
        with quiet():
            ms.save_checkpoint(items, str(temporary), append_dict={"meta": text}, crc_check=True)
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        previous = "; the previous file is unchanged" if path.exists() else ""
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: cannot be written ({reason}){previous}") from None
    finally:
        for leftover in (temporary, temporary.with_suffix(".tmp")):  # .tmp: MindSpore's temporary file
            with contextlib.suppress(OSError):  # it does not exist, or its name is too long to exist
                leftover.unlink()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turn off MindSpore's log; its errors are raised as exceptions too."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of this project.

    Raises:
        CheckpointError: the file is missing, damaged, truncated, or not a checkpoint of this project.
    """
    check_file(path)
    try:
        items, has_checksum = read_file(path)
    except (OSError, ValueError, LookupError):
        raise CheckpointError(f"{path}: damaged or not a MindSpore checkpoint; its content cannot be read") from None
    except MemoryError:
        raise CheckpointError(f"{path}: needs more memory than there is") from None
    meta = read_meta(path, items.pop("meta", ""))
    arrays = {name: value for name, value in items.items() if isinstance(value, np.ndarray)}
    missing = set(meta["names"]) - set(arrays)
    if missing:
        raise CheckpointError(f"{path}: truncated, {len(missing)} of {len(meta['names'])} arrays are missing")
    if not has_checksum:
        raise CheckpointError(f"{path}: truncated, the checksum at its end is missing")
    unused, state = take(arrays, STATE + UNUSED), take(arrays, STATE)
    for name, value in arrays.items():
        if value.dtype != np.float32:
            raise CheckpointError(f"{path}: {name} has {value.dtype} numbers; weights are float32")
    return Checkpoint(path, meta, arrays, state, unused)


def check_file(path: Path) -> None:
    """Check that a path is that of a checkpoint file.

    Raises:
        CheckpointError: it does not exist, or is a folder, a device or another kind of file.
    """
    if os.path.isdir(path):  # noqa: PTH112 # never raises
        files = sorted(file.name for file in path.glob("*.ckpt"))
        raise CheckpointError(f"{path}: a folder" + (f"; name a file in it: {', '.join(files[:5])}" if files else ""))
    if not os.path.isfile(path):  # noqa: PTH113
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.suffix != ".ckpt":
        raise CheckpointError(f"{path}: not a .ckpt file")


def read_meta(path: Path, text: Any) -> dict[str, Any]:
    """Return the facts that this project stores in a file.

    Raises:
        CheckpointError: the file has none, or one has another type than this project writes.
    """
    try:
        meta = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or not {"names", "recipe"} <= set(meta):
        raise CheckpointError(f"{path}: a MindSpore checkpoint, but without the recipe that this project stores in it")
    for key, (is_valid, meaning) in META.items():
        if key in meta and not is_valid(meta[key]):
            raise CheckpointError(f"{path}: damaged: {key} in its meta is {shown(meta[key])}, not {meaning}")
    return {**DEFAULTS, **meta}


def take(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Remove and return the arrays with a prefix, under names without it."""
    return {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}


#: what `meta` has if a file does not say it
DEFAULTS: dict[str, Any] = {"method": "", "epoch": 0, "step": 0, "best": None, "metrics": {}, "classes": []}


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def is_number(value: Any) -> bool:
    return value is None or isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def is_note(value: Any) -> bool:
    """Whether a value describes the file that a checkpoint was converted from (weights/foreign.py)."""
    if value is None:
        return True
    if not isinstance(value, dict) or not all(is_text(value.get(key)) for key in ("key", "prefix")):
        return False
    entries = value.get("entries")
    return isinstance(entries, list) and all(
        isinstance(entry, list)
        and len(entry) == 3
        and is_text(entry[0])
        and is_text(entry[1])
        and isinstance(entry[2], list)
        and len(entry[2]) <= MOST_AXES
        and all(map(is_count, entry[2]))
        for entry in entries
    )


#: key of `meta` -> whether a value is valid, and what it has to be
META: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("recipe", "method", "teacher"), (is_text, "a text")),
    **dict.fromkeys(("names", "classes", "origins"), (are_texts, "a list of texts")),
    **dict.fromkeys(("epoch", "step", "ranks", "format"), (is_count, "a whole number of 0 or more")),
    "best": (is_number, "a number or null"),
    "metrics": (are_numbers, "numbers by name"),
    "versions": (lambda value: isinstance(value, dict) and all(map(is_text, value.values())), "texts by name"),
    "torch": (is_note, "a key, a prefix and entries of name, number type and shape"),
}


def assign(parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], source: Path) -> None:
    """Set every parameter from the array of the same name and shape.

    Raises:
        CheckpointError: names or shapes differ.
    """
    unknown, missing = sorted(set(arrays) - set(parameters)), sorted(set(parameters) - set(arrays))
    if unknown or missing:
        text = f"{len(missing)} missing ({', '.join(missing[:3])})" if missing else ""
        text += " and " if missing and unknown else ""
        text += f"{len(unknown)} unknown ({', '.join(unknown[:3])})" if unknown else ""
        raise CheckpointError(f"{source}: does not fit this recipe: {text}")
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != arrays[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(arrays[name].shape)}, this recipe needs {list(parameter.shape)}"
            )
        wanted = str(parameter.dtype).lower()
        if str(arrays[name].dtype) != wanted:
            raise CheckpointError(f"{source}: {name} has {arrays[name].dtype} numbers, this recipe needs {wanted}")
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(arrays[name]))
