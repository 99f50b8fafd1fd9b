"""Methods: Cells that turn a batch into a loss.

Every Method has: `columns` (what it wants from the data), `construct(*columns)` -> (loss, *parts) with the names of
the parts in `parts`, `measure(image, label)` -> (count, *sums) with the names of the sums in `metrics`, `best` (metric
and direction that choose the best checkpoint), `layer_of(name)` and `no_weight_decay()` for the optimiser.
"""

from __future__ import annotations

from ..config import ClassifyConfig, ManifoldConfig, MIMConfig, Recipe, relation_maps
from ..models import Classifier, build_classifier, build_encoder
from .classify import Classify
from .manifold import ManifoldDistiller
from .mim import MaskedImageModel
from .mixing import Mixing


def build_method(recipe: Recipe, teacher: Classifier | None = None) -> MaskedImageModel | Classify:
    """The Method of a recipe with fresh weights; `mindspore.set_seed` before it fixes them.

    Args:
        recipe: the resolved recipe.
        teacher: of a distillation; without one it has fresh weights, which is enough for sizes and times.
    """
    config = recipe.method
    if isinstance(config, MIMConfig):
        encoder = build_encoder(recipe.trained_encoder)
        return MaskedImageModel(encoder, config, recipe.encoder.image_size)
    assert isinstance(config, ClassifyConfig)
    mixing = Mixing(config) if config.mixes else None
    classifier = build_classifier(recipe.encoder, config)
    if isinstance(config, ManifoldConfig):
        teacher = teacher or build_classifier(config.teacher_encoder, config.teacher_classifier)
        return ManifoldDistiller(classifier, config, relation_maps(recipe.encoder, config), teacher, mixing)
    return Classify(classifier, config.label_smoothing, mixing)


__all__ = ["Classify", "ManifoldDistiller", "MaskedImageModel", "build_method"]
