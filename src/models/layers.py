"""Layers of encoders and decoders, for MindSpore's graph mode.

MindSpore's own cells are not used: on CPU, Conv2d with stride = kernel and 5-D indexing are many times slower than the
same matrix products, and nn.GELU, nn.LayerNorm and nn.Dense have other defaults than the references (tanh GELU,
epsilon 1e-7, random bias). Operations whose fastest form depends on the device are in `src/operations`.
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

from ..operations import rows
from ..operations.forms import build
from .random import CounterUniform


def parameter(init: str | Initializer, *shape: int, requires_grad: bool = True) -> Parameter:
    """A float32 parameter; the cell that holds it gives it its name."""
    return Parameter(initializer(init, shape), requires_grad=requires_grad)


def trunc_normal(std: float = 0.02) -> Initializer:
    """Normal distribution cut at +-2 as in timm's trunc_normal_ (no effect for small std)."""
    return TruncatedNormal(std, 0.0, -2.0, 2.0)


def weight_init(name: str, block: int = 0) -> tuple[Initializer, Initializer]:
    """Initialisers of a block: of its linear layers, and of the last ones in its branches (attn.proj, mlp.fc2).

    Args:
        name: `init` of the encoder's configuration.
        block: number of the block; only `scaled` uses it (BEiT's fix_init_weight; SimMIM models/vision_transformer.py).
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
        self.affine = build(rows.Affine if bias else rows.Product)
        self.affine_onto = build(rows.AffineOnto)

    def construct(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """The result is added to `onto` (rows, out_dim), if it is given."""
        if self.bias is None:
            product = self.affine(x, self.weight)
            return product if onto is None else onto + product
        if onto is None:
            return self.affine(x, self.weight, self.bias)
        return self.affine_onto(x, self.weight, self.bias, onto)


class LayerNorm(nn.Cell):
    """Layer normalisation over the last axis of (rows, dim), biased variance."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = parameter("ones", dim)
        self.bias = parameter("zeros", dim)
        self.normalize = build(rows.Normalize, eps)
        self.norm_affine = build(rows.NormAffine, eps)
        self.norm_product = build(rows.NormProduct, eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.normalize(x, self.weight, self.bias)[0]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A linear layer, of this weight and bias, of the normalised rows."""
        if bias is None:
            return self.norm_product(x, self.weight, self.bias, weight)
        return self.norm_affine(x, self.weight, self.bias, weight, bias)


class Mlp(nn.Cell):
    """Two linear layers with an exact GELU between, on (rows, dim); `init` from `weight_init`."""

    def __init__(self, dim: int, hidden: int, init: tuple[Initializer, Initializer]):
        super().__init__()
        self.fc1 = Linear(dim, hidden, init=init[0])
        self.fc2 = Linear(hidden, dim, init=init[1])
        self.gelu_affine = build(rows.GeluAffine)
        self.gelu_affine_onto = build(rows.GeluAffineOnto)

    def construct(self, x: Tensor) -> Tensor:
        return self.second(self.fc1(x))

    def second(self, hidden: Tensor, onto: Tensor | None = None) -> Tensor:
        """GELU and the second layer: (rows, hidden) -> (rows, dim), added to `onto` if it is given."""
        if onto is None:
            return self.gelu_affine(hidden, self.fc2.weight, self.fc2.bias)
        return self.gelu_affine_onto(hidden, self.fc2.weight, self.fc2.bias, onto)


class Attention(nn.Cell):
    """Multi-head self-attention; one matrix product computes q, k and v.

    Args:
        dim, num_heads: width and heads.
        qkv_bias: whether q, k and v have biases.
        k_bias: False omits the bias of k (BEiT, SimMIM's ViT).
        positions: of the relative position bias, if there is one.
        table: entries of the layer's own relative position table, 0 for none.
        init: initialisers from `weight_init`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        k_bias: bool = True,
        positions: rows.Positions | None = None,
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
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias and k_bias, init=init[0])
        self.proj = Linear(dim, dim, init=init[1])
        self.attend = self.build_attend(positions)

    def build_attend(self, positions: rows.Positions | None) -> nn.Cell:
        return build(rows.Attend, self.num_heads, self.head_dim**-0.5, positions)

    def qkv_bias(self) -> Tensor | None:
        """The bias of q, k and v, (3C,)."""
        return self.qkv.bias if self.q_bias is None else without_k(self.q_bias, self.v_bias)

    def construct(
        self, qkv: Tensor, batch: int, tokens: int, bias: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        """Attention and projection.

        Args:
            qkv: output of the layer `qkv` (B*N, 3C).
            batch, tokens: B and N.
            bias: of a table that layers share, from `attend.bias_of`.
            onto: (B*N, C), what the result (B*N, C) is added to, or None.
        """
        if self.relative_position_bias_table is not None:
            bias = self.attend.bias_of(self.relative_position_bias_table)
        return self.proj(self.attend(qkv, batch, tokens, 1, bias), onto)


def without_k(q_bias: Tensor, v_bias: Tensor) -> Tensor:
    """The bias of q, k and v, (3C,), if k has none."""
    return ops.cat((q_bias, ops.zeros_like(v_bias), v_bias))


class Block(nn.Cell):
    """Pre-norm transformer block on (B*N, C) rows.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, k_bias: sizes and biases.
        norm_eps: epsilon of the norms.
        layer_scale: initial value of the layer scale of both branches, 0 for none.
        positions, table: as in `Attention`.
        init: initialisers from `weight_init`; Xavier if omitted.
        attention: replaces `Attention`; then `qkv_bias`, `k_bias`, `positions` and `table` have no effect.
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
        positions: rows.Positions | None = None,
        table: int = 0,
        init: tuple[Initializer, Initializer] | None = None,
        attention: nn.Cell | None = None,
    ):
        super().__init__()
        init = init or weight_init("xavier")
        self.gamma_1 = parameter(Constant(layer_scale), dim) if layer_scale else None
        self.gamma_2 = parameter(Constant(layer_scale), dim) if layer_scale else None
        self.norm1 = LayerNorm(dim, norm_eps)
        self.attn = attention or Attention(dim, num_heads, qkv_bias, k_bias, positions, table, init)
        self.norm2 = LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), init)

    def construct(
        self,
        x: Tensor,
        batch: int,
        tokens: int,
        factors: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(B*N, C) -> (B*N, C).

        Args:
            x: rows.
            batch, tokens: B and N.
            factors: drop path factors (B*N, 1) of the two branches.
            bias: as in `Attention`.
        """
        qkv = self.norm1.linear(x, self.attn.qkv.weight, self.attn.qkv_bias())
        if factors is None and self.gamma_1 is None:
            x = self.attn(qkv, batch, tokens, bias, x)
            return self.mlp.second(self.hidden(x), x)
        return self.add_branches(x, self.attn(qkv, batch, tokens, bias), factors)

    def hidden(self, x: Tensor) -> Tensor:
        """Norm and first layer of the MLP: (rows, C) -> (rows, hidden)."""
        return self.norm2.linear(x, self.mlp.fc1.weight, self.mlp.fc1.bias)

    def add_branches(self, x: Tensor, attended: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        """x (rows, C) plus both branches, given the output of its attention."""
        if self.gamma_1 is not None:
            attended = rows.scale_columns(attended, self.gamma_1)
        x = x + (attended if factors is None else rows.scale_rows(attended, factors[0]))
        hidden = self.mlp.second(self.hidden(x))
        if self.gamma_2 is not None:
            hidden = rows.scale_columns(hidden, self.gamma_2)
        return x + (hidden if factors is None else rows.scale_rows(hidden, factors[1]))


class PatchEmbed(nn.Cell):
    """Non-overlapping patches as one matrix product (a convolution with stride = kernel).

    Args:
        in_chans, patch_size, dim: sizes.
        norm_eps: epsilon of a norm after the projection, 0 for no norm.
        xavier: True initialises weights as MAE, False as PyTorch initialises a convolution.
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
    """The projection of `PatchEmbed`; its weight has the references' convolution layout (dim, in_chans, p, p).

    The bias is initialised as in PyTorch, like in all references. With zeros the channels of a token from a masked,
    hence constant, patch would hardly differ, and the norm after the projection would amplify their noise.
    """

    def __init__(self, in_chans: int, patch_size: int, dim: int, xavier: bool):
        super().__init__()
        fan_in = in_chans * patch_size**2
        bound = math.sqrt(6.0 / (fan_in + dim)) if xavier else fan_in**-0.5
        self.weight = parameter(Uniform(bound), dim, in_chans, patch_size, patch_size)
        self.bias = parameter(Uniform(fan_in**-0.5), dim)
        self.affine = build(rows.Affine)

    def construct(self, x: Tensor) -> Tensor:
        return self.affine(x, self.weight.reshape(self.weight.shape[0], -1), self.bias)


class DropPath(nn.Cell):
    """Drop path (stochastic depth), drawn once per step for all blocks of an encoder.

    Args:
        rate: rate of the last block; block i of n has rate * i / (n - 1) (timm's linspace).
        depth: number of blocks, two branches each.
        constant: every block has `rate` (CaiT).
    """

    def __init__(self, rate: float, depth: int, constant: bool = False):
        super().__init__()
        rates = np.repeat(np.linspace(rate if constant else 0, rate, depth), 2).reshape(depth, 2, 1)
        self.keep_prob = Tensor((1 - rates).astype(np.float32))
        self.uniform = CounterUniform("drop path")

    def construct(self, batch: int) -> Tensor:
        """Factors (depth, 2, B): 0 if a sample skips the branch, else 1 / keep probability."""
        depth = self.keep_prob.shape[0]
        noise = self.uniform(batch, 2 * depth).transpose(1, 0).reshape(depth, 2, batch)
        return (noise < self.keep_prob).astype(mindspore.float32) / self.keep_prob

    def of_rows(self, batch: int, length: int) -> Tensor:
        """Factors of each row of (B*length, C): (depth, 2, B*length, 1)."""
        factors = ops.tile(self.construct(batch).expand_dims(-1), (1, 1, 1, length))
        return factors.reshape(self.keep_prob.shape[0], 2, batch * length, 1)


def sincos_position(dim: int, grid: tuple[int, int], class_token: bool) -> np.ndarray:
    """Fixed 2-D sine-cosine table (1, [1 +] height*width, dim) of a grid (height, width) (MAE util/pos_embed.py).

    The first half of the channels encodes x, the second half y: sines then cosines of position / 10000^(i / (dim/4)),
    computed in float64. The entry of the class token, if there is one, is zero.
    """
    height, width = grid
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    y, x = np.meshgrid(np.arange(height, dtype=np.float64), np.arange(width, dtype=np.float64), indexing="ij")
    halves = []
    for position in (x, y):
        angle = position.reshape(-1, 1) * omega
        halves.append(np.concatenate([np.sin(angle), np.cos(angle)], axis=1))
    table = np.concatenate(halves, axis=1)
    if class_token:
        table = np.concatenate([np.zeros((1, dim)), table])
    return table[None].astype(np.float32)
