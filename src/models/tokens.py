"""Take the visible tokens of each image, and put them back in place (MAE)."""

from __future__ import annotations

import mindspore
from mindspore import Tensor, nn, ops


class MoveRows(nn.Cell):
    """Gathers rows (M, C) -> (M', C); each input row goes to one output row at most.

    The gradient is a gather with the inverse index; MindSpore's gradient of a gather adds rows one by one.

    Args:
        some: True takes some of the input rows; False takes all of them, and the other output rows are zero.
    """

    def __init__(self, some: bool):
        super().__init__()
        self.some = some
        self.gather = ops.Gather()

    def construct(self, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """Gather rows.

        Args:
            x: (M, C).
            index: (M',), the input row of each output row, M for zeros.
            inverse: (M,), the output row of each input row, M' for none.
        """
        return self.gather(x, index, 0) if self.some else self.gather_or_zero(x, index)

    def bprop(self, x: Tensor, index: Tensor, inverse: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        back = self.gather_or_zero(dout, inverse) if self.some else self.gather(dout, inverse, 0)
        return back, ops.zeros_like(index), ops.zeros_like(inverse)

    def gather_or_zero(self, x: Tensor, index: Tensor) -> Tensor:
        """A gather that gives zeros for the index after the last row."""
        return self.gather(ops.cat((x, ops.zeros((1, x.shape[1]), x.dtype)), axis=0), index, 0)


class TakeTokens(nn.Cell):
    """Tokens (B, N, C) and indices (B, K) int32, each at most once per image -> the visible tokens (B, K, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.move = MoveRows(some=True)

    def construct(self, tokens: Tensor, keep: Tensor) -> Tensor:
        batch, count, dim = tokens.shape
        index, inverse = row_indices(keep, count)
        return self.move(tokens.reshape(batch * count, dim), index, inverse).reshape(batch, keep.shape[1], dim)


class PutTokens(nn.Cell):
    """The inverse of `TakeTokens`: visible tokens (B, K, C) and indices (B, K) -> (B, count, C), zeros elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.move = MoveRows(some=False)

    def construct(self, tokens: Tensor, keep: Tensor, count: int) -> Tensor:
        batch, visible, dim = tokens.shape
        index, inverse = row_indices(keep, count)
        return self.move(tokens.reshape(batch * visible, dim), inverse, index).reshape(batch, count, dim)


def row_indices(keep: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Row among B*count of each visible token, (B*K,), and row among B*K of each token, (B*count,).

    The latter is B*K for a hidden token.
    """
    batch, visible = keep.shape
    first = ops.arange(batch).astype(mindspore.int32).reshape(batch, 1) * count
    index = (keep + first).reshape(-1)
    hidden = ops.full((batch * count,), batch * visible, dtype=mindspore.int32)
    inverse = ops.tensor_scatter_elements(hidden, index, ops.arange(batch * visible).astype(mindspore.int32), 0)
    return index, inverse
