"""Supervised training of a classifier, with labels or soft targets."""

from __future__ import annotations

import mindspore
import numpy as np
from mindspore import Tensor, ops

from ..models import Classifier, Encoder
from .method import Method
from .mixing import Mixing, soft_targets


class Classify(Method):
    """Cross-entropy of a classifier.

    Args:
        classifier: encoder, pooling and head.
        label_smoothing: share of the target that is spread evenly over all classes, the true one included (timm).
        mixing: mixup and CutMix of training batches, with its own label smoothing; `measure` does not mix.
    """

    columns: tuple[str, ...] = ("image", "label")
    best = ("top1", "max")

    def __init__(self, classifier: Classifier, label_smoothing: float, mixing: Mixing | None = None):
        super().__init__(auto_prefix=False)  # parameters keep the classifier's names: encoder.*, fc_norm.*, head.*
        self.classifier = classifier
        self.num_layers = classifier.encoder.num_layers
        self.num_classes = classifier.head.weight.shape[0]
        self.smoothing, self.mixing = label_smoothing, mixing
        self.top = min(5, self.num_classes)

    @property
    def encoder(self) -> Encoder:  # type: ignore[override]
        return self.classifier.encoder

    def construct(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """Images, and labels (B,) int or soft targets (B, classes) -> loss, sum of the targets (classes,)."""
        image, target = self.mixed(image, label)
        return soft_cross_entropy(self.classifier(image), target), target.sum(axis=0)

    def baseline(self, sums: np.ndarray) -> float:
        """Cross-entropy of the mean target."""
        return entropy(sums)

    def mixed(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Images and soft targets, mixed in training."""
        if self.mixing is not None and self.training:
            return self.mixing(image, label)
        return image, soft_targets(label, self.num_classes, self.smoothing)

    def measure(self, image: Tensor, label: Tensor, number: Tensor) -> Tensor:
        """Number of images, and sums of cross-entropy without smoothing, top-1 hits and top-5 hits."""
        logits = self.classifier(image)
        counted = (label >= 0).astype(mindspore.float32)
        loss = -ops.gather_elements(ops.log_softmax(logits), 1, ops.maximum(label, 0).expand_dims(1)).squeeze(1)
        ranked = ops.topk(logits, self.top)[1]
        hits = (ranked == label.astype(ranked.dtype).expand_dims(1)).astype(mindspore.float32)
        return ops.stack(
            (
                counted.sum(),
                (loss * counted).sum(),
                (hits[:, 0] * counted).sum(),
                (hits.sum(axis=1) * counted).sum(),
            )
        )

    def metrics(self, sums: np.ndarray) -> dict[str, float]:
        loss, top1, top5 = (sums[1:4] / max(sums[0], 1)).tolist()
        return {"loss": loss, "top1": top1, "top5": top5, "count": round(float(sums[0]))}


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of -sum(target * log softmax(logits))."""
    return -(target * ops.log_softmax(logits)).sum(axis=-1).mean()


def entropy(sums: np.ndarray) -> float:
    """Entropy of the mean target, from the sum of the targets (classes,); 0 if all are of one class."""
    share = np.maximum(sums, 0) / max(sums.sum(), 1e-12)
    value = -float((share * np.log(np.maximum(share, 1e-300))).sum())
    return value if value > 1e-7 else 0.0
