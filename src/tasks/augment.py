"""Draw some images as training sees them (`scripts/visualize.py augment`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import DataConfig, Recipe, at_stage, plural
from ..config.files import load_recipe
from ..data.decode import Decoder, Undecodable
from ..data.job import ImageJob, readable
from ..data.opening import open_source
from ..data.sources import Source, labelled_subset
from ..data.transform import Transform
from ..errors import UserError
from ..visual.gallery import displayed, write_grid
from .command import line
from .dataset import far_off, writable

MOST_IMAGES, MOST_COPIES = 32, 16  # which bounds memory and the size of the picture
TRIED = 64  # images that are tried beyond those asked for
MARGIN = 255  # grey level around an original of another shape


@dataclass(frozen=True)
class Column:
    """A column of the picture: the changes `data` makes to images in an epoch, which counts from 0."""

    title: str
    data: DataConfig
    epoch: int


def draw_augmentation(path: str, overrides: list[str], images: int, copies: int, out: str) -> None:
    """Write a PNG with a row for each image: the original, the image in the first epochs, and each change alone.

    Args:
        path: a recipe; of one with stages the first stage is drawn.
        overrides: changes to the recipe.
        images: images of the training set, spread evenly over it.
        copies: epochs.
        out: the file; empty: the recipe's name with `_augment.png`, in the working folder.

    Raises:
        UserError: recipe, images or file cannot be used.
    """
    target = picture_file(out or f"{Path(path).stem}_augment.png", images, copies)
    recipe = at_stage(load_recipe(path, overrides), 0)
    source = labelled_subset(open_source(recipe.data.training_place, "data.train"), recipe.data.labels_per_class)
    columns = columns_of(recipe, copies)
    rows, faults, note = [], list[str](), ""
    for index in candidates(len(source), images):
        row = row_of(recipe, source, columns, index)
        if isinstance(row, str):
            faults.append(f"{source.name(index)}: {row}")
        else:
            rows.append(row[0])
            note = note or row[1]
        if len(rows) == images:
            break
    if not rows:
        raise UserError(f"data.train: {faults[0]}; {plural(len(faults), 'image')} tried, none can be used")
    pictures = [np.stack(column) for column in zip(*rows, strict=True)]
    try:
        write_grid(pictures, ["original", *(column.title for column in columns)], target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}); name another file") from None
    if faults:
        line(f"left out: {plural(len(faults), 'image')} that cannot be used, first {faults[0]}")
    if note:
        line(note)
    line(f"{target}: {plural(len(rows), 'image')} of {source.place}, in {plural(copies, 'epoch')}")


def picture_file(out: str, images: int, copies: int) -> Path:
    """Return the path of the picture.

    Raises:
        UserError: it cannot be written, or is too large.
    """
    for option, value, most in (("--images", images, MOST_IMAGES), ("--copies", copies, MOST_COPIES)):
        if value > most:
            raise UserError(f"command line: {option}: {value} make too large a picture; write {most} or less")
    target = writable(out)
    if target.suffix.lower() != ".png":
        raise UserError(f"--out: {target} does not end in .png; write {target.stem}.png")
    return target


def columns_of(recipe: Recipe, copies: int) -> list[Column]:
    """Return the epochs and, if there are several, each change alone with the draws of the first epoch."""
    data, (height, width) = recipe.data, recipe.encoder.image_size
    none = unchanged(data, width / height)
    crop = replace(none, crop_scale=data.crop_scale, crop_ratio=data.crop_ratio, hflip=data.hflip)
    changes = [Column("crop and flip", crop, 0)]
    if data.brightness or data.contrast:
        title = f"brightness {data.brightness:g}, contrast {data.contrast:g}"
        changes.append(Column(title, replace(none, brightness=data.brightness, contrast=data.contrast), 0))
    if data.auto_augment:
        changes.append(Column(data.auto_augment, replace(none, auto_augment=data.auto_augment), 0))
    if data.color_jitter:
        title = f"color jitter {data.color_jitter:g}"
        changes.append(Column(title, replace(none, color_jitter=data.color_jitter), 0))
    if data.erasing:
        changes.append(Column(f"erasing ({data.erasing:.0%} of images)", replace(none, erasing=1.0), 0))
    epochs = [Column(f"epoch {epoch + 1}", data, epoch) for epoch in range(copies)]
    return epochs + (changes if len(changes) > 1 else [])


def unchanged(data: DataConfig, ratio: float) -> DataConfig:
    """Return the data without random changes; the crop is the largest centred box with this width / height."""
    data = replace(data, crop_scale=(1.0, 1.0), crop_ratio=(ratio, ratio), hflip=0.0, auto_augment="", erasing=0.0)
    return replace(data, brightness=0.0, contrast=0.0, color_jitter=0.0)


def candidates(count: int, images: int) -> Iterator[int]:
    """Yield images spread evenly, then others, which replace those that cannot be used."""
    chosen = np.linspace(0, count - 1, min(images, count)).astype(int).tolist()
    yield from chosen
    others = np.random.default_rng(0).permutation(count)[: TRIED + images].tolist()
    yield from [index for index in others if index not in chosen][:TRIED]


def row_of(recipe: Recipe, source: Source, columns: list[Column], index: int) -> tuple[list[np.ndarray], str] | str:
    """Return the pictures of an image, (H, W, 3) uint8 each, and `far_off` of it; or why it cannot be used."""
    size, channels = recipe.encoder.image_size, recipe.encoder.in_chans
    pixels = np.empty((len(columns), channels, *size), np.float32)
    for column, out in zip(columns, pixels, strict=True):
        job = ImageJob(source, Transform(column.data, size, channels, training=True), recipe.seed, replaces=False)
        fault = job.load(index, column.epoch, 0, out, lambda index: None)
        if fault is not None:
            return fault.reason
    try:
        with readable():
            first = original(recipe, source.read(index))
    except Undecodable as error:
        return str(error)
    return [first, *(eight_bits(displayed(recipe.data, one[None])[0]) for one in pixels)], far_off(recipe.data, pixels)


def original(recipe: Recipe, content: bytes) -> np.ndarray:
    """Return a whole image, as large as it fits into the image size in its own shape, (H, W, 3) uint8."""
    (height, width), channels, data = recipe.encoder.image_size, recipe.encoder.in_chans, recipe.data
    picture = Decoder.of(data, channels).open(content)
    share = min(height / picture.height, width / picture.width)
    rows, cols = (max(1, round(share * side)) for side in (picture.height, picture.width))
    plain = unchanged(replace(data, decode="exact"), picture.width / picture.height)
    pixels = np.empty((channels, rows, cols), np.float32)
    Transform(plain, (rows, cols), channels, training=True)(content, (0, 0, 0, 0), pixels)
    whole = np.full((height, width, 3), MARGIN, np.uint8)
    top, left = (height - rows) // 2, (width - cols) // 2
    whole[top : top + rows, left : left + cols] = eight_bits(displayed(data, pixels[None])[0])
    return whole


def eight_bits(picture: np.ndarray) -> np.ndarray:
    """Return a picture in 0..1 as uint8."""
    return np.round(picture * 255).astype(np.uint8)
