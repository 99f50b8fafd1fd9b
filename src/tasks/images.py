"""The images of a recipe: its folders, checked against its classes, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mindspore import Tensor

from ..config import Recipe, plural
from ..data.loader import Loader
from ..data.sources import DataError, ImageFolder, image_folder, labelled_subset
from ..engine import parallel


def load_sources(recipe: Recipe) -> tuple[ImageFolder, ImageFolder | None]:
    """Return training and validation images of a recipe.

    Raises:
        DataError: a folder is unusable, or its classes do not fit the classifier.
    """
    root = Path(recipe.data.root)
    training = image_folder(root / recipe.data.train)
    training = labelled_subset(training, recipe.data.labels_per_class)
    validation = image_folder(root / recipe.data.val) if recipe.data.val else None
    classifier = recipe.method.classifier
    if classifier is not None:
        check_class_count(classifier.num_classes, training)
        if validation is not None and validation.classes != training.classes:
            different = sorted(set(validation.classes) ^ set(training.classes))
            raise DataError(
                f"data.val: {validation.folder} and {training.folder} differ in classes ({', '.join(different[:5])})"
            )
    return training, validation


def check_class_count(num_classes: int, source: ImageFolder) -> None:
    """Check that the folder has `num_classes` classes."""
    if not source.classes:
        raise DataError(f"data: {source.folder} has no class folders; a classifier needs one per class")
    if len(source.classes) != num_classes:
        count = plural(len(source.classes), "class", "classes")
        raise DataError(
            f"method.num_classes: {num_classes}, but {source.folder} has {count}; write {len(source.classes)}"
        )


def loader(recipe: Recipe, source: ImageFolder, columns: tuple[str, ...], training: bool) -> Loader:
    """Return the batches of a split, with augmentation (training) or evaluation transform of the recipe."""
    return Loader(
        source,
        recipe.data,
        recipe.encoder.image_size,
        recipe.encoder.in_chans,
        recipe.train.batch_size,
        columns,
        recipe.seed,
        training,
        parallel.rank(),
        parallel.size(),
    )


def evaluation_batches(
    recipe: Recipe, files: list[Path], batch: int, columns: tuple[str, ...] = ("image",)
) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches of single files with the evaluation transform; they are the same on every rank."""
    source = ImageFolder(files[0].parent, files, [0] * len(files), [])
    encoder = recipe.encoder
    return Loader(
        source, recipe.data, encoder.image_size, encoder.in_chans, batch, columns, recipe.seed, training=False
    ).epoch(0)
