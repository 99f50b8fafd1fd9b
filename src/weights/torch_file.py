"""PyTorch checkpoint files without PyTorch, and without running what is pickled in them.

A `.pth` file is a pickle beside raw numbers: a zip archive since PyTorch 1.6, a row of pickles before. The pickle
machine here knows containers, numbers and tensors; every other class that a file names (argument lists, configs,
optimisers) becomes an inert `Inert`, nothing is imported, and a file that wants a function called is refused.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import WeightsError

#: PyTorch's storage classes -> its name of the number type
STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
STORAGE_OF = {dtype: storage for storage, dtype in STORAGES.items()}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
#: modules that nothing in a checkpoint has a reason to name
HOSTILE = {"os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "pty", "importlib", "ctypes", "code"}
HOSTILE |= {"commands", "webbrowser", "pickle", "_pickle", "marshal", "multiprocessing", "types", "operator", "asyncio"}
HOSTILE |= {"idlelib", "pip", "timeit", "pydoc", "pdb", "bdb"}
#: functions that ordinary files call to rebuild plain values
BUILTINS = ("set", "frozenset", "bytearray", "bytes", "complex", "slice", "range", "object", "list", "dict", "tuple")
HARMLESS = {"_codecs.encode", "copyreg._reconstructor", "collections.defaultdict", "collections.deque"}
HARMLESS |= {"functools.partial", "datetime.datetime", "datetime.date", "datetime.timedelta"}
HARMLESS |= {
    f"{module}.{name}" for module in ("builtins", "__builtin__") for name in (*BUILTINS, "int", "float", "str")
}
#: functions of PyTorch and NumPy that ordinary files call; classes may be called whatever their names
REBUILDERS = re.compile(
    r"torch\.(device|_utils\._rebuild_\w+|_tensor\._rebuild_\w+|storage\._load_from_bytes|serialization\._get_layout)"
    r"|numpy\.(dtype|ndarray|_?core\.(multiarray|numeric)\.(_reconstruct|scalar|_frombuffer))"
    r"|numpy\.random\._pickle\.__\w+_ctor"
)


def numpy_dtype(dtype: str) -> np.dtype:
    """Of a PyTorch number type; bfloat16, which NumPy lacks, is held in uint16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `read()` gives its numbers as an array of `numpy_dtype(dtype)`, in C order."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def array(self) -> np.ndarray:
        """The numbers; half precision and bfloat16 as float32, which holds them exactly."""
        values = self.read()
        if self.dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if self.dtype == "float16" else values


def stored(values: np.ndarray, dtype: str = "") -> Stored:
    """An array as it would stand in a file, in another number type if `dtype` names one."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        if values.dtype != np.float32:
            raise WeightsError(f"{values.dtype} numbers cannot become bfloat16")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        values = np.where(np.isnan(values).reshape(bits.shape), bits >> 16, rounded).astype(np.uint16)
    elif dtype and str(values.dtype) != dtype:
        values = values.astype(dtype)
    shape = values.shape
    name = dtype or str(values.dtype)
    return Stored(name, shape, lambda: np.ascontiguousarray(values).reshape(shape))


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Whatever a broken or hostile file provokes inside becomes one line."""
    try:
        yield
    except WeightsError:
        raise
    except MemoryError:
        raise WeightsError(f"{path}: damaged: asks for more memory than there is") from None
    except Exception as reason:  # hostile bytes can raise anything
        text = " ".join(str(reason).split())[:120] or type(reason).__name__
        raise WeightsError(f"{path}: cut short or damaged, its content cannot be read ({text})") from None


# --- the pickle machine -----------------------------------------------------------------------------------------


class Inert(dict):
    """Stands for an object of a class that is not imported: items, constructor arguments and state as plain values."""

    path = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any):
        super().__init__()
        if not callable_in_files(self.path):
            raise WeightsError(f"wants {self.path} called while loading, which a checkpoint has no reason to")
        self.args = args
        if self.path == "collections.OrderedDict" and args and isinstance(args[0], list):
            self.update(args[0])

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self[len(self)] = item

    add = append

    def extend(self, items: Any) -> None:
        for item in items:
            self.append(item)

    __hash__ = object.__hash__  # type: ignore[assignment]

    def fields(self) -> dict[str, Any]:
        """Named values, however the class kept them."""
        state = self.state if isinstance(self.state, dict) else {}
        return {str(k): v for k, v in (*state.items(), *self.items())}


def callable_in_files(path: str) -> bool:
    """Whether ordinary files call this: classes, and functions that rebuild arrays."""
    module, _, name = path.rpartition(".")
    if path in HARMLESS or REBUILDERS.fullmatch(path):
        return True
    return name.lstrip("_")[:1].isupper() and module not in ("builtins", "__builtin__")


class Rebuild:
    """A function of PyTorch that rebuilds a tensor; an object without a place for anything else."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise WeightsError("sets the state of a function")


@dataclass(frozen=True)
class Storage:
    """A run of numbers in a file; `dtype` is empty when the tensors say it (untyped storages count bytes)."""

    dtype: str
    count: int
    read: Callable[[], bytes]


def rebuild_tensor(storage: Storage, offset: int, size: Any, stride: Any, *rest: Any, dtype: str = "") -> Stored:
    """A view of a storage: `size` and `stride` in numbers, checked against what is there."""
    dtype = dtype or storage.dtype
    if not isinstance(storage, Storage) or dtype not in STORAGE_OF:
        raise WeightsError(f"holds a tensor of a type that is not read here ({dtype or 'unknown'})")
    shape, steps = tuple(size), tuple(stride)
    kind = numpy_dtype(dtype)
    count = storage.count if storage.dtype else storage.count // kind.itemsize
    if len(shape) != len(steps) or len(shape) > 32 or not all(isinstance(n, int) for n in (offset, *shape, *steps)):
        raise WeightsError("holds a tensor whose shape makes no sense")
    total = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) if total else offset
    if min((offset, *shape, *steps)) < 0 or total > max(count, 1) or (total and last >= count):
        raise WeightsError("holds a tensor that reaches beyond its numbers")

    def read() -> np.ndarray:
        data = storage.read()
        if len(data) < count * kind.itemsize:
            raise WeightsError("cut short: a tensor has fewer numbers than its shape")
        flat = np.frombuffer(data, kind, count)[offset:]
        strides = tuple(step * kind.itemsize for step in steps)
        view = np.lib.stride_tricks.as_strided(flat, shape, strides) if total else np.zeros(shape, kind)
        return np.ascontiguousarray(view).reshape(shape)

    return Stored(dtype, shape, read)


def rebuild_typed(storage: Storage, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any) -> Stored:
    """A tensor that says its own type (an inert `torch.<dtype>`)."""
    name = getattr(dtype, "path", "").removeprefix("torch.")
    return rebuild_tensor(storage, offset, size, stride, dtype=name)


REBUILDS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_typed,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
}


class Machine(pickle.Unpickler):
    """Reads one pickle; `storage(id)` finds the numbers that a persistent id names."""

    def __init__(self, file: BinaryIO, storage: Callable[[Any], Storage] | None = None):
        super().__init__(file, encoding="latin1")
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in REBUILDS:
            return Rebuild(REBUILDS[path])
        if module.split(".")[0] in HOSTILE:
            raise WeightsError(f"wants {path} called while loading, which a checkpoint has no reason to")
        return type("Inert", (Inert,), {"path": path})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":  # a class, beside its source text
            return pid[1]
        if self.storage is None:
            raise WeightsError("refers to numbers where there are none")
        return self.storage(pid)


def storage_id(pid: Any) -> tuple[str, str, int, Any]:
    """(number type, key, count, view) of the tuple ('storage', class, key, device, count[, view])."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise WeightsError("refers to something that is not a run of numbers")
    name = getattr(pid[1], "path", "").rpartition(".")[2]
    if name not in STORAGES and name != "UntypedStorage":
        raise WeightsError(f"holds numbers of a type that is not read here ({name})")
    if not isinstance(pid[4], int) or pid[4] < 0:
        raise WeightsError("holds a run of numbers without a length")
    return STORAGES.get(name, ""), str(pid[2]), pid[4], pid[5] if len(pid) > 5 else None


# --- reading ----------------------------------------------------------------------------------------------------


def read_torch(path: Path) -> Any:
    """What `torch.load` would give, with `Stored` for tensors and `Inert` for objects; numbers are read later.

    Raises:
        WeightsError: another format, damaged, cut short, or hostile.
    """
    with damage(path):
        with path.open("rb") as file:
            start = file.read(len(LEGACY_START))
        try:
            if start[:4] == b"PK\x03\x04":
                return read_zip(path)
            if start == LEGACY_START:
                return read_legacy(path)
        except WeightsError as reason:
            raise WeightsError(f"{path}: {reason}; refused, and nothing in it was run") from None
    raise WeightsError(f"{path}: not a PyTorch checkpoint (neither a zip archive nor the format before 1.6)")


def read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        inner = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(inner) != 1 or any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise WeightsError("a zip archive, but not one that torch.save writes")
        root = inner[0].removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder").strip() != b"little":
            raise WeightsError("written on a big-endian machine, which is not read here")
        content = archive.read(inner[0])

    @functools.lru_cache(maxsize=1)  # neighbouring tensors may share one run of numbers
    def numbers(name: str) -> bytes:
        with damage(path), zipfile.ZipFile(path) as archive:
            return archive.read(name)

    def find(pid: Any) -> Storage:
        dtype, key, count, _ = storage_id(pid)
        name = f"{root}data/{key}"
        size = count * (numpy_dtype(dtype).itemsize if dtype else 1)
        if name not in members or members[name].file_size < size:
            raise WeightsError(f"cut short: the numbers of {name} are missing")
        return Storage(dtype, count, functools.partial(numbers, name))

    return Machine(io.BytesIO(content), find).load()


def read_legacy(path: Path) -> Any:
    """Five pickles (magic, protocol, system, content, keys), then for each key a count and its numbers."""
    places: dict[str, tuple[int, int]] = {}  # key -> position and bytes
    sizes: dict[str, int] = {}

    @functools.lru_cache(maxsize=1)
    def numbers(key: str) -> bytes:
        with damage(path), path.open("rb") as file:
            file.seek(places[key][0])
            return file.read(places[key][1])

    def find(pid: Any) -> Storage:
        dtype, key, count, view = storage_id(pid)
        if view is not None or not dtype:
            raise WeightsError("holds views of storages, which PyTorch has not written since 0.4")
        sizes[key] = numpy_dtype(dtype).itemsize
        return Storage(dtype, count, functools.partial(numbers, key))

    with path.open("rb") as file:
        for _ in range(3):
            Machine(file).load()
        content = Machine(file, find).load()
        keys = Machine(file).load()
        end = path.stat().st_size
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            length = count * sizes[key]
            places[key] = (file.tell(), length)
            if count < 0 or file.tell() + length > end:
                raise WeightsError("cut short: numbers are missing at its end")
            file.seek(length, io.SEEK_CUR)
    if set(sizes) - set(places):
        raise WeightsError("cut short: numbers are missing")
    return content


# --- writing ----------------------------------------------------------------------------------------------------


def write_torch(path: Path, tensors: dict[str, Stored], key: str = "") -> None:
    """A zip archive that `torch.load(path, weights_only=True)` reads: a dict of tensors, below `key` if one is given.

    Numbers start at multiples of 64 bytes, as PyTorch puts them.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        add(archive, "archive/data.pkl", pickled(tensors, key))
        add(archive, "archive/byteorder", b"little")
        for number, tensor in enumerate(tensors.values()):
            add(archive, f"archive/data/{number}", tensor.read().tobytes())
        add(archive, "archive/version", b"3\n")


def add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """A member whose data is aligned; the padding is an extra field of the header, named as PyTorch names it."""
    info = zipfile.ZipInfo(name)
    large = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0  # zipfile adds a field for long members
    padding = -(archive.fp.tell() + 30 + len(name) + 4 + large) % 64  # type: ignore[union-attr]
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(info, data)


def pickled(tensors: dict[str, Stored], key: str) -> bytes:
    """The pickle of a (nested) dict of tensors, written opcode by opcode: the classes it names are not here."""
    out = io.BytesIO()
    out.write(b"\x80\x02")  # protocol 2
    if key:
        out.write(b"}" + text(key))
    out.write(ORDERED + b"(")
    for number, (name, tensor) in enumerate(tensors.items()):
        count, shape = math.prod(tensor.shape), tensor.shape
        stride = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        out.write(text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(")
        out.write(b"(" + text("storage") + f"ctorch\n{STORAGE_OF[tensor.dtype]}\n".encode() + text(str(number)))
        out.write(text("cpu") + integer(count) + b"tQ")  # a persistent id
        out.write(integer(0) + b"(" + b"".join(map(integer, shape)) + b"t(" + b"".join(map(integer, stride)) + b"t")
        out.write(b"\x89" + ORDERED + b"tR")  # requires_grad False, no hooks; call
    out.write(b"u" + (b"s" if key else b"") + b".")
    return out.getvalue()


ORDERED = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
