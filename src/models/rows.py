"""Linear, layer norm, GELU and softmax on rows, with a form for CPU and one for other devices.

On Ascend and GPU these are MindSpore's operations and gradients. On CPU those are slow or need much memory for four
reasons (MindSpore 2.10, measured with benchmarks/step.py):

- An element-wise operation that broadcasts holds 16 bytes of index lists per output element as long as the graph
  lives. So broadcasts are written as `tile` or BiasAdd.
- BiasAddGrad and sums over rows take as long as the matrix product next to them. So they are products with ones.
- A transposition is slow and holds 8 bytes per element as long as the graph lives. So heads are split and concatenated
  instead, and axes are swapped by unstacking one and stacking the pieces along the other.
- The gradients of LayerNorm and GELU take several times their forward pass. So they are written out here.

Both forms give the same numbers (tests/test_models.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import mindspore as ms
from mindspore import Tensor, nn, ops


def on_cpu() -> bool:
    """Whether cells are built for the CPU."""
    return bool(ms.get_context("device_target") == "CPU")


Form = TypeVar("Form", bound=type)
#: operation -> its CPU form
_CPU_FORMS: dict[type, type] = {}


def cpu_form(operation: type) -> Callable[[Form], Form]:
    """Register a class as the CPU form of an operation."""

    def register(form: Form) -> Form:
        _CPU_FORMS[operation] = form
        return form

    return register


def build(operation: type, *arguments: Any) -> nn.Cell:
    """A cell of an operation, in the form for the current device; forms are chosen nowhere else."""
    return (_CPU_FORMS.get(operation, operation) if on_cpu() else operation)(*arguments)


class Affine(nn.Cell):
    """(rows, in), weight (out, in), bias (out,) -> (rows, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)
        self.bias_add = ops.BiasAdd()

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.bias_add(self.matmul(x, weight), bias)


@cpu_form(Affine)
class AffineCPU(Affine):
    """`Affine` with the bias gradient as a product with ones."""

    def __init__(self) -> None:
        super().__init__()
        self.product = ops.MatMul()
        self.weight_gradient = ops.MatMul(transpose_a=True)
        self.ones = ops.Ones()

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        rows = self.ones((1, dout.shape[0]), dout.dtype)
        return self.product(dout, weight), self.weight_gradient(dout, x), self.product(rows, dout).reshape(-1)


class ChannelAffine(nn.Cell):
    """`Affine` over the middle axis: x (B, in, n), weight (out, in), bias (out,) -> (B, out, n)."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.BatchMatMul()
        self.bias_add = ops.BiasAdd()
        self.tile = ops.Tile()

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weights = self.tile(weight.expand_dims(0), (x.shape[0], 1, 1))
        return self.bias_add(self.matmul(weights, x), bias)


@cpu_form(ChannelAffine)
class ChannelAffineCPU(ChannelAffine):
    """`ChannelAffine` with the bias gradient as a product with ones."""

    def __init__(self) -> None:
        super().__init__()
        self.input_gradient = ops.BatchMatMul(transpose_a=True)
        self.weight_gradient = ops.BatchMatMul(transpose_b=True)
        self.ones = ops.Ones()

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        batch, _, count = dout.shape
        weights = self.tile(weight.expand_dims(0), (batch, 1, 1))
        column = self.ones((batch, count, 1), dout.dtype)
        return (
            self.input_gradient(weights, dout),
            self.weight_gradient(dout, x).sum(axis=0),
            self.matmul(dout, column).sum(axis=0).reshape(-1),
        )


class Normalize(nn.Cell):
    """Layer norm of rows: x (rows, dim), weight and bias (dim,) -> (rows, dim)."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.norm = ops.LayerNorm(-1, -1, eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the normalised rows, their means and their variances."""
        return self.norm(x, weight, bias)


@cpu_form(Normalize)
class NormalizeCPU(Normalize):
    """`Normalize` with its gradient written out."""

    def __init__(self, eps: float):
        super().__init__(eps)
        self.product = ops.MatMul()
        self.tile = ops.Tile()
        self.ones = ops.Ones()
        self.mean = ops.ReduceMean(keep_dims=True)
        self.rsqrt = ops.Rsqrt()

    def bprop(self, x: Tensor, weight: Tensor, bias: Tensor, out: Any, dout: Any) -> tuple[Tensor, ...]:
        grad = dout[0]
        rows, dim = x.shape
        scale = self.rsqrt(out[2].reshape(rows, 1) + self.eps)
        wide = self.tile(scale, (1, dim))
        unit = (x - self.tile(out[1].reshape(rows, 1), (1, dim))) * wide
        ones = self.ones((1, rows), x.dtype)
        weight_grad = self.product(ones, grad * unit).reshape(-1)
        bias_grad = self.product(ones, grad).reshape(-1)
        inner = grad * self.tile(weight.reshape(1, dim), (rows, 1))
        mean = self.mean(inner, -1)
        slope = self.mean(inner * unit, -1)
        inner = inner - self.tile(mean, (1, dim)) - unit * self.tile(slope, (1, dim))
        return inner * wide, weight_grad, bias_grad


class ExactGelu(nn.Cell):
    """x -> x * Phi(x) with the error function, and Phi(x), which the gradient needs."""

    def __init__(self) -> None:
        super().__init__()
        self.erf, self.exp = ops.Erf(), ops.Exp()

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        phi = self.erf(x * math.sqrt(0.5)) * 0.5 + 0.5
        return x * phi, phi


@cpu_form(ExactGelu)
class ExactGeluCPU(ExactGelu):
    """`ExactGelu` whose gradient reuses Phi(x), since the error function is the slowest element-wise operation."""

    def bprop(self, x: Tensor, out: Any, dout: Any) -> tuple[Tensor]:
        density = self.exp(x * x * -0.5) * (1.0 / math.sqrt(2.0 * math.pi))
        return (dout[0] * (out[1] + x * density),)


class Softmax(nn.Cell):
    """Softmax over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = ops.Softmax(-1)

    def construct(self, x: Tensor) -> Tensor:
        return self.softmax(x)


@cpu_form(Softmax)
class SoftmaxCPU(Softmax):
    """`Softmax` whose gradient does not broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.tile, self.sum = ops.Tile(), ops.ReduceSum()

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        dim = out.shape[-1]
        weighted = out * dout
        total = self.sum(weighted, -1).reshape(-1, 1)
        return (weighted - out * self.tile(total, (1, dim)).reshape(out.shape),)


class SplitHeads(nn.Cell):
    """Rows (B*N, C) -> (B, heads, N, C / heads)."""

    def construct(self, x: Tensor, batch: int, tokens: int, heads: int) -> Tensor:
        return x.reshape(batch, tokens, heads, x.shape[1] // heads).transpose(0, 2, 1, 3)


@cpu_form(SplitHeads)
class SplitHeadsCPU(SplitHeads):
    """`SplitHeads` without a transposition."""

    def construct(self, x: Tensor, batch: int, tokens: int, heads: int) -> Tensor:
        dim = x.shape[1]
        if heads == 1:
            return x.reshape(batch, 1, tokens, dim)
        return ops.stack(ops.split(x.reshape(batch, tokens, dim), dim // heads, -1), 1)


class SwapMiddle(nn.Cell):
    """(A, M, N, C) -> (A, N, M, C); `known` is axis 1 or 2, whichever has a fixed size in every export."""

    def construct(self, x: Tensor, known: int) -> Tensor:
        return x.transpose(0, 2, 1, 3)


@cpu_form(SwapMiddle)
class SwapMiddleCPU(SwapMiddle):
    """`SwapMiddle` without a transposition."""

    def construct(self, x: Tensor, known: int) -> Tensor:
        if x.shape[known] == 1:  # unstacking a single piece fails in some gradients
            return x.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3])
        return ops.stack(ops.unstack(x, known), 3 - known)


class JoinHeads(nn.Cell):
    """(B, heads, N, D) -> rows (B*N, heads * D)."""

    def construct(self, x: Tensor) -> Tensor:
        batch, heads, tokens, dim = x.shape
        return x.transpose(0, 2, 1, 3).reshape(batch * tokens, heads * dim)


@cpu_form(JoinHeads)
class JoinHeadsCPU(JoinHeads):
    """`JoinHeads` without a transposition."""

    def construct(self, x: Tensor) -> Tensor:
        batch, heads, tokens, dim = x.shape
        if heads == 1:
            return x.reshape(batch * tokens, dim)
        return ops.cat(ops.unstack(x, 1), -1).reshape(batch * tokens, heads * dim)


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """x (rows, dim) times factor (rows, 1)."""
    return x * ops.tile(factor, (1, x.shape[1]))


def scale_columns(x: Tensor, factor: Tensor) -> Tensor:
    """x (rows, dim) times factor (dim,)."""
    return x * ops.tile(factor.reshape(1, -1), (x.shape[0], 1))
