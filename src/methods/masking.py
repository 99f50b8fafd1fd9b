"""Random block masks, drawn on the device inside the graph."""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops

from ..models.random import CounterUniform


def masked_count(blocks: int, ratio: float, ceil: bool = False) -> int:
    """Masked blocks of `blocks`: all but int(blocks * (1 - ratio)) (FastMIM, MAE), or ceil(blocks * ratio) (SimMIM).

    Both in double precision: at 100 blocks and 0.9 the first masks 91 and the second 90.
    """
    return math.ceil(blocks * ratio) if ceil else blocks - int(blocks * (1 - ratio))


class BlockMask(nn.Cell):
    """Which blocks of each image are hidden; independent for every sample, different in every call.

    Args:
        grid: rows and columns of blocks.
        ratio: share of masked blocks.
        ceil: round as SimMIM does.
    """

    def __init__(self, grid: tuple[int, int], ratio: float, ceil: bool = False):
        super().__init__()
        self.grid = grid
        self.visible = math.prod(grid) - masked_count(math.prod(grid), ratio, ceil)
        self.uniform = CounterUniform("mask")

    def construct(self, batch: int) -> Tensor:
        """(B, rows, cols) float32, 1 = masked."""
        return self.from_noise(self.uniform(batch, self.grid[0] * self.grid[1]))

    def from_noise(self, noise: Tensor) -> Tensor:
        """The blocks with the smallest noise stay visible: (B, rows*cols) -> (B, rows, cols), 1 = masked."""
        rank = ops.argsort(ops.argsort(noise, axis=1), axis=1)
        return (rank >= self.visible).astype(noise.dtype).reshape(noise.shape[0], self.grid[0], self.grid[1])


def resize_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Repeat a mask (B, rows, cols) to a grid that is a multiple of its own."""
    batch, rows, cols = mask.shape
    down, right = grid[0] // rows, grid[1] // cols
    if down == 1 and right == 1:
        return mask
    repeated = ops.broadcast_to(mask.reshape(batch, rows, 1, cols, 1), (batch, rows, down, cols, right))
    return repeated.reshape(batch, grid[0], grid[1])
