"""What all Methods that hide a part of the image share: mask, target, loss, baseline, evaluation, pictures."""

from __future__ import annotations

from collections.abc import Iterable

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from ..config import MaskedConfig
from ..models import Encoder
from ..models.graph import AsGraph
from .masking import BlockMask
from .method import Method
from .panels import Panel, Scene
from .targets import build_target

EQUAL = 1e-6  # share of the mean square below which a variance in float32 is rounding
NOTHING = 1e-5  # a baseline below it is rounding too: half a grey level of normalised pixels makes 1e-4


class MaskedModel(Method):
    """Hide blocks of the image and predict the target of the hidden tokens; `predict` is what members differ in.

    Args:
        encoder: any encoder with its final norm.
        config: mask, target and loss.
        image_size: height and width of the training images.
        teacher: the frozen network of a target that asks one.
    """

    def __init__(
        self, encoder: Encoder, config: MaskedConfig, image_size: tuple[int, int], teacher: nn.Cell | None = None
    ):
        super().__init__()
        self.encoder = encoder
        self.num_layers = encoder.num_layers
        self.target = build_target(config.target, encoder.stride, encoder.in_chans, teacher)
        self.absolute = config.loss == "l1"
        self.grid, self.image_size = encoder.grid(image_size), image_size
        self.mask = BlockMask(config.mask_grid(image_size), config.hidden_blocks(image_size))
        self.centre = Tensor(np.zeros(self.target.dim, np.float32))  # what the baseline of absolute errors predicts

    @property
    def teacher(self) -> nn.Cell | None:  # type: ignore[override]
        return self.target.teacher

    def construct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> loss of a random mask, sums."""
        loss, sums, _, _ = self.run(image, self.mask(image.shape[0]))
        return loss, sums

    def run(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With a given block mask (B, rows, cols): loss, sums, prediction (B, N, dim), target (B, N, dim)."""
        prediction, target = self.predict(image, mask), self.target_of(image)
        weights = self.target.weights(mask, self.grid)
        error, count = self.errors(prediction - target, weights)
        return error / count, ops.stop_gradient(self.sums(target, weights)), prediction, target

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predictions of all tokens (B, N, dim) from images with the mask's blocks (B, rows, cols) hidden."""
        raise NotImplementedError

    def target_of(self, image: Tensor) -> Tensor:
        """The target of all tokens (B, N, dim), without gradients."""
        return ops.stop_gradient(self.target(image))

    def errors(self, error: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of squares or absolute values over the values of weight 1, and their number.

        SimMIM models/simmim.py adds 1e-5 to the number of masked pixels of one channel, which moves nothing that
        float32 shows as soon as one pixel is masked.

        Args:
            error: (B, N, dim).
            weights: (B, N) or (B, N, dim).
        """
        size = ops.abs(error) if self.absolute else error * error
        extra = 1e-5 if self.absolute else 0.0
        if weights.ndim == 2:
            return (size.sum(axis=-1) * weights).sum(), weights.sum() * error.shape[-1] + extra
        return (size * weights).sum(axis=-1).sum(), weights.sum(axis=-1).sum() + extra

    # --- baseline ---------------------------------------------------------------------------------------------------

    def sums(self, target: Tensor, weights: Tensor) -> Tensor:
        """What the baseline needs of the values of weight 1.

        Squared errors: their numbers, sums and sums of squares, channel by channel (one number for all channels where
        whole tokens are masked). Absolute errors: the sum of distances from `centre`, and the number of values.
        """
        rows = target.reshape(-1, target.shape[-1])
        if self.absolute:
            centre = ops.tile(self.centre.reshape(1, -1), (rows.shape[0], 1)).reshape(target.shape)
            return ops.stack(self.errors(target - centre, weights))
        if weights.ndim == 2:
            line = weights.reshape(1, -1)
            first, second = ops.matmul(line, rows), ops.matmul(line, rows * rows)
            return ops.cat((weights.sum().reshape(1), first.reshape(-1), second.reshape(-1)))
        each = weights.reshape(rows.shape)
        return ops.cat((each.sum(axis=0), (rows * each).sum(axis=0), (rows * rows * each).sum(axis=0)))

    def baseline(self, sums: np.ndarray) -> float:
        """Of squared errors: the variance around the mean of each channel, over all values."""
        if self.absolute:
            distance = float(sums[0] / max(sums[1], 1.0))
            return distance if distance > NOTHING else 0.0
        counts, first, second = np.split(sums, [len(sums) - 2 * self.target.dim, len(sums) - self.target.dim])
        spread = second.sum() - (first**2 / np.maximum(counts, 1)).sum()
        variance = float(spread / max(np.broadcast_to(counts, first.shape).sum(), 1))
        return variance if spread > EQUAL * second.sum() and variance > NOTHING else 0.0

    def prepare(self, batches: Iterable[np.ndarray]) -> None:
        """The mean target, channel by channel, of absolute errors.

        A sum of absolute distances cannot be moved to another centre afterwards, so it is measured from a centre that
        is the same for every batch of the run. The mean of squared errors follows from sums.
        """
        if not self.absolute:
            return
        total, count, size = np.zeros(self.target.dim), 0, 0
        for images in batches:
            size = size or len(images)
            filled = images[np.arange(size) % len(images)]  # one graph for all batches
            rows = self.target(Tensor(filled)).asnumpy()[: len(images)]
            total += rows.mean(axis=1, dtype=np.float64).sum(axis=0)
            count += len(images)
        self.centre = Tensor((total / max(count, 1)).astype(np.float32))

    # --- evaluation and pictures ------------------------------------------------------------------------------------

    def measure(self, image: Tensor, label: Tensor, number: Tensor) -> Tensor:
        """Images, sum of errors, values, and the sums of the baseline; each image's mask is that of its number."""
        counted = (label >= 0).astype(mindspore.float32)
        mask = self.mask.of_numbers(number) * counted.reshape(-1, 1, 1)
        prediction, target = self.predict(image, mask), self.target_of(image)
        weights = self.target.weights(mask, self.grid)
        error, count = self.errors(prediction - target, weights)
        return ops.cat((ops.stack((counted.sum(), error, count)), self.sums(target, weights)))

    def metrics(self, sums: np.ndarray) -> dict[str, float]:
        loss = float(sums[1] / max(sums[2], 1.0))
        return {"loss": loss, "baseline": self.baseline(sums[3:]), "count": round(float(sums[0]))}

    def panels(self, image: Tensor, number: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Panel]:
        was_training = self.training
        # kept, so that the next gallery compiles nothing; not a cell of this one
        pictured = self.__dict__.setdefault("pictured", AsGraph(self, self._pictured))
        pictured.set_train(False)
        mask, prediction, target = (part.asnumpy() for part in pictured(image, number))
        self.set_train(was_training)
        scene = Scene(image.asnumpy(), mask, self.grid, mean, std)
        return [*scene.panels(), *self.target.panels(prediction, target, scene)]

    def _pictured(self, image: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = self.mask.of_numbers(number)
        return mask, self.predict(image, mask), self.target_of(image)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"} | super().no_weight_decay()
