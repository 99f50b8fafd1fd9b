"""One training step as a graph: forward, gradient, mean over ranks, norm, clipping, update."""

from __future__ import annotations

from typing import Any

from mindspore import ParameterTuple, Tensor, nn, ops

from . import parallel
from .optim import AdamW


class TrainStep(nn.Cell):
    """Loss, gradients and update of any Method.

    Args:
        method: returns (loss, *parts).
        optimizer: updates the Method's parameters.
        clip_norm: global gradient norm above which gradients are scaled down; 0 only measures.
        accumulate: forward passes per update; the earlier ones go through `Accumulate`.
    """

    def __init__(self, method: Any, optimizer: AdamW, clip_norm: float = 0.0, accumulate: int = 1):
        super().__init__(auto_prefix=False)
        self.method, self.optimizer = method, optimizer
        self.clip_norm, self.accumulate = clip_norm, accumulate
        self.norm = GlobalNorm()
        self.over_ranks = parallel.Mean() if parallel.size() > 1 else None
        self.value_and_grad = ops.value_and_grad(method, None, optimizer.weights, has_aux=True)
        self.sums: Any = optimizer.weights.clone(prefix="gradient_sum", init="zeros") if accumulate > 1 else None

    def construct(self, values: Tensor, *batch: Tensor) -> tuple[Tensor, ...]:
        """`values` of AdamW.step_values and a batch -> (loss, *parts, gradient norm before clipping).

        Loss and parts are this rank's, the norm is that of the gradients' mean over ranks.
        """
        outputs, grads = self.value_and_grad(*batch)
        if self.sums is not None:
            grads = self._mean(grads)
        if self.over_ranks is not None:  # once per update, whatever is accumulated
            grads = self.over_ranks(grads)
        norm = self.norm(grads)
        if self.clip_norm > 0:
            # torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm
            factor = ops.minimum(self.clip_norm / (norm + 1e-6), 1.0)
            grads = [grad * factor for grad in grads]
        return ops.depend((*outputs, norm), self.optimizer(values, grads))

    def _mean(self, grads: tuple[Tensor, ...]) -> list[Tensor]:
        """Mean over the accumulated passes and this one; empties the sums."""
        means = []
        for number in range(len(grads)):
            mean = (self.sums[number] + grads[number]) / self.accumulate
            means.append(ops.depend(mean, ops.assign(self.sums[number], ops.zeros_like(mean))))
        return means


class Accumulate(nn.Cell):
    """Adds the gradients of a batch to the sums of a `TrainStep` without updating."""

    def __init__(self, step: TrainStep):
        super().__init__(auto_prefix=False)
        self.method = step.method
        self.value_and_grad = step.value_and_grad
        self.sums: ParameterTuple = step.sums

    def construct(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """A batch -> (loss, *parts)."""
        outputs, grads = self.value_and_grad(*batch)
        for number in range(len(grads)):
            outputs = ops.depend(outputs, ops.assign_add(self.sums[number], grads[number]))
        return outputs


class GlobalNorm(nn.Cell):
    """L2 norm of all gradients together.

    Primitives instead of operators on tensors: those are graphs of their own and made up a third of the time to
    compile a ViT-B. The last axis is summed first, which is many times faster on CPU.
    """

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.mul, self.sum, self.add, self.sqrt = ops.Mul(), ops.ReduceSum(), ops.AddN(), ops.Sqrt()

    def construct(self, grads: tuple[Tensor, ...]) -> Tensor:
        squares = []
        for grad in grads:
            squares.append(self.sum(self.sum(self.mul(grad, grad), -1), ()))
        return self.sqrt(self.add(squares))
