"""Checkpoints of other implementations: into ours, and back.

Into ours: a file's table of tensors is found, its names are recognised, its network is derived, and everything that
our networks have no place for is kept aside, so that the way back gives the same bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ClassifyConfig, EncoderConfig, FieldError, MaskedConfig
from ..models.layers import sincos_position
from . import WeightsError
from .derive import (
    Hints,
    derive_encoder,
    derive_method,
    fixed_positions,
    hints_of_arguments,
    hints_of_json,
    hints_of_tree,
)
from .names import TIMM_STAGES, Naming, naming_for, recognise
from .safetensors_file import is_safetensors, read_safetensors, write_safetensors
from .torch_file import STORAGE_OF, Inert, Stored, damage, read_torch, stored, write_torch

KEYS = ("model", "state_dict")  # where the network of a checkpoint stands
PREFIXES = ("module.", "_orig_mod.")  # of data parallel and compiled networks


@dataclass(frozen=True)
class Foreign:
    """The table of tensors of a file.

    Attributes:
        tensors: by name, without the common prefix.
        prefix: that all names have.
        key: where in the file the table stands, empty if it is the file.
        hints: what the file, or a config.json beside it, says about its network.
        others: further tables in the file.
    """

    path: Path
    tensors: dict[str, Stored]
    prefix: str = ""
    key: str = ""
    hints: Hints = field(default_factory=Hints)
    others: tuple[str, ...] = ()


def open_foreign(path: Path, key: str = "") -> Foreign:
    """Read a `.pth` (either format) or `.safetensors` file; numbers are read when they are asked for.

    Args:
        key: the table to take if the file has several; `model` or `state_dict` by default.

    Raises:
        WeightsError: no such file, damaged, hostile, or without a table of tensors.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    with damage(path):
        tree: Any = read_safetensors(path) if is_safetensors(path) else read_torch(path)
    tables = {"": tree} if table_of(tree) else {}
    if isinstance(tree, dict):
        tables |= {str(name): value for name, value in tree.items() if table_of(value)}
    if not tables:
        raise WeightsError(f"{path}: holds no table of named tensors")
    names = [key] if key else [name for name in (*KEYS, "") if name in tables] or list(tables)
    if names[0] not in tables:
        raise WeightsError(f"{path}: has no table {key!r} of named tensors; write --key {' or --key '.join(tables)}")
    if not key and names[0] not in (*KEYS, "") and len(names) > 1:
        raise WeightsError(f"{path}: has several tables of tensors; write --key {' or --key '.join(names)}")
    table = {str(name): value for name, value in tables[names[0]].items() if isinstance(value, Stored)}
    prefix = ""
    while more := next((p for p in PREFIXES if all(name.startswith(prefix + p) for name in table)), ""):
        prefix += more
    others = tuple(name for name in tables if name != names[0])
    found = hints_in(tree).over(hints_beside(path)) if isinstance(tree, dict) else Hints()
    return Foreign(path, {n.removeprefix(prefix): v for n, v in table.items()}, prefix, names[0], found, others)


def table_of(value: Any) -> bool:
    """Whether something is a table of named tensors (and not, say, an optimiser's numbered ones)."""
    return isinstance(value, dict) and any(isinstance(n, str) and isinstance(t, Stored) for n, t in value.items())


def hints_in(tree: dict[Any, Any]) -> Hints:
    """From the configuration or arguments that training scripts store beside the network."""
    config, arguments = tree.get("config"), tree.get("args")
    hints = Hints()
    if isinstance(config, Inert) and isinstance(config.fields().get("MODEL"), dict):
        hints = hints.over(hints_of_tree(config.fields()))
    if isinstance(arguments, Inert | dict):
        hints = hints.over(hints_of_arguments(arguments.fields() if isinstance(arguments, Inert) else arguments))
    return hints


def hints_beside(path: Path) -> Hints:
    """From the config.json and preprocessor_config.json that Hugging Face puts beside weights."""
    hints = Hints()
    for name, read in (("config.json", hints_of_json), ("preprocessor_config.json", hints_of_images)):
        file = path.with_name(name)
        if file.is_file():
            try:
                hints = hints.over(read(json.loads(file.read_text(encoding="utf-8"))))
            except WeightsError as error:
                raise WeightsError(f"{file}: {error}") from None
            except (ValueError, TypeError, AttributeError, KeyError):
                raise WeightsError(f"{file}: is not a configuration of Hugging Face or timm") from None
    return hints


def hints_of_images(config: dict[str, Any]) -> Hints:
    mean, std = config.get("image_mean"), config.get("image_std")
    return Hints(mean=tuple(mean), std=tuple(std)) if mean and std else Hints()


# --- into ours --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """A checkpoint of another implementation as one of ours.

    Attributes:
        encoder: its configuration.
        method: classifier or pre-training on it, None for a bare encoder.
        weights: float32, in our names.
        kept: what our networks have no place for, under the file's names.
        origins: who may have trained it (`names.SOURCES`).
        note: the file's names, number types and shapes, for the way back.
        remarks: lines for the user.
    """

    encoder: EncoderConfig
    method: ClassifyConfig | MaskedConfig | None
    weights: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]
    origins: tuple[str, ...]
    note: dict[str, Any]
    remarks: list[str]


def to_ours(foreign: Foreign, source: str = "", hints: Hints | None = None) -> Converted:
    """Convert what `open_foreign` read.

    Args:
        source: who trained it, where its names leave it open.
        hints: what the user says about the network; comes before what the file says.

    Raises:
        WeightsError: names of nobody known, a name without a place, or something that only the user can say.
    """
    try:
        return converted(foreign, source, (hints or Hints()).over(foreign.hints))
    except FieldError as error:
        raise WeightsError(f"{foreign.path}: {error.key}: {error}") from None
    except WeightsError as error:
        text = str(error)
        raise WeightsError(text if text.startswith(str(foreign.path)) else f"{foreign.path}: {text}") from None
    except (KeyError, ValueError, IndexError) as error:  # tensors that are missing, or of too few dimensions
        raise WeightsError(f"{foreign.path}: its tensors make up no network known here ({error})") from None


def converted(foreign: Foreign, source: str, hints: Hints) -> Converted:
    recognised = recognise(foreign.tensors)
    origins = recognised.origins
    if source and source not in origins:
        raise WeightsError(f"its names are those of {' or '.join(origins)}, not of {source}")
    origins = (source,) if source else origins
    weights, kept = placed(foreign.tensors, recognised.naming)
    moved = reindexed(weights, kept, foreign.tensors, recognised.naming)
    shapes = {name: value.shape for name, value in weights.items()}
    encoder = derive_encoder(shapes, kept, replace(hints, roll_first=recognised.naming is TIMM_STAGES))
    method = derive_method(shapes, encoder, hints)
    if method is None or method.classifier is None:
        encoder = fixed_positions(encoder, weights.get("encoder.pos_embed"), sincos_position)
    remarks = [f"names of {' or '.join(origins)}"]
    if method is None:  # an incomplete decoder, or a token that belongs to none of ours
        names = {theirs: place for theirs in foreign.tensors if (place := recognised.naming.ours(theirs))}
        loose = [theirs for theirs, (ours, _) in names.items() if not ours.startswith("encoder.")]
        kept |= {theirs: foreign.tensors[theirs].array() for theirs in loose}
        weights = {name: value for name, value in weights.items() if name.startswith("encoder.")}
        remarks.append("a bare encoder")
    if "decoder.pos_embed" in weights and not hints.decoder_heads:
        remarks.append("the decoder's heads taken to be its width / 32 (method.decoder.num_heads=N if not)")
    told = hints.pretrained_window_sizes or any(name.endswith("relative_coords_table") for name in kept)
    if hasattr(encoder, "pretrained_window_sizes") and not told:
        remarks.append("windows of pre-training taken to be its own (encoder.pretrained_window_sizes=... if not)")
    wide = [name for name, tensor in foreign.tensors.items() if tensor.dtype == "float64" and name not in kept]
    if wide:
        remarks.append(f"{len(wide)} float64 tensors rounded to float32 ({wide[0]})")
    if moved:
        remarks.append(f"{moved} position tables put in the order of the file's own index tables, which are odd")
    if foreign.others:
        remarks.append(f"not converted: {', '.join(name or 'the rest' for name in foreign.others)} (--key takes it)")
    entries = [[foreign.prefix + name, tensor.dtype, list(tensor.shape)] for name, tensor in foreign.tensors.items()]
    note = {"key": foreign.key, "prefix": foreign.prefix, "entries": entries}
    return Converted(encoder, method, weights, kept, origins, note, remarks)


def placed(tensors: dict[str, Stored], naming: Naming) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors in our names, thirds joined, and those without a place under their own."""
    weights: dict[str, np.ndarray] = {}
    kept: dict[str, np.ndarray] = {}
    thirds: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        place = naming.ours(name)
        if place is None:
            kept[name] = tensor.array()
            continue
        if not tensor.dtype.startswith(("float", "bfloat")):
            raise WeightsError(f"{name} has no place in our networks")
        ours, part = place
        if ours in weights or (part is not None and part in thirds.get(ours, {})):
            raise WeightsError(f"{name} and another name of the file are both {ours}")
        value = tensor.array().astype(np.float32, copy=False)
        if part is None:
            weights[ours] = flat(ours, value)
        else:
            thirds.setdefault(ours, {})[part] = value
    for ours, parts in thirds.items():
        if set(parts) != {0, 1, 2} or len({value.shape for value in parts.values()}) > 1:
            raise WeightsError(f"query, key and value of {ours} do not fit each other")
        weights[ours] = np.concatenate([parts[0], parts[1], parts[2]])
    return weights, kept


INDEX, TABLE = "relative_position_index", "relative_position_bias_table"


def reindexed(
    weights: dict[str, np.ndarray], kept: dict[str, np.ndarray], tensors: dict[str, Stored], naming: Naming
) -> int:
    """Give window tables whose index table is not the usual one the order in which the file reads them.

    A moving average over all of a network (FastMIM's model_ema) rounds the whole numbers of its index tables down; the
    network it then is reads its tables through those. The tables as they were are kept aside.

    Returns:
        How many tables that were.
    """
    moved = 0
    for name in [name for name in kept if name.endswith(INDEX)]:
        theirs = name.removesuffix(INDEX) + TABLE
        place = naming.ours(theirs) if theirs in tensors else None
        if place is None or kept[name].ndim != 2:
            continue
        table, index = weights[place[0]], kept[name]
        window = math.isqrt(len(index))
        usual = offset_index(window)
        if usual.shape != index.shape or np.array_equal(usual, index):
            continue
        order = np.arange(len(table))
        order[usual.reshape(-1)] = index.reshape(-1)
        if index.min() < 0 or index.max() >= len(table) or not np.array_equal(order[usual], index):
            raise WeightsError(f"{name} reads the position table in a way that no network of ours does")
        kept[theirs] = table
        weights[place[0]] = table[order]
        moved += 1
    return moved


def offset_index(window: int) -> np.ndarray:
    """(window**2, window**2): entry of a window's table for each pair of its tokens (Swin-Transformer)."""
    row, col = np.divmod(np.arange(window**2), window)
    rows, cols = (line[:, None] - line[None, :] + window - 1 for line in (row, col))
    return rows * (2 * window - 1) + cols


def flat(name: str, value: np.ndarray) -> np.ndarray:
    """SimMIM's decoder is a 1x1 convolution; ours is the same matrix."""
    return value.reshape(value.shape[:2]) if name == "decoder.pred.weight" and value.ndim == 4 else value


# --- back -------------------------------------------------------------------------------------------------------


def to_theirs(
    weights: dict[str, np.ndarray], kept: dict[str, np.ndarray], note: dict[str, Any] | None, source: str
) -> tuple[dict[str, Stored], str]:
    """Tensors in the names of another implementation, and the key below which its files have them.

    Args:
        weights: of a checkpoint of ours.
        kept, note: of a converted one, which goes back to exactly the file it was.
        source: whose names; may be left out for a converted checkpoint.

    Raises:
        WeightsError: names are not said, or a parameter has none there.
    """
    if note is not None and not source:
        return dict(as_noted(weights, kept, note)), str(note["key"])
    naming = naming_for(source, weights)
    tensors = {}
    for name, value in weights.items():
        found = naming.theirs(name)
        pieces = np.split(value, len(found)) if len(found) > 1 else [value]
        for (theirs, _), piece in zip(found, pieces, strict=True):
            convolution = theirs == "decoder.0.weight"
            tensors[theirs] = stored(piece.reshape(*piece.shape, 1, 1) if convolution else piece)
    return tensors, "" if source in ("timm", "hf") else "model"


def as_noted(
    weights: dict[str, np.ndarray], kept: dict[str, np.ndarray], note: dict[str, Any]
) -> Iterable[tuple[str, Stored]]:
    """The entries of a converted file, in its order."""
    prefix = note["prefix"]
    naming = recognise([name.removeprefix(prefix) for name, _, _ in note["entries"]]).naming
    for name, dtype, shape in note["entries"]:
        theirs = name.removeprefix(prefix)
        if theirs in kept:
            value = kept[theirs]
        else:
            place = naming.ours(theirs)
            if place is None or place[0] not in weights:
                raise WeightsError(f"has lost {theirs}, which the file it was converted from had")
            value = weights[place[0]]
            if place[1] is not None:
                value = np.split(value, 3)[place[1]]
        yield name, stored(value.reshape(shape), dtype)


def write_foreign(path: Path, tensors: dict[str, Stored], key: str) -> None:
    """Write a `.pth` or `.safetensors` file whole or not at all."""
    writers = {".pth": write_torch, ".pt": write_torch, ".bin": write_torch}
    odd = next((name for name, tensor in tensors.items() if tensor.dtype not in STORAGE_OF), None)
    if odd is not None:
        raise WeightsError(f"{odd}: {tensors[odd].dtype} numbers cannot be written")
    temporary = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".safetensors":
            write_safetensors(temporary, tensors)
        else:
            writers[path.suffix](temporary, tensors, key)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as reason:
        raise WeightsError(f"{path}: cannot be written ({reason.strerror or reason})") from None
    finally:
        temporary.unlink(missing_ok=True)
