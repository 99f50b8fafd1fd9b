"""Swin Transformer V2 (Swin-Transformer models/swin_transformer_v2.py): Swin with three changes.

The norms come after attention and MLP, and their weights start at zero. Attention scores are cosines. The position bias
comes from a small network over log-spaced offsets, so that other windows than in pre-training are possible.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from mindspore import Tensor, nn, ops

from ..config import SwinConfig, SwinV2Config
from ..operations import rows
from ..operations.forms import build
from .layers import LayerNorm, Linear, parameter, trunc_normal, weight_init, without_k
from .swin import PatchMerging, Swin, SwinBlock, SwinStage, WindowAttention, WindowLayout

MAX_LOGIT_SCALE = math.log(100.0)
CPB_WIDTH = 512  # hidden units of the bias network


def log_coordinates(window: int, pretrained: int) -> np.ndarray:
    """All offsets (y, x) in a window on a log scale, ((2w-1)**2, 2).

    sign(c) * log2(|c| + 1) / log2(8) with c = 8 * offset / (p - 1). p is the window of pre-training, or w if
    `pretrained` is 0.
    """
    line = np.arange(-(window - 1), window, dtype=np.float32)
    line = line / max((pretrained or window) - 1, 1) * 8  # a window of one token has only the offset 0
    line = np.sign(line) * np.log2(np.abs(line) + 1.0) / np.log2(8)
    table = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1)
    return table.reshape(-1, 2).astype(np.float32)


class CosineWindowAttention(WindowAttention):
    """Cosine attention with a learned temperature per head and a continuous position bias.

    Args:
        dim, num_heads, layout: width, heads, windows.
        config: biases.
        pretrained: window of pre-training, 0 if it is the window of `layout`.
    """

    def __init__(self, dim: int, num_heads: int, layout: WindowLayout, config: SwinConfig, pretrained: int):
        super().__init__(dim, num_heads, layout.window, layout.mask(), False, weight_init(config.init), table=False)
        self.logit_scale = parameter("zeros", num_heads, 1, 1)
        self.logit_scale.set_data(Tensor(np.full((num_heads, 1, 1), math.log(10.0), np.float32)))
        self.cpb_mlp = nn.CellList(
            [
                Linear(2, CPB_WIDTH, init=trunc_normal()),
                nn.ReLU(),
                Linear(CPB_WIDTH, num_heads, bias=False, init=trunc_normal()),
            ]
        )
        self.q_bias = parameter("zeros", dim) if config.qkv_bias else None
        self.v_bias = parameter("zeros", dim) if config.qkv_bias else None
        self.biased = build(rows.Affine)
        self.coordinates = Tensor(log_coordinates(layout.window, pretrained))

    def build_attend(self, positions: rows.Positions) -> nn.Cell:
        return build(rows.AttendCosine, self.num_heads, positions)

    def project(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        return self.biased(x, self.qkv.weight, without_k(self.q_bias, self.v_bias))

    def construct(self, qkv: Tensor, batch: int, onto: Tensor | None = None) -> Tensor:
        factor = ops.exp(ops.minimum(self.logit_scale, MAX_LOGIT_SCALE)).reshape(-1)
        windows = qkv.shape[0] // (self.area * batch)
        bias = self.attend.bias_of(self.table())
        return self.proj(self.attend(qkv, factor, windows, self.area, batch, bias, self.mask), onto)

    def table(self) -> Tensor:
        """Bias of every offset, ((2w-1)**2, heads)."""
        x = self.coordinates
        for layer in self.cpb_mlp:
            x = layer(x)
        return 16.0 * ops.sigmoid(x)


class SwinV2Block(SwinBlock):
    """Norms after attention and MLP; their weights start at 0, so that a fresh block returns its input.

    Args:
        dim, num_heads, layout, config: as in `SwinBlock`.
        pretrained: as in `CosineWindowAttention`.
        main_norm: whether a third norm follows, on the main branch (huge models).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        layout: WindowLayout,
        config: SwinConfig,
        pretrained: int,
        main_norm: bool = False,
    ):
        super().__init__(dim, num_heads, layout, config)
        self.attn = CosineWindowAttention(dim, num_heads, layout, config, pretrained)
        for norm in (self.norm1, self.norm2):
            norm.weight.set_data(Tensor(np.zeros(dim, np.float32)))
        self.norm3 = LayerNorm(dim, config.norm_eps) if main_norm else None

    def construct(self, x: Tensor, batch: int, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        attended = self.norm1(self.attend(x, batch))
        x = x + (attended if factors is None else rows.scale_rows(attended, factors[0]))
        hidden = self.norm2(self.mlp(x))
        x = x + (hidden if factors is None else rows.scale_rows(hidden, factors[1]))
        return x if self.norm3 is None else self.norm3(x)


class PatchMergingV2(PatchMerging):
    """Patch merging with the norm after the linear layer."""

    def __init__(self, dim: int, norm_eps: float, init: str):
        super().__init__(dim, norm_eps, init)
        self.norm = LayerNorm(2 * dim, norm_eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class SwinV2Stage(SwinStage):
    """A stage of V2 blocks."""

    merging = PatchMergingV2

    def make_block(self, config: SwinConfig, stage: int, number: int, dim: int, layout: WindowLayout) -> nn.Cell:
        config = cast(SwinV2Config, config)
        every = config.main_norm_every
        main_norm = every > 0 and (number + 1) % every == 0
        pretrained = config.pretrained_window_sizes[stage]
        return SwinV2Block(dim, config.num_heads[stage], layout, config, pretrained, main_norm)


class SwinV2(Swin):
    """Swin V2; see `Swin` for arguments."""

    stage = SwinV2Stage
    #: with the bias network and the temperatures, as in swin_transformer_v2.py
    undecayed = ("absolute_pos_embed", "logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight")
