"""What all comparisons share: a case on disk, errors, gradients, names."""

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

#: FastMIM's pre-training decays them: timm 0.3.2 add_weight_decay has no list of names to spare there
TOKENS = ("cls_token", "mask_token", "relative_position_bias_table")
#: biases added to all scores of a token alike, which softmax does not see: of CaiT's keys and its heads before softmax
UNSEEN = ("attn.k.bias", "attn.proj_l.bias")


class UnknownError(Exception):
    """What a case leaves open and a comparison needs; the case is then not covered."""


class Stated(dict[str, Any]):
    """Arguments of a reference; one that is asked for and not stated leaves the case open."""

    def __missing__(self, key: str) -> Any:
        raise UnknownError(f"its arguments do not state {key}")


def rename_with(naming: Naming) -> Callable[[str], str]:
    """Our name of each of theirs, where every name has a place."""

    def rename(name: str) -> str:
        place = naming.ours(name)
        assert place is not None and place[1] is None, name
        return place[0]

    return rename


from_simmim, from_plain, from_fastmim_pooled = (
    rename_with(SIMMIM),
    rename_with(PLAIN),
    rename_with(FASTMIM_SWIN_CLASSIFIER),
)


def from_fastmim(name: str) -> str:
    """Of either of FastMIM's pre-training networks."""
    return rename_with(FASTMIM_SWIN if name.startswith("encoder.") else FASTMIM_VIT)(name)


#: array name, error, tolerance
Finding = tuple[str, float, float]
Findings = Iterator[Finding]


class Case:
    """One folder of reference numbers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.info: dict[str, Any] = read_json(folder / "case.json")
        self.arguments = Stated(self.info.get("arguments") or {})
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
        raise ValueError(f"{path.name} holds no object")
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
    """Copy reference weights into our network; every name must find its place."""
    ours = {p.name: p for p in cell.get_parameters()}
    left = {name for name in ours if not name.endswith(".draws")}
    for name, value in weights.items():
        target = ours[rename(name)]
        target.set_data(Tensor(value.reshape(target.shape)))
        left.discard(target.name)
    if left:
        raise KeyError(f"no reference weight for {sorted(left)}")


def gradient_findings(
    case: Case, names: list[str], grads: tuple[Tensor, ...], rename: Callable[[str], str]
) -> Findings:
    """Every reference gradient against ours.

    Ours without a reference must be zero: PyTorch gives none to what the loss does not depend on. Biases that softmax
    does not see have no gradient but rounding noise; that is compared on the scale of their weights' gradient.
    """
    by_name = dict(zip(names, grads, strict=True))
    reference = case.tensors("grads")
    missing = set(names) - {rename(name) for name in reference}
    for name in sorted(missing):
        yield f"gradient without reference {name}", float(np.abs(by_name[name].asnumpy()).max()), 0.0
    for name, theirs in reference.items():
        ours = by_name[rename(name)].asnumpy().reshape(theirs.shape)
        if name.endswith(UNSEEN):
            scale = np.abs(reference[name.removesuffix("bias") + "weight"]).max()
            yield f"grad {name}", absolute(ours, theirs) / max(float(scale), 1e-12), case.gradient
        else:
            yield f"grad {name}", error(ours, theirs), case.gradient


def as_map(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(B, N, C) -> (B, C, rows, cols)."""
    return tokens.transpose(0, 2, 1).reshape(len(tokens), -1, *grid)


def absolute(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
