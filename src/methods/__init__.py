"""Methods: Cells that turn a batch into a loss.

Every Method has: `columns` (what it wants from the data), `construct(*columns)` -> (loss, *parts) with the names of
the parts in `parts`, `measure(image, label)` -> (count, *sums) with the names of the sums in `metrics`, `best` (metric
and direction that choose the best checkpoint), `layer_of(name)` and `no_weight_decay()` for the optimiser.
"""

from __future__ import annotations

from ..config import ClassifyConfig, MIMConfig, Recipe
from ..models import build_classifier, build_encoder
from .classify import Classify
from .mim import MaskedImageModel
from .mixing import Mixing


def build_method(recipe: Recipe) -> MaskedImageModel | Classify:
    """The Method of a recipe with fresh weights; `mindspore.set_seed` before it fixes them."""
    config = recipe.method
    if isinstance(config, MIMConfig):
        encoder = build_encoder(recipe.trained_encoder)
        return MaskedImageModel(encoder, config, recipe.encoder.image_size)
    assert isinstance(config, ClassifyConfig)
    mixing = Mixing(config) if config.mixes else None
    return Classify(build_classifier(recipe.encoder, config), config.label_smoothing, mixing)


__all__ = ["Classify", "MaskedImageModel", "build_method"]
