"""Relative position bias: from tables over offsets to every pair of tokens."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops

from ..operations.rows import Positions
from .layers import parameter


def one_hot_offsets(side: int) -> np.ndarray:
    """One-hot matrix (side**2, 2*side - 1) with the offset i - j + side - 1 of each pair (i, j)."""
    i, j = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    return np.eye(2 * side - 1, dtype=np.float32)[(i - j + side - 1).reshape(-1)]


class SpreadBias(Positions):
    """A table over offsets -> the bias of every pair of tokens in a grid.

    Two products with small one-hot matrices, one per axis: a gather would have a slow gradient, and a one-hot matrix
    over all pairs would not fit in memory for large windows.

    Args:
        grid: tokens along height and width.
        num_heads: values per table entry.
    """

    def __init__(self, grid: tuple[int, int], num_heads: int):
        super().__init__()
        self.grid, self.num_heads = grid, num_heads
        self.y_offsets = Tensor(one_hot_offsets(grid[0]))
        self.x_offsets = Tensor(one_hot_offsets(grid[1]))
        self.matmul = ops.MatMul()

    def construct(self, table: Tensor) -> Tensor:
        """((2*height-1) * (2*width-1), heads) -> (heads, height*width, height*width)."""
        h, w = self.grid
        heads, across = self.num_heads, 2 * self.grid[1] - 1
        spread = self.matmul(self.y_offsets, table.reshape(2 * h - 1, across * heads))  # (y1 y2, x offset, heads)
        spread = spread.reshape(h * h, across, heads).transpose(1, 0, 2).reshape(across, h * h * heads)
        spread = self.matmul(self.x_offsets, spread).reshape(w, w, h, h, heads)  # (x1, x2, y1, y2, heads)
        return spread.transpose(4, 2, 0, 3, 1).reshape(heads, h * w, h * w)

    def index(self) -> np.ndarray:
        y, x = (part.reshape(-1) for part in np.indices(self.grid))
        height, width = self.grid
        return (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1


def table_entries(grid: tuple[int, int]) -> int:
    """Entries of BEiT's table: all offsets, and three for the class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


class SharedTable(nn.Cell):
    """A relative position table that all blocks share (SimMIM's pre-training)."""

    def __init__(self, entries: int, num_heads: int):
        super().__init__()
        self.relative_position_bias_table = parameter("zeros", entries, num_heads)


class RelativeBias(Positions):
    """BEiT's bias of every pair of tokens, class token included (SimMIM models/vision_transformer.py).

    The last three table entries are class token to patch, patch to class token, class token to itself.

    Args:
        grid: patch tokens along height and width.
        num_heads: attention heads.
    """

    def __init__(self, grid: tuple[int, int], num_heads: int):
        super().__init__()
        self.pairs = table_entries(grid) - 3
        self.tokens, self.num_heads = grid[0] * grid[1], num_heads
        self.spread = SpreadBias(grid, num_heads)

    def construct(self, table: Tensor) -> Tensor:
        """(table_entries(grid), heads) -> (heads, 1 + N, 1 + N)."""
        heads, tokens = self.num_heads, self.tokens
        from_class = ops.tile(table[self.pairs].reshape(heads, 1, 1), (1, 1, tokens))
        to_class = ops.tile(table[self.pairs + 1].reshape(heads, 1, 1), (1, tokens, 1))
        to_itself = table[self.pairs + 2].reshape(heads, 1, 1)
        top = ops.cat((to_itself, from_class), axis=2)
        rest = ops.cat((to_class, self.spread(table[: self.pairs])), axis=2)
        return ops.cat((top, rest), axis=1)

    def index(self) -> np.ndarray:
        index = np.empty((1 + self.tokens, 1 + self.tokens), np.int64)
        index[0], index[:, 0], index[0, 0] = self.pairs, self.pairs + 1, self.pairs + 2
        index[1:, 1:] = self.spread.index()
        return index
