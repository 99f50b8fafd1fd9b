"""Random numbers inside a graph that are a pure function of (seed, number of the sample in the run).

MindSpore's random primitives keep a hidden state: a resumed run cannot continue their sequence, and ops.randperm even
repeats itself. Here the number of samples drawn for is a parameter, saved with the training state, so that a resumed
run draws what the uninterrupted one would have drawn, on every device. It counts the samples of all ranks, which take
them in the order of `data.loader.Loader`: a sample gets the same numbers whether its batch is computed by one rank, by
several, or in several passes.
"""

from __future__ import annotations

import zlib

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.communication import get_group_size, get_rank

#: 2**31 - 1 is prime and 2**31 - 2 is coprime to 5, so x -> x**5 permutes 0..P-1 (and stays within int64 when each
#: product is reduced); two rounds with a linear step between leave no visible pattern.
P = 2**31 - 1


class CounterUniform(nn.Cell):
    """Uniform float32 numbers in [0, 1); each call goes on to the next samples.

    Args:
        stream: name of what is drawn; cells with different streams draw independently of each other. The seed is
            that of `mindspore.set_seed` when the cell is built, rank and number of ranks those of the process.
    """

    def __init__(self, stream: str):
        super().__init__()
        seed = [mindspore.get_seed() or 0, zlib.crc32(stream.encode())]
        a, b, c, d = (int(v) for v in np.random.default_rng(seed).integers(1, P, 4))
        self.index_factor, self.sample_factor, self.offset, self.mix = a, b, c, d
        self.rank, self.ranks = get_rank(), get_group_size()
        self.draws = Parameter(Tensor(0, mstype.int64), requires_grad=False)

    def construct(self, batch: int, count: int) -> Tensor:
        """(batch, count): `count` numbers for each sample of this rank's batch."""
        draws = self.draws + 0  # a copy: the number is advanced below
        sample = ops.arange(batch).astype(mstype.int64).reshape(batch, 1) + draws + self.rank * batch
        index = ops.arange(count).astype(mstype.int64).reshape(1, count)
        x = (index * self.index_factor + sample % P * self.sample_factor % P + self.offset) % P
        x = (self._fifth(x) * self.mix + index) % P
        uniform = (self._fifth(x) // 128).astype(mstype.float32) / (2**24)  # the top 24 bits are exact in float32
        return ops.depend(uniform, ops.assign(self.draws, draws + self.ranks * batch))

    def _fifth(self, x: Tensor) -> Tensor:
        square = x * x % P
        return square * square % P * x % P
