"""Compiled graphs of earlier runs, so that the training step of a recipe is compiled once.

MindSpore can store graphs, but it takes the n-th stored one for the n-th graph of any later process of the same script.
With another constant in a cell (a seed, a table, a mean) that gives wrong numbers without a message. Here the name of
a stored graph is a digest of all that the graph is made from (`Key`). If a part cannot be covered, nothing is stored.

MindSpore reads the path of its cache once in a process. So it gets a folder of this process; a stored graph is copied
there under the number of the next graph, and a new graph is copied from there to ~/.cache/mim_mindspore/graphs
(XDG_CACHE_HOME instead of ~/.cache if it is set). Stored graphs carry a checksum and appear whole, by renaming, so that
damaged ones are noticed and runs can share them.

This works on CPU, where it is tested. MS_COMPILER_CACHE_ENABLE=0 turns it off, and =1 selects MindSpore's own cache.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore._c_expression import MetaFuncGraph_
from mindspore._c_expression.typing import Type

from .. import native
from . import parallel

SOURCE = Path(__file__).resolve().parents[1]
ENABLE, PATH, TRUST = "MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH", "MS_DEV_FORCE_USE_COMPILE_CACHE"
KEPT, DAYS = 20, 30  # stored graphs; days after its last use that one is kept


def compile_graph(cell: nn.Cell, *inputs: Tensor) -> bool:
    """Compile a cell before its first call; returns whether a graph of an earlier run was taken.

    Does nothing if the cell is compiled, or if graphs cannot be stored: then the first call compiles it.
    """
    if cell.compile_cache or ENABLE in os.environ or ms.get_context("device_target") != "CPU":
        return False
    try:
        key, store = key_of(cell, *inputs), folder()
    except Exception:  # any error: without a key or a folder the graph is compiled as ever
        return False
    with _LOCK:
        return _PROCESS.compile(cell, inputs, store / f"{key}.graph")


def folder() -> Path:
    """The folder of stored graphs; creates it."""
    path = native.cache_folder() / "graphs"
    path.mkdir(parents=True, exist_ok=True)
    return path


# --- stored graphs ----------------------------------------------------------------------------------------------


class _Process:
    """MindSpore's cache in this process: a folder in which graphs have numbers."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.number: int | None = 0  # of the next graph; None if it is unknown

    def compile(self, cell: nn.Cell, inputs: tuple[Tensor, ...], stored: Path) -> bool:
        """Compile a graph and store it, or take the stored one; returns whether it was taken."""
        number, self.number = self.number, None
        if number is None:
            return False
        content = read(stored)
        try:
            if self.path is None:
                self.path = Path(tempfile.mkdtemp(prefix="process-", dir=stored.parent))
            graphs = self.path / f"rank_{parallel.rank()}" / "graph_cache"
            placed = graphs / f"{os.environ.get('MS_ROLE', '')}compile_cache_{number}.mindir"  # MindSpore's name
            time_placed = place(placed, content)
            with environment({ENABLE: "1", PATH: str(self.path), TRUST: "1"}):
                cell.compile(*inputs)
            files = [path for path in self.path.rglob("*") if path.is_file() and path.stat().st_size]
            if files != [placed]:  # MindSpore stored nothing, or not one file
                return False
            self.number = number + 1
            if placed.stat().st_mtime_ns == time_placed:
                os.utime(stored)
                return True
            write(stored, placed.read_bytes())
            prune(stored.parent)
        except Exception:  # the first call compiles the graph, and raises its own errors
            with suppress(OSError):
                stored.unlink()
        finally:
            if self.path is not None:
                shutil.rmtree(self.path, ignore_errors=True)
        return False


def place(path: Path, content: bytes | None) -> int:
    """Write the content of a stored graph for MindSpore; returns the time of the file, 0 without content."""
    if content is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path.stat().st_mtime_ns


_PROCESS = _Process()
_LOCK = threading.Lock()


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def read(path: Path) -> bytes | None:
    """Content of a stored graph; None if there is none. A damaged one is removed."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, content = stored[:32], stored[32:]
    if hashlib.sha256(content).digest() == digest:
        return content
    path.unlink(missing_ok=True)
    return None


def write(path: Path, content: bytes) -> None:
    """Store a graph; without space nothing is stored."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        partial.write_bytes(hashlib.sha256(content).digest() + content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def prune(store: Path) -> None:
    """Remove what was not used for `DAYS` days, and all but the last `KEPT` graphs."""
    ages = {}
    for path in store.iterdir():
        with suppress(OSError):  # another run has removed it
            ages[path] = time.time() - path.stat().st_mtime
    kept = sorted((path for path in ages if path.suffix == ".graph"), key=lambda path: ages[path])[:KEPT]
    for path, age in ages.items():
        if age > DAYS * 86400 or (path.suffix == ".graph" and path not in kept):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


# --- keys -------------------------------------------------------------------------------------------------------


class UncoveredError(Exception):
    """A part of a graph that a key does not cover."""


def key_of(cell: nn.Cell, *inputs: Tensor) -> str:
    """Digest of all that a graph is made from.

    Versions, settings and ranks, the sources of this project and of every class and function met, the inputs' shapes,
    and the cell with all that it reaches: structure, options, constants, names and shapes of parameters.

    Raises:
        UncoveredError: a part has a type without a rule, or a parameter is not the cell's (the weights of a teacher):
            MindSpore gives a loaded graph the parameters of the cell, and leaves others without values.
    """
    key = Key()
    settings = ("mode", "device_target", "deterministic", "jit_config", "jit_level", "max_call_depth", "exec_order")
    parallel_settings = ("parallel_mode", "gradients_mean", "device_num", "gradient_fp32_sync")
    key.add(
        {
            "versions": [ms.__version__, np.__version__, platform.python_version(), platform.machine()],
            "settings": [str(ms.get_context(name)) for name in settings],
            "parallel": [str(ms.get_auto_parallel_context(name)) for name in parallel_settings],
            "variables": sorted(item for item in os.environ.items() if item[0].startswith(("MS_DEV_", "MS_JIT"))),
            "ranks": [parallel.rank(), parallel.size()],
            "inputs": [[list(value.shape), str(value.dtype)] for value in inputs],
        }
    )
    key.add(cell)
    known = cell.parameters_dict()
    if any(len(same) > 1 or known.get(name) is not same[0] for name, same in key.parameters.items()):
        raise UncoveredError("a parameter outside the cell")
    for path in sorted(SOURCE.rglob("*.py")):
        key.source(path, path.relative_to(SOURCE).as_posix())
    return key.digest.hexdigest()


class Key:
    """Digest of an object and of all that it reaches."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.numbers: dict[int, int] = {}  # id of an object -> its place in the walk
        self.alive: list[Any] = []  # keeps ids unique
        self.covered: set[str] = set()  # modules whose source is in the digest
        self.parameters: dict[str, list[Parameter]] = {}  # by name

    def text(self, *words: object) -> None:
        for word in words:
            data = str(word).encode()
            self.digest.update(b"%d:" % len(data) + data)

    def add(self, part: Any) -> None:
        """Add an object; one that was added before counts by its place."""
        kind = type(part)
        self.text(kind.__module__, kind.__qualname__)
        if part is None or kind in PLAIN:
            self.text(repr(part))
        elif id(part) in self.numbers:
            self.text(self.numbers[id(part)])
        else:
            self.numbers[id(part)] = len(self.numbers)
            self.alive.append(part)
            self.module(kind)
            rule = next((rule for known, rule in RULES.items() if isinstance(part, known)), None)
            if rule is None and not is_dataclass(part):
                raise UncoveredError(f"{kind.__module__}.{kind.__qualname__}")
            (rule or Key.object)(self, part)

    def source(self, path: Path, name: str) -> None:
        self.text(name)
        self.digest.update(hashlib.sha256(path.read_bytes()).digest())

    def module(self, owner: Any) -> None:
        """Add the source of a class or function, unless a version stands for it."""
        for part in inspect.getmro(owner) if isinstance(owner, type) else [owner]:
            name = str(part.__module__)
            top = name.split(".")[0]
            if name in self.covered or top in VERSIONED:
                continue
            file = getattr(sys.modules.get(name), "__file__", None)
            if file is None:
                raise UncoveredError(name)
            self.covered.add(name)
            self.source(Path(file), name)

    def items(self, part: Any) -> None:
        self.text(len(part))
        for item in part:
            self.add(item)

    def pairs(self, part: Any) -> None:
        self.text(len(part))
        for name, value in part.items():
            self.add(name)
            self.add(value)

    def parameter(self, part: Parameter) -> None:
        self.text(part.name, part.shape, part.dtype, part.requires_grad)
        self.parameters.setdefault(part.name, []).append(part)

    def tensor(self, part: Tensor) -> None:
        self.text(part.dtype)
        self.array(part.asnumpy())

    def array(self, part: Any) -> None:
        if part.dtype.hasobject:
            raise UncoveredError(str(part.dtype))
        self.text(part.dtype, part.shape)
        self.digest.update(part.tobytes())

    def function(self, part: types.FunctionType) -> None:
        self.module(part)
        self.text(part.__module__, part.__qualname__, part.__code__.co_firstlineno)
        self.pairs({**vars(part), "defaults": part.__defaults__, "named": part.__kwdefaults__})
        outer = zip(part.__code__.co_freevars, part.__closure__ or (), strict=True)
        stamp = "hash_obj" if part.__module__.startswith("mindspore.") else ""  # the time, in ms.jit
        self.pairs({name: cell.cell_contents for name, cell in outer if name != stamp})

    def method(self, part: types.MethodType) -> None:
        self.add(part.__func__)
        self.add(part.__self__)

    def partial(self, part: functools.partial) -> None:
        self.items([part.func, part.args, part.keywords])

    def named(self, part: Any) -> None:
        self.module(part)
        self.text(part.__module__, part.__qualname__)

    def cell(self, part: nn.Cell) -> None:
        """MindSpore's own attributes count if they differ from those of an empty cell; compiling empties some."""
        plain = vars(nn.Cell())
        own = {name: value for name, value in vars(part).items() if name not in PASSING}
        unchanged = [
            name for name in own if name in plain and (own[name] == plain[name] or not (own[name] or plain[name]))
        ]
        self.pairs({name: value for name, value in own.items() if name not in unchanged})

    def object(self, part: Any) -> None:
        """A primitive, a graph function of MindSpore or a dataclass, by its attributes."""
        self.pairs(vars(part))


#: types whose repr is their value
PLAIN = (bool, int, float, complex, str, bytes)
#: packages whose version stands for their source
VERSIONED = {"mindspore", "numpy", "pybind11_builtins", *sys.stdlib_module_names}
#: attributes of cells that change from run to run and are not part of the graph
PASSING = {
    "_create_time",
    "_id",
    "_phase_cache",
    "_compile_cache",
    "_compile_phase",
    "arguments_key",
    "_lazy_construct_sig",
    "_scope",
}
#: type -> rule; the first that fits
RULES: dict[Any, Callable[[Key, Any], None]] = {
    nn.Cell: Key.cell,
    Parameter: Key.parameter,
    Tensor: Key.tensor,
    (np.ndarray, np.generic): Key.array,
    dict: Key.pairs,
    (list, tuple): Key.items,
    types.FunctionType: Key.function,
    types.MethodType: Key.method,
    functools.partial: Key.partial,
    type: Key.named,
    (ops.Primitive, MetaFuncGraph_, ms.JitConfig): Key.object,
    (Type, np.dtype, inspect.Signature): lambda key, part: key.text(part),
}
