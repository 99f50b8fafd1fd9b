"""Linear, layer norm, GELU and attention on rows, with a form for CPU and one for other devices.

On Ascend and GPU these are MindSpore's operations and gradients. On CPU those are slow or need much memory for four
reasons (MindSpore 2.10, measured with benchmarks/step.py):

- An element-wise operation that broadcasts holds 16 bytes of index lists per output element as long as the graph
  lives. So broadcasts are written as `tile` or BiasAdd.
- BiasAddGrad and sums over rows take as long as the matrix product next to them. So they are products with ones.
- A transposition is slow and holds 8 bytes per element as long as the graph lives. So heads are split and concatenated
  instead, and axes are swapped by unstacking one and stacking the pieces along the other.
- The gradients of LayerNorm and GELU take several times their forward pass. So they are written out here.

The forms with our own kernels are in `kernels.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops

from .forms import build, cpu_form, stateless


@stateless
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


@stateless
class Product(nn.Cell):
    """`Affine` without bias: (rows, in), weight (out, in) -> (rows, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.matmul(x, weight)


@stateless
class AffineOnto(nn.Cell):
    """`Affine` plus rows of the same shape, as at the end of a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.affine = build(Affine)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, onto: Tensor) -> Tensor:
        """(rows, in), weight (out, in), bias (out,), onto (rows, out) -> (rows, out)."""
        return onto + self.affine(x, weight, bias)


@stateless
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


@stateless
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


@stateless
class NormAffine(nn.Cell):
    """`Affine` of the layer norm of x."""

    def __init__(self, eps: float):
        super().__init__()
        self.normalize = build(Normalize, eps)
        self.affine = build(Affine)

    def construct(self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(rows, in), (in,), (in,), weight (out, in), bias (out,) -> (rows, out)."""
        return self.affine(self.normalize(x, norm_weight, norm_bias)[0], weight, bias)


@stateless
class NormProduct(nn.Cell):
    """`Product` of the layer norm of x."""

    def __init__(self, eps: float):
        super().__init__()
        self.normalize = build(Normalize, eps)
        self.product = build(Product)

    def construct(self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
        """(rows, in), (in,), (in,), weight (out, in) -> (rows, out)."""
        return self.product(self.normalize(x, norm_weight, norm_bias)[0], weight)


@stateless
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


@stateless
class GeluAffine(nn.Cell):
    """`Affine` of the exact GELU of x."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = build(ExactGelu)
        self.affine = build(Affine)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(rows, in), weight (out, in), bias (out,) -> (rows, out)."""
        return self.affine(self.gelu(x)[0], weight, bias)


@stateless
class GeluAffineOnto(nn.Cell):
    """`AffineOnto` of the exact GELU of x."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = build(ExactGelu)
        self.affine = build(AffineOnto)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, onto: Tensor) -> Tensor:
        """(rows, in), weight (out, in), bias (out,), onto (rows, out) -> (rows, out)."""
        return self.affine(self.gelu(x)[0], weight, bias, onto)


@stateless
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


@stateless
class SplitHeads(nn.Cell):
    """Rows (B*N, C) -> (B, heads, N, C / heads)."""

    def construct(self, x: Tensor, batch: int, tokens: int, heads: int) -> Tensor:
        return x.reshape(batch, tokens, heads, x.shape[1] // heads).transpose(0, 2, 1, 3)


@cpu_form(SplitHeads)
class SplitHeadsCPU(SplitHeads):
    """`SplitHeads` without a transposition."""

    def construct(self, x: Tensor, batch: int, tokens: int, heads: int) -> Tensor:
        return split_heads(x, batch, tokens, heads)


def split_heads(x: Tensor, batch: int, tokens: int, heads: int) -> Tensor:
    """Rows (B*N, C) -> (B, heads, N, C / heads) without a transposition."""
    dim = x.shape[1]
    if heads == 1:
        return x.reshape(batch, 1, tokens, dim)
    return ops.stack(ops.split(x.reshape(batch, tokens, dim), dim // heads, -1), 1)


class Positions(nn.Cell):
    """A position table (entries, heads) -> the bias of every query and key (heads, tokens, tokens)."""

    def construct(self, table: Tensor) -> Tensor:
        raise NotImplementedError

    def index(self) -> np.ndarray:
        """The entry of each query and key, (tokens, tokens)."""
        raise NotImplementedError


class HeadScores(nn.Cell):
    """The parts of attention before and after its weights, on rows (outer*tokens*inner, C).

    Attention is among the tokens of each pair (outer, inner). A ViT has outer = images and inner = 1, a Swin, whose
    sequences are (N, B, C), outer = windows and inner = images.

    Args:
        num_heads: attention heads.
        scale: factor of the scores.
    """

    def __init__(self, num_heads: int, scale: float):
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.product = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = build(Softmax)

    def scores(self, qkv: Tensor, outer: int, tokens: int, inner: int = 1) -> tuple[Tensor, Tensor]:
        """Rows (outer*tokens*inner, 3C) -> scores (outer*inner, heads, tokens, tokens), v (.., heads, tokens, dim)."""
        q, k, v = self.heads(qkv, outer, tokens, inner)
        return self.product(q * self.scale, k), v

    def mixed(self, weights: Tensor, v: Tensor, outer: int, inner: int = 1) -> Tensor:
        """Weights and v -> rows (outer*tokens*inner, C)."""
        return self.rows(self.mix(weights, v), outer, inner)

    def heads(self, qkv: Tensor, outer: int, tokens: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (outer*tokens*inner, 3C) -> q, k, v (outer*inner, heads, tokens, dim)."""
        dim = qkv.shape[1] // 3 // self.num_heads
        parts = qkv.reshape(outer, tokens, inner, 3, self.num_heads, dim).transpose(3, 0, 2, 4, 1, 5)
        parts = parts.reshape(3, outer * inner, self.num_heads, tokens, dim)
        return parts[0], parts[1], parts[2]

    def rows(self, mixed: Tensor, outer: int, inner: int) -> Tensor:
        """(outer*inner, heads, tokens, dim) -> rows (outer*tokens*inner, C)."""
        _, heads, tokens, dim = mixed.shape
        parts = mixed.reshape(outer, inner, heads, tokens, dim).transpose(0, 3, 1, 2, 4)
        return parts.reshape(outer * tokens * inner, heads * dim)


class WithoutTranspositions:
    """The parts of `HeadScores` for MindSpore's operations on CPU."""

    num_heads: int

    def heads(self, qkv: Tensor, outer: int, tokens: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
        width = qkv.shape[1]
        q, k, v = _SPLIT(swap_middle(qkv.reshape(outer, tokens, inner, width), 1).reshape(-1, width))
        count, heads = outer * inner, self.num_heads
        return (
            split_heads(q, count, tokens, heads),
            split_heads(k, count, tokens, heads),
            split_heads(v, count, tokens, heads),
        )

    def rows(self, mixed: Tensor, outer: int, inner: int) -> Tensor:
        _, heads, tokens, dim = mixed.shape
        joined = ops.cat(ops.unstack(mixed, 1), -1) if heads > 1 else mixed
        joined = swap_middle(joined.reshape(outer, inner, tokens, heads * dim), 2)
        return joined.reshape(outer * tokens * inner, heads * dim)


_SPLIT = ops.Split(-1, 3)


@cpu_form(HeadScores)
class HeadScoresCPU(WithoutTranspositions, HeadScores):
    """`HeadScores` without transpositions."""


class Attend(HeadScores):
    """Softmax attention of all heads, from q, k and v on rows: (outer*tokens*inner, 3C) -> (outer*tokens*inner, C).

    Args:
        num_heads, scale: as in `HeadScores`.
        positions: of the position table, if there is one.
    """

    def __init__(self, num_heads: int, scale: float, positions: Positions | None = None):
        super().__init__(num_heads, scale)
        self.positions: Any = positions

    def bias_of(self, table: Tensor) -> Tensor:
        """Position table (entries, heads) -> the argument `bias` of `construct`."""
        return self.positions(table)

    def construct(
        self,
        qkv: Tensor,
        outer: int,
        tokens: int,
        inner: int,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention.

        Args:
            qkv: rows in the order (outer, tokens, inner); q, k and v side by side, each (heads, dim).
            outer, tokens, inner: sizes.
            bias: of `bias_of`, added to the scores.
            mask: (windows, tokens, tokens), a constant, added to the scores of outer = window.
        """
        scores, v = self.scores(qkv, outer, tokens, inner)
        return self.mixed(self.softmax(self.added(scores, inner, bias, mask)), v, outer, inner)

    def added(self, scores: Tensor, inner: int, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """Scores (outer*inner, heads, tokens, tokens) plus bias and mask."""
        if mask is None:
            return scores if bias is None else scores + ops.tile(bias.expand_dims(0), (scores.shape[0], 1, 1, 1))
        extra = ops.tile(mask.expand_dims(1), (1, self.num_heads, 1, 1))
        if bias is not None:
            extra = extra + ops.tile(bias.expand_dims(0), (mask.shape[0], 1, 1, 1))
        return scores + ops.tile(extra.expand_dims(1), (1, inner, 1, 1, 1)).reshape(scores.shape)


@cpu_form(Attend)
class AttendCPU(WithoutTranspositions, Attend):
    """`Attend` without transpositions."""


def swap_middle(x: Tensor, known: int) -> Tensor:
    """(A, M, N, C) -> (A, N, M, C) without a transposition.

    `known` is axis 1 or 2, whichever has a fixed size in every export.
    """
    other = x.shape[3 - known]
    single = ops.isconstant(other) and other == 1  # a branch on a size that varies cannot be exported
    if single or x.shape[known] == 1:  # unstacking a single piece fails in some gradients
        return x.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3])
    return ops.stack(ops.unstack(x, known), 3 - known)


class AttendCosine(Attend):
    """`Attend` whose scores are cosines times a factor of each head (Swin V2).

    Args:
        num_heads, positions: as in `Attend`.
    """

    def __init__(self, num_heads: int, positions: Positions | None = None):
        super().__init__(num_heads, 1.0, positions)

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
        """As in `Attend`, with `factor` (heads,)."""
        q, k, v = self.heads(qkv, outer, tokens, inner)
        count, heads, tokens, dim = q.shape
        q = direction(q) * ops.tile(factor.reshape(1, heads, 1, 1), (count, 1, tokens, dim))
        weights = self.softmax(self.added(self.product(q, direction(k)), inner, bias, mask))
        return self.mixed(weights, v, outer, inner)


@cpu_form(AttendCosine)
class AttendCosineCPU(WithoutTranspositions, AttendCosine):
    """`AttendCosine` without transpositions."""


def direction(x: Tensor) -> Tensor:
    """Vectors along the last axis, scaled to length 1 (PyTorch's normalize, eps 1e-12)."""
    square = ops.maximum((x * x).sum(axis=-1, keepdims=True), 1e-24)  # the root of zero has no gradient
    return x / ops.tile(ops.sqrt(square), (1, 1, 1, x.shape[-1]))


@stateless
class SwapMiddle(nn.Cell):
    """(A, M, N, C) -> (A, N, M, C); `known` as in `swap_middle`."""

    def construct(self, x: Tensor, known: int) -> Tensor:
        return x.transpose(0, 2, 1, 3)


@cpu_form(SwapMiddle)
class SwapMiddleCPU(SwapMiddle):
    """`SwapMiddle` without a transposition."""

    def construct(self, x: Tensor, known: int) -> Tensor:
        return swap_middle(x, known)


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """x (rows, dim) times factor (rows, 1)."""
    return x * ops.tile(factor, (1, x.shape[1]))


def scale_columns(x: Tensor, factor: Tensor) -> Tensor:
    """x (rows, dim) times factor (dim,)."""
    return x * ops.tile(factor.reshape(1, -1), (x.shape[0], 1))
