"""The dataclasses of a recipe, their presets and the checks between fields.

A recipe is one YAML file with five parts: encoder, method, data, train and a few top-level keys. The dataclasses are
frozen and need neither MindSpore nor files; `src.config.files` reads and writes them.
`python -m src.config FILE [key=value ...]` prints the resolved recipe.

Some fields take one of several classes: encoder, method, target, decoder. There the YAML names a preset, and the other
keys change single fields of that preset: `encoder: {name: vit_base, image_size: 128}`. `encoder: vit_base` is the
short form without changes.
"""

from __future__ import annotations

from .checks import FieldError, plural, show_size
from .encoders import ENCODERS, CaiTConfig, EncoderConfig, SwinConfig, SwinV2Config, ViTConfig, window_side
from .methods import (
    METHODS,
    ClassifyConfig,
    DecoderConfig,
    FeaturesConfig,
    HOGConfig,
    LinearDecoderConfig,
    MAEConfig,
    ManifoldConfig,
    MaskedConfig,
    MethodConfig,
    MIMConfig,
    PixelsConfig,
    TargetConfig,
    Teacher,
    TransformerDecoderConfig,
    masked_count,
    relation_maps,
)
from .recipe import PRESETS, Recipe, at_stage
from .training import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataConfig,
    Kernels,
    Precision,
    PrecisionConfig,
    RandAugmentConfig,
    StageConfig,
    TrainConfig,
    parse_auto_augment,
)

__all__ = [
    "ENCODERS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "METHODS",
    "PRESETS",
    "CaiTConfig",
    "ClassifyConfig",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "FeaturesConfig",
    "FieldError",
    "HOGConfig",
    "Kernels",
    "LinearDecoderConfig",
    "MAEConfig",
    "MIMConfig",
    "ManifoldConfig",
    "MaskedConfig",
    "MethodConfig",
    "PixelsConfig",
    "Precision",
    "PrecisionConfig",
    "RandAugmentConfig",
    "Recipe",
    "StageConfig",
    "SwinConfig",
    "SwinV2Config",
    "TargetConfig",
    "Teacher",
    "TrainConfig",
    "TransformerDecoderConfig",
    "ViTConfig",
    "at_stage",
    "masked_count",
    "parse_auto_augment",
    "plural",
    "relation_maps",
    "show_size",
    "window_side",
]
