"""Our own CPU kernels (kernels.cpp): compiled once for a machine, checked at start, and the forms that use them.

Where they cannot be had, or `train.kernels: builtin` says so, MindSpore's own operations do the same (rows.py,
updates.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops
from mindspore.ops.signature import make_sig, sig_rw

from .. import native
from ..config import Kernels, Precision
from ..errors import UserError
from ..native import KernelError, cores, processor
from .forms import kernel_form
from .rows import (
    Affine,
    AffineOnto,
    Attend,
    AttendCosine,
    GeluAffine,
    GeluAffineOnto,
    NormAffine,
    Normalize,
    NormProduct,
    Positions,
    Product,
)
from .updates import AdamWUpdate, GlobalNorm

SOURCE = Path(__file__).with_name("kernels.cpp")
#: of a C++ compiler, with those of `native`; NaN and infinity keep their meaning
FLAGS = (
    "-mprefer-vector-width=512",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-pthread",
)
CHECK_ERROR = 1e-4  # largest relative error of the self-check in float32; bfloat16 has 100 times that


class ExportError(UserError):
    """A network with our kernels cannot be written to a file for other machines."""


@dataclass
class State:
    """What this process uses; `set_up` changes it.

    Attributes:
        precision: as in `train`.
        threads: of our kernels.
        library: path of the compiled kernels; empty: not in use; None: not looked for yet.
        reason: why they are not in use.
    """

    precision: Precision = "float32"
    threads: int = 1
    library: str | None = None
    reason: str = ""


_state = State()


def set_up(kernels: Kernels = "auto", threads: int = 0, precision: Precision = "float32") -> str:
    """Choose the kernels of all cells that are built from now on; compiles them if this machine has none yet.

    Args:
        kernels: `auto` uses our kernels where that is possible, `builtin` MindSpore's operations.
        threads: of the kernels in this process, 0: all cores.
        precision: of matrix products; the rest is always float32.

    Returns:
        A line for the log.
    """
    _state.precision, _state.threads = precision, threads or cores()
    _state.library, _state.reason = "", "train.kernels is builtin"
    if kernels == "auto":
        try:
            _state.library = str(library())
            open_library(_state.library).set_threads(_state.threads)
            check(_state.library, precision)
        except KernelError as error:
            _state.library, _state.reason = "", str(error)
    return description()


def description() -> str:
    """Return a line on the kernels in use."""
    if not _state.library:
        return f"CPU kernels: MindSpore's, since {_state.reason}"
    count = f"{_state.threads} thread{'s' * (_state.threads > 1)}"
    return f"CPU kernels: our own ({Path(_state.library).name}), {count}, products in {_state.precision}"


def available() -> bool:
    """Whether cells that are built now use our kernels; the first call of a process without `set_up` looks for them."""
    if _state.library is None:
        set_up()
    return bool(_state.library)


def reason() -> str:
    """Return why our kernels are not in use; empty if they are."""
    return "" if _state.library else _state.reason


@contextlib.contextmanager
def builtin() -> Iterator[None]:
    """Build cells from MindSpore's operations only, for files that other machines read."""
    before = _state.library
    _state.library = ""
    try:
        yield
    finally:
        _state.library = before


# --- compiling ---------------------------------------------------------------------------------------------------


def library() -> Path:
    """Return the kernels compiled for this machine; compiles them on first use, one process for all.

    Raises:
        KernelError: they cannot be compiled here.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise KernelError(f"they are for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
    libraries = Path(ms.__file__).parent / "lib"
    products = sorted(libraries.glob("libdnnl.so*"))
    if not products:
        raise KernelError(f"this MindSpore has no oneDNN in {libraries}")
    links = (f"-L{libraries}", f"-l:{products[0].name}", f"-Wl,-rpath,{libraries}")
    source = native.Source(SOURCE, FLAGS, links, ms.__version__)
    if ":" in str(source.target) or "MS_CUSTOM_AOT_WHITE_LIST" in os.environ:
        raise KernelError(f"MindSpore cannot load {source.target}: a colon, or MS_CUSTOM_AOT_WHITE_LIST, is in the way")
    return source.compiled()


# --- checking ----------------------------------------------------------------------------------------------------


def open_library(path: str) -> ctypes.CDLL:
    """Load compiled kernels into this process.

    Raises:
        KernelError: the file cannot be loaded.
    """
    return native.open_library(path, "set_threads")


def call(path: str, name: str, *arrays: np.ndarray) -> None:
    """Call a kernel on arrays, inputs and outputs, as MindSpore does."""
    count = len(arrays)
    data = (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays])
    ranks = (ctypes.c_int * count)(*[array.ndim for array in arrays])
    shapes: list[Any] = [(ctypes.c_int64 * max(array.ndim, 1))(*array.shape) for array in arrays]
    table = (ctypes.POINTER(ctypes.c_int64) * count)(*shapes)
    getattr(open_library(path), name)(count, data, ranks, table, None, None, None)


def check(path: str, precision: Precision) -> None:
    """Compare a product and an update with numpy; takes milliseconds.

    Raises:
        KernelError: they differ.
    """
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((33, 40), (24, 40), (24,)))
    out = np.zeros((33, 24), np.float32)
    if precision == "bfloat16" and not {"avx512_bf16", "amx_bf16"} & set(processor().split()):
        raise KernelError("this processor has neither avx512_bf16 nor AMX, which bfloat16 needs")
    call(path, f"linear_{precision}", x, weight, bias, out)
    compare("product", out, x @ weight.T + bias, CHECK_ERROR * (1 if precision == "float32" else 100))
    values = np.array([0.1, 0.01, 1e-8], np.float32)
    betas, group = np.array([0.9, 0.99], np.float32), np.zeros(1, np.int32)
    factor, skip = np.ones(1, np.float32), np.zeros(1, np.float32)
    before, first, second = weight.copy(), np.zeros_like(weight), np.zeros_like(weight)
    gradient, done = rng.standard_normal(weight.shape).astype(np.float32), np.zeros(1, np.float32)
    call(path, "adamw", values, betas, group, factor, skip, weight, first, second, gradient, done)
    expected = before - 0.1 * (0.1 * gradient / (0.1 * np.abs(gradient) + 1e-8) + 0.01 * before)
    compare("update", weight, expected, CHECK_ERROR)


def compare(what: str, actual: np.ndarray, expected: np.ndarray, limit: float) -> None:
    error = float(np.abs(actual - expected).max() / np.abs(expected).max())
    if not error <= limit:
        raise KernelError(f"the {what} of the self-check is wrong by {error:.1e}")


# --- forms -------------------------------------------------------------------------------------------------------


def kernel(name: str, shapes: Any, kinds: Any) -> ops.Custom:
    """A kernel as an operation; `shapes` and `kinds` infer shapes and types of the outputs from those of the inputs."""

    def checked_shapes(*inputs: Any) -> Any:
        refuse_export()
        return shapes(*inputs)

    return ops.Custom(f"{_state.library}:{name}", checked_shapes, kinds, "aot")


def refuse_export() -> None:
    """Raise `ExportError` if MindSpore compiles for a file, which would contain the path of our kernels here.

    MindSpore infers shapes while it compiles, so the caller of the compilation is on the stack.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "export" and str(frame.f_globals.get("__name__")).startswith("mindspore."):
            raise ExportError(
                "export: this network has CPU kernels that were compiled for this machine; build it inside "
                "`with src.operations.kernels.builtin():`, or use export.py"
            )


def same(*kinds: Any) -> Any:
    return kinds[0]


def writing(custom: ops.Custom, *written: bool) -> ops.Custom:
    """Declare which inputs of a kernel it changes, so that MindSpore orders and never copies them."""
    rights = [sig_rw.RW_WRITE if write else sig_rw.RW_READ for write in written]
    custom.set_signatures([make_sig(f"input_{number}", right) for number, right in enumerate(rights)])
    custom.add_prim_attr("side_effect_mem", True)
    return custom


class LinearKernel(nn.Cell):
    """A linear kernel as a form: `name` in kernels.cpp, whose arrays are those of `construct`."""

    name = "linear"

    def __init__(self) -> None:
        super().__init__()
        name = f"{self.name}_{_state.precision}"
        self.forward = kernel(name, lambda x, w, *others: [x[0], w[0]], same)
        self.backward = kernel(f"{name}_grad", lambda x, w, g: (x, w), lambda x, w, g: (x, x))
        self.backward_biased = kernel(f"{name}_grad", lambda x, w, g: (x, w, [w[0]]), lambda x, w, g: (x, x, x))


@kernel_form(Product)
class ProductKernel(LinearKernel):
    """`Product` with our kernel."""

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.forward(x, weight)

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(x, weight, dout)


@kernel_form(Affine)
class AffineKernel(LinearKernel):
    """`Affine` with our kernel."""

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, weight, bias)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward_biased(x, weight, dout)


@kernel_form(AffineOnto)
class AffineOntoKernel(LinearKernel):
    """`AffineOnto` with our kernel."""

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, onto: Tensor) -> Tensor:
        return self.forward(x, weight, bias, onto)

    def bprop(
        self, x: Tensor, weight: Tensor, bias: Tensor, onto: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, ...]:
        return (*self.backward_biased(x, weight, dout), dout)


@kernel_form(GeluAffine)
class GeluAffineKernel(AffineKernel):
    """`GeluAffine` with our kernel, which computes GELU again for the gradient instead of keeping it."""

    name = "gelu_linear"


@kernel_form(GeluAffineOnto)
class GeluAffineOntoKernel(AffineOntoKernel):
    """`GeluAffineOnto` with our kernel."""

    name = "gelu_linear"


class NormLinearKernel(nn.Cell):
    """A linear kernel after a layer norm, which it computes again for the gradient instead of keeping it."""

    def __init__(self, eps: float):
        super().__init__()
        name = f"norm_linear_{_state.precision}"
        self.eps = Tensor(np.array([eps], np.float32))
        self.forward = kernel(name, lambda x, nw, nb, e, w, *others: [x[0], w[0]], same)
        self.backward = kernel(f"{name}_grad", lambda x, nw, nb, e, w, g: (x, nw, nb, w), lambda *kinds: kinds[:1] * 4)
        self.backward_biased = kernel(
            f"{name}_grad", lambda x, nw, nb, e, w, g: (x, nw, nb, w, [w[0]]), lambda *kinds: kinds[:1] * 5
        )


@kernel_form(NormProduct)
class NormProductKernel(NormLinearKernel):
    """`NormProduct` with our kernel."""

    def construct(self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
        return self.forward(x, norm_weight, norm_bias, self.eps, weight)

    def bprop(
        self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, ...]:
        return self.backward(x, norm_weight, norm_bias, self.eps, weight, dout)


@kernel_form(NormAffine)
class NormAffineKernel(NormLinearKernel):
    """`NormAffine` with our kernel."""

    def construct(self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.forward(x, norm_weight, norm_bias, self.eps, weight, bias)

    def bprop(
        self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, ...]:
        return self.backward_biased(x, norm_weight, norm_bias, self.eps, weight, dout)


@kernel_form(Normalize)
class NormalizeKernel(nn.Cell):
    """`Normalize` with our kernel; returns the normalised rows only."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = Tensor(np.array([eps], np.float32))
        self.forward = kernel("layer_norm", lambda x, w, b, e: x, same)
        self.backward = kernel("layer_norm_grad", lambda x, w, b, e, g: (x, w, b), lambda x, *kinds: (x, x, x))

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (self.forward(x, weight, bias, self.eps),)

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Any, dout: Any) -> tuple[Tensor, ...]:
        return self.backward(x, weight, bias, self.eps, dout[0])


class Mix(nn.Cell):
    """The attention kernel: (outer, tokens, inner, 3, heads, dim) -> (outer, tokens, inner, heads, dim).

    Args:
        scale: factor of the scores.
        index: (tokens, tokens) int32, the entry of the position table for each query and key; None for no table.
    """

    def __init__(self, scale: float, index: np.ndarray | None):
        super().__init__()
        self.scale = Tensor(np.array([scale], np.float32))
        self.index = Tensor(np.zeros(1, np.int32) if index is None else index.astype(np.int32))
        self.forward = kernel("attention", lambda q, *others: [*q[:3], *q[4:]], same)
        self.kept = kernel(
            "attention",
            lambda q, *others: ([*q[:3], *q[4:]], [q[0], q[2], q[4], q[1], q[1]]),
            lambda q, *others: (q, q),
        )
        self.backward = kernel("attention_grad", lambda q, table, *others: (q, table), lambda q, *others: (q, q))

    def construct(self, qkv: Tensor, table: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Table (entries, heads) and mask (windows, tokens, tokens), each (1,) for none; training keeps the weights."""
        if not self.training:
            return (self.forward(qkv, table, self.index, mask, self.scale),)
        return self.kept(qkv, table, self.index, mask, self.scale)

    def bprop(self, qkv: Tensor, table: Tensor, mask: Tensor, out: Any, dout: Any) -> tuple[Tensor, ...]:
        inputs = (qkv, table, self.index, mask, self.scale)
        weights = out[1] if self.training else self.kept(*inputs)[1]
        qkv_grad, table_grad = self.backward(*inputs, weights, dout[0])
        return qkv_grad, table_grad, ops.zeros_like(mask)


@kernel_form(Attend)
class AttendKernel(nn.Cell):
    """`Attend` with our kernel, which looks up the position table itself."""

    def __init__(self, num_heads: int, scale: float, positions: Positions | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.none = Tensor(np.zeros(1, np.float32))
        self.mix = Mix(scale, None if positions is None else positions.index())

    def bias_of(self, table: Tensor) -> Tensor:
        return table

    def construct(
        self,
        qkv: Tensor,
        outer: int,
        tokens: int,
        inner: int,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        rows, width = qkv.shape
        parts = qkv.reshape(outer, tokens, inner, 3, self.num_heads, width // 3 // self.num_heads)
        mixed = self.mix(parts, self.none if bias is None else bias, self.none if mask is None else mask)
        return mixed[0].reshape(rows, width // 3)


class Cosine(nn.Cell):
    """qkv (rows, 3, heads, dim), factor (heads,) -> q of length factor, k of length 1, v."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = kernel("cosine", lambda x, f: x, same)
        self.backward = kernel("cosine_grad", lambda x, f, g: (x, f), lambda x, f, g: (x, x))

    def construct(self, qkv: Tensor, factor: Tensor) -> Tensor:
        return self.forward(qkv, factor)

    def bprop(self, qkv: Tensor, factor: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return self.backward(qkv, factor, dout)


@kernel_form(AttendCosine)
class AttendCosineKernel(AttendKernel):
    """`AttendCosine` with our kernels."""

    def __init__(self, num_heads: int, positions: Positions | None = None):
        super().__init__(num_heads, 1.0, positions)
        self.cosine = Cosine()

    def construct(  # type: ignore[override] # one argument more
        self,
        qkv: Tensor,
        factor: Tensor,
        outer: int,
        tokens: int,
        inner: int,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        rows, width = qkv.shape
        parts = self.cosine(qkv.reshape(rows, 3, self.num_heads, -1), factor.reshape(-1))
        return super().construct(parts.reshape(rows, width), outer, tokens, inner, bias, mask)


@kernel_form(GlobalNorm)
class GlobalNormKernel(nn.Cell):
    """`GlobalNorm` with our kernel."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.squares = kernel("square_sum", lambda *shapes: [1], same)
        self.sqrt = ops.Sqrt()

    def construct(self, grads: tuple[Tensor, ...]) -> Tensor:
        return self.sqrt(self.squares(*grads)).reshape(())


@kernel_form(AdamWUpdate)
class AdamWUpdateKernel(AdamWUpdate):
    """`AdamWUpdate` with our kernel."""

    def __init__(self, betas: tuple[float, float], group_of: list[int], *state: ParameterTuple):
        super().__init__(betas, group_of, *state)
        self.betas = Tensor(np.array(betas, np.float32))
        self.groups = Tensor(np.array(group_of, np.int32))
        self.one, self.never = Tensor(np.ones(1, np.float32)), Tensor(np.zeros(1, np.float32))
        count = len(self.weights)
        update = kernel("adamw", lambda *shapes: [1], same)
        self.update = writing(update, *[False] * 5, *[True] * (3 * count), *[False] * count)

    def construct(self, values: Tensor, factor: Tensor | None, grads: tuple[Tensor, ...]) -> Tensor:
        scale = self.one if factor is None else factor.reshape(1)
        state = (*self.weights, *self.first, *self.second)
        return self.update(values, self.betas, self.groups, scale, self.never, *state, *grads)
