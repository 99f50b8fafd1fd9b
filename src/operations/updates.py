"""What follows the gradients in a training step: sums over passes, norm, AdamW.

These operations act on all parameters at once. They use HyperMap and primitives, because those compile fast: the
compile time of a loop that appends to a list grows with the square of the number of parameters, and each operator on
tensors becomes a separate graph.
"""

from __future__ import annotations

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

_MUL = ops.Mul()
_ADD = ops.Add()
_SUM = ops.ReduceSum()
_ASSIGN = ops.Assign()
_ZEROS = ops.ZerosLike()


class GlobalNorm(nn.Cell):
    """L2 norm of all gradients together; the last axis is summed first, which is many times faster on CPU."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.map = ops.HyperMap()
        self.add = ops.AddN()
        self.sqrt = ops.Sqrt()

    def construct(self, grads: tuple[Tensor, ...]) -> Tensor:
        return self.sqrt(self.add(self.map(sum_of_squares, grads)))


class Accumulation(nn.Cell):
    """Adds gradients to sums, in place.

    Args:
        sums: a sum for each parameter.
    """

    def __init__(self, sums: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.sums = sums

    def construct(self, grads: tuple[Tensor, ...]) -> Tensor | bool:
        done = True
        for number in range(len(grads)):
            done = ops.depend(done, ops.assign_add(self.sums[number], grads[number]))
        return done


class MeanGradients(nn.Cell):
    """Means of the gradients over accumulated passes and a last one; sets the sums to zero.

    Args:
        sums: of all passes but the last.
        passes: their number with the last.
    """

    def __init__(self, sums: ParameterTuple, passes: int):
        super().__init__(auto_prefix=False)
        self.sums = sums
        self.share = 1.0 / passes
        self.map = ops.HyperMap()

    def construct(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.map(ops.partial(mean_of, self.share), self.sums, grads)


class AdamWUpdate(nn.Cell):
    """One update of all parameters; arguments as in `engine.optim.AdamW`.

    Args:
        betas: decay of the moments.
        group_of: number of the group of each parameter.
        weights, first, second: parameters and their moments.
    """

    def __init__(
        self,
        betas: tuple[float, float],
        group_of: list[int],
        weights: ParameterTuple,
        first: ParameterTuple,
        second: ParameterTuple,
    ):
        super().__init__(auto_prefix=False)
        self.beta1, self.beta2 = betas
        self.group_of, self.count = group_of, max(group_of) + 1
        self.weights, self.first, self.second = weights, first, second
        self.update = ops.AdamWeightDecay()
        self.map = ops.HyperMap()

    def construct(self, values: Tensor, factor: Tensor | None, grads: tuple[Tensor, ...]) -> Tensor | bool:
        """Update.

        Args:
            values: of `AdamW.step_values`.
            factor: a scalar that the gradients are multiplied by, or None.
            grads: a gradient for each parameter.
        """
        if factor is not None:
            grads = self.map(ops.partial(times, factor), grads)
        count = self.count
        eps = values[2 * count]
        rates = [values[number] for number in range(count)]
        decays = [values[count + number] for number in range(count)]
        for number in range(len(self.weights)):
            group = self.group_of[number]
            self.update(
                self.weights[number],
                self.first[number],
                self.second[number],
                rates[group],
                self.beta1,
                self.beta2,
                eps,
                decays[group],
                grads[number],
            )
        return True


def times(factor: Tensor, x: Tensor) -> Tensor:
    return _MUL(x, factor)


def sum_of_squares(x: Tensor) -> Tensor:
    return _SUM(_SUM(_MUL(x, x), -1), ())


def mean_of(share: float, total: Parameter, x: Tensor) -> Tensor:
    """Return (total + x) * share and set `total` to zero."""
    mean = _MUL(_ADD(total, x), share)
    return ops.depend(mean, _ASSIGN(total, _ZEROS(mean)))
