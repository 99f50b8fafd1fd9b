"""Data-parallel training: start-up, sums over ranks, errors that end every rank, the self-test.

msrun (scripts/run_distribute_train_*.sh) starts one process per device. Without msrun a process is rank 0 of 1 and the
functions here change nothing. Ranks exchange float32 sums only, the one collective that MindSpore has on CPU, GPU and
Ascend. A gather is a sum of tables in which each rank fills its row and leaves the others zero. A broadcast is a sum of
arrays that are zero except on rank 0.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.communication import get_group_size, get_local_rank_size, get_rank, init

from ..errors import UserError
from .contracts import Batches

Result = TypeVar("Result")

CHUNK = 2**24  # values per all-reduce, 64 MB
MAX_TEXT = 1000  # bytes of an error text that ranks exchange
_MUL = ops.Mul()


class RankError(UserError):
    """An error that ends all ranks; every rank prints the same line."""


def start() -> None:
    """Join the other ranks if msrun started this process; the scheduler process returns only after the run."""
    if "MS_ROLE" in os.environ:
        init()


def rank() -> int:
    """Return the rank of this process, from 0."""
    return int(get_rank())


def size() -> int:
    """Return the number of ranks."""
    return int(get_group_size())


def local_size() -> int:
    """Return the number of ranks on this machine."""
    return int(get_local_rank_size())


# --- sums -------------------------------------------------------------------------------------------------------


class Mean(nn.Cell):
    """Mean over ranks of each gradient, inside a graph."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.sum = ops.AllReduce()
        self.sum.add_prim_attr("fusion", 1)  # Ascend and GPU may fuse all-reduces
        self.map = ops.HyperMap()  # not a list that grows in a loop: see step.GlobalNorm
        self.share = 1.0 / size()

    def construct(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.map(ops.partial(share_of_sum, self.sum, self.share), grads)


def share_of_sum(add: Any, share: float, x: Tensor) -> Tensor:
    """Sum x over ranks with the primitive `add` and multiply by `share`."""
    return _MUL(add(x), share)


def total(values: Any) -> np.ndarray:
    """Sum an array of the same shape over all ranks; with one rank the array is returned as it is.

    All-reduce adds in float32; float64 values are sent in two parts, so the sum keeps their precision.
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
    """Collect a vector from each rank: (n,) -> (ranks, n)."""
    row = np.asarray(values, np.float32)
    table = np.zeros((size(), row.size), np.float32)
    table[rank()] = row
    return total(table)


def gather_bytes(content: bytes) -> list[bytes]:
    """Collect bytes without trailing zeros from each rank; if no rank has any, that costs one small sum."""
    longest = largest(len(content))
    row = np.zeros(longest)
    row[: len(content)] = list(content)
    table = gather(row) if longest else np.zeros((size(), 0))
    return [bytes(letters.astype(np.uint8)).rstrip(b"\0") for letters in table]


def gather_texts(texts: list[str]) -> list[str]:
    """Collect texts from all ranks, those of rank 0 first."""
    if size() == 1:
        return texts
    parts = gather_bytes("\0".join(texts).encode())
    return [text for part in parts if part for text in part.decode().split("\0")]


def gather_faults(faults: list[dict[str, str]]) -> list[dict[str, str]]:
    """Collect the unusable images of all ranks."""
    return [json.loads(text) for text in gather_texts([json.dumps(fault) for fault in faults])]


def largest(value: int) -> int:
    """Return the maximum over ranks of a whole number below 2**24."""
    return int(gather([value]).max())


def broadcast(parameters: list[Parameter]) -> None:
    """Give every rank the float parameters of rank 0."""
    for parameter in parameters:
        value = parameter.asnumpy()
        if np.issubdtype(value.dtype, np.floating):
            summand = value if rank() == 0 else np.zeros_like(value)
            parameter.set_data(Tensor(total(summand).astype(value.dtype)))


def together(work: Callable[[], Result]) -> Result:
    """Do `work` on every rank; if it raises a `UserError` on any rank, all ranks stop with that line.

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
    texts = [content.decode(errors="ignore") for content in gather_bytes(text.encode()[:MAX_TEXT])]
    failed = [number for number, text in enumerate(texts) if text]
    if failed:
        first = failed[0]
        raise RankError(f"rank {first}: {texts[first]}" if first else texts[first])
    return result  # type: ignore[return-value] # work succeeded here, so this is its result


# --- self-test --------------------------------------------------------------------------------------------------


def self_test(loader: Batches, parameters: dict[str, Parameter], recipe: str) -> str:
    """Check before the first step: all-reduce works, ranks have equal recipes and weights, shards are correct.

    Args:
        loader: training batches; the first epoch is checked.
        parameters: parameters that must be equal on all ranks.
        recipe: the resolved recipe as text.

    Returns:
        A line for the log.

    Raises:
        RankError: a rank differs from rank 0, or reads images of another rank; the text names it.
    """
    check_sums()
    check_equal(crc([recipe.encode()]), "has another recipe than rank 0; start all nodes with the same recipe")
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
    """Check that a sum of ones counts the ranks, and that every rank's value arrives in its row of a gather."""
    ones = total(np.ones(8))
    if not (ones == size()).all():
        raise RankError(f"rank {rank()}: an all-reduce of ones over {size()} ranks gives {ones.max():g}")
    numbers = gather([rank() + 1])[:, 0]
    for number, value in enumerate(numbers):
        if value != number + 1:
            raise RankError(f"rank {number}: its values do not arrive in an all-reduce (got {value:g})")


def check_equal(values: list[int], message: str) -> None:
    """Check that whole numbers below 2**24 are equal on all ranks."""
    table = gather(values)
    for number in range(1, size()):
        if not (table[number] == table[0]).all():
            raise RankError(f"rank {number}: {message}")


def check_shards(loader: Batches) -> None:
    """Check that all ranks list the same images, and that the first epoch reads each image as often as it should.

    Less than a global batch may stay unread.
    """
    check_equal(loader.checksum(), "lists other images than rank 0; data.root must have the same files on all nodes")
    order = loader.order(0)
    counts = np.zeros(len(loader.source))
    np.add.at(counts, order, 1)
    counts = total(counts)
    twice = counts > loader.config.repeats
    table = gather([twice[order].sum(), len(order)])
    for number, (shared, _) in enumerate(table):
        if shared:
            others = [str(other) for other, row in enumerate(table) if row[0] and other != number]
            partner = f", as does rank {', '.join(others)}" if others else ""
            raise RankError(f"rank {number}: reads {int(shared)} images of an epoch that are read twice{partner}")
    for number, (_, images) in enumerate(table):
        if images != table[0, 1]:
            raise RankError(f"rank {number}: reads {int(images)} images in an epoch, rank 0 reads {int(table[0, 1])}")
    unread = loader.images - int(counts.sum())
    if unread >= loader.batch_size * size():
        raise RankError(f"rank 0: no rank reads {unread} images, more than the incomplete last batch")


def check_parameters(parameters: dict[str, Parameter]) -> None:
    """Check that parameters have equal bytes on all ranks."""
    sums = gather(np.concatenate([crc([np.ascontiguousarray(p.asnumpy())]) for p in parameters.values()]))
    for number in range(1, size()):
        unequal = (sums[number] != sums[0]).reshape(-1, 2).any(axis=1)
        if unequal.any():
            name = list(parameters)[int(unequal.argmax())]
            raise RankError(f"rank {number}: {int(unequal.sum())} parameters differ from rank 0's, first {name}")


def crc(parts: Any) -> list[int]:
    """Return the CRC-32 of bytes in two halves, which float32 represents exactly."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return [value >> 16, value & 0xFFFF]
