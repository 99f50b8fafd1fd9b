"""Self-describing checkpoints: weights, the resolved recipe, versions, and what resuming needs.

One MindSpore `.ckpt` file. Weights stand under their own names, the training state (AdamW moments, draw counters)
under `state/`, and one JSON text `meta` holds the rest. A file is written under a temporary name, synced and renamed,
so that there is always a whole one.
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
KEPT = "kept/"  # in the state: what a converted file had and no network of ours has, for the way back
CHECKSUM = b"crc_num"  # before the last 10 bytes of a file saved with crc_check
DRAWS = ".draws"  # draw counters of random cells: training state, not weights


class CheckpointError(UserError):
    """A checkpoint that cannot be used; one line for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        meta: recipe (YAML text), method, epoch, step, versions, metrics, classes, names.
        weights: of the network.
        state: of the training, empty if the file is not for resuming.
        kept: arrays of a converted file that no network of ours has.
    """

    path: Path
    meta: dict[str, Any]
    weights: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]


def weights_of(network: nn.Cell) -> dict[str, Parameter]:
    """Parameters that make up the network, by name."""
    return {p.name: p for p in network.get_parameters() if not p.name.endswith(DRAWS)}


def counters_of(network: nn.Cell) -> dict[str, Parameter]:
    """Draw counters of the random cells, by name."""
    return {p.name: p for p in network.get_parameters() if p.name.endswith(DRAWS)}


def save(path: Path, weights: dict[str, Parameter], state: dict[str, Parameter], meta: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        CheckpointError: it cannot be written, as on a full disk.
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
        before = "; the file before it is whole" if path.exists() else ""
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: cannot be written ({reason}){before}") from None
    finally:
        for left in (temporary, temporary.with_suffix(".tmp")):  # MindSpore's own temporary file
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without MindSpore's log: what it says comes as an exception too."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of this project.

    Raises:
        CheckpointError: missing, damaged, cut short, or written by something else.
    """
    if path.is_dir():
        held = sorted(file.name for file in path.glob("*.ckpt"))
        raise CheckpointError(f"{path}: a folder" + (f"; name a file in it: {', '.join(held[:5])}" if held else ""))
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
        raise CheckpointError(f"{path}: cut short, {len(missing)} of {len(meta['names'])} arrays are missing")
    if not has_checksum(path):
        raise CheckpointError(f"{path}: cut short, the checksum at its end is missing")
    arrays = {name: value.asnumpy() for name, value in items.items()}
    kept, state = take(arrays, STATE + KEPT), take(arrays, STATE)
    return Checkpoint(path, meta, arrays, state, kept)


def take(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Remove the arrays below a prefix; their names lose it."""
    return {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}


def has_checksum(path: Path) -> bool:
    """Whether a file ends in MindSpore's checksum; without it ms.load_checkpoint checks nothing and only warns."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, len(CHECKSUM) + 10), os.SEEK_END)
        return file.read().startswith(CHECKSUM)


def assign(parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], source: Path) -> None:
    """Set every parameter from an array of the same name and shape; neither may have names of its own."""
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
