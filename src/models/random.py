"""Random numbers in a graph as a pure function of the seed and the number of the sample.

MindSpore's random primitives have a hidden state: a resumed run cannot continue their sequence, and ops.randperm
repeats itself.
"""

from __future__ import annotations

import zlib

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.communication import get_group_size, get_rank

#: 2**31 - 1 is prime and 2**31 - 2 is coprime to 5, so x -> x**5 modulo P permutes 0..P-1. With each product reduced,
#: int64 is enough. Two rounds with a linear step between leave no visible pattern.
P = 2**31 - 1


class SampleUniform(nn.Cell):
    """Uniform float32 numbers in [0, 1) for numbered samples.

    Args:
        stream: name of the numbers' use; different streams are independent of each other.
        seed: seed of all streams.
    """

    def __init__(self, stream: str, seed: int):
        super().__init__()
        seeds = [seed, zlib.crc32(stream.encode())]
        constants = [int(value) for value in np.random.default_rng(seeds).integers(1, P, 4)]
        self.index_factor = constants[0]
        self.sample_factor = constants[1]
        self.offset = constants[2]
        self.mix = constants[3]

    def construct(self, sample: Tensor, count: int) -> Tensor:
        """Numbers of samples (B,) -> (B, count)."""
        return self.numbers(sample.astype(mstype.int64).reshape(-1, 1), count)

    def numbers(self, sample: Tensor, count: int) -> Tensor:
        """Numbers of samples (B, 1) int64 -> (B, count)."""
        index = ops.arange(count).astype(mstype.int64).reshape(1, count)
        x = (index * self.index_factor + sample % P * self.sample_factor % P + self.offset) % P
        x = (self._fifth(x) * self.mix + index) % P
        return (self._fifth(x) // 128).astype(mstype.float32) / (2**24)  # the top 24 bits are exact in float32

    def _fifth(self, x: Tensor) -> Tensor:
        square = x * x % P
        return square * square % P * x % P


class CounterUniform(SampleUniform):
    """`SampleUniform` for consecutive samples of a training run.

    The count of samples so far is a parameter and part of the saved training state, so a resumed run draws the same
    numbers as an uninterrupted one, on every device. It counts the samples of all ranks in the order of
    `data.loader.Loader`: the numbers of a sample do not depend on how its batch is split over ranks and passes.
    The graph only reads the count, and `Draws` advances it after each pass: an assignment inside the graph would make
    MindSpore copy every weight in each step.

    Args:
        stream: as in `SampleUniform`. The seed is the one of `mindspore.set_seed` when the cell is built.
        per_batch: whether it counts passes and not samples; then a pass draws the numbers of one sample.
    """

    def __init__(self, stream: str, per_batch: bool = False):
        super().__init__(stream, mindspore.get_seed() or 0)
        self.rank, self.ranks = get_rank(), get_group_size()
        self.per_batch = per_batch
        self.draws = Parameter(Tensor(0, mstype.int64), requires_grad=False)

    def construct(self, batch: int, count: int) -> Tensor:
        """(batch, count): `count` numbers for each sample of this rank's batch."""
        sample = ops.arange(batch).astype(mstype.int64).reshape(batch, 1) + self.draws + self.rank * batch
        return self.numbers(sample, count)


class Draws:
    """The counts of all `CounterUniform` of a network, kept by the host.

    Args:
        network: its counts so far are those of the parameters.
    """

    def __init__(self, network: nn.Cell):
        self.counters = [cell for _, cell in network.cells_and_names() if isinstance(cell, CounterUniform)]
        self.counts = [int(counter.draws.asnumpy()) for counter in self.counters]

    def advance(self, batch: int) -> None:
        """Count a pass of `batch` samples on every rank."""
        for number, counter in enumerate(self.counters):
            self.counts[number] += counter.ranks * (1 if counter.per_batch else batch)
            counter.draws.set_data(Tensor(self.counts[number], mstype.int64))
