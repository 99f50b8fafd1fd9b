"""The safetensors format: a JSON header and raw numbers.

Not with the safetensors library: it reads into NumPy arrays, which have no bfloat16, and reads whole files.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from . import WeightsError
from .torch_file import StoredTensor, damage_reported, numpy_dtype

#: number type in safetensors -> in PyTorch
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"}
DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
LONGEST = 100_000_000  # bytes of a header; the format's limit


def is_safetensors(path: Path) -> bool:
    """Whether a file starts with a header length and a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= LONGEST


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Tensors by name; the values are read later, on access.

    Raises:
        WeightsError: the file is damaged or cut short.
    """
    with damage_reported(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(LONGEST, size - 8):
                raise WeightsError(f"{path}: cut short or damaged, its header does not fit the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: entry(path, name, value, 8 + length, size) for name, value in header.items()}


def entry(path: Path, name: str, value: dict[str, Any], start: int, size: int) -> StoredTensor:
    """The tensor of one header entry, checked against the file size."""
    if value["dtype"] not in DTYPES:
        raise WeightsError(f"{path}: {name} has number type {value['dtype']}, which is not supported")
    dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
    first, last = value["data_offsets"]
    kind = numpy_dtype(dtype)
    if (
        not all(isinstance(n, int) and n >= 0 for n in (*shape, first))
        or last - first != math.prod(shape) * kind.itemsize
    ):
        raise WeightsError(f"{path}: damaged, the size of {name} does not fit its shape")
    if start + last > size:
        raise WeightsError(f"{path}: cut short, the numbers of {name} are missing")
    return StoredTensor(
        dtype, shape, lambda: np.fromfile(path, kind, math.prod(shape), offset=start + first).reshape(shape)
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
