"""Evaluate a checkpoint (`eval.py`), and open checkpoints for all tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Recipe, plural
from ..config.files import ConfigError, load_recipe, override
from ..data.sources import DataError, ImageFolder, image_folder
from ..engine import checkpoint, device
from ..engine.evaluate import confusion_matrix, evaluate, features
from ..methods import build_method
from ..models.graph import AsGraph
from .images import loader
from .networks import classifier_recipe, deployed, fill, stored_recipe


def open_checkpoint(path: str, overrides: list[str]) -> tuple[Recipe, checkpoint.Checkpoint]:
    """Load a checkpoint and the recipe stored in it, with overrides."""
    loaded = checkpoint.load(Path(path))
    recipe = stored_recipe(loaded)
    return (override(recipe, overrides, path) if overrides else recipe), loaded


def open_classifier(path: str, overrides: list[str], config: str = "") -> tuple[Recipe, checkpoint.Checkpoint]:
    """Load a checkpoint with a classifier, and its recipe or the recipe file `config`, with overrides.

    Raises:
        CheckpointError: the checkpoint has no classifier, or one with another number of classes.
        ConfigError: the recipe has no classifier.
    """
    loaded = checkpoint.load(Path(path))
    stored = classifier_recipe(loaded)
    recipe = load_recipe(config, overrides) if config else override(stored, overrides, path)
    classifier, trained = recipe.method.classifier, stored.method.classifier
    if classifier is None or trained is None:
        raise ConfigError(f"{config or path}: method: {recipe.method.name} has no classifier; write method: classify")
    if classifier.num_classes != trained.num_classes:
        raise checkpoint.CheckpointError(
            f"{path}: its head has {trained.num_classes} classes, but method.num_classes is "
            f"{classifier.num_classes}; write {trained.num_classes}"
        )
    return replace(recipe, method=classifier), loaded


def evaluate_checkpoint(path: str, data: str, overrides: list[str], config: str = "") -> dict[str, Any]:
    """Measure the accuracy of a checkpoint on the image folder `data`, by default its validation folder.

    Returns:
        ckpt, data (the folder), count, top1 and top5 as fractions, top1_correct and top5_correct as numbers of images,
        and loss (cross-entropy without label smoothing).
    """
    return measure_checkpoint(path, data, overrides, config)[0]


def measure_checkpoint(path: str, data: str, overrides: list[str], config: str = "") -> tuple[dict[str, Any], str]:
    """Return the result of `evaluate_checkpoint` and a readable line about it."""
    recipe, loaded = open_classifier(path, overrides, config)
    source = images_for(recipe, loaded, data)
    device.set_up(recipe.device, recipe.seed, recipe.train)
    method = build_method(recipe)
    checkpoint.assign(checkpoint.weights_of(method), loaded.weights, loaded.path)
    batches = loader(recipe, source, ("image", "label", "number"), training=False).epoch(0)
    result = method.metrics(evaluate(AsGraph(method, method.measure), batches))
    count = int(result["count"])
    shares = {key: result[key] for key in ("top1", "top5")}
    correct = {f"{key}_correct": round(share * count) for key, share in shares.items()}
    parts = [
        f"{name} {100 * shares[key]:.2f} % ({correct[f'{key}_correct']} of {plural(count, 'image')})"
        for name, key in (("top-1", "top1"), ("top-5", "top5"))
        if key == "top1" or len(source.classes) > 5  # with 5 classes top-5 is always 100 %
    ]
    figures = {"ckpt": path, "data": str(source.folder), "count": count, **shares, **correct, "loss": result["loss"]}
    return figures, ", ".join(parts)


def measure_confusion(path: str, data: str = "") -> tuple[list[str], np.ndarray]:
    """Class names and counts of images (classes, classes), row = true class, column = predicted class.

    Args:
        path, data: as in `evaluate_checkpoint`.
    """
    recipe, loaded = open_classifier(path, [])
    source = images_for(recipe, loaded, data)
    device.set_up(recipe.device, recipe.seed, recipe.train)
    batches = loader(recipe, source, ("image", "label"), training=False).epoch(0)
    logits = features(fill(deployed(recipe), loaded), batches)
    return source.classes, confusion_matrix(np.array(source.labels), logits.argmax(axis=1), len(source.classes))


def images_for(recipe: Recipe, loaded: checkpoint.Checkpoint, data: str) -> ImageFolder:
    """The folder `data`, or the validation images of the recipe; its classes are those of the checkpoint."""
    source = image_folder(Path(data) if data else recipe.data.evaluation_folder)
    check_class_names(source, loaded)
    return source


def check_class_names(source: ImageFolder, loaded: checkpoint.Checkpoint) -> None:
    """Check that the folder has the checkpoint's class names; a converted checkpoint has only their number.

    Raises:
        DataError: the classes differ.
    """
    names = loaded.meta["classes"]
    trained = names or [str(number) for number in range(len(loaded.weights["head.weight"]))]
    if source.classes == trained or (not names and len(source.classes) == len(trained)):
        return
    if not source.classes:
        raise DataError(f"data: {source.folder} has no class folders; accuracy needs one for each of {len(trained)}")
    different = sorted(set(source.classes) ^ set(trained)) if names else []
    raise DataError(
        f"data: {source.folder} has {len(source.classes)} classes, the checkpoint has {len(trained)}"
        + (f"; not in both: {', '.join(different[:5])}" if different else "")
        + (", ..." if len(different) > 5 else "")
    )
