"""Random numbers inside a graph that are a pure function of (seed, draw number).

MindSpore's random primitives keep a hidden state: a resumed run cannot continue their sequence, and ops.randperm even
repeats itself. Here the draw number is a parameter, saved with the training state, so that a resumed run draws what
the uninterrupted one would have drawn, on every device.
"""

from __future__ import annotations

import math
import zlib

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

#: 2**31 - 1 is prime and 2**31 - 2 is coprime to 5, so x -> x**5 permutes 0..P-1 (and stays within int64 when each
#: product is reduced); two rounds with a linear step between leave no visible pattern.
P = 2**31 - 1


class CounterUniform(nn.Cell):
    """Uniform float32 numbers in [0, 1); each call advances the draw number by one.

    Args:
        stream: name of what is drawn; cells with different streams draw independently of each other. The seed is
            that of `mindspore.set_seed` when the cell is built.
    """

    def __init__(self, stream: str):
        super().__init__()
        seed = [mindspore.get_seed() or 0, zlib.crc32(stream.encode())]
        a, b, c, d = (int(v) for v in np.random.default_rng(seed).integers(1, P, 4))
        self.index_factor, self.draw_factor, self.offset, self.mix = a, b, c, d
        self.draws = Parameter(Tensor(0, mstype.int64), requires_grad=False)

    def construct(self, shape: tuple[int, ...]) -> Tensor:
        draw = self.draws + 0  # a copy: the number is advanced below
        index = ops.arange(math.prod(shape)).astype(mstype.int64)
        x = (index * self.index_factor + draw * self.draw_factor % P + self.offset) % P
        x = (self._fifth(x) * self.mix + index) % P
        uniform = (self._fifth(x) // 128).astype(mstype.float32) / (2**24)  # the top 24 bits are exact in float32
        return ops.depend(uniform.reshape(shape), ops.assign(self.draws, draw + 1))

    def _fifth(self, x: Tensor) -> Tensor:
        square = x * x % P
        return square * square % P * x % P
