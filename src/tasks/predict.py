"""Classify image files (`scripts/predict.py`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from ..config import Recipe
from ..data.folders import images_below
from ..data.sources import DataError, plain_files
from ..engine import device
from .evaluate import open_classifier
from .images import loader
from .networks import deployed, fill


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first."""

    path: Path
    classes: list[tuple[str, float]]  # name and probability; empty if the file cannot be used
    reason: str = ""  # why it cannot be used


def predict(path: str, images: list[str], top: int, overrides: list[str]) -> Iterator[Prediction]:
    """Classify image files and all images below folders, with the evaluation transform.

    Raises:
        DataError: a path does not exist or is not an image, or a folder has no image; before the first prediction.
    """
    recipe, loaded = open_classifier(path, overrides)
    files = image_files(images)
    device.set_up(recipe.device, recipe.seed, recipe.train)
    network = fill(deployed(recipe), loaded)
    batch = min(recipe.train.batch_size, len(files))
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        decoded = read_images(recipe, part)
        readable = [image for image in decoded if not isinstance(image, str)]
        scores = iter(probabilities(network, readable, batch))
        for file, image in zip(part, decoded, strict=True):
            if isinstance(image, str):
                yield Prediction(file, [], image)
            else:
                yield Prediction(file, top_classes(next(scores), loaded.meta["classes"], top))


def image_files(images: list[str]) -> list[Path]:
    """Return the given files, whatever their names, and all images below the given folders, in the given order."""
    files: list[Path] = []
    for name in images:
        path = Path(name)
        if os.path.isdir(path):  # noqa: PTH112 # never raises
            below = images_below(path, "command line")
            files += [below.path(index) for index in range(len(below))]
        elif not os.path.isfile(path):  # noqa: PTH113
            exists = os.path.exists(path)  # noqa: PTH110
            kind = "is a pipe, a socket or a device; name a file" if exists else "no such file or folder"
            raise DataError(f"{path}: {kind}")
        else:
            files.append(path)
    return files


def read_images(recipe: Recipe, files: list[Path]) -> list[np.ndarray | str]:
    """Read files with the evaluation transform, each (in_chans, H, W), or the reason why it cannot be used."""
    batches = replace(loader(recipe, plain_files(files), ("image",), training=False), batch_size=len(files))
    (image,) = next(batches.epoch(0))
    reasons = {fault["image"]: fault["reason"] for fault in batches.take_faults()}
    pixels = image.asnumpy()
    return [reasons.get(str(path), pixels[row]) for row, path in enumerate(files)]


def probabilities(network: nn.Cell, images: list[np.ndarray], batch: int) -> np.ndarray:
    """Return the softmax of the logits, (len(images), classes); the batch is padded, so one graph is enough."""
    if not images:
        return np.empty((0, 0))
    padded = np.stack(images + [np.zeros_like(images[0])] * (batch - len(images)))
    return ops.softmax(network(Tensor(padded)), -1).asnumpy()[: len(images)]


def top_classes(probability: np.ndarray, classes: list[str], top: int) -> list[tuple[str, float]]:
    """Return names (numbers without class names) and probabilities of the most probable classes, best first."""
    best = np.argsort(-probability, kind="stable")[:top]
    return [(classes[index] if classes else str(index), float(probability[index])) for index in best]
