"""Masked image modelling on MindSpore: SimMIM, FastMIM and manifold distillation for ViT and Swin."""

from __future__ import annotations

import os
from typing import Any

__version__ = "0.1.0"


def load_model(source: str | os.PathLike[str], **options: Any) -> Any:
    """Return a classifier from a checkpoint or by name, images -> logits: see `src.tasks.networks.load_model`."""
    from .tasks.networks import load_model as load  # MindSpore is imported only when it is needed

    return load(source, **options)


def load_encoder(source: str | os.PathLike[str], blocks: Any = None, **options: Any) -> Any:
    """Return an encoder, images -> pooled features or feature maps: see `src.tasks.networks.load_encoder`."""
    from .tasks.networks import load_encoder as load

    return load(source, blocks, **options)
