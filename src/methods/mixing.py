"""Mixup and CutMix within a batch, drawn in the graph."""

from __future__ import annotations

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops
from scipy.special import betaincinv

from ..config import ClassifyConfig
from ..models.random import CounterUniform
from ..operations.rows import scale_columns


class BetaQuantile(nn.Cell):
    """Uniform numbers in [0, 1) -> Beta(alpha, alpha), by linear interpolation in a table of quantiles.

    The error of the distribution function is at most 1 / entries = 2.4e-4. The error of a value is at most 4e-6 for
    alpha 0.8, and 0 for alpha 1.
    """

    entries = 4096

    def __init__(self, alpha: float):
        super().__init__(auto_prefix=False)
        quantiles = betaincinv(alpha, alpha, np.linspace(0, 1, self.entries + 1))
        self.table = Tensor(quantiles.astype(np.float32))

    def construct(self, uniform: Tensor) -> Tensor:
        """Any shape -> the same shape, float32."""
        position = uniform * self.entries
        left = ops.minimum(ops.floor(position), self.entries - 1)
        index = left.astype(mindspore.int32)
        low, high = ops.gather(self.table, index, 0), ops.gather(self.table, index + 1, 0)
        return low + (high - low) * (position - left)


class Mixing(nn.Cell):
    """Mixes image i of a batch with image B - 1 - i; one lambda and one box for the whole batch.

    As timm 0.4.12 data/mixup.py Mixup, mode batch. The random numbers are a pure function of seed and call, so a
    resumed run mixes like an uninterrupted one.

    Args:
        config: alphas, probabilities, classes and label smoothing.
    """

    def __init__(self, config: ClassifyConfig):
        super().__init__()
        self.num_classes, self.smoothing = config.num_classes, config.label_smoothing
        self.prob = config.mixup_prob
        self.switch_prob = config.mixup_switch_prob if config.mixup and config.cutmix else float(config.cutmix > 0)
        self.mixup_quantile = BetaQuantile(config.mixup or config.cutmix)
        self.cutmix_quantile = BetaQuantile(config.cutmix or config.mixup)
        self.uniform = CounterUniform("mixing", per_batch=True)

    def construct(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), labels (B,) int or soft targets (B, classes) -> mixed images, soft targets."""
        target = soft_targets(label, self.num_classes, self.smoothing)
        lam, box, use_cutmix = self.draw(image)
        return mix(image, target, lam, box, use_cutmix)

    def draw(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Lambda (1 is a no-op), the box of `cut_box`, and whether to use CutMix, for a batch."""
        height, width = image.shape[2], image.shape[3]
        uniform = self.uniform(1, 5)[0]  # different numbers on every rank
        use_cutmix = uniform[0] < self.switch_prob
        lam = ops.select(use_cutmix, self.cutmix_quantile(uniform[1]), self.mixup_quantile(uniform[1]))
        lam = ops.select(uniform[2] < self.prob, lam, ops.ones_like(lam))
        size = Tensor([height, width], mindspore.float32)
        centre = ops.minimum(ops.floor(uniform[3:] * size), size - 1)  # a product may round up to the size
        return lam, cut_box(lam, centre, height, width), use_cutmix


def cut_box(lam: Tensor, centre: Tensor, height: int, width: int) -> Tensor:
    """CutMix's box, a share 1 - lambda of the image clipped at the borders: (4,) int32 top, bottom, left, right.

    Args:
        lam: lambda, a float32 scalar.
        centre: (2,) float32 whole numbers, y and x.
        height, width: of the image.
    """
    size = Tensor([height, width], mindspore.float32)
    half = ops.floor(ops.floor(size * ops.sqrt(1.0 - lam)) / 2)  # an odd box loses a pixel, as in timm
    low, high = ops.maximum(centre - half, 0.0), ops.minimum(centre + half, size)
    return ops.stack((low, high), axis=1).reshape(4).astype(mindspore.int32)


def mix(image: Tensor, target: Tensor, lam: Tensor, box: Tensor, use_cutmix: Tensor) -> tuple[Tensor, Tensor]:
    """Mix image and soft target i of a batch with those of B - 1 - i.

    Args:
        image, target: (B, C, H, W), (B, classes).
        lam: weight of image i in mixup, a float32 scalar; CutMix uses image i outside the box.
        box: (4,) top, bottom, left, right, ends excluded; mixup does not use it.
        use_cutmix: bool scalar.
    """
    height, width = image.shape[2], image.shape[3]
    row, col = ops.arange(height).reshape(height, 1), ops.arange(width)
    inside = ops.logical_and(
        ops.logical_and(row >= box[0], row < box[1]), ops.logical_and(col >= box[2], col < box[3])
    ).astype(image.dtype)
    cut = use_cutmix.astype(image.dtype)
    weight = cut * (1.0 - inside) + (1.0 - cut) * lam  # (H, W), of image i
    share = cut * (1.0 - inside.mean()) + (1.0 - cut) * lam
    pixels, partner = image.reshape(-1, height * width), ops.flip(image, (0,)).reshape(-1, height * width)
    mixed = (scale_columns(pixels, weight) + scale_columns(partner, 1.0 - weight)).reshape(image.shape)
    return mixed, target * share + ops.flip(target, (0,)) * (1.0 - share)


def soft_targets(label: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Labels (B,) int -> targets (B, classes) with label smoothing; soft targets are returned unchanged."""
    if label.ndim == 2:
        return label
    hot = ops.one_hot(label.astype(mindspore.int32), num_classes, 1.0, 0.0)
    return hot * (1.0 - smoothing) + smoothing / num_classes
