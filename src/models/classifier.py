"""Encoder, pooling and linear head: one network for fine-tuning, evaluation, export and teachers."""

from __future__ import annotations

from mindspore import Tensor, nn

from ..config import ClassifyConfig
from .encoder import Encoder
from .layers import LayerNorm, Linear, trunc_normal


class Pooled(nn.Cell):
    """Features of an image: an encoder's tokens, pooled.

    Args:
        encoder: built without final norm when `config.fc_norm` is set.
        config: how a classifier pools. `pool: mean` averages the patch tokens (never the class token), `pool: cls`
            takes the class token; `fc_norm` normalises after pooling (FastMIM models_vit.py). None averages.
    """

    def __init__(self, encoder: Encoder, config: ClassifyConfig | None):
        super().__init__()
        self.encoder = encoder
        self.pool_mean = config is None or config.pool == "mean"
        self.prefix = encoder.num_prefix_tokens
        norm = config is not None and config.fc_norm
        self.fc_norm = LayerNorm(encoder.out_dim, encoder.norm_eps) if norm else None

    def construct(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, out_dim)."""
        return self.features(image)

    def features(self, image: Tensor) -> Tensor:
        """Pooled features (B, out_dim) that a head sees."""
        return self.pool(self.encoder(image))

    def pool(self, sequence: Tensor) -> Tensor:
        """(B, prefix + N, out_dim) -> (B, out_dim)."""
        pooled = sequence[:, self.prefix :].mean(axis=1) if self.pool_mean else sequence[:, 0]
        return pooled if self.fc_norm is None else self.fc_norm(pooled)


class Classifier(Pooled):
    """Logits of an image.

    Args:
        encoder: as in `Pooled`.
        config: classes and pooling. With a distillation token `pool: cls` gives the mean of two heads' logits, one on
            each token (DeiT).
    """

    def __init__(self, encoder: Encoder, config: ClassifyConfig):
        super().__init__(encoder, config)
        self.head = Linear(encoder.out_dim, config.num_classes, init=trunc_normal(config.head_std))
        second = self.prefix > 1 and not self.pool_mean
        self.head_dist = (
            Linear(encoder.out_dim, config.num_classes, init=trunc_normal(config.head_std)) if second else None
        )

    def construct(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.logits(self.encoder(image))

    def logits(self, sequence: Tensor) -> Tensor:
        """Tokens of the encoder -> logits (B, num_classes)."""
        first, second = self.heads(sequence)
        return first if self.head_dist is None else (first + second) / 2

    def heads(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the encoder -> logits of the head, and of that on the distillation token if there is one."""
        logits = self.head(self.pool(sequence))
        return logits, logits if self.head_dist is None else self.head_dist(sequence[:, 1])

    def layer_of(self, name: str) -> int:
        """Learning-rate layer: the encoder's own, fc_norm and head on top."""
        if name.startswith("encoder."):
            return self.encoder.layer_of(name.removeprefix("encoder."))
        return self.encoder.num_layers - 1


class BareEncoder(nn.Cell):
    """An encoder under the names it has in checkpoints: images (B, in_chans, H, W) -> tokens (B, N, out_dim)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def construct(self, image: Tensor) -> Tensor:
        return self.encoder(image)
