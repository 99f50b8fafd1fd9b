"""Encoder, pooling and linear head: one network for fine-tuning, evaluation, export and teachers."""

from __future__ import annotations

from mindspore import Tensor, nn

from ..config import ClassifyConfig
from .encoder import Encoder
from .layers import LayerNorm, Linear, trunc_normal


class PooledEncoder(nn.Cell):
    """An encoder and pooling: image features.

    Args:
        encoder: without final norm if `config.fc_norm` is set.
        config: how to pool. `pool: mean` averages the patch tokens, `pool: cls` takes the class token; `fc_norm`
            normalises after pooling (FastMIM models_vit.py). None means `pool: mean` without `fc_norm`.
    """

    def __init__(self, encoder: Encoder, config: ClassifyConfig | None):
        super().__init__()
        self.encoder = encoder
        self.pool_mean = config is None or config.pool == "mean"
        self.num_prefix_tokens = encoder.num_prefix_tokens
        norm = config is not None and config.fc_norm
        self.fc_norm = LayerNorm(encoder.out_dim, encoder.norm_eps) if norm else None

    def construct(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, out_dim)."""
        return self.features(image)

    def features(self, image: Tensor) -> Tensor:
        """Pooled features (B, out_dim), the input of a head."""
        return self.pool(self.encoder(image))

    def pool(self, sequence: Tensor) -> Tensor:
        """(B, num_prefix_tokens + N, out_dim) -> (B, out_dim)."""
        pooled = sequence[:, self.num_prefix_tokens :].mean(axis=1) if self.pool_mean else sequence[:, 0]
        return pooled if self.fc_norm is None else self.fc_norm(pooled)


class Classifier(PooledEncoder):
    """An encoder, pooling and a linear head: class logits.

    Args:
        encoder: as in `PooledEncoder`.
        config: classes and pooling. With a distillation token, `pool: cls` has a head on each of the two prefix tokens
            and averages their logits (DeiT).
    """

    def __init__(self, encoder: Encoder, config: ClassifyConfig):
        super().__init__(encoder, config)
        self.head = Linear(encoder.out_dim, config.num_classes, init=trunc_normal(config.head_std))
        distilled = self.num_prefix_tokens > 1 and not self.pool_mean
        self.head_dist = (
            Linear(encoder.out_dim, config.num_classes, init=trunc_normal(config.head_std)) if distilled else None
        )

    def construct(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.logits(self.encoder(image))

    def logits(self, sequence: Tensor) -> Tensor:
        """Encoder tokens -> logits (B, num_classes)."""
        first, second = self.heads(sequence)
        return first if self.head_dist is None else (first + second) / 2

    def heads(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder tokens -> logits of both heads, (B, num_classes) each; the same logits twice if there is one head."""
        logits = self.head(self.pool(sequence))
        return logits, logits if self.head_dist is None else self.head_dist(sequence[:, 1])

    def layer_of(self, name: str) -> int:
        """Learning-rate layer of a parameter; fc_norm and heads are in the top layer."""
        if name.startswith("encoder."):
            return self.encoder.layer_of(name.removeprefix("encoder."))
        return self.encoder.num_layers - 1


class BareEncoder(nn.Cell):
    """An encoder with the parameter names of checkpoints: images (B, in_chans, H, W) -> tokens (B, N, out_dim)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def construct(self, image: Tensor) -> Tensor:
        return self.encoder(image)
