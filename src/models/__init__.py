"""Encoders and the classifier built from them."""

from __future__ import annotations

from collections.abc import Callable

from ..config import CaiTConfig, ClassifyConfig, EncoderConfig, SwinConfig, SwinV2Config, ViTConfig
from .cait import CaiT
from .classifier import BareEncoder, Classifier, PooledEncoder
from .encoder import Encoder
from .swin import Swin
from .swin_v2 import SwinV2
from .vit import ViT

#: configuration -> encoder
ENCODERS: dict[type[EncoderConfig], Callable[..., Encoder]] = {
    ViTConfig: ViT,
    CaiTConfig: CaiT,
    SwinConfig: Swin,
    SwinV2Config: SwinV2,
}


def build_encoder(config: EncoderConfig, final_norm: bool = True) -> Encoder:
    """The encoder of a configuration; `final_norm=False` omits its last norm, for a norm after pooling."""
    return ENCODERS[type(config)](config, final_norm)


def build_classifier(encoder: EncoderConfig, config: ClassifyConfig) -> Classifier:
    """Encoder, pooling and linear head, for fine-tuning, evaluation, export and teachers."""
    return Classifier(build_encoder(encoder, final_norm=not config.fc_norm), config)


def build_network(encoder: EncoderConfig, classifier: ClassifyConfig | None) -> BareEncoder | Classifier:
    """A classifier, or the bare encoder if there is none; parameters have the names of checkpoints."""
    return build_classifier(encoder, classifier) if classifier else BareEncoder(build_encoder(encoder))


__all__ = [
    "BareEncoder",
    "Classifier",
    "Encoder",
    "PooledEncoder",
    "build_classifier",
    "build_encoder",
    "build_network",
]
