"""A function of a cell as a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspore import nn


class AsGraph(nn.Cell):
    """Compiles a function of a cell: MindSpore compiles `construct` alone.

    The parameters keep the cell's names, and `set_train` reaches the cell.

    Args:
        cell: the cell whose parameters and mode the function uses.
        function: tensors -> tensors, a bound method of the cell or of one of its parts.
        fixed: further arguments of the function, behind the tensors.
    """

    def __init__(self, cell: nn.Cell, function: Callable[..., Any], *fixed: Any):
        super().__init__(auto_prefix=False)
        self.cell, self.function, self.fixed = cell, function, fixed

    def construct(self, *inputs: Any) -> Any:
        return self.function(*inputs, *self.fixed)
