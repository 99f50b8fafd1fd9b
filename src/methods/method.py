"""The interface of all Methods; engine and tasks use nothing else of a Method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from mindspore import Tensor, nn

from ..models import Encoder
from ..models.random import Draws
from .panels import Display, Panel


class Method(nn.Cell):
    """Computes a loss from a batch, without optimisers and files.

    Attributes:
        columns: columns of the training data, in the order of `construct`'s arguments.
        parts: names of the terms of the loss that `construct` returns after it, as means over the batch.
        best: the metric that selects the best checkpoint, and whether its best value is the minimum or maximum.
        teacher_columns: names of `teacher_outputs`; empty if there is no teacher whose outputs can be cached.
        teacher: a frozen network, not a sub-cell, so that it is neither trained nor saved.
        num_layers: number of learning-rate layers; `layer_of` is less than it.
        encoder: the encoder that is trained.
    """

    columns: tuple[str, ...] = ("image",)
    parts: tuple[str, ...] = ()
    best: tuple[str, Literal["min", "max"]] = ("loss", "min")
    teacher_columns: tuple[str, ...] = ()
    teacher: nn.Cell | None = None
    num_layers: int
    encoder: Encoder

    def construct(self, *columns: Any) -> tuple[Tensor, ...]:
        """The columns of a batch -> loss, parts, sums.

        `sums` is a float32 vector for `baseline`; it is added over the passes and ranks of an update.
        """
        raise NotImplementedError

    def draws(self) -> Draws:
        """The counts of the random cells; `advance` them after each pass of training."""
        return Draws(self)

    def baseline(self, sums: np.ndarray) -> float:
        """The loss of always predicting the mean target, from `sums` (n,); 0 if all targets are equal."""
        raise NotImplementedError

    def measure(self, image: Tensor, label: Tensor, number: Tensor) -> Tensor:
        """Sums (n,) over the images with label >= 0, for `metrics`; `number` (B,) int32 is the number of each image."""
        raise NotImplementedError

    def metrics(self, sums: np.ndarray) -> dict[str, float]:
        """Sums of `measure`, added over all batches and ranks -> metrics, with `count`."""
        raise NotImplementedError

    def prepare(self, batches: Iterable[np.ndarray]) -> None:
        """Prepare the baseline before the first step, from batches of training images (n, C, H, W)."""

    def teacher_outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the teacher, in the order of `teacher_columns`."""
        raise NotImplementedError

    def panels(self, image: Tensor, number: Tensor, display: Display) -> list[Panel]:
        """Titled pictures of images and predictions; empty if the Method has none.

        Args:
            image: (B, C, H, W) normalised.
            number: (B,) int32, numbers of the images.
            display: how normalised images are shown.
        """
        return []

    def layer_of(self, name: str) -> int:
        """Learning-rate layer of a parameter; those outside the encoder are in the top layer."""
        if name.startswith("encoder."):
            return self.encoder.layer_of(name.removeprefix("encoder."))
        return self.encoder.num_layers - 1

    def no_weight_decay(self) -> set[str]:
        """Names without weight decay, unless the recipe lists them in `train.decayed`."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


def freeze(network: nn.Cell) -> nn.Cell:
    """Make a network a teacher: evaluation mode, no gradients, parameter names that start with `teacher.`."""
    network.set_train(False)
    for parameter in network.get_parameters():
        parameter.requires_grad = False
        if not parameter.name.startswith("teacher."):
            parameter.name = f"teacher.{parameter.name}"
    return network
