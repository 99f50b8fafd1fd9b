"""Networks by name or from a checkpoint, for `load_model`, the hub, evaluation and export.

The named networks are the recipes in `config/_models`, one file each with an encoder and a classifier; fine-tuning
recipes may use them as `base:`. Adding a file there adds a model name.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mindspore import Tensor, nn

from ..config import ClassifyConfig, EncoderConfig, Recipe, plural
from ..config.files import ConfigError, change, did_you_mean, load_recipe, parse_recipe
from ..engine import checkpoint
from ..models import BareEncoder, Encoder, PooledEncoder, build_classifier, build_encoder, build_network

if TYPE_CHECKING:
    from ..weights.load import Origin

MODELS = Path(__file__).resolve().parents[2] / "config" / "_models"


class UnknownModelError(ConfigError, NotImplementedError):
    """A name that is not in `config/_models`; also a NotImplementedError, as create_network in the model zoo raises."""


def load_model(source: str | os.PathLike[str], **options: Any) -> nn.Cell:
    """Return a classifier in evaluation mode: normalised images (B, in_chans, H, W) -> logits (B, num_classes).

    Args:
        source: a checkpoint of a fine-tuning run, or a name of `model_names()` for initial weights.
        options: fields of encoder or classifier (`src/config/`) to change, for example `num_classes=10` or
            `image_size=192`. With a checkpoint they must not change the shapes of its weights.

    Raises:
        CheckpointError: the file is damaged, another kind of file, from pre-training, or does not fit the options.
        UnknownModelError: the name does not exist; the text lists all names.
        ConfigError: an option does not exist or has an invalid value.
    """
    name = os.fspath(source)
    if name.lower() in model_names():
        return create_model(name, **options)
    loaded = load_checkpoint(name)
    recipe = classifier_recipe(loaded)
    encoder, classifier = with_options(recipe, options, name)
    check_shapes(replace(recipe, encoder=encoder, method=classifier), loaded)
    return fill(build_classifier(without_drop_path(encoder), classifier), loaded)


def load_checkpoint(name: str) -> checkpoint.Checkpoint:
    """Load a checkpoint file.

    Raises:
        UnknownModelError: `name` is no file; the text lists the models.
    """
    if not (name.endswith(".ckpt") or Path(name).exists()):
        raise UnknownModelError(f"{name}: neither a checkpoint file nor a model; models: {', '.join(model_names())}")
    return checkpoint.load(Path(name))


def create_model(name: str, **options: Any) -> nn.Cell:
    """Return a named classifier with initial weights in evaluation mode; upper and lower case do not matter.

    Raises:
        UnknownModelError, ConfigError: as in `load_model`.
    """
    encoder, classifier = with_options(model_recipe(name), options, name)
    return build_classifier(encoder, classifier).set_train(False)


def load_encoder(
    source: str | os.PathLike[str], blocks: Literal["stages"] | int | Sequence[int] | None = None, **options: Any
) -> FeatureExtractor | PooledEncoder:
    """Return the encoder of any run as a backbone, in evaluation mode; its parameters can be trained further.

        features = load_encoder("runs/pretrain/last.ckpt")(images)                        # (B, out_dim)
        maps = load_encoder("runs/pretrain/last.ckpt", blocks="stages", image_size=512)(images)  # (B, C, H, W) each

    Args:
        source: a checkpoint of pre-training, fine-tuning or distillation, or a converted one, or a name of
            `model_names()` for initial weights.
        blocks: None: pooled features of the last block, pooled as in the source's classifier; after pre-training that
            is the mean of the patch tokens after the final norm. Block numbers: feature maps after these blocks, before
            the final norm. Numbers count from 0 over all encoder stages, negative ones from the end. `stages`: the last
            block of each encoder stage (a ViT has one stage).
        options: fields of the encoder (`src/config/encoders.py`) to change. With another `image_size` or `window_size`
            position tables are resized as in `train.py --init-from`; the attribute `report` describes the changes.

    Raises:
        CheckpointError: the file is damaged or another kind of file.
        WeightsError: its weights do not fit the options.
        UnknownModelError: the name does not exist; the text lists all names.
        ConfigError: an option or a block does not exist or is invalid.
    """
    name = os.fspath(source)
    loaded = None if name.lower() in model_names() else load_checkpoint(name)
    recipe = model_recipe(name) if loaded is None else recipe_in(loaded)
    trained = recipe.trained_encoder
    valid = sorted({f.name for f in fields(trained)} - {"name"})
    check_options(options, valid, name)
    encoder, classifier = without_drop_path(change(trained, options, name)), recipe.method.classifier
    numbers = block_numbers(encoder, blocks, name)
    final_norm = numbers is None and not (classifier and classifier.fc_norm)  # feature maps have no final norm
    network = build_encoder(encoder, final_norm=final_norm)
    pooled = PooledEncoder(network, classifier)
    cell = pooled if numbers is None else FeatureExtractor(network, encoder, numbers)
    cell.report = "initial weights"
    if loaded is not None:
        from ..weights.load import load_encoder_weights  # needs SciPy, but only to resize tables

        cell.report = str(
            load_encoder_weights(checkpoint.weights_of(cell), loaded.weights, loaded.path, origin_of(loaded), encoder)
        )
    return cell.set_train(False)


def origin_of(loaded: checkpoint.Checkpoint) -> Origin:
    """Return whose resizing rules a checkpoint follows; files of earlier versions have that in their recipe only."""
    from ..weights.load import RULES, Origin

    recipe = recipe_in(loaded)
    origins = loaded.meta.get("origins", [])
    # earlier versions wrote the name of the preset here
    sources = tuple(dict.fromkeys(name if name in RULES else recipe.method.origin for name in origins))
    if not sources and not recipe.method.classifier:
        sources = (recipe.method.origin,)
    classes = tuple(loaded.meta["classes"])
    return Origin(sources, recipe.trained_encoder, classes, tuple(loaded.unused), recipe.method.encoder_blocks)


class FeatureExtractor(nn.Cell):
    """Images (B, in_chans, H, W) -> feature maps (B, C, rows, cols) after some blocks of an encoder.

    Args:
        encoder, config: the encoder and its configuration.
        blocks: numbers of the blocks, in the order of the maps.

    Attributes:
        channels: of each map.
        strides: pixels per side of one position of each map.
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
        for number in range(len(self.order)):
            sequence, (rows, cols) = sequences[self.order[number]], self.maps[number]
            patches = sequence[:, sequence.shape[1] - rows * cols :]
            maps.append(patches.transpose(0, 2, 1).reshape(image.shape[0], self.channels[number], rows, cols))
        return tuple(maps)


def block_numbers(
    encoder: EncoderConfig, blocks: Literal["stages"] | int | Sequence[int] | None, source: str
) -> tuple[int, ...] | None:
    """Return the block numbers of `load_encoder`'s argument, from 0; None for pooled features."""
    if blocks is None:
        return None
    total = sum(encoder.stage_depths)
    if blocks == "stages":
        return tuple(last - 1 for last in itertools.accumulate(encoder.stage_depths))
    given = [blocks] if isinstance(blocks, int) else list(blocks)
    legal = f"write numbers from {-total} to {total - 1}, each block once, or 'stages'"
    if not given or not all(type(number) is int and -total <= number < total for number in given):
        raise ConfigError(f"{source}: blocks: {blocks!r}, but {encoder.name} has {total} blocks; {legal}")
    numbers = tuple(number % total for number in given)
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"{source}: blocks: {blocks!r} names a block twice; {legal}")
    return numbers


def model_names() -> list[str]:
    """Return the names that `load_model` and the hub's create_network accept."""
    return sorted(path.stem for path in MODELS.glob("*.yaml"))


def model_recipe(name: str) -> Recipe:
    """Return the recipe of a named network with its encoder and classifier.

    Raises:
        UnknownModelError: the name does not exist.
    """
    if name.lower() not in model_names():
        hint = did_you_mean(name.lower(), model_names())
        raise UnknownModelError(f"{name}: not a model of this project; {hint}models: {', '.join(model_names())}")
    return load_recipe(MODELS / f"{name.lower()}.yaml")


def recipe_in(loaded: checkpoint.Checkpoint) -> Recipe:
    """Return the recipe stored in a checkpoint, which fits its weights.

    Raises:
        ConfigError: it is no recipe.
        CheckpointError: it describes another network than the weights are of.
    """
    recipe = parse_recipe(loaded.meta["recipe"], str(loaded.path))
    check_shapes(recipe, loaded)
    classifier, classes = recipe.method.classifier, loaded.meta["classes"]
    if classifier is not None and classes and len(classes) != classifier.num_classes:
        raise checkpoint.CheckpointError(
            f"{loaded.path}: names {plural(len(classes), 'class', 'classes')}, but method.num_classes in its recipe is "
            f"{classifier.num_classes}"
        )
    return recipe


def check_shapes(recipe: Recipe, loaded: checkpoint.Checkpoint) -> None:
    """Check that a checkpoint has the weights that decide how large the network of a recipe is, before it is built.

    A file of a bare encoder has none for the decoder that its recipe names.

    Raises:
        CheckpointError: one is missing, or has another shape.
    """
    shapes = recipe.encoder_shapes()
    if recipe.method.classifier is not None or any(name.startswith("decoder.") for name in loaded.weights):
        shapes = itertools.chain(shapes, recipe.method.weight_shapes(recipe.trained_encoder))
    for name, shape in shapes:
        if name not in loaded.weights:
            raise checkpoint.CheckpointError(f"{loaded.path}: does not fit this recipe: has no {name}")
        if loaded.weights[name].shape != shape:
            raise checkpoint.CheckpointError(
                f"{loaded.path}: {name} has shape {list(loaded.weights[name].shape)}, this recipe needs {list(shape)}"
            )


def stored_recipe(loaded: checkpoint.Checkpoint) -> Recipe:
    """Return the recipe stored in a checkpoint, without the settings for the machine that it was trained on."""
    return recipe_in(loaded).without_machine()


def classifier_recipe(loaded: checkpoint.Checkpoint) -> Recipe:
    """Return the recipe stored in a checkpoint with its plain classifier as the method, also after distillation.

    Raises:
        CheckpointError: the checkpoint is from pre-training.
    """
    recipe = stored_recipe(loaded)
    if recipe.method.classifier is None:
        raise checkpoint.CheckpointError(
            f"{loaded.path}: a pre-training checkpoint ({recipe.method.name}) has no classifier; fine-tune it first "
            "with train.py --init-from"
        )
    return replace(recipe, method=recipe.method.classifier)


def with_options(recipe: Recipe, options: dict[str, Any], source: str) -> tuple[EncoderConfig, ClassifyConfig]:
    """Return encoder and classifier of a recipe with single fields changed; `source` names the recipe in errors."""
    encoder, classifier = recipe.encoder, recipe.method.classifier
    assert classifier is not None  # ensured by `classifier_recipe` and `model_recipe`
    encoder_keys, classifier_keys = ({f.name for f in fields(part)} for part in (encoder, classifier))
    valid = sorted((encoder_keys | classifier_keys) - {"name", *ClassifyConfig.training_only})
    check_options(options, valid, source)
    encoder = change(encoder, {k: v for k, v in options.items() if k in encoder_keys}, source)
    return encoder, change(classifier, {k: v for k, v in options.items() if k in classifier_keys}, source)


def check_options(options: dict[str, Any], valid: list[str], source: str) -> None:
    for key in options:
        if key not in valid:
            raise ConfigError(f"{source}: {key}: unknown option; {did_you_mean(key, valid)}valid: {', '.join(valid)}")


def deployed(recipe: Recipe) -> nn.Cell:
    """Build the network for inference, in evaluation mode: the classifier, or after pre-training the bare encoder."""
    encoder = without_drop_path(recipe.trained_encoder)
    return build_network(encoder, recipe.method.classifier).set_train(False)


def without_drop_path(encoder: EncoderConfig) -> EncoderConfig:
    """Return the encoder without drop path, which acts in training only and adds draw counters."""
    return replace(encoder, drop_path=0.0)


def fill(network: nn.Cell, loaded: checkpoint.Checkpoint) -> nn.Cell:
    """Set a network's weights from a checkpoint; a bare encoder takes only the encoder's.

    Raises:
        CheckpointError: names or shapes differ.
    """
    arrays = loaded.weights
    if isinstance(network, BareEncoder):
        arrays = {name: value for name, value in arrays.items() if name.startswith("encoder.")}
    checkpoint.assign(checkpoint.weights_of(network), arrays, loaded.path)
    return network.set_train(False)
