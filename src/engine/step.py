"""The training step as a graph: forward, gradient, mean over ranks, norm, clipping, update."""

from __future__ import annotations

from typing import Any

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ..operations.forms import build
from ..operations.updates import GlobalNorm
from . import parallel
from .contracts import Trainable
from .optim import AdamW


class TrainStep(nn.Cell):
    """Loss, gradients and update of any Method.

    Args:
        method: returns (loss, *parts, sums).
        optimizer: updates the Method's parameters.
        clip_norm: global gradient norm above which gradients are scaled down; 0: no clipping.
        accumulate: forward passes per update; all but the last go through `Accumulate`.
    """

    def __init__(self, method: Trainable, optimizer: AdamW, clip_norm: float = 0.0, accumulate: int = 1):
        super().__init__(auto_prefix=False)
        self.method = method
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.norm = build(GlobalNorm)
        self.over_ranks = parallel.Mean() if parallel.size() > 1 else None
        self.value_and_grad = ops.value_and_grad(method, None, optimizer.weights, has_aux=True)
        self.map = ops.HyperMap()
        self.sums: Any = optimizer.weights.clone(prefix="gradient_sum", init="zeros") if accumulate > 1 else None

    def construct(self, values: Tensor, *batch: Tensor) -> tuple[Tensor, ...]:
        """`values` from AdamW.step_values and a batch -> (loss, *parts, sums, gradient norm before clipping).

        The norm is of the mean gradient over passes and ranks; the other outputs are of this batch.
        """
        outputs, grads = self.value_and_grad(*batch)
        if self.sums is not None:  # means over the accumulated passes and this one; the sums become zero
            grads = self.map(ops.partial(mean_of, self.accumulate), self.sums, grads)
        if self.over_ranks is not None:  # once per update, after accumulation
            grads = self.over_ranks(grads)
        norm = self.norm(grads)
        factor = None
        if self.clip_norm > 0:
            # torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm
            factor = ops.minimum(self.clip_norm / (norm + 1e-6), 1.0)
        return ops.depend((*outputs, norm), self.optimizer(values, factor, grads))


class Accumulate(nn.Cell):
    """Adds the gradients of a batch to the sums of a `TrainStep`, without an update."""

    def __init__(self, step: TrainStep):
        super().__init__(auto_prefix=False)
        self.method = step.method
        self.value_and_grad = step.value_and_grad
        self.sums: ParameterTuple = step.sums

    def construct(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """A batch -> (loss, *parts, sums)."""
        outputs, grads = self.value_and_grad(*batch)
        for number in range(len(grads)):
            outputs = ops.depend(outputs, ops.assign_add(self.sums[number], grads[number]))
        return outputs


_MUL = ops.Mul()
_ADD = ops.Add()
_ASSIGN = ops.Assign()
_ZEROS = ops.ZerosLike()


def mean_of(count: int, total: Parameter, x: Tensor) -> Tensor:
    """Return (total + x) / count and set `total` to zero."""
    mean = _MUL(_ADD(total, x), 1.0 / count)
    return ops.depend(mean, _ASSIGN(total, _ZEROS(mean)))
