"""The images of a recipe: folders or lists, checked against its classes, and batches of them."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
from mindspore import Tensor

from ..config import DataConfig, Kernels, Recipe, plural
from ..data import resample
from ..data.lists import ground_truth_of
from ..data.loader import Loader
from ..data.opening import open_source
from ..data.sources import DataError, Source, labelled_subset, with_classes, without_labels
from ..engine import parallel
from .dataset import far_off

LARGE_BATCH = 256  # images
AT_FIRST, TRIED = 3, 24  # images that `check_usable` decodes: as a rule, and if it finds none that can be used


def load_sources(recipe: Recipe) -> tuple[Source, Source | None]:
    """Return training and validation images of a recipe; the labels of both count the same classes.

    Raises:
        DataError: a folder or list is unusable, or its classes do not fit the classifier.
    """
    data, classifier = recipe.data, recipe.method.classifier
    training = open_source(data.training_place, "data.train", "complete" if classifier else "any")
    if classifier:
        training = numbered_classes(training, classifier.num_classes)
    training = labelled_subset(training, data.labels_per_class)
    if not data.val:
        return training, None
    place = data.evaluation_place
    probed = recipe.train.knn and training.classes and place.is_dir() and ground_truth_of(place)
    validation = open_source(place, "data.val", "needed" if classifier or probed else "any")
    if classifier or (recipe.train.knn and training.classes and validation.classes):
        validation = with_classes(validation, training.classes, str(training.place), "data.val")
    elif recipe.train.knn:  # a probe needs the labels of both
        validation = without_labels(validation)
    return training, validation


def numbered_classes(source: Source, num_classes: int) -> Source:
    """Return the training images of a classifier; those of a list with numbers have `num_classes` classes.

    Raises:
        DataError: they have another number of classes.
    """
    if source.numbered and len(source.classes) < num_classes:
        return with_classes(source, [str(number) for number in range(num_classes)], "method.num_classes", "data.train")
    check_class_count(num_classes, source)
    return source


def check_class_count(num_classes: int, source: Source) -> None:
    """Check that the images have `num_classes` classes."""
    low, high = int(source.labels.min()), int(source.labels.max())
    if source.numbered and high >= num_classes > high - low:
        raise DataError(
            f"method.num_classes: {num_classes}, but {source.place} has class numbers {low} to {high}, and they count "
            f"from 0; subtract {low} from each"
        )
    if len(source.classes) != num_classes:
        count = plural(len(source.classes), "class", "classes")
        raise DataError(
            f"method.num_classes: {num_classes}, but {source.place} has {count}; write {len(source.classes)}"
        )


def loader(recipe: Recipe, source: Source, columns: tuple[str, ...], training: bool) -> Loader:
    """Return the batches of a split, with augmentation (training) or evaluation transform of the recipe.

    A large batch of an evaluation is not larger than the split: a checkpoint's recipe can ask for any.
    """
    batch = recipe.train.batch_size
    return Loader(
        source,
        recipe.data,
        recipe.encoder.image_size,
        recipe.encoder.in_chans,
        batch if training else min(batch, max(len(source), LARGE_BATCH)),
        columns,
        recipe.seed,
        training,
        parallel.rank(),
        parallel.size(),
        library=resampling(recipe.train.kernels),
    )


@functools.cache
def resampling(kernels: Kernels) -> str:
    """Return the compiled library that resizes images; empty where it cannot be had, or is not asked for."""
    return resample.library() if kernels == "auto" else ""


def check_usable(recipe: Recipe, source: Source, key: str) -> str:
    """Check before a run that images can be used; they are the same on every rank.

    Returns:
        `far_off` of those decoded.

    A few images are decoded, and some more only if none of these can be used, so a set with broken files passes.

    Args:
        key: of the recipe or command line that names the images.

    Raises:
        DataError: none of `TRIED` images can be used.
    """
    drawn = np.random.default_rng(0).permutation(len(source))[:TRIED]
    batches = loader(recipe, source.subset(drawn), ("image", "label"), training=False)
    batches = replace(batches, batch_size=min(AT_FIRST, len(drawn)), rank=0, ranks=1)
    with closing(batches.stream(range(1))) as stream:
        for image, label in stream:
            usable = image.asnumpy()[label.asnumpy() >= 0]
            if len(usable):
                return far_off(recipe.data, usable)
    fault = batches.take_faults()[0]
    others = f", and none of {len(drawn) - 1} others tried can be used" if len(drawn) > 1 else ""
    options = f"--channels {recipe.encoder.in_chans}"
    if recipe.data.max_pixels != DataConfig.max_pixels:
        options += f" --max-pixels {recipe.data.max_pixels}"
    raise DataError(
        f"{key}: {fault['image']}: {fault['reason']}{others}; "
        f"python scripts/verify_dataset.py {shlex.quote(str(source.place))} {options} "
        "lists what is wrong with each file"
    )


def left_out(faults: list[dict[str, str]], source: Source) -> str:
    """Return a line on the images of an evaluation that are not counted; empty if there are none."""
    if not faults:
        return ""
    first = min(faults, key=lambda fault: fault["image"])
    more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    return (
        f"{len(faults)} of {plural(len(source), 'image')} cannot be used and {'is' if len(faults) == 1 else 'are'} not "
        f"counted: {first['image']} ({first['reason']}){more}"
    )


def evaluation_batches(
    recipe: Recipe, source: Source, batch: int, columns: tuple[str, ...] = ("image",)
) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches of a few images with the evaluation transform; they are the same on every rank."""
    return replace(loader(recipe, source, columns, training=False), batch_size=batch, rank=0, ranks=1).epoch(0)
