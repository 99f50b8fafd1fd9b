"""Encoders and the classifier built from them."""

from __future__ import annotations

from ..config import CaiTConfig, ClassifyConfig, EncoderConfig, SwinConfig, SwinV2Config, ViTConfig
from .cait import CaiT
from .classifier import Classifier
from .encoder import Encoder
from .swin import Swin
from .swin_v2 import SwinV2
from .vit import ViT


def build_encoder(config: EncoderConfig, final_norm: bool = True) -> Encoder:
    """The encoder of a recipe; `final_norm=False` leaves the last norm out (pooling brings its own)."""
    classes = {ViTConfig: ViT, CaiTConfig: CaiT, SwinConfig: Swin, SwinV2Config: SwinV2}
    return classes[type(config)](config, final_norm)


def build_classifier(encoder: EncoderConfig, config: ClassifyConfig) -> Classifier:
    """Encoder, pooling and linear head, as fine-tuning, evaluation, export and teachers use it."""
    return Classifier(build_encoder(encoder, final_norm=not config.fc_norm), config)


__all__ = ["Classifier", "Encoder", "build_classifier", "build_encoder"]
