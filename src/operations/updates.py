"""What follows the gradients in a training step: norm and AdamW.

These operations act on all parameters at once. They use HyperMap and primitives, because those compile fast: the
compile time of a loop that appends to a list grows with the square of the number of parameters, and each operator on
tensors becomes a separate graph.
"""

from __future__ import annotations

from mindspore import ParameterTuple, Tensor, nn, ops

_MUL = ops.Mul()
_SUM = ops.ReduceSum()


class GlobalNorm(nn.Cell):
    """L2 norm of all gradients together; the last axis is summed first, which is many times faster on CPU."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.map = ops.HyperMap()
        self.add = ops.AddN()
        self.sqrt = ops.Sqrt()

    def construct(self, grads: tuple[Tensor, ...]) -> Tensor:
        return self.sqrt(self.add(self.map(sum_of_squares, grads)))


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
