"""Networks by name or from a checkpoint, ready to use: what `load_model`, the hub, evaluation and export share.

The named networks are the recipes of `config/_models`, one file each with an encoder and a classifier; fine-tuning
recipes may name them as their `base:`. A file added there is a name more.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mindspore import Tensor, nn

from ..config import ClassifyConfig, EncoderConfig, Recipe
from ..config.files import ConfigError, change, did_you_mean, load_recipe, parse_recipe
from ..engine import checkpoint
from ..models import BareEncoder, Encoder, PooledEncoder, build_classifier, build_encoder, build_network

if TYPE_CHECKING:
    from ..weights.load import Origin

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
    found = open_source(name)
    encoder, classifier = with_options(classifier_recipe(found), options, name)
    return fill(build_classifier(without_drop_path(encoder), classifier), found)


def open_source(name: str) -> checkpoint.Checkpoint:
    """The checkpoint of that name.

    Raises:
        UnknownModelError: it is no file's name; the text lists the models.
    """
    if not (name.endswith(".ckpt") or Path(name).exists()):
        raise UnknownModelError(f"{name}: neither a checkpoint file nor a model; models: {', '.join(model_names())}")
    return checkpoint.load(Path(name))


def create_model(name: str, **options: Any) -> nn.Cell:
    """A named classifier with fresh weights in evaluation mode; names are taken in any case.

    Raises:
        UnknownModelError, ConfigError: as `load_model`.
    """
    encoder, classifier = with_options(model_recipe(name), options, name)
    return build_classifier(encoder, classifier).set_train(False)


def load_encoder(
    source: str | os.PathLike[str], blocks: Literal["stages"] | int | Sequence[int] | None = None, **options: Any
) -> FeatureExtractor | PooledEncoder:
    """The encoder of any run, to be used as a backbone; in evaluation mode, its parameters can be trained on.

        features = load_encoder("runs/pretrain/last.ckpt")(images)                        # (B, out_dim)
        maps = load_encoder("runs/pretrain/last.ckpt", blocks="stages", image_size=512)(images)  # (B, C, H, W) each

    Args:
        source: a checkpoint of pre-training, fine-tuning or distillation, converted ones too, or a name of
            `model_names()` for fresh weights.
        blocks: None pools the tokens of the last block as the source's classifier does; after pre-training that is the
            mean of the patch tokens after the final norm. Else the maps after these blocks, before the final norm:
            numbers from 0 through all stages, negative ones from the end, or `stages` for the last block of each stage
            (a ViT is one stage).
        options: fields of the encoder (`src/config/encoders.py`) that differ from the source's. With another
            `image_size` or `window_size` tables of positions are resized as `train.py --init-from` does it; what was
            done stands in the attribute `report`.

    Raises:
        CheckpointError: the file is damaged or another kind of file.
        WeightsError: its weights do not fit the options.
        UnknownModelError: the name is not known; the text lists all.
        ConfigError: an option or a block is not known or impossible.
    """
    name = os.fspath(source)
    found = None if name.lower() in model_names() else open_source(name)
    recipe = model_recipe(name) if found is None else parse_recipe(found.meta["recipe"], name)
    before = recipe.trained_encoder
    known = sorted({f.name for f in fields(before)} - {"name"})
    check_options(options, known, name)
    encoder, classifier = without_drop_path(change(before, options, name)), recipe.method.classifier
    chosen = chosen_blocks(encoder, blocks, name)
    normed = chosen is None and not (classifier and classifier.fc_norm)  # maps come before the final norm
    built = build_encoder(encoder, final_norm=normed)
    pooled = PooledEncoder(built, classifier)
    cell = pooled if chosen is None else FeatureExtractor(built, encoder, chosen)
    cell.report = "fresh weights"
    if found is not None:
        from ..weights.load import load_encoder as load  # SciPy is needed to resize tables alone

        cell.report = str(load(checkpoint.weights_of(cell), found.weights, found.path, origin_of(found), encoder))
    return cell.set_train(False)


def origin_of(found: checkpoint.Checkpoint) -> Origin:
    """What a checkpoint says about its weights; before it said who trained them, its recipe did."""
    from ..weights.load import RULES, Origin

    recipe = parse_recipe(found.meta["recipe"], str(found.path))
    said = found.meta.get("origins", [])
    # files of other presets had the preset's name here
    sources = tuple(dict.fromkeys(who if who in RULES else recipe.method.origin for who in said))
    if not sources and not recipe.method.classifier:
        sources = (recipe.method.origin,)
    classes = tuple(found.meta["classes"])
    return Origin(sources, recipe.trained_encoder, classes, tuple(found.kept), recipe.method.encoder_blocks)


class FeatureExtractor(nn.Cell):
    """Images (B, in_chans, H, W) -> maps (B, C, rows, cols) after some blocks of an encoder.

    Args:
        encoder, config: the encoder and its configuration.
        blocks: numbers of the blocks, in the order of the maps.

    Attributes:
        channels: of each map.
        strides: pixels per side of a place of each map.
    """

    report: str

    def __init__(self, encoder: Encoder, config: EncoderConfig, blocks: tuple[int, ...]):
        super().__init__(auto_prefix=False)
        self.encoder = encoder
        self.ascending = tuple(sorted(blocks))
        self.order = tuple(self.ascending.index(number) for number in blocks)
        self.maps = tuple(config.block_maps[number] for number in blocks)
        self.channels = tuple(config.block_dims[number] for number in blocks)
        self.strides = tuple(-(-config.image_size[0] // rows) for rows, _ in self.maps)

    def construct(self, image: Tensor) -> tuple[Tensor, ...]:
        sequences = self.encoder.blocks_of(self.encoder.embed(image), self.ascending)
        maps = []
        for place in range(len(self.order)):
            sequence, (rows, cols) = sequences[self.order[place]], self.maps[place]
            patches = sequence[:, sequence.shape[1] - rows * cols :]
            maps.append(patches.transpose(0, 2, 1).reshape(image.shape[0], self.channels[place], rows, cols))
        return tuple(maps)


def chosen_blocks(
    encoder: EncoderConfig, blocks: Literal["stages"] | int | Sequence[int] | None, source: str
) -> tuple[int, ...] | None:
    """Numbers of blocks from 0; None where none are asked for."""
    if blocks is None:
        return None
    total = sum(encoder.stage_depths)
    if blocks == "stages":
        return tuple(last - 1 for last in itertools.accumulate(encoder.stage_depths))
    wanted = [blocks] if isinstance(blocks, int) else list(blocks)
    legal = f"write numbers from {-total} to {total - 1}, each block once, or 'stages'"
    if not wanted or not all(type(number) is int and -total <= number < total for number in wanted):
        raise ConfigError(f"{source}: blocks: {blocks!r}, but {encoder.name} has {total} blocks; {legal}")
    numbers = tuple(number % total for number in wanted)
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"{source}: blocks: {blocks!r} names a block twice; {legal}")
    return numbers


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
    check_options(options, known, source)
    encoder = change(encoder, {k: v for k, v in options.items() if k in of_encoder}, source)
    return encoder, change(classifier, {k: v for k, v in options.items() if k in of_method}, source)


def check_options(options: dict[str, Any], known: list[str], source: str) -> None:
    for key in options:
        if key not in known:
            raise ConfigError(f"{source}: {key}: unknown option; {did_you_mean(key, known)}valid: {', '.join(known)}")


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
