"""Parameter groups and AdamW, equal to PyTorch's.

`nn.AdamWeightDecay` has no bias correction. Its fused primitive becomes AdamW when the correction is folded into
learning rate, epsilon and decay, which the host computes in float64 for each step:

    p -= lr * (m / bc1) / (sqrt(v / bc2) + eps) + lr * wd * p,   bc = 1 - beta^t
       = lr_t * m / (sqrt(v) + eps_t) + lr_t * wd_t * p
    lr_t = lr * sqrt(bc2) / bc1,   eps_t = eps * sqrt(bc2),   wd_t = wd * bc1 / sqrt(bc2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn

from ..config import TrainConfig
from ..operations.forms import build
from ..operations.updates import AdamWUpdate
from .contracts import Trainable


@dataclass(frozen=True)
class Group:
    """Parameters that share learning rate and weight decay."""

    layer: int
    lr_scale: float
    weight_decay: float
    parameters: list[Parameter]


def parameter_groups(method: Trainable, train: TrainConfig) -> list[Group]:
    """Group the trainable parameters by layer and decay, in order of first appearance.

    Biases and other 1-D parameters are never decayed. The tokens and tables in `no_weight_decay` are decayed only if
    the last part of their name is in `train.decayed`.
    The rate of a layer is scaled by layer_decay ** (number of layers above it) (BEiT; FastMIM util/lr_decay.py).
    """
    excluded = {name for name in method.no_weight_decay() if name.split(".")[-1] not in train.decayed}
    layers = method.num_layers
    groups: dict[tuple[int, bool], Group] = {}
    for parameter in method.trainable_params():
        name = parameter.name
        decayed = parameter.ndim > 1 and not name.endswith(".bias") and name not in excluded
        layer = method.layer_of(name) if train.layer_decay < 1 else layers - 1
        scale = train.layer_decay ** (layers - 1 - layer)
        weight_decay = train.weight_decay if decayed else 0.0
        groups.setdefault((layer, decayed), Group(layer, scale, weight_decay, [])).parameters.append(parameter)
    return list(groups.values())


class AdamW(nn.Cell):
    """AdamW: decoupled weight decay, bias-corrected moments, one fused update per parameter.

    Args:
        groups: parameters with learning-rate scale and weight decay.
        betas, eps: as in PyTorch.
    """

    def __init__(self, groups: list[Group], betas: tuple[float, float], eps: float):
        super().__init__(auto_prefix=False)
        self.groups = groups
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.weights = ParameterTuple([p for group in groups for p in group.parameters])
        group_of = [number for number, group in enumerate(groups) for _ in group.parameters]
        self.first = self.weights.clone(prefix="adam_m", init="zeros")
        self.second = self.weights.clone(prefix="adam_v", init="zeros")
        self.update = build(AdamWUpdate, betas, group_of, self.weights, self.first, self.second)

    def step_values(self, rate_of: Callable[[float], float], step: int) -> Tensor:
        """Return the values that `construct` needs for an update: lr_t of each group, wd_t of each group, eps_t.

        Args:
            rate_of: layer-decay factor of a group -> learning rate.
            step: number of the update, from 1.
        """
        bc1, bc2 = 1 - self.beta1**step, 1 - self.beta2**step
        rates = [rate_of(group.lr_scale) * bc2**0.5 / bc1 for group in self.groups]
        decays = [group.weight_decay * bc1 / bc2**0.5 for group in self.groups]
        return Tensor(np.array([*rates, *decays, self.eps * bc2**0.5], np.float32))

    def construct(self, values: Tensor, factor: Tensor | None, grads: tuple[Tensor, ...]) -> Any:
        """Update all parameters once; `factor`, a scalar or None, scales the gradients."""
        return self.update(values, factor, grads)

    def state(self) -> dict[str, Parameter]:
        """Return the moments by name, for checkpoints."""
        return {p.name: p for p in (*self.first, *self.second)}


def build_optimizer(method: Trainable, train: TrainConfig) -> AdamW:
    """Build AdamW for the Method's trainable parameters."""
    return AdamW(parameter_groups(method, train), train.betas, train.eps)
