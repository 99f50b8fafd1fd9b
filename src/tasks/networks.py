"""Networks by name or from a checkpoint, ready to use: what `load_model`, the hub, evaluation and export share.

The named networks are the recipes of `config/_models`, one file each with an encoder and a classifier; fine-tuning
recipes may name them as their `base:`. A file added there is a name more.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mindspore import nn

from ..config import ClassifyConfig, EncoderConfig, Recipe
from ..config.files import ConfigError, change, did_you_mean, load_recipe, parse_recipe
from ..engine import checkpoint
from ..models import BareEncoder, build_classifier, build_network

MODELS = Path(__file__).resolve().parents[2] / "config" / "_models"


class UnknownModelError(ConfigError, NotImplementedError):
    """A name that is not in `config/_models`; a NotImplementedError too, as create_network of the zoo raises it."""


def load_model(source: str | os.PathLike[str], **options: Any) -> nn.Cell:
    """A classifier in evaluation mode: normalised images (B, in_chans, H, W) -> logits (B, num_classes).

    Args:
        source: a checkpoint of a fine-tuning run, or a name of `model_names()` for fresh weights.
        options: fields of the encoder or the classifier (`src/config/`) that differ from the source's, for example
            `num_classes=10` or `image_size=192`. Those of a checkpoint must leave the shapes of its weights.

    Raises:
        CheckpointError: the file is damaged, another kind of file, from pre-training, or does not fit the options.
        UnknownModelError: the name is not known; the text lists all.
        ConfigError: an option is not known or has an impossible value.
    """
    name = os.fspath(source)
    if name.lower() in model_names():
        return create_model(name, **options)
    if not (name.endswith(".ckpt") or Path(name).exists()):
        raise UnknownModelError(f"{name}: neither a checkpoint file nor a model; models: {', '.join(model_names())}")
    found = checkpoint.load(Path(name))
    encoder, classifier = with_options(classifier_recipe(found), options, name)
    return fill(build_classifier(without_drop_path(encoder), classifier), found)


def create_model(name: str, **options: Any) -> nn.Cell:
    """A named classifier with fresh weights in evaluation mode; names are taken in any case.

    Raises:
        UnknownModelError, ConfigError: as `load_model`.
    """
    encoder, classifier = with_options(model_recipe(name), options, name)
    return build_classifier(encoder, classifier).set_train(False)


def model_names() -> list[str]:
    """The names `load_model` and the hub's create_network answer."""
    return sorted(path.stem for path in MODELS.glob("*.yaml"))


def model_recipe(name: str) -> Recipe:
    """The recipe of a named network: its encoder and its classifier."""
    if name.lower() not in model_names():
        hint = did_you_mean(name.lower(), model_names())
        raise UnknownModelError(f"{name}: not a model of this project; {hint}models: {', '.join(model_names())}")
    return load_recipe(MODELS / f"{name.lower()}.yaml")


def classifier_recipe(found: checkpoint.Checkpoint) -> Recipe:
    """The recipe inside a checkpoint; a distilled student is a classifier like any other.

    Raises:
        CheckpointError: it is from pre-training.
    """
    recipe = parse_recipe(found.meta["recipe"], str(found.path))
    if recipe.method.classifier is None:
        raise checkpoint.CheckpointError(
            f"{found.path}: a pre-training checkpoint ({recipe.method.name}) has no classifier; fine-tune it first "
            "with train.py --init-from"
        )
    return replace(recipe, method=recipe.method.classifier)


def with_options(recipe: Recipe, options: dict[str, Any], source: str) -> tuple[EncoderConfig, ClassifyConfig]:
    """Encoder and classifier of a recipe with single fields changed; `source` names the recipe in errors."""
    encoder, classifier = recipe.encoder, recipe.method.classifier
    assert classifier is not None  # `classifier_recipe` and `model_recipe` give no other
    of_encoder, of_method = ({f.name for f in fields(part)} for part in (encoder, classifier))
    known = sorted((of_encoder | of_method) - {"name", *ClassifyConfig.training_only})
    for key in options:
        if key not in known:
            raise ConfigError(f"{source}: {key}: unknown option; {did_you_mean(key, known)}valid: {', '.join(known)}")
    encoder = change(encoder, {k: v for k, v in options.items() if k in of_encoder}, source)
    return encoder, change(classifier, {k: v for k, v in options.items() if k in of_method}, source)


def deployed(recipe: Recipe) -> nn.Cell:
    """What a recipe trains for: its classifier, or the bare encoder of a pre-training recipe; in evaluation mode."""
    encoder = without_drop_path(recipe.trained_encoder)
    return build_network(encoder, recipe.method.classifier).set_train(False)


def without_drop_path(encoder: EncoderConfig) -> EncoderConfig:
    """Stochastic depth acts in training only, and its draw counters are no weights."""
    return replace(encoder, drop_path=0.0)


def fill(network: nn.Cell, found: checkpoint.Checkpoint) -> nn.Cell:
    """Give a network the weights of a checkpoint; a bare encoder leaves the others out.

    Raises:
        CheckpointError: names or shapes differ.
    """
    own = checkpoint.weights_of(network)
    arrays = found.weights
    if isinstance(network, BareEncoder):
        arrays = {name: value for name, value in arrays.items() if name.startswith("encoder.")}
    checkpoint.assign(own, arrays, found.path)
    return network.set_train(False)
