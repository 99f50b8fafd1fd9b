"""Classes of single images: what `scripts/predict.py` does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from mindspore import Tensor, nn, ops

from ..config import Recipe
from ..data.sources import EXTENSIONS, DataError, images_below
from ..engine import device
from .evaluate import open_classifier
from .images import evaluation_batches
from .networks import deployed, fill


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first; none if the file cannot be read."""

    path: Path
    classes: list[tuple[str, float]]


def predict(path: str, images: list[str], top: int, overrides: list[str]) -> Iterator[Prediction]:
    """Classes of image files and of all images below folders, preprocessed as evaluation does.

    Raises:
        DataError: a path does not exist or is no image, or a folder holds none; before the first prediction.
    """
    recipe, found = open_classifier(path, overrides)
    files = image_files(images)
    device.set_up(recipe.device, recipe.seed)
    network = fill(deployed(recipe), found)
    batch = min(recipe.train.batch_size, len(files))
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        decoded = read_images(recipe, part)
        rows = [image for image in decoded if image is not None]
        scores = iter(probabilities(network, rows, batch))
        for file, image in zip(part, decoded, strict=True):
            best = [] if image is None else ranked(next(scores), found.meta["classes"], top)
            yield Prediction(file, best)


def image_files(images: list[str]) -> list[Path]:
    """Image files and the images below folders, in the order given."""
    files: list[Path] = []
    for name in images:
        path = Path(name)
        if path.is_dir():
            below = images_below(path)
            if not below:
                raise DataError(f"{path}: no image in this folder; valid formats: {', '.join(sorted(EXTENSIONS))}")
            files += below
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder")
        elif path.suffix.lower() not in EXTENSIONS:
            raise DataError(f"{path}: not an image file; valid formats: {', '.join(sorted(EXTENSIONS))}")
        else:
            files.append(path)
    return files


def read_images(recipe: Recipe, files: list[Path]) -> list[np.ndarray | None]:
    """Each file through the evaluation transform, (in_chans, H, W); None for one that cannot be read."""

    sound = [path for path in files if is_image(path)]
    found: dict[Path, np.ndarray] = {}
    try:
        if sound:
            batch = next(evaluation_batches(recipe, sound, len(sound)))[0].asnumpy()
            found = dict(zip(sound, batch, strict=True))
    except DataError:
        if len(files) > 1:
            return [read_images(recipe, [path])[0] for path in files]
    return [found.get(path) for path in files]


def is_image(path: Path) -> bool:
    """Whether a file decodes; MindSpore ends the process on a JPEG that stops inside its header."""
    content = np.fromfile(path, np.uint8)
    return bool(content.size) and cv2.imdecode(content, cv2.IMREAD_REDUCED_COLOR_8) is not None


def probabilities(network: nn.Cell, images: list[np.ndarray], batch: int) -> np.ndarray:
    """Softmax of the logits (len(images), classes); the batch is filled up so that one graph serves all."""
    if not images:
        return np.empty((0, 0))
    filled = np.stack(images + [np.zeros_like(images[0])] * (batch - len(images)))
    return ops.softmax(network(Tensor(filled)), -1).asnumpy()[: len(images)]


def ranked(probability: np.ndarray, classes: list[str], top: int) -> list[tuple[str, float]]:
    best = np.argsort(-probability, kind="stable")[:top]
    return [(classes[index] if classes else str(index), float(probability[index])) for index in best]
