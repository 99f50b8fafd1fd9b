"""The safetensors format: a JSON header and raw numbers.

Not with the safetensors library: it reads into NumPy arrays, which have no bfloat16, and reads whole files.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.checks import shown
from . import WeightsError
from .torch_file import MOST, MOST_AXES, StoredTensor, damage_reported, numpy_dtype

#: number type in safetensors -> in PyTorch
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"}
DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
LONGEST = 100_000_000  # bytes of a header; the format's limit
LONGEST_READ = 10_000_000  # of one that is read; those of our networks have 200,000


def is_safetensors(path: Path) -> bool:
    """Whether a file starts with a header length and a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= LONGEST


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Tensors by name; the values are read later, on access.

    Raises:
        WeightsError: the file is damaged or cut short, or its tensors do not follow each other without gaps, which the
            format requires.
    """
    with damage_reported(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise WeightsError(f"{path}: cut short or damaged, its header does not fit the file")
            if length > LONGEST_READ:
                raise WeightsError(f"{path}: its header has {length} bytes, more than that of any network here")
            header = json.loads(file.read(length), object_pairs_hook=without_doubles)
        header.pop("__metadata__", None)
        entries = {name: read_entry(path, name, value) for name, value in header.items()}
        check_places(path, entries, size - 8 - length)
        return {name: stored(path, entry, 8 + length) for name, entry in entries.items()}


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dict; a name twice is an error."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header has {shown(name)} twice")
    return found


@dataclass(frozen=True)
class Entry:
    """A tensor in the header; `first` and `last` bound its bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


def read_entry(path: Path, name: str, value: Any) -> Entry:
    """The tensor of one header entry.

    Raises:
        WeightsError: its number type is unknown, or its size does not fit its shape.
    """
    label = shown(name)
    kind, sizes, place = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in DTYPES:
        raise WeightsError(f"{path}: {label} has number type {shown(kind)}, which is not supported")
    if not (are_counts(sizes) and are_counts(place) and len(place) == 2):
        raise WeightsError(f"{path}: damaged, {label} has no shape or place in the file")
    (first, last), dtype = place, DTYPES[kind]
    if last - first != math.prod(sizes) * numpy_dtype(dtype).itemsize:
        raise WeightsError(f"{path}: damaged, the size of {label} does not fit its shape")
    return Entry(dtype, tuple(sizes), first, last)


def are_counts(values: Any) -> bool:
    """Whether a value of a header is a list of sizes or positions."""
    return (
        isinstance(values, list) and len(values) <= MOST_AXES and all(type(n) is int and 0 <= n < MOST for n in values)
    )


def check_places(path: Path, entries: dict[str, Entry], size: int) -> None:
    """Check that tensors fill the `size` bytes after the header, each byte once."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].first, item[1].last)):
        if entry.last > size:
            raise WeightsError(f"{path}: cut short, the numbers of {shown(name)} are missing")
        if entry.first != end:
            gap = f"lie in those of another tensor, from byte {entry.first}" if entry.first < end else "follow a gap"
            raise WeightsError(f"{path}: damaged, the numbers of {shown(name)} {gap}")
        end = entry.last
    if end != size:
        raise WeightsError(f"{path}: damaged, it has {size - end} bytes that belong to no tensor")


def stored(path: Path, entry: Entry, start: int) -> StoredTensor:
    """The tensor of an entry; `start`: where the numbers begin in the file."""
    kind, count = numpy_dtype(entry.dtype), math.prod(entry.shape)
    return StoredTensor(
        entry.dtype,
        entry.shape,
        lambda: np.fromfile(path, kind, count, offset=start + entry.first).reshape(entry.shape),
    )


def write_safetensors(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Write tensors to a file with the metadata `format: pt`, which Hugging Face requires."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * numpy_dtype(tensor.dtype).itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        for tensor in tensors.values():
            file.write(tensor.read().tobytes())
