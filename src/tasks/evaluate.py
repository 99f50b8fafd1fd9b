"""Evaluate a checkpoint (`eval.py`), and open checkpoints for all tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Recipe, plural
from ..config.files import ConfigError, load_recipe, override
from ..data.opening import open_source
from ..data.sources import DataError, Source, count_classes, with_classes
from ..engine import checkpoint, device, parallel
from ..engine.evaluate import confusion_matrix, evaluate, features
from ..methods import build_method
from ..models.graph import AsGraph
from .images import check_usable, left_out, loader
from .networks import check_shapes, classifier_recipe, deployed, fill, stored_recipe


def open_checkpoint(path: str, overrides: list[str]) -> tuple[Recipe, checkpoint.Checkpoint]:
    """Load a checkpoint and the recipe stored in it, with overrides."""
    loaded = checkpoint.load(Path(path))
    recipe = stored_recipe(loaded)
    recipe = override(recipe, overrides, path) if overrides else recipe
    check_shapes(recipe, loaded)
    return recipe, loaded


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
    recipe = replace(recipe, method=classifier)
    check_shapes(recipe, loaded)
    return recipe, loaded


def evaluate_checkpoint(path: str, data: str, overrides: list[str], config: str = "") -> dict[str, Any]:
    """Measure the accuracy of a checkpoint on the images `data`, by default the validation images of its recipe.

    Args:
        path: the checkpoint.
        data: a folder, list or MindRecord file; its classes are those of the checkpoint, or a part of them.
        overrides, config: changes to the checkpoint's recipe, or a recipe file instead of it.

    Returns:
        ckpt, data, classes (how many of the checkpoint's have images), count, top1 and top5 as fractions, top1_correct
        and top5_correct as numbers of images, unusable (images that are not counted), and loss (cross-entropy without
        label smoothing).
    """
    return measure_checkpoint(path, data, overrides, config)[0]


def measure_checkpoint(path: str, data: str, overrides: list[str], config: str = "") -> tuple[dict[str, Any], str]:
    """Return the result of `evaluate_checkpoint` and a readable line about it."""
    recipe, loaded = open_classifier(path, overrides, config)
    source = images_for(recipe, loaded, data)
    device.set_up(recipe.device, recipe.seed, recipe.train)
    parallel.together(lambda: check_usable(recipe, source, "--data" if data else "data.val"))
    method = build_method(recipe)
    checkpoint.assign(checkpoint.weights_of(method), loaded.weights, loaded.path)
    batches = loader(recipe, source, ("image", "label", "number"), training=False)
    sums = evaluate(AsGraph(method, method.measure), batches.epoch(0))
    faults = parallel.gather_faults(batches.take_faults())
    if len(faults) == len(source):
        raise DataError(left_out(faults, source))
    result = method.metrics(sums)
    count = int(result["count"])
    shares = {key: result[key] for key in ("top1", "top5")}
    correct = {f"{key}_correct": round(share * count) for key, share in shares.items()}
    parts = [
        f"{name} {100 * shares[key]:.2f} % ({correct[f'{key}_correct']} of {plural(count, 'image')})"
        for name, key in (("top-1", "top1"), ("top-5", "top5"))
        if key == "top1" or len(source.classes) > 5  # with 5 classes top-5 is always 100 %
    ]
    present = len(np.unique(source.labels))
    if present < len(source.classes):
        parts.append(f"images of {count_classes(source)}")
    if faults:
        parts.append(left_out(faults, source))
    figures = {"ckpt": path, "data": str(source.place), "classes": present, "count": count, "unusable": len(faults)}
    return {**figures, **shares, **correct, "loss": result["loss"]}, ", ".join(parts)


def measure_confusion(path: str, data: str = "") -> tuple[list[str], np.ndarray]:
    """Class names and counts of images (classes, classes), row = true class, column = predicted class.

    Args:
        path, data: as in `evaluate_checkpoint`.
    """
    recipe, loaded = open_classifier(path, [])
    source = images_for(recipe, loaded, data)
    device.set_up(recipe.device, recipe.seed, recipe.train)
    check_usable(recipe, source, "--data" if data else "data.val")
    batches = loader(recipe, source, ("image", "label", "number"), training=False).epoch(0)
    numbers, logits = features(fill(deployed(recipe), loaded), batches)
    return source.classes, confusion_matrix(source.labels[numbers], logits.argmax(axis=1), len(source.classes))


def images_for(recipe: Recipe, loaded: checkpoint.Checkpoint, data: str) -> Source:
    """The images in `data`, or the validation images of the recipe, with the classes of the checkpoint."""
    place, key = (Path(data), "--data") if data else (recipe.data.evaluation_place, "data.val")
    return with_trained_classes(open_source(place, key, "needed"), loaded, key)


def with_trained_classes(source: Source, loaded: checkpoint.Checkpoint, key: str) -> Source:
    """Return the images with the checkpoint's classes, found by name; the images may have a part of them.

    A converted checkpoint without class names needs as many classes in the order of its own.

    Raises:
        DataError: the classes differ.
    """
    count = len(loaded.weights["head.weight"])
    names = list(loaded.meta["classes"])
    numbered = source.numbered and len(source.classes) <= count
    if names or numbered:
        return with_classes(source, names or [str(number) for number in range(count)], "the checkpoint", key)
    if len(source.classes) != count:
        raise DataError(
            f"{key}: {source.place} has {plural(len(source.classes), 'class', 'classes')}, and the checkpoint {count} "
            f"without names; name images of all {count}, or a list with class numbers from 0"
        )
    return source
