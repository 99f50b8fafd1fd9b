"""Random block masks, drawn in the graph."""

from __future__ import annotations

import math

from mindspore import Tensor, nn, ops

from ..models.random import CounterUniform, SampleUniform


class BlockMask(nn.Cell):
    """Draws the hidden blocks of each image.

    Args:
        grid: blocks along height and width.
        hidden: number of hidden blocks per image.
    """

    def __init__(self, grid: tuple[int, int], hidden: int):
        super().__init__()
        self.grid = grid
        self.count = math.prod(grid)
        self.num_visible = self.count - hidden
        self.uniform = CounterUniform("mask")
        self.fixed = SampleUniform("mask", seed=0)

    def construct(self, batch: int) -> Tensor:
        """New masks for the next B samples: (B, h, w) float32, 1 = hidden."""
        return self.from_noise(self.uniform(batch, self.count))

    def of_numbers(self, number: Tensor) -> Tensor:
        """Masks (B, h, w) for evaluation and pictures; each depends on the number of its image (B,) only."""
        return self.from_noise(self.fixed(number, self.count))

    def from_noise(self, noise: Tensor) -> Tensor:
        """(B, h*w) -> (B, h, w), 1 = hidden; the blocks with the smallest noise stay visible."""
        rank = ops.argsort(ops.argsort(noise, axis=1), axis=1)
        return (rank >= self.num_visible).astype(noise.dtype).reshape(noise.shape[0], self.grid[0], self.grid[1])


def resize_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Repeat the entries of a mask (B, h, w): (B, grid[0], grid[1]), multiples of h and w."""
    batch, height, width = mask.shape
    down, right = grid[0] // height, grid[1] // width
    if down == 1 and right == 1:
        return mask
    repeated = ops.broadcast_to(mask.reshape(batch, height, 1, width, 1), (batch, height, down, width, right))
    return repeated.reshape(batch, grid[0], grid[1])
