"""Swin Transformer in the encoder contract (SimMIM models/swin_transformer.py, FastMIM mim_swin_*.py).

Tokens of a stage stay in the order of the windows that the block at hand attends in, so that cutting windows is a
reshape; between two blocks of different shift one gather along the first axis changes the order, and patch merging
and the next stage's order are one gather too. Inside, sequences are (N, B, C): a gather then moves whole rows of B*C
numbers. Where a window does not divide the map, a stage keeps raster order and each attention gathers its padded
windows. The outside sees (B, N, C) in raster order.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Initializer

from ..config import SwinConfig, window_side
from . import rows
from .encoder import Encoder
from .layers import DropPath, LayerNorm, Linear, Mlp, PatchEmbed, parameter, trunc_normal, weight_init
from .relative import SpreadBias

BLOCKED = -100.0  # added to scores between tokens that the shift made neighbours


def window_order(size: tuple[int, int], window: int, shift: int, roll_first: bool = False) -> np.ndarray:
    """Raster index of each token in window order, (windows * window**2,); -1 where a window is padded.

    The map is padded at the bottom and right to whole windows, then rolled by -shift, then cut; or rolled before it is
    padded (timm models/swin_transformer.py since 0.9).
    """
    height, width = size
    rows_, cols = -(-height // window) * window, -(-width // window) * window
    row, col = rolled(height, rows_, shift, roll_first), rolled(width, cols, shift, roll_first)
    index = np.where((row[:, None] < height) & (col < width), row[:, None] * width + col, -1)
    cut = index.reshape(rows_ // window, window, cols // window, window).transpose(0, 2, 1, 3)
    return cut.reshape(-1)


def rolled(side: int, padded: int, shift: int, roll_first: bool) -> np.ndarray:
    """Position, before rolling, of each of `padded` lines; `side` and more are padding."""
    line = np.arange(padded)
    if roll_first:
        return np.where(line < side, (line + shift) % side, side)
    return (line + shift) % padded


def shift_mask(size: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """(windows, window**2, window**2): 0 between tokens that were neighbours before the shift, else `BLOCKED`."""
    padded = [-(-side // window) * window for side in size]
    bands = []
    for side in padded:
        line = np.arange(side)
        bands.append((line >= side - window).astype(int) + (line >= side - shift))
    region = bands[0][:, None] * 3 + bands[1]
    shape = (padded[0] // window, window, padded[1] // window, window)
    region = region.reshape(shape).transpose(0, 2, 1, 3).reshape(-1, window**2)
    return np.where(region[:, :, None] == region[:, None, :], 0.0, BLOCKED).astype(np.float32)


class WindowLayout:
    """Where a block's windows lie on its map.

    Args:
        size: rows and columns of the map.
        window: wanted window; a map that is not larger caps it and drops the shift (swin_transformer.py).
        shifted: every second block is shifted by half a window.
        cap: False pads a smaller map to a whole window and keeps the shift (mmpretrain's pad_small_map).
        roll_first: as in `window_order`.
    """

    def __init__(self, size: tuple[int, int], window: int, shifted: bool, cap: bool = True, roll_first: bool = False):
        capped = cap and min(size) <= window
        self.size, self.count, self.roll_first = size, size[0] * size[1], roll_first
        self.window = window_side(size, window, cap)
        self.shift = 0 if capped or not shifted else window // 2
        self.padded = any(side % self.window for side in size)

    def order(self) -> np.ndarray:
        return window_order(self.size, self.window, self.shift, self.roll_first)

    def mask(self) -> np.ndarray | None:
        return shift_mask(self.size, self.window, self.shift) if self.shift else None

    def layout(self) -> np.ndarray:
        """Raster index of each row while the block runs: window order, or raster order when padded."""
        return np.arange(self.count) if self.padded else self.order()


class Reorder(nn.Cell):
    """Rows along the first axis in another order; index -1 gives zeros. The gradient gathers by the inverse.

    Args:
        index: position of each output row in the input, every input row exactly once.
        count: input rows.
    """

    def __init__(self, index: np.ndarray, count: int):
        super().__init__()
        inverse = np.empty(count, np.int32)
        inverse[index[index >= 0]] = np.flatnonzero(index >= 0)
        self.pads = bool((index < 0).any())
        self.index = Tensor(np.where(index < 0, count, index).astype(np.int32))
        self.inverse = Tensor(inverse)
        self.gather = ops.Gather()

    def construct(self, x: Tensor) -> Tensor:
        """(N, B, C) -> (N', B, C)."""
        if self.pads:
            x = ops.cat((x, ops.zeros((1, x.shape[1], x.shape[2]), x.dtype)), axis=0)
        return self.gather(x, self.index, 0)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.gather(dout, self.inverse, 0),)


class UndoReorder(nn.Cell):
    """Back from padded windows: the inverse of a `Reorder` with padding."""

    def __init__(self, enter: Reorder):
        super().__init__()
        self.enter = enter

    def construct(self, x: Tensor) -> Tensor:
        return self.enter.gather(x, self.enter.inverse, 0)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.enter(dout),)


class WindowAttention(nn.Cell):
    """Attention within windows, on rows in window order.

    Args:
        dim, num_heads: width and heads.
        window: tokens per side.
        mask: of a shifted map, (windows, window**2, window**2), or None.
        qkv_bias: biases of q, k and v.
        init: weights, as `weight_init` gives them.
        table: whether the position bias comes from a table.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        mask: np.ndarray | None,
        qkv_bias: bool,
        init: tuple[Initializer, Initializer],
        table: bool = True,
    ):
        super().__init__()
        entries = (2 * window - 1) ** 2
        self.relative_position_bias_table = parameter(trunc_normal(), entries, num_heads) if table else None
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.area = window**2
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, init=init[0])
        self.proj = Linear(dim, dim, init=init[1])
        self.spread = SpreadBias((window, window), num_heads)
        self.mask = None if mask is None else Tensor(np.repeat(mask[:, None], num_heads, axis=1))
        self.scale = self.head_dim**-0.5
        self.split = ops.Split(-1, 3)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = rows.build(rows.Softmax)
        self.split_heads, self.join_heads = rows.build(rows.SplitHeads), rows.build(rows.JoinHeads)
        self.swap = rows.build(rows.SwapMiddle)

    def construct(self, x: Tensor, batch: int) -> Tensor:
        """(N*B, C) -> (N*B, C), N tokens in window order."""
        q, k, v = self.split(self.qkv(self.image_by_image(x, batch)))
        scores = self.scores(self.heads(q * self.scale), self.heads(k))
        return self.attend(scores, self.spread(self.relative_position_bias_table), v, batch)

    def attend(self, scores: Tensor, bias: Tensor, v: Tensor, batch: int) -> Tensor:
        """Scores (windows*B, heads, area, area) and the bias of a window -> mixed and projected rows."""
        windows = scores.shape[0] // batch
        if self.mask is None:
            bias = ops.tile(bias.expand_dims(0), (windows * batch, 1, 1, 1))
        else:
            bias = ops.tile(bias.expand_dims(0), (windows, 1, 1, 1)) + self.mask
            bias = ops.tile(bias.expand_dims(1), (1, batch, 1, 1, 1)).reshape(scores.shape)
        mixed = self.proj(self.join_heads(self.mix(self.softmax(scores + bias), self.heads(v))))
        return self.swap(mixed.reshape(windows, batch, self.area, -1), 2).reshape(windows * self.area * batch, -1)

    def image_by_image(self, x: Tensor, batch: int) -> Tensor:
        """Rows (N*B, C), the images of each token together, -> the tokens of each window of an image together."""
        windows = x.shape[0] // (self.area * batch)
        return self.swap(x.reshape(windows, self.area, batch, -1), 1).reshape(windows * batch * self.area, -1)

    def heads(self, x: Tensor) -> Tensor:
        """(windows*B*area, C) -> (windows*B, heads, area, head_dim)."""
        return self.split_heads(x, x.shape[0] // self.area, self.area, self.num_heads)


class SwinBlock(nn.Cell):
    """Window attention and MLP with norms before them.

    Args:
        dim, num_heads: width and heads.
        place: where the windows lie.
        config: MLP ratio, biases, epsilon.
    """

    def __init__(self, dim: int, num_heads: int, place: WindowLayout, config: SwinConfig):
        super().__init__()
        init = weight_init(config.init)
        self.norm1 = LayerNorm(dim, config.norm_eps)
        self.attn = WindowAttention(dim, num_heads, place.window, place.mask(), config.qkv_bias, init)
        self.norm2 = LayerNorm(dim, config.norm_eps)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), init)
        self.enter = Reorder(place.order(), place.count) if place.padded else None
        self.leave: Any = None if self.enter is None else UndoReorder(self.enter)

    def construct(self, x: Tensor, batch: int, keep: tuple[Tensor, Tensor] | None) -> Tensor:
        """(N*B, C) -> (N*B, C); `keep`: factors (N*B, 1) on the two branches, None in evaluation."""
        attended = self.windows(self.norm1(x), batch)
        x = x + (attended if keep is None else rows.scale_rows(attended, keep[0]))
        hidden = self.mlp(self.norm2(x))
        return x + (hidden if keep is None else rows.scale_rows(hidden, keep[1]))

    def windows(self, x: Tensor, batch: int) -> Tensor:
        """Attention, through padded windows where the stage is in raster order."""
        if self.enter is None:
            return self.attn(x, batch)
        dim = x.shape[1]
        padded = self.enter(x.reshape(-1, batch, dim)).reshape(-1, dim)
        return self.leave(self.attn(padded, batch).reshape(-1, batch, dim)).reshape(-1, dim)


class PatchMerging(nn.Cell):
    """2 x 2 neighbours to one token of twice the width: norm of the four, then a linear layer without bias."""

    def __init__(self, dim: int, norm_eps: float, init: str):
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, init=weight_init(init)[0])
        self.norm = LayerNorm(4 * dim, norm_eps)

    def construct(self, x: Tensor) -> Tensor:
        """(N/4 * B, 4C) -> (N/4 * B, 2C)."""
        return self.reduction(self.norm(x))


def merging_order(layout: np.ndarray, size: tuple[int, int], following: np.ndarray) -> np.ndarray:
    """Rows of the merged tokens' four parts: (4 * merged tokens,) positions in the current layout.

    A side that is odd is padded: -1 stands for a part beyond the map (Hugging Face's and timm's current merging).

    Args:
        layout: raster index of each current row.
        size: of the current map.
        following: raster index, on the merged map, of each row of the next stage.
    """
    position = np.full((size[0] + 1, size[1] + 1), -1)
    position[:-1, :-1] = np.argsort(layout).reshape(size)
    row, col = np.divmod(following, -(-size[1] // 2))
    # the order of the references: top left, bottom left, top right, bottom right
    parts = [position[2 * row + down, 2 * col + right] for right in (0, 1) for down in (0, 1)]
    return np.stack(parts, axis=1).reshape(-1)


class SwinStage(nn.Cell):
    """Blocks on one map, then merging (but after the last stage)."""

    block = SwinBlock
    merging = PatchMerging

    def __init__(self, config: SwinConfig, stage: int):
        super().__init__()
        size, first_block = config.stage_maps[stage], sum(config.depths[:stage])
        dim, depth = config.embed_dim * 2**stage, config.depths[stage]
        self.dim, self.depth, self.first_block = dim, depth, first_block
        places = self.places(config, stage, size)
        self.blocks = nn.CellList([self.make_block(config, stage, i, dim, place) for i, place in enumerate(places)])
        layouts = [place.layout() for place in places]
        moves = [
            None if np.array_equal(a, b) else Reorder(np.argsort(a)[b], len(a)) for a, b in itertools.pairwise(layouts)
        ]
        self.moves = nn.CellList([nn.Identity() if move is None else move for move in moves])
        self.to_raster = nn.CellList([Reorder(np.argsort(layout), len(layout)) for layout in layouts])
        self.join: Any = None
        self.merged = 0  # tokens after merging
        self.swap = rows.build(rows.SwapMiddle)
        self.downsample = None
        if stage < len(config.depths) - 1:
            following = self.places(config, stage + 1, config.stage_maps[stage + 1])[0].layout()
            self.merged = len(following)
            self.join = Reorder(merging_order(layouts[-1], size, following), size[0] * size[1])
            self.downsample = self.merging(dim, config.between_eps, config.init)

    @staticmethod
    def places(config: SwinConfig, stage: int, size: tuple[int, int]) -> list[WindowLayout]:
        count, cap = config.depths[stage], config.cap_window
        return [
            WindowLayout(size, config.window_size, number % 2 == 1, cap, config.roll_first) for number in range(count)
        ]

    def make_block(self, config: SwinConfig, stage: int, number: int, dim: int, place: WindowLayout) -> nn.Cell:
        return self.block(dim, config.num_heads[stage], place, config)

    def construct(self, x: Tensor, factors: Tensor | None, indices: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """(N, B, C) in the first block's layout -> the next stage's input (or raster order), and tapped sequences."""
        tokens, batch, dim = x.shape
        taken = []
        x = x.reshape(tokens * batch, dim)
        for number in range(self.depth):
            if number > 0:
                x = self.moves[number - 1](x.reshape(tokens, batch, dim)).reshape(tokens * batch, dim)
            x = self.blocks[number](x, batch, self.keep(factors, number, tokens))
            if self.first_block + number in indices:
                taken.append(self.to_raster[number](x.reshape(tokens, batch, dim)).transpose(1, 0, 2))
        x = x.reshape(tokens, batch, dim)
        if self.downsample is None:
            return self.to_raster[self.depth - 1](x), taken
        groups = self.swap(self.join(x).reshape(self.merged, 4, batch, dim), 1)
        joined = self.downsample(groups.reshape(self.merged * batch, 4 * dim))
        return joined.reshape(self.merged, batch, 2 * dim), taken

    def keep(self, factors: Tensor | None, number: int, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Stochastic depth factors of a block's rows, (N*B, 1) each."""
        if factors is None:
            return None
        own = factors[self.first_block + number]
        return ops.tile(own[0].reshape(-1, 1), (tokens, 1)), ops.tile(own[1].reshape(-1, 1), (tokens, 1))


class Swin(Encoder):
    """Patch embedding, stages of window attention, final norm.

    Args:
        config: sizes; `image_size` fixes maps, windows and shift masks.
        final_norm: False leaves the final norm out.
    """

    stage = SwinStage
    spared: tuple[str, ...] = ("absolute_pos_embed", "relative_position_bias_table")

    def __init__(self, config: SwinConfig, final_norm: bool = True):
        super().__init__()
        dim, size = config.embed_dim, config.stage_maps[0]
        self.out_dim, self.stride, self.patch_size = config.out_dim, config.stride, config.patch_size
        self.in_chans, self.num_prefix_tokens, self.norm_eps = config.in_chans, 0, config.norm_eps
        self.embed_dim, self.depths = dim, config.depths
        self.num_layers = sum(config.depths) + 2
        self.absolute_pos_embed = (
            parameter(trunc_normal(), 1, size[0] * size[1], dim) if config.absolute_position else None
        )
        self.patch_embed = PatchEmbed(
            config.in_chans, config.patch_size, dim, norm_eps=config.between_eps if config.patch_norm else 0
        )
        self.layers = nn.CellList([self.stage(config, number) for number in range(len(config.depths))])
        layout = SwinStage.places(config, 0, size)[0].layout()
        self.arrange = Reorder(layout, len(layout))
        self.norm = LayerNorm(config.out_dim, config.norm_eps) if final_norm else None
        self.drop_path = DropPath(config.drop_path, sum(config.depths)) if config.drop_path else None

    def embed(self, image: Tensor) -> Tensor:
        return self.patch_embed(image)

    def outputs(
        self, tokens: Tensor, indices: tuple[int, ...], keep: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if keep is not None:
            raise ValueError("windows need all tokens")
        x, taken = self._run(tokens, indices)
        count, batch, dim = x.shape
        if self.norm is not None:
            x = self.norm(x.reshape(count * batch, dim)).reshape(count, batch, dim)
        return x.transpose(1, 0, 2), tuple(taken)

    def _run(self, tokens: Tensor, indices: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """All stages: output (N', B, C') in raster order, and the sequences after the blocks in `indices`."""
        batch = tokens.shape[0]
        if self.absolute_pos_embed is not None:
            tokens = tokens + ops.tile(self.absolute_pos_embed, (batch, 1, 1))
        factors = None
        if self.drop_path is not None and self.training:
            factors = self.drop_path(batch)
        x = self.arrange(tokens.transpose(1, 0, 2))
        taken: list[Tensor] = []
        for stage in self.layers:
            x, tapped = stage(x, factors, indices)
            taken = taken + tapped
        return x, taken

    def layer_of(self, name: str) -> int:
        """Embedding 0, block k of the whole network k + 1, a merging that of the last block before it, the rest on top.

        The absolute position table is on top too, as in SimMIM optimizer.py and FastMIM util/lr_decay.py.
        """
        if name.startswith("patch_embed"):
            return 0
        if not name.startswith("layers."):
            return self.num_layers - 1
        parts = name.split(".")
        stage = int(parts[1])
        if parts[2] == "downsample":
            return sum(self.depths[: stage + 1])
        return sum(self.depths[:stage]) + int(parts[3]) + 1

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.parameters_and_names() if name.endswith(self.spared)}
