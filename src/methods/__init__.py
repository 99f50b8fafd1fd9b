"""Methods: Cells that compute a loss from a batch; their interface is `method.Method`."""

from __future__ import annotations

from collections.abc import Callable

from mindspore import nn

from ..config import ClassifyConfig, MAEConfig, ManifoldConfig, MethodConfig, MIMConfig, Recipe, relation_maps
from ..models import Classifier, build_classifier, build_encoder, build_network
from .classify import Classify
from .mae import MaskedAutoencoder
from .manifold import ManifoldDistiller
from .method import Method
from .mim import MaskedImageModel
from .mixing import Mixing


def masked_image_model(recipe: Recipe, config: MIMConfig, teacher: nn.Cell | None) -> Method:
    return MaskedImageModel(build_encoder(recipe.trained_encoder), config, recipe.encoder.image_size, teacher)


def masked_autoencoder(recipe: Recipe, config: MAEConfig, teacher: nn.Cell | None) -> Method:
    return MaskedAutoencoder(build_encoder(recipe.trained_encoder), config, recipe.encoder.image_size, teacher)


def classify(recipe: Recipe, config: ClassifyConfig, teacher: nn.Cell | None) -> Method:
    mixing = Mixing(config) if config.mixes else None
    return Classify(build_classifier(recipe.encoder, config), config.label_smoothing, mixing)


def manifold(recipe: Recipe, config: ManifoldConfig, teacher: Classifier) -> Method:
    mixing = Mixing(config) if config.mixes else None
    classifier, maps = build_classifier(recipe.encoder, config), relation_maps(recipe.encoder, config)
    return ManifoldDistiller(classifier, config, maps, teacher, mixing)


#: configuration -> function of recipe, configuration and teacher
BUILDERS: dict[type[MethodConfig], Callable[..., Method]] = {
    MIMConfig: masked_image_model,
    MAEConfig: masked_autoencoder,
    ClassifyConfig: classify,
    ManifoldConfig: manifold,
}


def build_method(recipe: Recipe, teacher: nn.Cell | None = None) -> Method:
    """The Method of a recipe with fresh weights, which depend on `mindspore.set_seed`.

    Args:
        recipe: the resolved recipe.
        teacher: the network that the recipe names; None builds it with fresh weights, for measurements of size and
            time.
    """
    network = recipe.method.teacher_network
    build = BUILDERS[type(recipe.method)]
    if network is not None and teacher is None:
        teacher = build_network(network.encoder, network.classifier)
    return build(recipe, recipe.method, teacher)


__all__ = ["Classify", "ManifoldDistiller", "MaskedAutoencoder", "MaskedImageModel", "Method", "build_method"]
