"""Swin Transformer V2 (Swin-Transformer models/swin_transformer_v2.py): Swin with three parts exchanged.

Norms stand after the branches and start at zero, attention compares directions instead of products, and the position
bias comes from a small network over log-spaced offsets, which can be asked for windows it was not trained with.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from mindspore import Tensor, nn, ops

from ..config import SwinConfig, SwinV2Config
from . import rows
from .layers import LayerNorm, Linear, parameter, trunc_normal, weight_init
from .swin import PatchMerging, Swin, SwinBlock, SwinStage, WindowAttention, WindowLayout

MAX_LOGIT_SCALE = math.log(100.0)
CPB_WIDTH = 512  # hidden units of the bias network


def log_coordinates(window: int, pretrained: int) -> np.ndarray:
    """Offsets of a window's pairs on a log scale: ((2w-1)**2, 2), rows then columns.

    sign(c) * log2(|c| + 1) / log2(8) with c = 8 * offset / (w - 1), w the window of pre-training if it was another.
    """
    line = np.arange(-(window - 1), window, dtype=np.float32)
    line = line / max((pretrained or window) - 1, 1) * 8  # a window of one token has no offsets but 0
    line = np.sign(line) * np.log2(np.abs(line) + 1.0) / np.log2(8)
    table = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1)
    return table.reshape(-1, 2).astype(np.float32)


class CosineWindowAttention(WindowAttention):
    """Cosine attention with a learned temperature per head and a continuous position bias.

    Args:
        dim, num_heads, place: width, heads, windows.
        config: biases.
        pretrained: window of pre-training for the coordinates, 0 for the block's own.
    """

    def __init__(self, dim: int, num_heads: int, place: WindowLayout, config: SwinConfig, pretrained: int):
        super().__init__(dim, num_heads, place.window, place.mask(), False, weight_init(config.init), table=False)
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
        self.coordinates = Tensor(log_coordinates(place.window, pretrained))
        self.bias_add = ops.BiasAdd()

    def construct(self, x: Tensor, batch: int) -> Tensor:
        """(N*B, C) -> (N*B, C), N tokens in window order."""
        q, k, v = self.split(self.qkv(self.image_by_image(x, batch)))
        if self.q_bias is not None:
            q, v = self.bias_add(q, self.q_bias), self.bias_add(v, self.v_bias)
        q, k = direction(self.heads(q)), direction(self.heads(k))
        scale = ops.exp(ops.minimum(self.logit_scale, MAX_LOGIT_SCALE)).expand_dims(0)
        scores = self.scores(q * ops.tile(scale, (q.shape[0], 1, q.shape[2], q.shape[3])), k)
        return self.attend(scores, self.spread(self.table()), v, batch)

    def table(self) -> Tensor:
        """Bias of every offset: ((2w-1)**2, heads)."""
        x = self.coordinates
        for layer in self.cpb_mlp:
            x = layer(x)
        return 16.0 * ops.sigmoid(x)


def direction(x: Tensor) -> Tensor:
    """Vectors of the last axis at length 1 (PyTorch's normalize, eps 1e-12)."""
    length = ops.sqrt((x * x).sum(axis=-1, keepdims=True))
    return x / ops.tile(ops.maximum(length, 1e-12), (1, 1, 1, x.shape[-1]))


class SwinV2Block(SwinBlock):
    """Norms after attention and MLP; their weights start at 0, so that a fresh block passes its input on.

    Args:
        dim, num_heads, place, config: as `SwinBlock`.
        pretrained: window of pre-training.
        main_norm: a third norm, on the main branch after both others (huge models).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        place: WindowLayout,
        config: SwinConfig,
        pretrained: int,
        main_norm: bool = False,
    ):
        super().__init__(dim, num_heads, place, config)
        self.attn = CosineWindowAttention(dim, num_heads, place, config, pretrained)
        for norm in (self.norm1, self.norm2):
            norm.weight.set_data(Tensor(np.zeros(dim, np.float32)))
        self.norm3 = LayerNorm(dim, config.norm_eps) if main_norm else None

    def construct(self, x: Tensor, batch: int, keep: tuple[Tensor, Tensor] | None) -> Tensor:
        attended = self.norm1(self.windows(x, batch))
        x = x + (attended if keep is None else rows.scale_rows(attended, keep[0]))
        hidden = self.norm2(self.mlp(x))
        x = x + (hidden if keep is None else rows.scale_rows(hidden, keep[1]))
        return x if self.norm3 is None else self.norm3(x)


class PatchMergingV2(PatchMerging):
    """The norm after the linear layer."""

    def __init__(self, dim: int, norm_eps: float, init: str):
        super().__init__(dim, norm_eps, init)
        self.norm = LayerNorm(2 * dim, norm_eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class SwinV2Stage(SwinStage):
    """A stage of V2 blocks."""

    merging = PatchMergingV2

    def make_block(self, config: SwinConfig, stage: int, number: int, dim: int, place: WindowLayout) -> nn.Cell:
        own = cast(SwinV2Config, config)
        every = own.main_norm_every
        main_norm = every > 0 and (number + 1) % every == 0
        return SwinV2Block(dim, config.num_heads[stage], place, config, own.pretrained_window_sizes[stage], main_norm)


class SwinV2(Swin):
    """Swin V2; see `Swin` for arguments."""

    stage = SwinV2Stage
    #: the bias network and the temperatures too, as swin_transformer_v2.py spares them
    spared = ("absolute_pos_embed", "logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight")
