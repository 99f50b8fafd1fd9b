"""Compile a function of a cell into a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspore import nn


class AsGraph(nn.Cell):
    """Runs a function of a cell as a graph; MindSpore itself compiles only `construct`.

    Parameters keep the names they have in the cell, and `set_train` acts on the cell.

    Args:
        cell: the cell whose parameters and mode the function uses.
        function: tensors -> tensors, a bound method of the cell or of one of its parts.
        fixed: further arguments of the function, after the tensors.
    """

    def __init__(self, cell: nn.Cell, function: Callable[..., Any], *fixed: Any):
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.function = function
        self.fixed = fixed

    def construct(self, *inputs: Any) -> Any:
        return self.function(*inputs, *self.fixed)
