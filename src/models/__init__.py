"""Encoders and the classifier built from them."""

from __future__ import annotations

from collections.abc import Callable

from ..config import CaiTConfig, ClassifyConfig, EncoderConfig, SwinConfig, SwinV2Config, ViTConfig
from .cait import CaiT
from .classifier import BareEncoder, Classifier, Pooled
from .encoder import Encoder
from .swin import Swin
from .swin_v2 import SwinV2
from .vit import ViT

#: configuration -> what builds it
ENCODERS: dict[type[EncoderConfig], Callable[..., Encoder]] = {
    ViTConfig: ViT,
    CaiTConfig: CaiT,
    SwinConfig: Swin,
    SwinV2Config: SwinV2,
}


def build_encoder(config: EncoderConfig, final_norm: bool = True) -> Encoder:
    """The encoder of a recipe; `final_norm=False` leaves the last norm out (pooling brings its own)."""
    return ENCODERS[type(config)](config, final_norm)


def build_classifier(encoder: EncoderConfig, config: ClassifyConfig) -> Classifier:
    """Encoder, pooling and linear head, as fine-tuning, evaluation, export and teachers use it."""
    return Classifier(build_encoder(encoder, final_norm=not config.fc_norm), config)


def build_network(encoder: EncoderConfig, classifier: ClassifyConfig | None) -> BareEncoder | Classifier:
    """What a checkpoint is used for: its classifier, or the encoder alone, under the names they have in checkpoints."""
    return build_classifier(encoder, classifier) if classifier else BareEncoder(build_encoder(encoder))


__all__ = ["BareEncoder", "Classifier", "Encoder", "Pooled", "build_classifier", "build_encoder", "build_network"]
