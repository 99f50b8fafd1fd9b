"""Convert checkpoints of other implementations into ours, and back.

Into ours: open the file's table of tensors, recognise its names, derive its network. Tensors that our networks do not
use are stored too, so that the conversion back gives the same bits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ClassifyConfig, EncoderConfig, FieldError, MaskedConfig
from ..config.checks import shown
from ..config.reading import available_memory, read_text
from ..models.layers import sincos_position
from . import WeightsError
from .derive import (
    HintError,
    Hints,
    derive_encoder,
    derive_method,
    fixed_positions,
    hints_of_arguments,
    hints_of_json,
    hints_of_tree,
    numbers,
)
from .names import Naming, naming_for, recognise
from .safetensors_file import is_safetensors, read_safetensors, write_safetensors
from .torch_file import (
    STORAGE_OF,
    InertObject,
    StoredTensor,
    damage_reported,
    numpy_dtype,
    read_torch,
    stored_tensor,
    write_torch,
)

MOST_TENSORS = 20_000  # of a table; our networks have up to 1000
LONGEST_NAME = 500  # characters of a tensor's name
LONGEST_JSON = 10_000_000  # bytes of a configuration; the names of 20,000 classes take one million
KEYS = ("model", "state_dict")  # usual keys of the network in a checkpoint
PREFIXES = ("module.", "_orig_mod.")  # name prefixes of data parallel and compiled networks


@dataclass(frozen=True)
class Foreign:
    """The table of tensors of a file.

    Attributes:
        tensors: tensors by name, without the common prefix.
        prefix: common prefix of all names.
        key: key of the table in the file; empty if the file is the table.
        hints: facts about the network from the file or from a config.json next to it.
        others: keys of the other tables in the file.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    prefix: str = ""
    key: str = ""
    hints: Hints = field(default_factory=Hints)
    others: tuple[str, ...] = ()


def open_foreign(path: Path, key: str = "") -> Foreign:
    """Open a `.pth` (either format) or `.safetensors` file; the values are read later, on access.

    Args:
        path: the file.
        key: the table to read if the file has several; `model` or `state_dict` by default.

    Raises:
        WeightsError: no such file; or the file is damaged, hostile, or without a table of tensors.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    with damage_reported(path):
        tree: Any = read_safetensors(path) if is_safetensors(path) else read_torch(path)
    tables = {"": tree} if table_of(tree) else {}
    if isinstance(tree, dict):
        tables |= {name: value for name, value in tree.items() if isinstance(name, str) and table_of(value)}
    if not tables:
        raise WeightsError(f"{path}: holds no table of named tensors")
    names = [key] if key else [name for name in (*KEYS, "") if name in tables] or list(tables)
    if names[0] not in tables:
        raise WeightsError(f"{path}: has no table {key!r} of named tensors; write --key {' or --key '.join(tables)}")
    if not key and names[0] not in (*KEYS, "") and len(names) > 1:
        raise WeightsError(f"{path}: has several tables of tensors; write --key {' or --key '.join(names)}")
    table = {name: value for name, value in tables[names[0]].items() if isinstance(value, StoredTensor)}
    check_table(path, table)
    prefix = ""
    while more := next((p for p in PREFIXES if all(name.startswith(prefix + p) for name in table)), ""):
        prefix += more
    others = tuple(name for name in tables if name != names[0])
    try:
        hints = hints_in(tree).over(hints_beside(path)) if isinstance(tree, dict) else Hints()
    except HintError as error:
        raise WeightsError(f"{path}: its configuration: {error}") from None
    return Foreign(path, {n.removeprefix(prefix): v for n, v in table.items()}, prefix, names[0], hints, others)


def check_table(path: Path, table: dict[str, StoredTensor]) -> None:
    """Check that a table of tensors is one of a network, and that its tensors are not more than the file.

    Raises:
        WeightsError: it has other names, more tensors than any network, or many that share their numbers.
    """
    for name in table:
        if not isinstance(name, str) or len(name) > LONGEST_NAME:
            raise WeightsError(f"{path}: {shown(name)} is no name of a tensor")
    if len(table) > MOST_TENSORS:
        raise WeightsError(f"{path}: has {len(table)} tensors, more than any network")
    size = sum(math.prod(tensor.shape) * numpy_dtype(tensor.dtype).itemsize for tensor in table.values())
    if size > 2 * path.stat().st_size:
        raise WeightsError(f"{path}: its tensors share their numbers: they take {size} bytes, more than the file")
    if size > available_memory():
        raise WeightsError(f"{path}: its tensors take {size / 1e9:.0f} GB, more memory than there is")


def table_of(value: Any) -> bool:
    """Whether a value is a table of named tensors (the numbered tensors of an optimiser are not)."""
    return isinstance(value, dict) and any(isinstance(n, str) and isinstance(t, StoredTensor) for n, t in value.items())


def hints_in(tree: dict[Any, Any]) -> Hints:
    """Hints from the configuration or arguments that training scripts store in the file."""
    config, arguments = tree.get("config"), tree.get("args")
    hints = Hints()
    if isinstance(config, InertObject) and isinstance(config.fields().get("MODEL"), dict):
        hints = hints.over(hints_of_tree(config.fields()))
    if isinstance(arguments, InertObject | dict):
        hints = hints.over(hints_of_arguments(arguments.fields() if isinstance(arguments, InertObject) else arguments))
    return hints


def hints_beside(path: Path) -> Hints:
    """Hints from the config.json and preprocessor_config.json that Hugging Face puts next to the weights."""
    hints = Hints()
    for name, read in (("config.json", hints_of_json), ("preprocessor_config.json", hints_of_images)):
        file = path.with_name(name)
        if file.is_file():
            try:
                hints = hints.over(read(json.loads(read_text(file, LONGEST_JSON))))
            except WeightsError as error:
                raise WeightsError(f"{file}: {error}") from None
            except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
                raise WeightsError(f"{file}: not a configuration of Hugging Face or timm") from None
    return hints


def hints_of_images(config: dict[str, Any]) -> Hints:
    mean, std = numbers(config, "image_mean"), numbers(config, "image_std")
    return Hints(mean=mean, std=std) if mean and std else Hints()


# --- into ours --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """A checkpoint of another implementation, converted into ours.

    Attributes:
        encoder: configuration of the encoder.
        method: classifier or pre-training method; None for a bare encoder.
        weights: float32 arrays by our names.
        unused: arrays that our networks do not use, by the file's names.
        sources: the `names.SOURCES` that may have trained it.
        note: names, number types and shapes of the file, for the conversion back.
        remarks: lines for the user.
    """

    encoder: EncoderConfig
    method: ClassifyConfig | MaskedConfig | None
    weights: dict[str, np.ndarray]
    unused: dict[str, np.ndarray]
    sources: tuple[str, ...]
    note: dict[str, Any]
    remarks: list[str]


def to_ours(foreign: Foreign, source: str = "", hints: Hints | None = None) -> Converted:
    """Convert an opened file.

    Args:
        foreign: from `open_foreign`.
        source: who trained it, if its names leave it open.
        hints: facts from the user; they override those of the file.

    Raises:
        WeightsError: the names belong to no known implementation, a name has no place in our networks, or a fact is
            missing that only the user can give.
    """
    try:
        return convert_tensors(foreign, source, (hints or Hints()).over(foreign.hints))
    except FieldError as error:
        raise WeightsError(f"{foreign.path}: {error.key}: {error}") from None
    except WeightsError as error:
        text = str(error)
        raise WeightsError(text if text.startswith(str(foreign.path)) else f"{foreign.path}: {text}") from None
    except (
        LookupError,
        ValueError,
        TypeError,
        ArithmeticError,
    ) as error:  # missing, of other shapes
        raise WeightsError(f"{foreign.path}: its tensors form no known network ({error})") from None
    except MemoryError:
        raise WeightsError(f"{foreign.path}: needs more memory than there is") from None


def convert_tensors(foreign: Foreign, source: str, hints: Hints) -> Converted:
    recognised = recognise(foreign.tensors)
    sources = recognised.sources
    if source and source not in sources:
        raise WeightsError(f"its names are those of {' or '.join(sources)}, not of {source}")
    sources = (source,) if source else sources
    weights, unused = rename_tensors(foreign.tensors, recognised.naming)
    reordered = reorder_tables(weights, unused, foreign.tensors, recognised.naming)
    shapes = {name: value.shape for name, value in weights.items()}
    encoder = derive_encoder(shapes, unused, replace(hints, roll_first=recognised.naming.roll_first))
    method = derive_method(shapes, encoder, hints)
    if method is None or method.classifier is None:
        encoder = fixed_positions(encoder, weights.get("encoder.pos_embed"), sincos_position)
    remarks = [f"names of {' or '.join(sources)}"]
    if method is None:  # an incomplete decoder, or a token that our networks do not have
        names = {theirs: ours for theirs in foreign.tensors if (ours := recognised.naming.ours(theirs))}
        not_encoder = [theirs for theirs, (ours, _) in names.items() if not ours.startswith("encoder.")]
        unused |= {theirs: foreign.tensors[theirs].array() for theirs in not_encoder}
        weights = {name: value for name, value in weights.items() if name.startswith("encoder.")}
        remarks.append("a bare encoder")
    if "decoder.pos_embed" in weights and not hints.decoder_heads:
        remarks.append("decoder heads assumed to be its width / 32 (if not: method.decoder.num_heads=N)")
    windows_known = hints.pretrained_window_sizes or any(name.endswith("relative_coords_table") for name in unused)
    if hasattr(encoder, "pretrained_window_sizes") and not windows_known:
        remarks.append("pre-training windows assumed to be its windows (if not: encoder.pretrained_window_sizes=...)")
    wide = [name for name, tensor in foreign.tensors.items() if tensor.dtype == "float64" and name not in unused]
    if wide:
        remarks.append(f"{len(wide)} float64 tensors rounded to float32 ({wide[0]})")
    if reordered:
        remarks.append(
            f"{reordered} position tables reordered by the file's index tables, which are not the usual ones"
        )
    if foreign.others:
        remarks.append(f"not converted: {', '.join(name or 'the rest' for name in foreign.others)} (use --key)")
    entries = [[foreign.prefix + name, tensor.dtype, list(tensor.shape)] for name, tensor in foreign.tensors.items()]
    note = {"key": foreign.key, "prefix": foreign.prefix, "entries": entries}
    return Converted(encoder, method, weights, unused, sources, note, remarks)


def rename_tensors(
    tensors: dict[str, StoredTensor], naming: Naming
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Arrays by our names, with thirds joined, and unused arrays by the file's names."""
    weights: dict[str, np.ndarray] = {}
    unused: dict[str, np.ndarray] = {}
    thirds: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        our_name = naming.ours(name)
        if our_name is None:
            unused[name] = tensor.array()
            continue
        if not tensor.dtype.startswith(("float", "bfloat")):
            raise WeightsError(f"{name} has no place in our networks")
        ours, third = our_name
        if ours in weights or (third is not None and third in thirds.get(ours, {})):
            raise WeightsError(f"{name} and another name of the file both mean {ours}")
        value = tensor.array().astype(np.float32, copy=False)
        if third is None:
            weights[ours] = flat(ours, value)
        else:
            thirds.setdefault(ours, {})[third] = value
    for ours, parts in thirds.items():
        if set(parts) != {0, 1, 2} or len({value.shape for value in parts.values()}) > 1:
            raise WeightsError(f"query, key and value of {ours} do not fit each other")
        weights[ours] = np.concatenate([parts[0], parts[1], parts[2]])
    return weights, unused


INDEX, TABLE = "relative_position_index", "relative_position_bias_table"


def reorder_tables(
    weights: dict[str, np.ndarray], unused: dict[str, np.ndarray], tensors: dict[str, StoredTensor], naming: Naming
) -> int:
    """Reorder window tables whose index table in the file is not the usual one, so that the usual one reads them.

    FastMIM's model_ema averages the index tables too and rounds them down; its network reads its window tables through
    these. `weights` and `unused` change in place; the tables in the file's order go to `unused`.

    Returns:
        Number of reordered tables.
    """
    reordered = 0
    for name in [name for name in unused if name.endswith(INDEX)]:
        theirs = name.removesuffix(INDEX) + TABLE
        our_name = naming.ours(theirs) if theirs in tensors else None
        if our_name is None or unused[name].ndim != 2:
            continue
        table, index = weights[our_name[0]], unused[name]
        window = math.isqrt(len(index))
        usual = offset_index(window)
        if usual.shape != index.shape or np.array_equal(usual, index):
            continue
        order = np.arange(len(table))
        order[usual.reshape(-1)] = index.reshape(-1)
        if index.min() < 0 or index.max() >= len(table) or not np.array_equal(order[usual], index):
            raise WeightsError(f"{name} reads the position table in an order that no network of ours can follow")
        unused[theirs] = table
        weights[our_name[0]] = table[order]
        reordered += 1
    return reordered


def offset_index(window: int) -> np.ndarray:
    """(window**2, window**2): table entry of each pair of tokens in a window (Swin-Transformer)."""
    row, column = np.divmod(np.arange(window**2), window)
    down, right = (line[:, None] - line[None, :] + window - 1 for line in (row, column))
    return down * (2 * window - 1) + right


def flat(name: str, value: np.ndarray) -> np.ndarray:
    """The 1x1 convolution of SimMIM's decoder as a matrix; other values unchanged."""
    return value.reshape(value.shape[:2]) if name == "decoder.pred.weight" and value.ndim == 4 else value


# --- back -------------------------------------------------------------------------------------------------------


def to_theirs(
    weights: dict[str, np.ndarray], unused: dict[str, np.ndarray], note: dict[str, Any] | None, source: str
) -> tuple[dict[str, StoredTensor], str]:
    """Tensors by the names of another implementation, and the key of the table in its files.

    Args:
        weights: of a checkpoint of ours.
        unused, note: of a converted checkpoint; with them the result equals the file it came from.
        source: whose names; may be empty for a converted checkpoint.

    Raises:
        WeightsError: a parameter has no name there, or the checkpoint lacks one that the file had.
    """
    try:
        if note is not None and not source:
            return dict(noted_tensors(weights, unused, note)), str(note["key"])
        return named_tensors(weights, source)
    except WeightsError:
        raise
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:  # of shapes that do not fit
        raise WeightsError(f"its arrays do not fit its names ({error})") from None


def named_tensors(weights: dict[str, np.ndarray], source: str) -> tuple[dict[str, StoredTensor], str]:
    """Tensors by the names of an implementation, and the key of the table in its files."""
    naming = naming_for(source, weights)
    tensors = {}
    for name, value in weights.items():
        names = naming.theirs(name)
        pieces = np.split(value, len(names)) if len(names) > 1 else [value]
        for (theirs, _), piece in zip(names, pieces, strict=True):
            convolution = theirs == "decoder.0.weight"
            tensors[theirs] = stored_tensor(piece.reshape(*piece.shape, 1, 1) if convolution else piece)
    return tensors, "" if source in ("timm", "hf") else "model"


def noted_tensors(
    weights: dict[str, np.ndarray], unused: dict[str, np.ndarray], note: dict[str, Any]
) -> Iterable[tuple[str, StoredTensor]]:
    """Names and tensors of the file that `note` describes, in its order."""
    prefix = note["prefix"]
    naming = recognise([name.removeprefix(prefix) for name, _, _ in note["entries"]]).naming
    for name, dtype, shape in note["entries"]:
        if dtype not in STORAGE_OF:
            raise WeightsError(f"{shown(name)} had {shown(dtype)} numbers, which cannot be written")
        theirs = name.removeprefix(prefix)
        if theirs in unused:
            value = unused[theirs]
        else:
            our_name = naming.ours(theirs)
            if our_name is None or our_name[0] not in weights:
                raise WeightsError(f"lacks {theirs}, which the file it was converted from had")
            value = weights[our_name[0]]
            if our_name[1] is not None:
                value = np.split(value, 3)[our_name[1]]
        yield name, stored_tensor(value.reshape(shape), dtype)


def write_foreign(path: Path, tensors: dict[str, StoredTensor], key: str) -> None:
    """Write a `.pth` or `.safetensors` file; a failed write leaves no file."""
    writers = {".pth": write_torch, ".pt": write_torch, ".bin": write_torch}
    unwritable = next((name for name, tensor in tensors.items() if tensor.dtype not in STORAGE_OF), None)
    if unwritable is not None:
        raise WeightsError(f"{unwritable}: {tensors[unwritable].dtype} numbers cannot be written")
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
        with contextlib.suppress(OSError):  # it does not exist, or its name is too long to exist
            temporary.unlink()
