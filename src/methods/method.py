"""The contract every Method keeps, so that the engine and the tasks never ask which one it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from mindspore import Tensor, nn

from ..models import Encoder
from .panels import Panel


class Method(nn.Cell):
    """A batch to a loss; knows nothing of optimisers and files.

    Attributes:
        columns: columns of the training data, in the order of `construct`'s arguments.
        parts: names of the scalars behind the loss, terms of it as means over the batch.
        best: the metric that chooses the best checkpoint, and whether it should be high or low.
        answers: columns that `ask` gives, where the Method asks a teacher whose answers can be kept.
        teacher: a frozen network outside the tree of cells, so that neither optimiser nor checkpoint meets it.
        num_layers: learning-rate layers, `layer_of` + 1 at most.
        encoder: the encoder that is trained.
    """

    columns: tuple[str, ...] = ("image",)
    parts: tuple[str, ...] = ()
    best: tuple[str, Literal["min", "max"]] = ("loss", "min")
    answers: tuple[str, ...] = ()
    teacher: nn.Cell | None = None
    num_layers: int
    encoder: Encoder

    def construct(self, *columns: Any) -> tuple[Tensor, ...]:
        """The columns of a batch -> loss, parts, sums.

        `sums` is a float32 vector that is added over the passes and ranks of an update: what `baseline` needs.
        """
        raise NotImplementedError

    def baseline(self, sums: np.ndarray) -> float:
        """The loss of always predicting the mean target of everything that `sums` (n,) were added over.

        0 where the targets do not differ.
        """
        raise NotImplementedError

    def measure(self, image: Tensor, label: Tensor, number: Tensor) -> Tensor:
        """Sums (n,) over the images with label >= 0, for `metrics`; `number` (B,) int32 is that of each image."""
        raise NotImplementedError

    def metrics(self, sums: np.ndarray) -> dict[str, float]:
        """Sums of `measure`, added over all batches and ranks -> metrics, `count` among them."""
        raise NotImplementedError

    def prepare(self, batches: Iterable[np.ndarray]) -> None:
        """What the baseline has to know of the data before the first step, from training images (n, C, H, W)."""

    def ask(self, image: Tensor) -> tuple[Tensor, ...]:
        """The teacher's answers to images, in the order of `answers`."""
        raise NotImplementedError

    def panels(self, image: Tensor, number: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Panel]:
        """Titled pictures of what the Method does with images; none if it has nothing to show.

        Args:
            image: (B, C, H, W) normalised.
            number: (B,) int32, of each image.
            mean, std: of the normalisation.
        """
        return []

    def layer_of(self, name: str) -> int:
        """Learning-rate layer of a parameter: the encoder's, everything else on top."""
        if name.startswith("encoder."):
            return self.encoder.layer_of(name.removeprefix("encoder."))
        return self.encoder.num_layers - 1

    def no_weight_decay(self) -> set[str]:
        """Names left without weight decay unless the recipe lists them in `train.decayed`."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


def freeze(network: nn.Cell) -> nn.Cell:
    """A teacher: evaluation mode, no gradients, and names apart from another network's."""
    network.set_train(False)
    for parameter in network.get_parameters():
        parameter.requires_grad = False
        if not parameter.name.startswith("teacher."):
            parameter.name = f"teacher.{parameter.name}"
    return network
