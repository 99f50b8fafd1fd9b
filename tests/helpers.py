"""Names that several test files share."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from src.models.random import Draws

ROOT = Path(__file__).resolve().parents[1]

#: type of the fixture `run_entry`
Run = Callable[..., subprocess.CompletedProcess[str]]
#: type of the fixture `image_folder_factory`
MakeFolder = Callable[..., Path]


def assert_one_line_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and exactly one line `error: ...` with the words, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for word in words:
        assert word in lines[0], lines[0]


class Contract(nn.Cell):
    """All ways through an encoder in one graph; `indices` of the blocks whose sequences are asked for."""

    def __init__(self, encoder: Any, indices: tuple[int, ...]):
        super().__init__(auto_prefix=False)
        self.encoder, self.indices = encoder, indices

    def construct(self, image: Tensor) -> Any:
        tokens = self.encoder.embed(image)
        return tokens, self.encoder.encode(tokens), self.encoder(image), self.encoder.blocks_of(tokens, self.indices)


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def counted(cell: nn.Cell, batch: int, *inputs: Tensor) -> Any:
    """Outputs of a pass of `batch` samples, which is counted as in training: the next pass draws other numbers."""
    outputs = cell(*inputs)
    Draws(cell).advance(batch)
    return outputs


class FirstOutput(nn.Cell):
    """Weighted sum of an operation's (first) output, so that every element has a gradient of its own."""

    def __init__(self, cell: nn.Cell, several: bool):
        super().__init__(auto_prefix=False)
        self.cell, self.several = cell, several

    def construct(self, factor: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        out = self.cell(*inputs)
        out = out[0] if self.several else out
        return (out * factor).sum(), out


class WithGradients(nn.Cell):
    """Output and gradients with respect to all inputs."""

    def __init__(self, cell: nn.Cell, several: bool, count: int):
        super().__init__(auto_prefix=False)
        positions = tuple(range(count + 1))  # the factor too: a single input gives no tuple
        self.run = ops.value_and_grad(FirstOutput(cell, several), positions, None, has_aux=True)

    def construct(self, factor: Tensor, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        (_, out), grads = self.run(factor, *inputs)
        return out, grads[1:]


def snapshot(parameters: Iterable[Parameter]) -> dict[str, np.ndarray]:
    """Values by name as they are now (`asnumpy` alone shares memory with the parameter)."""
    return {p.name: p.asnumpy().copy() for p in parameters}


def take_interrupts() -> None:
    """Take Ctrl-C in a new process, also where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
