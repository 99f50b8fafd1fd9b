"""Several processes, one run: start-up, sums over ranks, errors that end every rank, the self-test.

msrun (scripts/run_distribute_train_*.sh) starts one process per device. Without it a process is rank 0 of 1 and every
function here does nothing. All that ranks exchange is a float32 sum, the one collective that MindSpore knows on CPU,
GPU and Ascend alike: a gather is a sum of arrays that are zero except in the own row, a broadcast one of arrays that
are zero except on rank 0.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank, init

from ..errors import UserError
from .contracts import Batches

Result = TypeVar("Result")

CHUNK = 2**24  # values of one sum, 64 MB
TEXT = 1000  # bytes of an error that ranks tell each other
_MUL = ops.Mul()


class RankError(UserError):
    """What ended a run on several ranks; the same line on all of them."""


def start() -> None:
    """Join the other ranks if msrun started this process; the scheduler process stays in here until the run is over."""
    if "MS_ROLE" in os.environ:
        init()


def rank() -> int:
    """Number of this process, from 0."""
    return int(get_rank())


def size() -> int:
    """Processes of the run."""
    return int(get_group_size())


# --- sums -------------------------------------------------------------------------------------------------------


class Mean(nn.Cell):
    """Mean over ranks of each gradient, inside a graph."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.sum = ops.AllReduce()
        self.sum.add_prim_attr("fusion", 1)  # Ascend and GPU may join them into few large ones
        self.map, self.share = ops.HyperMap(), 1.0 / size()  # not a list grown in a loop: see step.GlobalNorm

    def construct(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.map(ops.partial(share_of_sum, self.sum, self.share), grads)


def share_of_sum(add: Any, share: float, x: Tensor) -> Tensor:
    """x summed over ranks by the primitive `add`, times `share`."""
    return _MUL(add(x), share)


def total(values: Any) -> np.ndarray:
    """Sum over all ranks of an array of the same shape on each; a single rank's own values untouched.

    The collective adds in float32; numbers in float64 are sent in two parts, so that a sum keeps what it had.
    """
    array = np.asarray(values)
    if size() == 1:
        return array
    if array.dtype == np.float64:
        high = array.astype(np.float32)
        low = (array - high).astype(np.float32)
        return total(high).astype(np.float64) + total(low)
    flat = array.astype(np.float32).ravel()
    add = ops.AllReduce()
    parts = [add(Tensor(flat[at : at + CHUNK])).asnumpy() for at in range(0, flat.size, CHUNK)]
    return np.concatenate(parts).reshape(array.shape)


def gather(values: Any) -> np.ndarray:
    """A vector of each rank: (n,) -> (ranks, n)."""
    row = np.asarray(values, np.float32)
    table = np.zeros((size(), row.size), np.float32)
    table[rank()] = row
    return total(table)


def largest(value: int) -> int:
    """The largest of the ranks' whole numbers below 2**24."""
    return int(gather([value]).max())


def broadcast(parameters: list[Parameter]) -> None:
    """Give every rank the float parameters of rank 0."""
    for parameter in parameters:
        value = parameter.asnumpy()
        if np.issubdtype(value.dtype, np.floating):
            own = value if rank() == 0 else np.zeros_like(value)
            parameter.set_data(Tensor(total(own).astype(value.dtype)))


def together(work: Callable[[], Result]) -> Result:
    """Do `work` on every rank; where a `UserError` stops it on any, all ranks stop with that line.

    Raises:
        RankError: the error of the first rank that failed.
    """
    if size() == 1:
        return work()
    text, result = "", None
    try:
        result = work()
    except UserError as error:
        text = str(error) or type(error).__name__
    letters = np.zeros(TEXT)
    content = text.encode()[:TEXT]
    letters[: len(content)] = list(content)
    told = [bytes(row[row > 0].astype(np.uint8)).decode(errors="ignore") for row in gather(letters)]
    failed = [number for number, text in enumerate(told) if text]
    if failed:
        first = failed[0]
        raise RankError(f"rank {first}: {told[first]}" if first else told[first])
    return result  # type: ignore[return-value] # work succeeded here, so this is its result


# --- self-test --------------------------------------------------------------------------------------------------


def self_test(loader: Batches, parameters: dict[str, Parameter], recipe: str) -> str:
    """Before the first step: the sums arrive, all ranks run one recipe from the same weights, shards are right.

    Args:
        loader: of the training data; its first epoch is looked at.
        parameters: what has to be equal on all ranks.
        recipe: the resolved recipe as text.

    Returns:
        A line for the log.

    Raises:
        RankError: naming the rank that differs from rank 0, or that reads what another one reads.
    """
    check_sums()
    check_equal(crc([recipe.encode()]), "runs another recipe than rank 0; start all nodes with the same one")
    names = "\n".join(parameters)
    check_equal(crc([names.encode()]), "has other parameters than rank 0; start all nodes with the same code")
    check_shards(loader)
    check_parameters(parameters)
    shards = "disjoint" if loader.config.repeats == 1 else "repeated"
    return (
        f"{size()} ranks: self-test passed ({len(loader.order(0))} images each in an epoch, {shards}; "
        f"{len(parameters)} parameters equal)"
    )


def check_sums() -> None:
    """A sum of ones counts the ranks, and every rank finds its own contribution at its place."""
    ones = total(np.ones(8))
    if not (ones == size()).all():
        raise RankError(f"rank {rank()}: an all-reduce of ones over {size()} ranks gives {ones.max():g}")
    numbers = gather([rank() + 1])[:, 0]
    for number, found in enumerate(numbers):
        if found != number + 1:
            raise RankError(f"rank {number}: an all-reduce does not bring its values (got {found:g})")


def check_equal(values: list[int], message: str) -> None:
    """The same whole numbers below 2**24 on all ranks."""
    table = gather(values)
    for number in range(1, size()):
        if not (table[number] == table[0]).all():
            raise RankError(f"rank {number}: {message}")


def check_shards(loader: Batches) -> None:
    """All ranks see one list of images, and the first epoch takes each as often as it should; less than a global batch
    is left over."""
    check_equal(loader.checksum(), "sees other images than rank 0; data.root must hold the same files on all nodes")
    own = loader.order(0)
    counts = np.zeros(len(loader.source))
    np.add.at(counts, own, 1)
    counts = total(counts)
    twice = counts > loader.config.repeats
    table = gather([twice[own].sum(), len(own)])
    for number, (shared, _) in enumerate(table):
        if shared:
            others = [str(other) for other, row in enumerate(table) if row[0] and other != number]
            partner = f", as does rank {', '.join(others)}" if others else ""
            raise RankError(f"rank {number}: reads {int(shared)} images of an epoch that are read twice{partner}")
    for number, (_, images) in enumerate(table):
        if images != table[0, 1]:
            raise RankError(f"rank {number}: reads {int(images)} images in an epoch, rank 0 {int(table[0, 1])}")
    left = loader.images - int(counts.sum())
    if left >= loader.batch_size * size():
        raise RankError(f"rank 0: {left} images are read by no rank, more than the incomplete last batch")


def check_parameters(parameters: dict[str, Parameter]) -> None:
    """Equal bytes on all ranks."""
    sums = gather(np.concatenate([crc([np.ascontiguousarray(p.asnumpy())]) for p in parameters.values()]))
    for number in range(1, size()):
        unequal = (sums[number] != sums[0]).reshape(-1, 2).any(axis=1)
        if unequal.any():
            name = list(parameters)[int(unequal.argmax())]
            raise RankError(f"rank {number}: {int(unequal.sum())} parameters differ from rank 0's, first {name}")


def crc(parts: Any) -> list[int]:
    """CRC-32 of bytes in two halves, which float32 holds exactly."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return [value >> 16, value & 0xFFFF]
