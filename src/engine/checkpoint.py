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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from .. import __version__
from ..errors import UserError

STATE = "state/"
UNUSED = "kept/"  # below `state/`: arrays of a converted file without a counterpart here, for converting it back
CHECKSUM = b"crc_num"  # before the last 10 bytes of a file saved with crc_check
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
            leftover.unlink(missing_ok=True)


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
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.ckpt"))
        raise CheckpointError(f"{path}: a folder" + (f"; name a file in it: {', '.join(files[:5])}" if files else ""))
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.suffix != ".ckpt":
        raise CheckpointError(f"{path}: not a .ckpt file")
    try:
        items = ms.load_checkpoint(str(path), crc_check=True)
    except (ValueError, RuntimeError, TypeError, OSError):
        raise CheckpointError(f"{path}: damaged or not a MindSpore checkpoint; its content cannot be read") from None
    if "meta" not in items:
        raise CheckpointError(f"{path}: a MindSpore checkpoint, but without the recipe that this project stores in it")
    try:
        meta = json.loads(str(items.pop("meta")))
    except ValueError:
        meta = None
    if not isinstance(meta, dict) or not {"names", "recipe"} <= set(meta):
        raise CheckpointError(f"{path}: a MindSpore checkpoint, but without the recipe that this project stores in it")
    missing = set(meta["names"]) - set(items)
    if missing:
        raise CheckpointError(f"{path}: truncated, {len(missing)} of {len(meta['names'])} arrays are missing")
    if not has_checksum(path):
        raise CheckpointError(f"{path}: truncated, the checksum at its end is missing")
    arrays = {name: value.asnumpy() for name, value in items.items()}
    unused, state = take(arrays, STATE + UNUSED), take(arrays, STATE)
    return Checkpoint(path, meta, arrays, state, unused)


def take(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Remove and return the arrays with a prefix, under names without it."""
    return {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}


def has_checksum(path: Path) -> bool:
    """Whether a file ends with MindSpore's checksum; without it ms.load_checkpoint only warns and checks nothing."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, len(CHECKSUM) + 10), os.SEEK_END)
        return file.read().startswith(CHECKSUM)


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
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(arrays[name]))
