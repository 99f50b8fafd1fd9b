"""Swin Transformer as an `Encoder` (SimMIM models/swin_transformer.py, FastMIM mim_swin_*.py).

In each block the tokens are in the order of its windows, so that cutting windows is a reshape. One gather along the
first axis changes the order between blocks of different shift; one gather does patch merging and the next stage's
order. Sequences inside are (N, B, C), so that a gather moves rows of B*C numbers. If the window does not divide the
map, the stage stays in raster order and each attention gathers its padded windows. Input and output are (B, N, C) in
raster order.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Initializer

from ..config import SwinConfig, window_side
from ..operations import rows
from ..operations.forms import build
from .encoder import Encoder
from .layers import DropPath, LayerNorm, Linear, Mlp, PatchEmbed, parameter, trunc_normal, weight_init
from .relative import SpreadBias

BLOCKED = -100.0  # added to scores between tokens that only the shift made neighbours


def window_order(size: tuple[int, int], window: int, shift: int, roll_first: bool = False) -> np.ndarray:
    """Raster index of each token in window order, (windows * window**2,); -1 for padding.

    The map (height, width) is padded at the bottom and right to whole windows, then rolled by -shift, then cut into
    windows. With `roll_first` it is rolled before it is padded (timm models/swin_transformer.py since 0.9).
    """
    height, width = size
    padded_height, padded_width = -(-height // window) * window, -(-width // window) * window
    y = unrolled(height, padded_height, shift, roll_first)
    x = unrolled(width, padded_width, shift, roll_first)
    index = np.where((y[:, None] < height) & (x < width), y[:, None] * width + x, -1)
    cut = index.reshape(padded_height // window, window, padded_width // window, window).transpose(0, 2, 1, 3)
    return cut.reshape(-1)


def unrolled(side: int, padded: int, shift: int, roll_first: bool) -> np.ndarray:
    """Position before rolling of each position along an axis, (padded,); values from `side` on are padding."""
    line = np.arange(padded)
    if roll_first:
        return np.where(line < side, (line + shift) % side, side)
    return (line + shift) % padded


def shift_mask(size: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """(windows, window**2, window**2): 0 between tokens of the same region of the map, else `BLOCKED`."""
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
    """The windows of a block on its map.

    Args:
        size: height and width of the map, in tokens.
        window: tokens per side; a map that is not larger caps it, without shift (swin_transformer.py).
        shifted: whether windows are shifted by half a window, as in every second block.
        cap: False pads a smaller map to a whole window, with shift (mmpretrain's pad_small_map).
        roll_first: as in `window_order`.
    """

    def __init__(self, size: tuple[int, int], window: int, shifted: bool, cap: bool = True, roll_first: bool = False):
        capped = cap and min(size) <= window
        self.size = size
        self.count = size[0] * size[1]
        self.roll_first = roll_first
        self.window = window_side(size, window, cap)
        self.shift = 0 if capped or not shifted else window // 2
        self.padded = any(side % self.window for side in size)

    def order(self) -> np.ndarray:
        return window_order(self.size, self.window, self.shift, self.roll_first)

    def mask(self) -> np.ndarray | None:
        return shift_mask(self.size, self.window, self.shift) if self.shift else None

    def token_order(self) -> np.ndarray:
        """Raster index of each token while the block runs: window order, or raster order if windows are padded."""
        return np.arange(self.count) if self.padded else self.order()


class Reorder(nn.Cell):
    """Gathers along the first axis in another order. Its gradient is a gather with the inverse index.

    Args:
        index: input position of each output position, every input position exactly once; -1 gives zeros.
        count: input positions.
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


class InverseReorder(nn.Cell):
    """The inverse of a `Reorder` with padding; padding is dropped."""

    def __init__(self, reorder: Reorder):
        super().__init__()
        self.reorder = reorder

    def construct(self, x: Tensor) -> Tensor:
        return self.reorder.gather(x, self.reorder.inverse, 0)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.reorder(dout),)


class WindowAttention(nn.Cell):
    """Attention within windows, on rows in window order.

    Args:
        dim, num_heads: width and heads.
        window: tokens per side.
        mask: mask of shifted windows, (windows, window**2, window**2), or None.
        qkv_bias: whether q, k and v have biases.
        init: initialisers from `weight_init`.
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
        self.mask = None if mask is None else Tensor(mask)
        self.attend = self.build_attend(SpreadBias((window, window), num_heads))

    def build_attend(self, positions: rows.Positions) -> nn.Cell:
        return build(rows.Attend, self.num_heads, self.head_dim**-0.5, positions)

    def project(self, x: Tensor) -> Tensor:
        """The layer `qkv`: (N*B, C) -> (N*B, 3C)."""
        return self.qkv(x)

    def construct(self, qkv: Tensor, batch: int, onto: Tensor | None = None) -> Tensor:
        """Attention and projection.

        Args:
            qkv: output of the layer `qkv` (N*B, 3C), N tokens in window order.
            batch: B.
            onto: (N*B, C), what the result (N*B, C) is added to, or None.
        """
        bias = self.attend.bias_of(self.relative_position_bias_table)
        windows = qkv.shape[0] // (self.area * batch)
        return self.proj(self.attend(qkv, windows, self.area, batch, bias, self.mask), onto)


class SwinBlock(nn.Cell):
    """Window attention and MLP, each after a norm.

    Args:
        dim, num_heads: width and heads.
        layout: the windows.
        config: MLP ratio, biases, epsilon.
    """

    def __init__(self, dim: int, num_heads: int, layout: WindowLayout, config: SwinConfig):
        super().__init__()
        init = weight_init(config.init)
        self.norm1 = LayerNorm(dim, config.norm_eps)
        self.attn = WindowAttention(dim, num_heads, layout.window, layout.mask(), config.qkv_bias, init)
        self.norm2 = LayerNorm(dim, config.norm_eps)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), init)
        self.to_windows = Reorder(layout.order(), layout.count) if layout.padded else None
        self.from_windows: Any = None if self.to_windows is None else InverseReorder(self.to_windows)

    def construct(self, x: Tensor, batch: int, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        """(N*B, C) -> (N*B, C); `factors`: drop path factors (N*B, 1) of the two branches, None in evaluation."""
        onto = x if factors is None else None
        if self.to_windows is None:
            attended = self.attn(self.norm1.linear(x, self.attn.qkv.weight, self.attn.qkv.bias), batch, onto)
        else:
            attended = self.attend(self.norm1(x), batch)
            attended = attended if onto is None else onto + attended
        x = attended if factors is None else x + rows.scale_rows(attended, factors[0])
        hidden = self.norm2.linear(x, self.mlp.fc1.weight, self.mlp.fc1.bias)
        if factors is None:
            return self.mlp.second(hidden, x)
        return x + rows.scale_rows(self.mlp.second(hidden), factors[1])

    def attend(self, x: Tensor, batch: int) -> Tensor:
        """Window attention, (N*B, C) -> (N*B, C); gathers padded windows if the stage is in raster order."""
        if self.to_windows is None:
            return self.attn(self.attn.project(x), batch)
        dim = x.shape[1]
        padded = self.to_windows(x.reshape(-1, batch, dim)).reshape(-1, dim)
        attended = self.attn(self.attn.project(padded), batch).reshape(-1, batch, dim)
        return self.from_windows(attended).reshape(-1, dim)


class PatchMerging(nn.Cell):
    """Merges 2 x 2 tokens into one of twice the width: concatenation, norm, linear layer without bias."""

    def __init__(self, dim: int, norm_eps: float, init: str):
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, init=weight_init(init)[0])
        self.norm = LayerNorm(4 * dim, norm_eps)

    def construct(self, x: Tensor) -> Tensor:
        """(N/4 * B, 4C) -> (N/4 * B, 2C)."""
        return self.norm.linear(x, self.reduction.weight, None)


def merging_order(order: np.ndarray, size: tuple[int, int], next_order: np.ndarray) -> np.ndarray:
    """Current positions of the four parts of each merged token, (4 * merged tokens,).

    An odd side is padded: -1 is a part beyond the map (as in current Hugging Face and timm).

    Args:
        order: raster index of each token of the current stage.
        size: height and width of the current map.
        next_order: raster index, on the merged map, of each token of the next stage.
    """
    position = np.full((size[0] + 1, size[1] + 1), -1)
    position[:-1, :-1] = np.argsort(order).reshape(size)
    y, x = np.divmod(next_order, -(-size[1] // 2))
    # the order of the references: top left, bottom left, top right, bottom right
    parts = [position[2 * y + down, 2 * x + right] for right in (0, 1) for down in (0, 1)]
    return np.stack(parts, axis=1).reshape(-1)


class SwinStage(nn.Cell):
    """Blocks on one map, then patch merging (not in the last stage)."""

    block = SwinBlock
    merging = PatchMerging

    def __init__(self, config: SwinConfig, stage: int):
        super().__init__()
        size = config.stage_maps[stage]
        dim = config.embed_dim * 2**stage
        self.dim = dim
        self.depth = config.depths[stage]
        self.first_block = sum(config.depths[:stage])
        layouts = self.layouts(config, stage, size)
        self.blocks = nn.CellList([self.make_block(config, stage, i, dim, layout) for i, layout in enumerate(layouts)])
        orders = [layout.token_order() for layout in layouts]
        reorders = [
            None if np.array_equal(a, b) else Reorder(np.argsort(a)[b], len(a)) for a, b in itertools.pairwise(orders)
        ]
        self.reorders = nn.CellList([nn.Identity() if reorder is None else reorder for reorder in reorders])
        self.to_raster = nn.CellList([Reorder(np.argsort(order), len(order)) for order in orders])
        self.gather_parts: Any = None
        self.num_merged = 0  # tokens after merging
        self.swap = build(rows.SwapMiddle)
        self.downsample = None
        if stage < len(config.depths) - 1:
            next_order = self.layouts(config, stage + 1, config.stage_maps[stage + 1])[0].token_order()
            self.num_merged = len(next_order)
            self.gather_parts = Reorder(merging_order(orders[-1], size, next_order), size[0] * size[1])
            self.downsample = self.merging(dim, config.between_eps, config.init)

    @staticmethod
    def layouts(config: SwinConfig, stage: int, size: tuple[int, int]) -> list[WindowLayout]:
        """The windows of each block of a stage."""
        count, cap = config.depths[stage], config.cap_window
        return [
            WindowLayout(size, config.window_size, number % 2 == 1, cap, config.roll_first) for number in range(count)
        ]

    def make_block(self, config: SwinConfig, stage: int, number: int, dim: int, layout: WindowLayout) -> nn.Cell:
        return self.block(dim, config.num_heads[stage], layout, config)

    def construct(self, x: Tensor, factors: Tensor | None, indices: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """Run the stage.

        Args:
            x: (N, B, C), tokens in the order of the first block.
            factors: drop path factors (blocks of the encoder, 2, B), None in evaluation.
            indices: numbers of blocks, counted through all stages.

        Returns:
            Input of the next stage (N/4, B, 2C), or (N, B, C) in raster order after the last stage; and the sequences
            (B, N, C) in raster order after the blocks in `indices`.
        """
        tokens, batch, dim = x.shape
        selected = []
        x = x.reshape(tokens * batch, dim)
        for number in range(self.depth):
            if number > 0:
                x = self.reorders[number - 1](x.reshape(tokens, batch, dim)).reshape(tokens * batch, dim)
            x = self.blocks[number](x, batch, self.row_factors(factors, number, tokens))
            if self.first_block + number in indices:
                selected.append(self.to_raster[number](x.reshape(tokens, batch, dim)).transpose(1, 0, 2))
        x = x.reshape(tokens, batch, dim)
        if self.downsample is None:
            return self.to_raster[self.depth - 1](x), selected
        parts = self.swap(self.gather_parts(x).reshape(self.num_merged, 4, batch, dim), 1)
        merged = self.downsample(parts.reshape(self.num_merged * batch, 4 * dim))
        return merged.reshape(self.num_merged, batch, 2 * dim), selected

    def row_factors(self, factors: Tensor | None, number: int, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Drop path factors of the rows in a block, (N*B, 1) for each of its two branches."""
        if factors is None:
            return None
        of_block = factors[self.first_block + number]
        return ops.tile(of_block[0].reshape(-1, 1), (tokens, 1)), ops.tile(of_block[1].reshape(-1, 1), (tokens, 1))


class Swin(Encoder):
    """Patch embedding, stages of window attention, final norm.

    Args:
        config: sizes; `image_size` determines maps, windows and shift masks.
        final_norm: False omits the final norm.
    """

    stage = SwinStage
    #: ends of the names without weight decay
    undecayed: tuple[str, ...] = ("absolute_pos_embed", "relative_position_bias_table")

    def __init__(self, config: SwinConfig, final_norm: bool = True):
        super().__init__()
        dim, size = config.embed_dim, config.stage_maps[0]
        self.in_chans = config.in_chans
        self.patch_size = config.patch_size
        self.stride = config.stride
        self.embed_dim = dim
        self.out_dim = config.out_dim
        self.depths = config.depths
        self.num_layers = sum(config.depths) + 2
        self.num_prefix_tokens = 0
        self.norm_eps = config.norm_eps
        self.absolute_pos_embed = (
            parameter(trunc_normal(), 1, size[0] * size[1], dim) if config.absolute_position else None
        )
        self.patch_embed = PatchEmbed(
            config.in_chans, config.patch_size, dim, norm_eps=config.between_eps if config.patch_norm else 0
        )
        self.layers = nn.CellList([self.stage(config, number) for number in range(len(config.depths))])
        order = SwinStage.layouts(config, 0, size)[0].token_order()
        self.from_raster = Reorder(order, len(order))
        self.norm = LayerNorm(config.out_dim, config.norm_eps) if final_norm else None
        self.drop_path = DropPath(config.drop_path, sum(config.depths)) if config.drop_path else None

    def embed(self, image: Tensor) -> Tensor:
        return self.patch_embed(image)

    def outputs(
        self, tokens: Tensor, indices: tuple[int, ...], keep: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if keep is not None:
            raise ValueError("window attention needs all tokens")
        x, selected = self._run(tokens, indices)
        count, batch, dim = x.shape
        if self.norm is not None:
            x = self.norm(x.reshape(count * batch, dim)).reshape(count, batch, dim)
        return x.transpose(1, 0, 2), tuple(selected)

    def _run(self, tokens: Tensor, indices: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """Run all stages: output (N', B, C') in raster order, and the sequences after the blocks in `indices`."""
        batch = tokens.shape[0]
        if self.absolute_pos_embed is not None:
            tokens = tokens + ops.tile(self.absolute_pos_embed, (batch, 1, 1))
        factors = None
        if self.drop_path is not None and self.training:
            factors = self.drop_path(batch)
        x = self.from_raster(tokens.transpose(1, 0, 2))
        selected: list[Tensor] = []
        for stage in self.layers:
            x, of_stage = stage(x, factors, indices)
            selected = selected + of_stage
        return x, selected

    def layer_of(self, name: str) -> int:
        """0 for the patch embedding, k + 1 for block k, the layer of the block before for a merging, else the top.

        The absolute position table is in the top layer, as in SimMIM optimizer.py and FastMIM util/lr_decay.py.
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
        return {name for name, _ in self.parameters_and_names() if name.endswith(self.undecayed)}
