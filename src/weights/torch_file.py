"""Read and write PyTorch checkpoint files without PyTorch, and without running code that is pickled in them.

A `.pth` file is a pickle and raw numbers: a zip archive since PyTorch 1.6, a sequence of pickles before. The unpickler
here knows containers, numbers and tensors. Every other class that a file names (arguments, configs, optimisers) becomes
an `InertObject`. Nothing is imported, and a file that calls a function is refused.
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
from typing import Any, BinaryIO, ClassVar

import numpy as np

from . import WeightsError

#: PyTorch storage class -> number type
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
MOST = 2**60  # of what a file counts
MOST_AXES = 32  # of a tensor
STORAGE_OF = {dtype: storage for storage, dtype in STORAGES.items()}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
LONGEST = 64_000_000  # bytes of a pickle without the numbers of its tensors; those of our networks have 200,000
MOST_STEPS = 4_000_000  # operations of a pickle, each of which can make an object of 100 bytes
MOST_CLASSES = 1000  # that a pickle names
LONGEST_LIST = 4_000_000  # bytes of the list of the members of a zip archive
#: modules that no ordinary checkpoint names
HOSTILE = {"os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "runpy", "pty", "importlib", "ctypes", "code"}
HOSTILE |= {"commands", "webbrowser", "pickle", "_pickle", "marshal", "multiprocessing", "types", "operator", "asyncio"}
HOSTILE |= {"idlelib", "pip", "timeit", "pydoc", "pdb", "bdb"}
#: functions that ordinary files call to build plain values
BUILTINS = ("set", "frozenset", "bytearray", "bytes", "complex", "slice", "range", "object", "list", "dict", "tuple")
HARMLESS = {"_codecs.encode", "copyreg._reconstructor", "collections.defaultdict", "collections.deque"}
HARMLESS |= {"functools.partial", "datetime.datetime", "datetime.date", "datetime.timedelta"}
HARMLESS |= {
    f"{module}.{name}" for module in ("builtins", "__builtin__") for name in (*BUILTINS, "int", "float", "str")
}
#: functions of PyTorch and NumPy that ordinary files call; a call of any class is allowed
REBUILDERS = re.compile(
    r"torch\.(device|_utils\._rebuild_\w+|_tensor\._rebuild_\w+|storage\._load_from_bytes|serialization\._get_layout)"
    r"|numpy\.(dtype|ndarray|_?core\.(multiarray|numeric)\.(_reconstruct|scalar|_frombuffer))"
    r"|numpy\.random\._pickle\.__\w+_ctor"
)


def numpy_dtype(dtype: str) -> np.dtype:
    """NumPy type for a PyTorch number type; uint16 for bfloat16, which NumPy lacks."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `read()` returns its values as an array of `numpy_dtype(dtype)`, in C order."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def array(self) -> np.ndarray:
        """The values; float16 and bfloat16 converted to float32 without loss."""
        values = self.read()
        if self.dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if self.dtype == "float16" else values


def stored_tensor(values: np.ndarray, dtype: str = "") -> StoredTensor:
    """An array as a `StoredTensor`, converted to the number type `dtype` if given."""
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
    return StoredTensor(name, shape, lambda: np.ascontiguousarray(values).reshape(shape))


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn any exception in the block into a WeightsError of one line: the file is damaged or hostile."""
    try:
        yield
    except WeightsError:
        raise
    except MemoryError:
        raise WeightsError(f"{path}: damaged: needs more memory than there is") from None
    except Exception as reason:  # hostile bytes can raise anything
        text = " ".join(str(reason).split())[:120] or type(reason).__name__
        raise WeightsError(f"{path}: cut short or damaged, its content cannot be read ({text})") from None


# --- unpickling -------------------------------------------------------------------------------------------------


class InertObject(dict):
    """An object whose class is not imported: its items, constructor arguments and state as plain values."""

    path = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any):
        super().__init__()
        if not callable_in_files(self.path):
            raise WeightsError(f"calls {self.path} while loading, which no ordinary checkpoint does")
        self.args = args
        if self.path == "collections.OrderedDict" and args and isinstance(args[0], list):
            for key, value in args[0]:
                check_key(key)
                self[key] = value

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
        """Values by name, from both state and items."""
        state = self.state if isinstance(self.state, dict) else {}
        return {str(k): v for k, v in (*state.items(), *self.items())}


def callable_in_files(path: str) -> bool:
    """Whether ordinary files call this: a class, or a function that builds values or arrays."""
    module, _, name = path.rpartition(".")
    if path in HARMLESS or REBUILDERS.fullmatch(path):
        return True
    return name.lstrip("_")[:1].isupper() and module not in ("builtins", "__builtin__")


class RebuildFunction:
    """A function that rebuilds a PyTorch tensor; as an object that a pickle cannot change."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise WeightsError("sets the state of a function")


@dataclass(frozen=True)
class Storage:
    """A run of numbers in a file. `dtype` is empty in untyped storages; then `count` is in bytes."""

    dtype: str
    count: int
    read: Callable[[], bytes]


def rebuild_tensor(storage: Storage, offset: int, size: Any, stride: Any, *rest: Any, dtype: str = "") -> StoredTensor:
    """A view of a storage; `offset`, `size` and `stride` count numbers and are checked against the storage."""
    dtype = dtype or storage.dtype
    if not isinstance(storage, Storage) or dtype not in STORAGE_OF:
        raise WeightsError(f"holds a tensor of an unsupported number type ({dtype or 'unknown'})")
    if not isinstance(size, tuple | list) or not isinstance(stride, tuple | list) or len(size) > MOST_AXES:
        raise WeightsError("holds a tensor with an invalid shape")
    shape, steps = tuple(size), tuple(stride)
    kind = numpy_dtype(dtype)
    count = storage.count if storage.dtype else storage.count // kind.itemsize
    if len(shape) != len(steps) or not all(isinstance(n, int) and abs(n) < MOST for n in (offset, *shape, *steps)):
        raise WeightsError("holds a tensor with an invalid shape")
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

    return StoredTensor(dtype, shape, read)


def rebuild_typed(
    storage: Storage, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any
) -> StoredTensor:
    """A tensor with a number type of its own; `dtype` is the InertObject of `torch.<dtype>`."""
    name = getattr(dtype, "path", "").removeprefix("torch.")
    return rebuild_tensor(storage, offset, size, stride, dtype=name)


REBUILDS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_typed,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
}


def check_key(key: Any) -> None:
    """Check that a key is soon hashed: tuples of tuples can stand for more values than there are atoms."""
    if isinstance(key, tuple | frozenset) and any(isinstance(part, tuple | frozenset) for part in key):
        raise WeightsError("has a key of tuples within tuples, which no ordinary checkpoint has")


def after(check: Callable[[Any], None], operation: Callable[[Any], None]) -> Callable[[Any], None]:
    """An operation of an unpickler with a check before it."""

    def both(unpickler: Any) -> None:
        check(unpickler)
        operation(unpickler)

    return both


class Portion:
    """The next bytes of a file, at most `left`; an unpickler reads no further."""

    def __init__(self, file: BinaryIO, left: int = LONGEST):
        self.file, self.left = file, left

    def read(self, count: int) -> bytes:
        self.take(count)
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline(self.left + 1)
        self.take(len(line))
        return line

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise WeightsError("holds a part that is longer than the file or than any checkpoint's")


class SafeUnpickler(pickle._Unpickler):
    """Reads one pickle without importing or running anything; `storage(id)` returns the numbers of a persistent id.

    It is based on pickle's unpickler in Python: that in C takes memory for numbers in a file, such as the largest index
    of a memo, before it reads what they belong to.
    """

    def __init__(self, file: BinaryIO, storage: Callable[[Any], Storage] | None = None):
        super().__init__(Portion(file), encoding="latin1")
        self.storage = storage
        self.classes: dict[str, type[InertObject]] = {}

    def load(self) -> Any:
        """As in pickle, with a limited number of steps."""
        self._unframer = pickle._Unframer(self._file_read, self._file_readline)  # type: ignore[attr-defined]
        self.read, self.readline = self._unframer.read, self._unframer.readline
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0
        for _ in range(MOST_STEPS):
            code = self.read(1)
            if not code:
                raise EOFError("it ends too early")
            try:
                self.dispatch[code[0]](self)
            except pickle._Stop as stop:  # type: ignore[attr-defined]
                return stop.value
        raise WeightsError("has more parts than any checkpoint")

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in REBUILDS:
            return RebuildFunction(REBUILDS[path])
        if module.split(".")[0] in HOSTILE:
            raise WeightsError(f"names {path}, which no ordinary checkpoint does")
        if path not in self.classes:
            if len(self.classes) == MOST_CLASSES:
                raise WeightsError("names more classes than any checkpoint")
            self.classes[path] = type("InertObject", (InertObject,), {"path": path})
        return self.classes[path]

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":  # a class and its source text
            return pid[1]
        if self.storage is None:
            raise WeightsError("refers to numbers in a part of the file that has none")
        return self.storage(pid)

    def check_one(self) -> None:
        check_key(self.stack[-2])

    def check_pairs(self) -> None:
        for key in self.stack[::2]:
            check_key(key)

    def check_all(self) -> None:
        for key in self.stack:
            check_key(key)

    def check_built(self) -> None:
        if not isinstance(self.stack[-2], InertObject):
            raise WeightsError("sets the state of a function or tensor, which no ordinary checkpoint does")

    def load_bytes(self) -> None:
        """A byte array; pickle takes its memory before it reads."""
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(count)))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**pickle._Unpickler.dispatch}


SafeUnpickler.dispatch[pickle.BYTEARRAY8[0]] = SafeUnpickler.load_bytes
for code, check in (
    (pickle.SETITEM, SafeUnpickler.check_one),
    (pickle.SETITEMS, SafeUnpickler.check_pairs),
    (pickle.DICT, SafeUnpickler.check_pairs),
    (pickle.ADDITEMS, SafeUnpickler.check_all),
    (pickle.FROZENSET, SafeUnpickler.check_all),
    (pickle.BUILD, SafeUnpickler.check_built),
):
    SafeUnpickler.dispatch[code[0]] = after(check, SafeUnpickler.dispatch[code[0]])


def storage_id(pid: Any) -> tuple[str, str, int, Any]:
    """(number type, key, count, view) from the tuple ('storage', class, key, device, count[, view])."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise WeightsError("refers to something that is not a run of numbers")
    name = getattr(pid[1], "path", "").rpartition(".")[2]
    if name not in STORAGES and name != "UntypedStorage":
        raise WeightsError(f"holds numbers of an unsupported type ({name})")
    if not isinstance(pid[2], str | int) or not isinstance(pid[4], int) or not 0 <= pid[4] < MOST:
        raise WeightsError("holds a run of numbers without a name or length")
    return STORAGES.get(name, ""), str(pid[2]), pid[4], pid[5] if len(pid) > 5 else None


# --- reading ----------------------------------------------------------------------------------------------------


def read_torch(path: Path) -> Any:
    """The content of `torch.load`, with `StoredTensor` for tensors and `InertObject` for objects.

    Values of tensors are read later, on access.

    Raises:
        WeightsError: another format; or the file is damaged, cut short, or hostile.
    """
    with damage_reported(path):
        with path.open("rb") as file:
            start = file.read(len(LEGACY_START))
        try:
            if start[:4] == b"PK\x03\x04":
                return read_zip(path)
            if start == LEGACY_START:
                return read_legacy(path)
        except WeightsError as reason:
            raise WeightsError(f"{path}: {reason}; refused, nothing in it was run") from None
    raise WeightsError(f"{path}: not a PyTorch checkpoint (neither a zip archive nor the format before 1.6)")


def read_zip(path: Path) -> Any:
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined] # zipfile itself reads the whole list at once
    if end is None or end[zipfile._ECD_SIZE] > LONGEST_LIST:  # type: ignore[attr-defined]
        raise WeightsError("cut short, or with more members than any checkpoint")
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1 or any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise WeightsError("a zip archive, but not one that torch.save writes")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and (order.file_size > 99 or archive.read(order).strip() != b"little"):
            raise WeightsError("written on a big-endian machine, which is not supported")
        if members[pickles[0]].file_size > LONGEST:
            raise WeightsError(f"its part {pickles[0]} is longer than any checkpoint's")
        content = archive.read(pickles[0])

    @functools.lru_cache(maxsize=1)  # consecutive tensors may share a storage
    def numbers(name: str) -> bytes:
        with damage_reported(path), zipfile.ZipFile(path) as archive:
            return archive.read(name)

    def storage(pid: Any) -> Storage:
        dtype, key, count, _ = storage_id(pid)
        name = f"{root}data/{key}"
        size = count * (numpy_dtype(dtype).itemsize if dtype else 1)
        if name not in members or members[name].file_size < size:
            raise WeightsError(f"cut short: the numbers of {name} are missing")
        return Storage(dtype, count, functools.partial(numbers, name))

    return SafeUnpickler(io.BytesIO(content), storage).load()


def read_legacy(path: Path) -> Any:
    """Read the format before PyTorch 1.6.

    The file is five pickles (magic, protocol, system, content, keys), then a count and its numbers for each key.
    """
    spans: dict[str, tuple[int, int]] = {}  # key -> position and length in bytes
    item_sizes: dict[str, int] = {}  # key -> bytes per number

    @functools.lru_cache(maxsize=1)
    def numbers(key: str) -> bytes:
        with damage_reported(path), path.open("rb") as file:
            file.seek(spans[key][0])
            return file.read(spans[key][1])

    def storage(pid: Any) -> Storage:
        dtype, key, count, view = storage_id(pid)
        if view is not None or not dtype:
            raise WeightsError("holds views of storages, which PyTorch has not written since 0.4")
        item_sizes[key] = numpy_dtype(dtype).itemsize
        return Storage(dtype, count, functools.partial(numbers, key))

    with path.open("rb") as file:
        for _ in range(3):
            SafeUnpickler(file).load()
        content = SafeUnpickler(file, storage).load()
        keys = SafeUnpickler(file).load()
        end = path.stat().st_size
        for key in keys:
            if not isinstance(key, str) or key not in item_sizes:
                raise WeightsError("names numbers that no tensor has")
            (count,) = struct.unpack("<q", file.read(8))
            length = count * item_sizes[key]
            spans[key] = (file.tell(), length)
            if count < 0 or file.tell() + length > end:
                raise WeightsError("cut short: numbers are missing at its end")
            file.seek(length, io.SEEK_CUR)
    if set(item_sizes) - set(spans):
        raise WeightsError("cut short: numbers are missing")
    return content


# --- writing ----------------------------------------------------------------------------------------------------


def write_torch(path: Path, tensors: dict[str, StoredTensor], key: str = "") -> None:
    """Write a dict of tensors, under `key` if given, as a zip archive for `torch.load(path, weights_only=True)`.

    Numbers start at multiples of 64 bytes, as in PyTorch.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        add(archive, "archive/data.pkl", pickle_bytes(tensors, key))
        add(archive, "archive/byteorder", b"little")
        for number, tensor in enumerate(tensors.values()):
            add(archive, f"archive/data/{number}", tensor.read().tobytes())
        add(archive, "archive/version", b"3\n")


def add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a member with aligned data; an extra header field, with PyTorch's name, is the padding."""
    info = zipfile.ZipInfo(name)
    large = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0  # zipfile adds a field for long members
    padding = -(archive.fp.tell() + 30 + len(name) + 4 + large) % 64  # type: ignore[union-attr]
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(info, data)


def pickle_bytes(tensors: dict[str, StoredTensor], key: str) -> bytes:
    """The pickle of a (nested) dict of tensors, written opcode by opcode since PyTorch's classes are not available."""
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
