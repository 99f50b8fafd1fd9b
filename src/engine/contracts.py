"""Protocols of the layers that the engine does not import: a Method (methods/method.py), data (data/loader.py)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Protocol

import numpy as np
from mindspore import Parameter, Tensor

from ..config import DataConfig


class Trainable(Protocol):
    """A Method as the engine sees it; it is also a cell."""

    parts: tuple[str, ...]
    best: tuple[str, Any]
    num_layers: int

    def __call__(self, *columns: Any) -> tuple[Tensor, ...]: ...

    def set_train(self, mode: bool = True) -> Any: ...

    def get_parameters(self) -> Iterator[Parameter]: ...

    def trainable_params(self) -> list[Parameter]: ...

    def draws(self) -> Any: ...

    def baseline(self, sums: np.ndarray) -> float: ...

    def layer_of(self, name: str) -> int: ...

    def no_weight_decay(self) -> set[str]: ...


class Batches(Protocol):
    """Training batches of a rank as the engine sees them."""

    @property
    def config(self) -> DataConfig: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def images(self) -> int: ...

    @property
    def source(self) -> Any: ...

    def __len__(self) -> int: ...

    def order(self, epoch: int) -> np.ndarray: ...

    def checksum(self) -> list[int]: ...

    def stream(self, epochs: range, count: int | None = None) -> Generator[tuple[Tensor, ...], None, None]: ...

    def take_faults(self) -> list[dict[str, str]]: ...
