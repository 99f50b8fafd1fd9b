"""Evaluate a checkpoint: what `eval.py` does, and how every task opens a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Recipe, plural
from ..config.files import ConfigError, load_recipe, override, parse_recipe
from ..data.sources import DataError, ImageFolder, image_folder
from ..engine import checkpoint, device
from ..engine.evaluate import confusion_matrix, evaluate, features
from ..methods import build_method
from ..models.graph import AsGraph
from .images import loader
from .networks import classifier_recipe, deployed, fill


def open_checkpoint(path: str, overrides: list[str]) -> tuple[Recipe, checkpoint.Checkpoint]:
    """A checkpoint and the recipe inside it, with overrides."""
    found = checkpoint.load(Path(path))
    recipe = parse_recipe(found.meta["recipe"], path)
    return (override(recipe, overrides, path) if overrides else recipe), found


def open_classifier(path: str, overrides: list[str], config: str = "") -> tuple[Recipe, checkpoint.Checkpoint]:
    """Likewise for a checkpoint with a classifier; the recipe file `config` takes the place of its own recipe."""
    found = checkpoint.load(Path(path))
    own = classifier_recipe(found)
    recipe = load_recipe(config, overrides) if config else override(own, overrides, path)
    classifier, wanted = recipe.method.classifier, own.method.classifier
    if classifier is None or wanted is None:
        raise ConfigError(f"{config or path}: method: {recipe.method.name} has no classifier; use method: classify")
    if classifier.num_classes != wanted.num_classes:
        raise checkpoint.CheckpointError(
            f"{path}: its head has {wanted.num_classes} classes, but method.num_classes is "
            f"{classifier.num_classes}; write {wanted.num_classes}"
        )
    return replace(recipe, method=classifier), found


def evaluate_checkpoint(path: str, data: str, overrides: list[str], config: str = "") -> dict[str, Any]:
    """Accuracy of a checkpoint on its own validation folder or on another image folder `data`.

    Returns:
        ckpt, data (the folder), count, top1 and top5 as shares, top1_correct and top5_correct as numbers of images,
        and loss (cross-entropy without smoothing).
    """
    return measure_checkpoint(path, data, overrides, config)[0]


def measure_checkpoint(path: str, data: str, overrides: list[str], config: str = "") -> tuple[dict[str, Any], str]:
    """What `evaluate_checkpoint` gives, and a line about it for people."""
    recipe, found = open_classifier(path, overrides, config)
    source = images_for(recipe, found, data)
    device.set_up(recipe.device, recipe.seed)
    method = build_method(recipe)
    checkpoint.assign(checkpoint.weights_of(method), found.weights, found.path)
    batches = loader(recipe, source, ("image", "label", "number"), training=False).epoch(0)
    result = method.metrics(evaluate(AsGraph(method, method.measure), batches))
    count = int(result["count"])
    shares = {key: result[key] for key in ("top1", "top5")}
    correct = {f"{key}_correct": round(share * count) for key, share in shares.items()}
    parts = [
        f"{name} {100 * shares[key]:.2f} % ({correct[f'{key}_correct']} of {plural(count, 'image')})"
        for name, key in (("top-1", "top1"), ("top-5", "top5"))
        if key == "top1" or len(source.classes) > 5  # the top-5 of so few classes tells nothing
    ]
    told = {"ckpt": path, "data": str(source.folder), "count": count, **shares, **correct, "loss": result["loss"]}
    return told, ", ".join(parts)


def measure_confusion(path: str, data: str = "", overrides: Sequence[str] = ()) -> tuple[list[str], np.ndarray]:
    """Class names and counts of images (classes, classes), row = true class, column = predicted class.

    Args:
        path, data, overrides: as in `evaluate_checkpoint`.
    """
    recipe, found = open_classifier(path, list(overrides))
    source = images_for(recipe, found, data)
    device.set_up(recipe.device, recipe.seed)
    logits = features(
        fill(deployed(recipe), found), loader(recipe, source, ("image", "label"), training=False).epoch(0)
    )
    matrix = confusion_matrix(np.array(source.labels), logits.argmax(axis=1), len(source.classes))
    return source.classes, matrix


def images_for(recipe: Recipe, found: checkpoint.Checkpoint, data: str) -> ImageFolder:
    """The folder `data`, or the validation images of the recipe; its classes are those of the checkpoint."""
    source = image_folder(Path(data) if data else Path(recipe.data.root) / (recipe.data.val or recipe.data.train))
    check_classes(source, found)
    return source


def check_classes(source: ImageFolder, found: checkpoint.Checkpoint) -> None:
    """The folder has the classes the checkpoint was trained on, by name; a converted one knows only how many."""
    wanted = found.meta["classes"] or [str(number) for number in range(len(found.weights["head.weight"]))]
    known = bool(found.meta["classes"])
    if source.classes == wanted or (not known and len(source.classes) == len(wanted)):
        return
    if not source.classes:
        raise DataError(f"data: {source.folder} has no class folders; accuracy needs one for each of {len(wanted)}")
    odd = sorted(set(source.classes) ^ set(wanted)) if known else []
    raise DataError(
        f"data: {source.folder} has {len(source.classes)} classes, the checkpoint {len(wanted)}"
        + (f"; not in both: {', '.join(odd[:5])}" if odd else "")
        + (", ..." if len(odd) > 5 else "")
    )
