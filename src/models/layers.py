"""The layers all encoders and decoders share, written for MindSpore's graph mode.

Why not the built-in cells: Conv2d with stride = kernel and 5-D indexing are many times slower on CPU than the matrix
products they stand for, and nn.GELU, nn.LayerNorm and nn.Dense have defaults that differ from the references (tanh
GELU, epsilon 1e-7, random bias). `rows.py` has the operations whose best form depends on the device.
"""

from __future__ import annotations

import math

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import (
    Constant,
    Initializer,
    TruncatedNormal,
    Uniform,
    XavierUniform,
    initializer,
)

from . import rows
from .random import CounterUniform


def parameter(init: str | Initializer, *shape: int, requires_grad: bool = True) -> Parameter:
    """A float32 parameter; its name comes from the cell tree."""
    return Parameter(initializer(init, shape), requires_grad=requires_grad)


def trunc_normal(std: float = 0.02) -> Initializer:
    """Normal cut at +-2 in absolute value, as timm's trunc_normal_ cuts it (no effect for small std)."""
    return TruncatedNormal(std, 0.0, -2.0, 2.0)


def weight_init(name: str, block: int = 0) -> tuple[Initializer, Initializer]:
    """Initial weights of a block's linear layers, and of the two that end its branches (attn.proj, mlp.fc2).

    Args:
        name: `init` of the encoder's configuration.
        block: number of the block, for `scaled` (BEiT's fix_init_weight; SimMIM models/vision_transformer.py).
    """
    if name == "xavier":
        return XavierUniform(), XavierUniform()
    return trunc_normal(), trunc_normal(0.02 / math.sqrt(2 * (block + 1)) if name == "scaled" else 0.02)


class Linear(nn.Cell):
    """y = x W^T + b on rows: (rows, in_dim) -> (rows, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True, init: str | Initializer | None = None):
        super().__init__()
        self.weight = parameter(init or XavierUniform(), out_dim, in_dim)
        self.bias = parameter("zeros", out_dim) if bias else None
        self.affine = rows.build(rows.Affine) if bias else ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        return self.affine(x, self.weight) if self.bias is None else self.affine(x, self.weight, self.bias)


class LayerNorm(nn.Cell):
    """Layer normalisation over the last axis of (rows, dim), biased variance."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = parameter("ones", dim)
        self.bias = parameter("zeros", dim)
        self.normalize = rows.build(rows.Normalize, eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight, self.bias)[0]


class Gelu(nn.Cell):
    """GELU with the exact error function (nn.GELU() is the tanh approximation)."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = rows.build(rows.ExactGelu)

    def construct(self, x: Tensor) -> Tensor:
        return self.gelu(x)[0]


class Mlp(nn.Cell):
    """Two linear layers with a GELU between, on (rows, dim); `init` as `weight_init` gives it."""

    def __init__(self, dim: int, hidden: int, init: tuple[Initializer, Initializer]):
        super().__init__()
        self.fc1 = Linear(dim, hidden, init=init[0])
        self.act = Gelu()
        self.fc2 = Linear(hidden, dim, init=init[1])

    def construct(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Cell):
    """Multi-head self-attention; one product makes q, k and v, split on the last axis.

    Args:
        dim, num_heads: width and heads.
        qkv_bias: biases of q, k and v.
        k_bias: False leaves out that of k (BEiT, SimMIM's ViT).
        table: entries of a relative position table of its own, 0 for none.
        init: weights, as `weight_init` gives them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        k_bias: bool = True,
        table: int = 0,
        init: tuple[Initializer, Initializer] | None = None,
    ):
        super().__init__()
        init = init or weight_init("xavier")
        self.q_bias = parameter("zeros", dim) if qkv_bias and not k_bias else None
        self.v_bias = parameter("zeros", dim) if qkv_bias and not k_bias else None
        self.relative_position_bias_table = parameter("zeros", table, num_heads) if table else None
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias and k_bias, init=init[0])
        self.proj = Linear(dim, dim, init=init[1])
        self.split = ops.Split(-1, 3)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = rows.build(rows.Softmax)
        self.bias_add = ops.BiasAdd()
        self.split_heads, self.join_heads = rows.build(rows.SplitHeads), rows.build(rows.JoinHeads)

    def construct(self, x: Tensor, batch: int, tokens: int, bias: Tensor | None = None) -> Tensor:
        """(B*N, C) and a bias of the scores (heads, N, N) or None -> (B*N, C)."""
        q, k, v = self.split(self.qkv(x))
        if self.q_bias is not None:
            q, v = self.bias_add(q, self.q_bias), self.bias_add(v, self.v_bias)
        scores = self.scores(
            self.split_heads(q * self.scale, batch, tokens, self.num_heads),
            self.split_heads(k, batch, tokens, self.num_heads),
        )
        if bias is not None:
            scores = scores + ops.tile(bias.expand_dims(0), (batch, 1, 1, 1))
        mixed = self.mix(self.shares(scores), self.split_heads(v, batch, tokens, self.num_heads))
        return self.proj(self.join_heads(mixed))

    def shares(self, scores: Tensor) -> Tensor:
        """Scores (B, heads, N, N) -> what each token takes of each other."""
        return self.softmax(scores)


class Block(nn.Cell):
    """Pre-norm transformer block on (B*N, C) rows.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, k_bias: sizes and biases.
        norm_eps: epsilon of the norms.
        layer_scale: initial value of the factors on both branches, 0 for none.
        table: entries of the attention's own relative position table, 0 for none.
        init: weights, as `weight_init` gives them; Xavier if left out.
        attention: in place of the usual one, which then `qkv_bias`, `k_bias` and `table` say nothing about.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        k_bias: bool = True,
        norm_eps: float = 1e-6,
        layer_scale: float = 0.0,
        table: int = 0,
        init: tuple[Initializer, Initializer] | None = None,
        attention: nn.Cell | None = None,
    ):
        super().__init__()
        init = init or weight_init("xavier")
        self.gamma_1 = parameter(Constant(layer_scale), dim) if layer_scale else None
        self.gamma_2 = parameter(Constant(layer_scale), dim) if layer_scale else None
        self.norm1 = LayerNorm(dim, norm_eps)
        self.attn = attention or Attention(dim, num_heads, qkv_bias, k_bias, table, init)
        self.norm2 = LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), init)

    def construct(
        self,
        x: Tensor,
        batch: int,
        tokens: int,
        keep: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """`keep`: factors (B*N, 1) on the two branches (stochastic depth), `bias`: of the attention scores."""
        return self.join(x, self.attn(self.norm1(x), batch, tokens, bias), keep)

    def join(self, x: Tensor, attended: Tensor, keep: tuple[Tensor, Tensor] | None) -> Tensor:
        """Both branches on top of x (rows, C), given what its attention says."""
        if self.gamma_1 is not None:
            attended = rows.scale_columns(attended, self.gamma_1)
        x = x + (attended if keep is None else rows.scale_rows(attended, keep[0]))
        hidden = self.mlp(self.norm2(x))
        if self.gamma_2 is not None:
            hidden = rows.scale_columns(hidden, self.gamma_2)
        return x + (hidden if keep is None else rows.scale_rows(hidden, keep[1]))


class PatchEmbed(nn.Cell):
    """Non-overlapping patches as one matrix product (a convolution with stride = kernel).

    Args:
        in_chans, patch_size, dim: sizes.
        norm_eps: epsilon of a norm on the tokens, 0 for none.
        xavier: weights start as MAE starts them, else as PyTorch starts a convolution.
    """

    def __init__(self, in_chans: int, patch_size: int, dim: int, norm_eps: float = 0.0, xavier: bool = False):
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(in_chans, patch_size, dim, xavier)
        self.norm = LayerNorm(dim, norm_eps) if norm_eps else None

    def construct(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, N, dim), patches in row order."""
        batch, chans, height, width = image.shape
        p = self.patch_size
        patches = image.reshape(batch, chans, height // p, p, width // p, p).transpose(0, 2, 4, 1, 3, 5)
        flat = patches.reshape(batch * (height // p) * (width // p), chans * p * p)
        tokens = self.proj(flat) if self.norm is None else self.norm(self.proj(flat))
        return tokens.reshape(batch, (height // p) * (width // p), -1)


class PatchProjection(nn.Cell):
    """The weights of `PatchEmbed` in the references' convolution layout (dim, in_chans, p, p).

    The bias starts as PyTorch's, which all references leave alone. With zeros the tokens of a masked, hence constant
    patch would hardly differ between channels, and the norm behind would blow their noise up.
    """

    def __init__(self, in_chans: int, patch_size: int, dim: int, xavier: bool):
        super().__init__()
        fan_in = in_chans * patch_size**2
        bound = math.sqrt(6.0 / (fan_in + dim)) if xavier else fan_in**-0.5
        self.weight = parameter(Uniform(bound), dim, in_chans, patch_size, patch_size)
        self.bias = parameter(Uniform(fan_in**-0.5), dim)
        self.affine = rows.build(rows.Affine)

    def construct(self, x: Tensor) -> Tensor:
        return self.affine(x, self.weight.reshape(self.weight.shape[0], -1), self.bias)


class DropPath(nn.Cell):
    """Stochastic depth: which samples skip which branch, drawn once for the whole encoder.

    Args:
        rate: rate of the last block; block i of n has rate * i / (n - 1) (timm's linspace).
        depth: number of blocks, two branches each.
        constant: every block has that rate (CaiT).
    """

    def __init__(self, rate: float, depth: int, constant: bool = False):
        super().__init__()
        rates = np.repeat(np.linspace(rate if constant else 0, rate, depth), 2).reshape(depth, 2, 1)
        self.keep_prob = Tensor((1 - rates).astype(np.float32))
        self.uniform = CounterUniform("drop path")

    def construct(self, batch: int) -> Tensor:
        """Factors (depth, 2, B): 0 where a sample skips the branch, else 1 / keep probability."""
        depth = self.keep_prob.shape[0]
        noise = self.uniform(batch, 2 * depth).transpose(1, 0).reshape(depth, 2, batch)
        return (noise < self.keep_prob).astype(mindspore.float32) / self.keep_prob

    def of_rows(self, batch: int, length: int) -> Tensor:
        """The same for each row of (B*length, C): (depth, 2, B*length, 1)."""
        factors = ops.tile(self.construct(batch).expand_dims(-1), (1, 1, 1, length))
        return factors.reshape(self.keep_prob.shape[0], 2, batch * length, 1)


def sincos_position(dim: int, grid: tuple[int, int], class_token: bool) -> np.ndarray:
    """Fixed 2-D sine-cosine table (1, [1 +] rows*cols, dim), class-token row zero (MAE util/pos_embed.py).

    The first half of the channels encodes the column, the second half the row: sines then cosines of position /
    10000^(i / (dim/4)), computed in float64.
    """
    rows, cols = grid
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    row, col = np.meshgrid(np.arange(rows, dtype=np.float64), np.arange(cols, dtype=np.float64), indexing="ij")
    halves = []
    for position in (col, row):
        angle = position.reshape(-1, 1) * omega
        halves.append(np.concatenate([np.sin(angle), np.cos(angle)], axis=1))
    table = np.concatenate(halves, axis=1)
    if class_token:
        table = np.concatenate([np.zeros((1, dim)), table])
    return table[None].astype(np.float32)
