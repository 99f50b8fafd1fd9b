"""Random block masks, drawn on the device inside the graph."""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops

from ..models.random import CounterUniform, SampleUniform


class BlockMask(nn.Cell):
    """Which blocks of each image are hidden; independent for every sample, different in every call.

    Args:
        grid: rows and columns of blocks.
        hidden: hidden blocks of an image.
    """

    def __init__(self, grid: tuple[int, int], hidden: int):
        super().__init__()
        self.grid = grid
        self.count = math.prod(grid)
        self.visible = self.count - hidden
        self.uniform = CounterUniform("mask")
        self.fixed = SampleUniform("mask", seed=0)

    def construct(self, batch: int) -> Tensor:
        """(B, rows, cols) float32, 1 = masked."""
        return self.from_noise(self.uniform(batch, self.count))

    def of_numbers(self, number: Tensor) -> Tensor:
        """The masks (B, rows, cols) of evaluations and pictures: a function of each image's number (B,) alone."""
        return self.from_noise(self.fixed(number, self.count))

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
