"""PyTorch's file formats written by hand, so that tests need no PyTorch: real pickles with stand-ins for its names."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STORAGE = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "bfloat16": "BFloat16Storage",
}
MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class Bits:
    """Numbers that torch.save would write: an array, bfloat16 as uint16."""

    values: np.ndarray
    dtype: str = ""


class Tensor:
    """What the pickler turns into a call of torch._utils._rebuild_tensor_v2."""

    def __init__(self, bits: Bits, key: str, fake: types.ModuleType, part: slice | None = None):
        self.bits, self.key, self.fake, self.part = bits, key, fake, part


class Storage:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def rebuild_stub(*args: Any) -> None:
    raise AssertionError("a test does not load what it writes")


@pytest.fixture
def torch_names(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Modules torch, torch._utils and yacs.config with the names that checkpoints refer to, while a test writes."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGE.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    rebuild = types.FunctionType(rebuild_stub.__code__, {}, "_rebuild_tensor_v2")
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild  # type: ignore[attr-defined]
    yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    config.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})  # type: ignore[attr-defined]
    for module in (torch, utils, yacs, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return torch


class Pickler(pickle.Pickler):
    """Tensors become calls on persistent ids, as in torch.save."""

    def __init__(self, file: Any, legacy: bool):
        super().__init__(file, protocol=2)
        self.legacy = legacy

    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, Storage):
            return None
        tensor = item.tensor
        kind = getattr(tensor.fake, STORAGE[tensor.bits.dtype or str(tensor.bits.values.dtype)])
        pid = ("storage", kind, tensor.key, "cpu", tensor.bits.values.size)
        return (*pid, None) if self.legacy else pid

    def reducer_override(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return NotImplemented
        values = item.bits.values
        stride = tuple(step // values.itemsize for step in values.strides)
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2  # type: ignore[attr-defined]
        return rebuild, (Storage(item), 0, values.shape, stride, False, OrderedDict())


def with_tensors(tree: Any, fake: types.ModuleType, found: list[Tensor]) -> Any:
    """The tree with arrays as tensors, which are collected."""
    if isinstance(tree, np.ndarray | Bits):
        bits = tree if isinstance(tree, Bits) else Bits(tree)
        found.append(Tensor(bits, str(len(found)), fake))
        return found[-1]
    if isinstance(tree, dict):
        copy = type(tree)()
        for name, value in tree.items():
            copy[name] = with_tensors(value, fake, found)
        return copy
    if isinstance(tree, list | tuple):
        return type(tree)(with_tensors(value, fake, found) for value in tree)
    return tree


def raw(bits: Bits) -> bytes:
    """The numbers in the order of memory, which may not be that of the shape."""
    return bits.values.ravel(order="K").tobytes()


def save_zip(path: Path, tree: Any, fake: types.ModuleType) -> None:
    """As torch.save since 1.6."""
    found: list[Tensor] = []
    content = io.BytesIO()
    Pickler(content, legacy=False).dump(with_tensors(tree, fake, found))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("name/data.pkl", content.getvalue())
        archive.writestr("name/byteorder", "little")
        for tensor in found:
            archive.writestr(f"name/data/{tensor.key}", raw(tensor.bits))
        archive.writestr("name/version", "3\n")


def save_legacy(path: Path, tree: Any, fake: types.ModuleType) -> None:
    """As torch.save before 1.6."""
    found: list[Tensor] = []
    tree = with_tensors(tree, fake, found)
    with path.open("wb") as file:
        for header in (MAGIC, 1001, {"little_endian": True, "protocol_version": 1001}):
            pickle.dump(header, file, protocol=2)
        Pickler(file, legacy=True).dump(tree)
        pickle.dump([tensor.key for tensor in found], file, protocol=2)
        for tensor in found:
            file.write(struct.pack("<q", tensor.bits.values.size) + raw(tensor.bits))
