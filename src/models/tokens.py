"""Some of the tokens of each image: taken out, and put back among others (MAE)."""

from __future__ import annotations

import mindspore
from mindspore import Tensor, nn, ops


class MoveRows(nn.Cell):
    """Rows (M, C) to other places (M', C); each goes to one place at the most.

    The gradient moves back by the inverse index: that of a plain gather adds rows one by one.

    Args:
        some: whether only some of the rows are moved; else they fill some of the places, and the others are zero.
    """

    def __init__(self, some: bool):
        super().__init__()
        self.some = some
        self.gather = ops.Gather()

    def construct(self, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """`index` (M',): the row that each place takes, M for none; `inverse` (M,): the place of each row, or M'."""
        return self.gather(x, index, 0) if self.some else self.filled(x, index)

    def bprop(self, x: Tensor, index: Tensor, inverse: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        back = self.filled(dout, inverse) if self.some else self.gather(dout, inverse, 0)
        return back, ops.zeros_like(index), ops.zeros_like(inverse)

    def filled(self, x: Tensor, index: Tensor) -> Tensor:
        """A gather that gives zeros for the row behind the last."""
        return self.gather(ops.cat((x, ops.zeros((1, x.shape[1]), x.dtype)), axis=0), index, 0)


class TakeTokens(nn.Cell):
    """Tokens (B, N, C) and indices (B, K) int32, each at most once in an image -> (B, K, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.move = MoveRows(some=True)

    def construct(self, tokens: Tensor, keep: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        index, inverse = places(keep, count)
        return self.move(tokens.reshape(batch * count, dim), index, inverse).reshape(batch, keep.shape[1], dim)


class PutTokens(nn.Cell):
    """The way back: tokens (B, K, C) at their indices (B, K) among `count`, zeros elsewhere -> (B, count, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.move = MoveRows(some=False)

    def construct(self, tokens: Tensor, keep: Tensor, count: int) -> Tensor:
        batch, kept, dim = tokens.shape
        index, inverse = places(keep, count)
        return self.move(tokens.reshape(batch * kept, dim), inverse, index).reshape(batch, count, dim)


def places(keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of all kept tokens the rows among B * count, (B*K,), and of all tokens the rows among B * K, (B*count,).

    B * K stands for a token that is not kept.
    """
    batch, kept = keep.shape
    first = ops.arange(batch).astype(mindspore.int32).reshape(batch, 1) * count
    index = (keep + first).reshape(-1)
    nowhere = ops.full((batch * count,), batch * kept, dtype=mindspore.int32)
    inverse = ops.tensor_scatter_elements(nowhere, index, ops.arange(batch * kept).astype(mindspore.int32), 0)
    return index, inverse
