"""Parts of all comparisons: a case on disk, errors, gradients, names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file

from src.weights.names import FASTMIM_SWIN, FASTMIM_SWIN_CLASSIFIER, FASTMIM_VIT, PLAIN, SIMMIM, Naming

#: parameters with weight decay in FastMIM's pre-training, where timm 0.3.2 add_weight_decay gets no list of exceptions
TOKENS = ("cls_token", "mask_token", "relative_position_bias_table")
#: biases without effect, since they shift all scores of a softmax: those of CaiT's keys and heads before softmax
NO_EFFECT = ("attn.k.bias", "attn.proj_l.bias")


class UnknownError(Exception):
    """A comparison needs something that its case does not state; the case is then not covered."""


class StatedArguments(dict[str, Any]):
    """Arguments of a reference; reading a missing one raises UnknownError."""

    def __missing__(self, key: str) -> Any:
        raise UnknownError(f"its arguments do not state {key}")


def rename_with(naming: Naming) -> Callable[[str], str]:
    """Function from their names to ours; each of their parameters must be a whole one of ours."""

    def rename(name: str) -> str:
        our_name = naming.ours(name)
        assert our_name is not None and our_name[1] is None, name
        return our_name[0]

    return rename


from_simmim, from_plain, from_fastmim_pooled = (
    rename_with(SIMMIM),
    rename_with(PLAIN),
    rename_with(FASTMIM_SWIN_CLASSIFIER),
)


def from_fastmim(name: str) -> str:
    """Our name for a parameter of FastMIM's pre-training, Swin or ViT."""
    return rename_with(FASTMIM_SWIN if name.startswith("encoder.") else FASTMIM_VIT)(name)


#: array name, error, tolerance
Finding = tuple[str, float, float]
Findings = Iterator[Finding]


class Case:
    """One folder of reference numbers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.info: dict[str, Any] = read_json(folder / "case.json")
        self.arguments = StatedArguments(self.info.get("arguments") or {})
        stated = self.info.get("tolerance", {})
        tolerance: dict[str, Any] = stated if isinstance(stated, dict) else {}
        self.tolerance = tolerance
        self.forward: float = tolerance.get("float32_forward_rel", tolerance.get("forward", 1e-4))
        self.gradient: float = tolerance.get("float32_grad_rel", tolerance.get("gradient", 1e-3))
        data = folder / "data.npz"
        if self.info.get("arrays") and not data.exists():
            raise FileNotFoundError("data.npz is missing")
        self.data = dict(np.load(data)) if data.exists() else {}

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        return load_file(str(self.folder / f"{name}.safetensors"))

    @property
    def batch(self) -> int:
        return self.data["image"].shape[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    if not path.exists():
        raise FileNotFoundError(f"{path.name} is missing")
    info = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(info, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return info


class Gradients(nn.Cell):
    """Loss, other outputs and parameter gradients of a Cell that returns the loss first."""

    def __init__(self, cell: nn.Cell, weights: ms.ParameterTuple):
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.value_and_grad = ops.value_and_grad(cell, None, weights, has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Any, Any]:
        return self.value_and_grad(*inputs)


def error(ours: Any, theirs: np.ndarray) -> float:
    """max|a-b| / max|b|, infinite for another shape or values that are not finite."""
    ours = ours.asnumpy() if isinstance(ours, Tensor) else np.asarray(ours)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    if not ours.size:
        return 0.0
    return float(np.abs(ours.astype(np.float64) - theirs).max() / max(np.abs(theirs).max(), 1e-12))


def load_weights(cell: nn.Cell, weights: dict[str, np.ndarray], rename: Callable[[str], str]) -> None:
    """Copy reference weights into our network; both must have the same parameters."""
    ours = {p.name: p for p in cell.get_parameters()}
    missing = {name for name in ours if not name.endswith(".draws")}
    for name, value in weights.items():
        target = ours[rename(name)]
        target.set_data(Tensor(value.reshape(target.shape)))
        missing.discard(target.name)
    if missing:
        raise KeyError(f"no reference weight for {sorted(missing)}")


def gradient_findings(
    case: Case, names: list[str], grads: tuple[Tensor, ...], rename: Callable[[str], str]
) -> Findings:
    """Compare every reference gradient with ours.

    Our gradients without a reference must be zero: PyTorch has none for parameters that the loss does not depend on.
    The gradients of `NO_EFFECT` are rounding noise; they are compared on the scale of their weights' gradients.
    """
    by_name = dict(zip(names, grads, strict=True))
    reference = case.tensors("grads")
    missing = set(names) - {rename(name) for name in reference}
    for name in sorted(missing):
        yield f"gradient without reference {name}", float(np.abs(by_name[name].asnumpy()).max()), 0.0
    for name, theirs in reference.items():
        ours = by_name[rename(name)].asnumpy().reshape(theirs.shape)
        if name.endswith(NO_EFFECT):
            scale = np.abs(reference[name.removesuffix("bias") + "weight"]).max()
            yield f"grad {name}", absolute(ours, theirs) / max(float(scale), 1e-12), case.gradient
        else:
            yield f"grad {name}", error(ours, theirs), case.gradient


def as_map(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(B, N, C) -> (B, C, *grid)."""
    return tokens.transpose(0, 2, 1).reshape(len(tokens), -1, *grid)


def absolute(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
