"""Supervised training of a classifier: hard labels with smoothing, or soft targets."""

from __future__ import annotations

import mindspore
from mindspore import Tensor, nn, ops

from ..models import Classifier
from .mixing import Mixing, soft_targets


class Classify(nn.Cell):
    """Cross-entropy of a classifier.

    Args:
        classifier: encoder, pooling and head.
        label_smoothing: share of the target spread evenly over all classes, the true one included (timm).
        mixing: mixes the batches of training, with label smoothing of its own; never those of `measure`.
    """

    columns: tuple[str, ...] = ("image", "label")
    parts: tuple[str, ...] = ("baseline",)
    metrics = ("loss", "top1", "top5")
    best = ("top1", "max")

    def __init__(self, classifier: Classifier, label_smoothing: float, mixing: Mixing | None = None):
        super().__init__(auto_prefix=False)  # parameters keep the classifier's names: encoder.*, fc_norm.*, head.*
        self.classifier = classifier
        self.num_layers = classifier.encoder.num_layers
        self.num_classes = classifier.head.weight.shape[0]
        self.smoothing, self.mixing = label_smoothing, mixing
        self.top = min(5, self.num_classes)

    def construct(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels (B,) int or soft targets (B, classes) -> loss, and the entropy of the mean target."""
        image, target = self.mixed(image, label)
        return soft_cross_entropy(self.classifier(image), target), entropy_of_mean(target)

    def mixed(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Images and soft targets as training sees them."""
        if self.mixing is not None and self.training:
            return self.mixing(image, label)
        return image, soft_targets(label, self.num_classes, self.smoothing)

    def measure(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """Sums over the images with label >= 0: count, cross-entropy without smoothing, top-1 and top-5 hits."""
        logits = self.classifier(image)
        counted = (label >= 0).astype(mindspore.float32)
        loss = -ops.gather_elements(ops.log_softmax(logits), 1, ops.maximum(label, 0).expand_dims(1)).squeeze(1)
        ranked = ops.topk(logits, self.top)[1]
        hits = (ranked == label.astype(ranked.dtype).expand_dims(1)).astype(mindspore.float32)
        return (
            counted.sum(),
            (loss * counted).sum(),
            (hits[:, 0] * counted).sum(),
            (hits.sum(axis=1) * counted).sum(),
        )

    def layer_of(self, name: str) -> int:
        return self.classifier.layer_of(name)

    def no_weight_decay(self) -> set[str]:
        """Names left without weight decay unless the recipe lists them in `train.decayed`."""
        return {f"encoder.{name}" for name in self.classifier.encoder.no_weight_decay()}


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of -sum(target * log softmax(logits))."""
    return -(target * ops.log_softmax(logits)).sum(axis=-1).mean()


def entropy_of_mean(target: Tensor) -> Tensor:
    """Cross-entropy of the best constant prediction: the entropy of the mean of targets (B, classes)."""
    mean = target.mean(axis=0)
    return -(mean * ops.log(ops.maximum(mean, 1e-12))).sum()
