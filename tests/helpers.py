"""Names that several test files share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

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


def snapshot(parameters: Iterable[Parameter]) -> dict[str, np.ndarray]:
    """Values by name as they are now (`asnumpy` alone shares memory with the parameter)."""
    return {p.name: p.asnumpy().copy() for p in parameters}
