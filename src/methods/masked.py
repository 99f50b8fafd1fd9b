"""Base of the Methods that hide parts of the image: mask, target, loss, baseline, evaluation, pictures."""

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
from .panels import Display, MaskedImages, Panel
from .targets import build_target

ROUNDING = 1e-6  # a variance in float32 below this share of the mean square is rounding
MIN_BASELINE = 1e-5  # a baseline below is rounding too; half a grey level of normalised pixels makes 1e-4


class MaskedModel(Method):
    """Hides blocks of the image and predicts the target of the hidden tokens; subclasses define `predict`.

    Args:
        encoder: any encoder with its final norm.
        config: mask, target and loss.
        image_size: height and width of the training images.
        teacher: the frozen network of a feature target.
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
        self.centre = Tensor(np.zeros(self.target.dim, np.float32))  # prediction of the baseline for absolute errors

    @property
    def teacher(self) -> nn.Cell | None:  # type: ignore[override]
        return self.target.teacher

    def construct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> loss with a random mask, sums."""
        loss, sums, _, _ = self.run(image, self.mask(image.shape[0]))
        return loss, sums

    def run(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images and block mask (B, h, w) -> loss, sums, prediction (B, N, dim), target (B, N, dim)."""
        prediction, target = self.predict(image, mask), self.target_of(image)
        weights = self.target.weights(mask, self.grid)
        error, count = self.errors(prediction - target, weights)
        return error / count, ops.stop_gradient(self.sums(target, weights)), prediction, target

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        """Images and block mask (B, h, w) -> predictions of all tokens (B, N, dim)."""
        raise NotImplementedError

    def target_of(self, image: Tensor) -> Tensor:
        """The target of all tokens (B, N, dim), without gradients."""
        return ops.stop_gradient(self.target(image))

    def errors(self, error: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of squared or absolute errors, and the sum of the weights.

        As in SimMIM models/simmim.py, 1e-5 is added to the number of absolute errors.

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
        """Weighted sums for the baseline.

        Squared errors: count, sum and sum of squares of each channel; one count for all channels if whole tokens are
        masked. Absolute errors: the sum of distances from `centre`, and the count.
        """
        rows = target.reshape(-1, target.shape[-1])
        if self.absolute:
            centre = ops.tile(self.centre.reshape(1, -1), (rows.shape[0], 1)).reshape(target.shape)
            return ops.stack(self.errors(target - centre, weights))
        if weights.ndim == 2:
            weights_row = weights.reshape(1, -1)
            first, second = ops.matmul(weights_row, rows), ops.matmul(weights_row, rows * rows)
            return ops.cat((weights.sum().reshape(1), first.reshape(-1), second.reshape(-1)))
        weights = weights.reshape(rows.shape)
        return ops.cat((weights.sum(axis=0), (rows * weights).sum(axis=0), (rows * rows * weights).sum(axis=0)))

    def baseline(self, sums: np.ndarray) -> float:
        """Loss of the mean target, channel by channel: the variance, or the mean distance from `centre`."""
        if self.absolute:
            distance = float(sums[0] / max(sums[1], 1.0))
            return distance if distance > MIN_BASELINE else 0.0
        counts, first, second = np.split(sums, [len(sums) - 2 * self.target.dim, len(sums) - self.target.dim])
        spread = second.sum() - (first**2 / np.maximum(counts, 1)).sum()
        variance = float(spread / max(np.broadcast_to(counts, first.shape).sum(), 1))
        return variance if spread > ROUNDING * second.sum() and variance > MIN_BASELINE else 0.0

    def prepare(self, batches: Iterable[np.ndarray]) -> None:
        """Set `centre`, for absolute errors, to the mean target of training images, channel by channel.

        Sums of absolute distances cannot be moved to another centre afterwards, so `centre` is the same for every batch
        of a run. Squared errors need no centre.
        """
        if not self.absolute:
            return
        total, count, size = np.zeros(self.target.dim), 0, 0
        for images in batches:
            size = size or len(images)
            full_batch = images[np.arange(size) % len(images)]  # one graph for all batches
            tokens = self.target(Tensor(full_batch)).asnumpy()[: len(images)]
            total += tokens.mean(axis=1, dtype=np.float64).sum(axis=0)
            count += len(images)
        self.centre = Tensor((total / max(count, 1)).astype(np.float32))

    # --- evaluation and pictures ------------------------------------------------------------------------------------

    def measure(self, image: Tensor, label: Tensor, number: Tensor) -> Tensor:
        """Number of images, sum of errors, their count, and `sums`; the mask of an image depends on its number only."""
        counted = (label >= 0).astype(mindspore.float32)
        mask = self.mask.of_numbers(number) * counted.reshape(-1, 1, 1)
        prediction, target = self.predict(image, mask), self.target_of(image)
        weights = self.target.weights(mask, self.grid)
        error, count = self.errors(prediction - target, weights)
        return ops.cat((ops.stack((counted.sum(), error, count)), self.sums(target, weights)))

    def metrics(self, sums: np.ndarray) -> dict[str, float]:
        loss = float(sums[1] / max(sums[2], 1.0))
        return {"loss": loss, "baseline": self.baseline(sums[3:]), "count": round(float(sums[0]))}

    def panels(self, image: Tensor, number: Tensor, display: Display) -> list[Panel]:
        was_training = self.training
        # cached, so that the next gallery compiles nothing; not a sub-cell
        predict_masked = self.__dict__.setdefault("predict_masked", AsGraph(self, self._predict_masked))
        predict_masked.set_train(False)
        mask, prediction, target = (part.asnumpy() for part in predict_masked(image, number))
        self.set_train(was_training)
        images = MaskedImages(image.asnumpy(), mask, self.grid, display)
        return [*images.panels(), *self.target.panels(prediction, target, images)]

    def _predict_masked(self, image: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = self.mask.of_numbers(number)
        return mask, self.predict(image, mask), self.target_of(image)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"} | super().no_weight_decay()
