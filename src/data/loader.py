"""Batches of images: which images of an epoch, in which order, on which rank.

The order is a permutation drawn from (seed, epoch), and each random change of an image a pure function of (seed, epoch,
image, copy): workers, ranks, prefetching and resuming change nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor

from ..config import DataConfig, plural
from ..native import cores
from .job import Fault, ImageJob
from .sources import DataError, Source
from .transform import Transform
from .workers import batches


class Faults:
    """The images that could not be used, each reported once."""

    def __init__(self) -> None:
        self.known: dict[int, Fault] = {}
        self._new: list[Fault] = []

    def add(self, faults: Sequence[Fault]) -> None:
        """Note faults; those of known images are ignored."""
        for fault in faults:
            if fault.image not in self.known:
                self.known[fault.image] = fault
                self._new.append(fault)

    def take(self) -> list[Fault]:
        """Return the faults since the last call."""
        new, self._new = self._new, []
        return new


@dataclass(frozen=True)
class Loader:
    """Batches of one split.

    Args:
        source: the images.
        config: augmentation and evaluation transform.
        image_size: height and width of the result.
        channels: 3 (RGB), 1 (grey), or the number of bands of the files.
        batch_size: images per batch.
        columns: any of `image`, `label`, `number` (index of the image in the source) and the names in `extras`.
        seed: of order and augmentation.
        training: true: augmented and shuffled, an incomplete last batch is dropped, an image that cannot be used is
            replaced by another one of its class, or of any class if it has none and labels are not used. False: resized
            and centre-cropped, in order; an image that cannot be used and the padding of the last batch have label -1.
        rank, ranks: in training each rank takes its slice of every global batch; the global batch does not depend on
            how it is split over ranks and passes. With `config.repeats` a rank takes every `ranks`-th image, so copies
            of an image go to different ranks. In evaluation whole batches are dealt out to the ranks in turn.
        extras: further columns, arrays with one entry per image; a replacement comes with its own.
        library: of `resample`; empty: Pillow, with the same numbers.
        faults: what could not be used so far.
    """

    source: Source
    config: DataConfig
    image_size: tuple[int, int]
    channels: int
    batch_size: int
    columns: tuple[str, ...]
    seed: int = 0
    training: bool = True
    rank: int = 0
    ranks: int = 1
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    library: str = ""
    faults: Faults = field(default_factory=Faults, compare=False)

    def __post_init__(self) -> None:
        if self.training and not len(self):
            each = f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
            raise DataError(
                f"train.batch_size: {self.batch_size}{each} is more than the {plural(len(self.source), 'image')} "
                f"of {self.source.place}; write {len(self.source) // self.ranks} or less"
            )

    def __len__(self) -> int:
        """Number of batches of an epoch on this rank."""
        if self.training:
            return self.images // (self.batch_size * self.ranks)
        count = -(-len(self.source) // self.batch_size)
        return len(range(self.rank, count, self.ranks))

    @property
    def images(self) -> int:
        """Images of an epoch over all ranks, before an incomplete last batch is dropped."""
        return images_of_epoch(len(self.source), self.config.repeats) if self.training else len(self.source)

    def order(self, epoch: int) -> np.ndarray:
        """Return the indices of this rank's images in an epoch; -1 pads the last batch of an evaluation."""
        return self._items(epoch)[:, 0]

    def _items(self, epoch: int) -> np.ndarray:
        """Return image, epoch and copy of each of this rank's images in an epoch, (n, 3) int64."""
        count, batch = len(self.source), self.batch_size
        if not self.training:
            padded = np.concatenate([np.arange(count), np.full(-count % batch, -1)])
            return with_epoch(padded.reshape(-1, batch)[self.rank :: self.ranks].ravel(), epoch, 0)
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(count)
        repeats, used = self.config.repeats, len(self) * self.ranks * batch
        items = with_epoch(np.repeat(shuffled, repeats), epoch, np.tile(np.arange(repeats), count))[:used]
        if repeats > 1:
            return items[self.rank :: self.ranks]
        return items.reshape(-1, self.ranks, batch, 3)[:, self.rank].reshape(-1, 3)

    def checksum(self) -> list[int]:
        """Return a checksum of the list of images and labels as two numbers below 2**16."""
        value = self.source.checksum()
        return [value >> 16, value & 0xFFFF]

    def epoch(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches of an epoch as tensors in the order of `columns`."""
        return self.stream(range(number, number + 1))

    def stream(self, epochs: range, count: int | None = None) -> Generator[tuple[Tensor, ...], None, None]:
        """Yield the batches of several epochs; the first ones of an epoch are loaded before the epoch before ends.

        Args:
            count: batches of each epoch; None is all.

        Raises:
            DataError: an image cannot be used, and no image of its class replaces it.
        """
        size = self.batch_size

        def items() -> Iterator[np.ndarray]:
            for epoch in epochs:
                rows = self._items(epoch)
                for start in range(0, size * (len(self) if count is None else count), size):
                    yield rows[start : start + size]

        return self._batches(items(), self.columns)

    def take_faults(self) -> list[dict[str, str]]:
        """Return the unusable images since the last call: `image` (its name), `reason`, and `replacement` if any."""
        name = self.source.name
        return [
            {"image": name(fault.image), "reason": fault.reason}
            | ({"replacement": name(fault.replacement)} if fault.replacement >= 0 else {})
            for fault in self.faults.take()
        ]

    def every(self, columns: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        """Yield each image once, in order, with the transform of this split; the first image pads the last batch."""
        count, size = len(self.source), self.batch_size
        indices = np.concatenate([np.arange(count), np.zeros(-count % size, int)])
        return self._batches(iter(with_epoch(indices, 0, 0).reshape(-1, size, 3)), columns)

    def _batches(
        self, items: Iterator[np.ndarray], columns: Sequence[str]
    ) -> Generator[tuple[Tensor, ...], None, None]:
        transform = Transform(self.config, self.image_size, self.channels, self.training)
        job = ImageJob(self.source, transform, self.seed, self.training, self.library)
        taken: list[np.ndarray] = []  # the items of the batches being loaded

        def noted() -> Iterator[np.ndarray]:
            for rows in items:
                taken.append(rows)
                yield rows

        for images, faults in batches(job, noted(), self.batch_size, min(self.config.workers, cores())):
            indices = taken.pop(0)[:, 0]
            unused = [row for row, fault in faults if not self._fits(fault, columns)]
            self.faults.add([fault for _, fault in faults])
            if self.training and unused:
                raise self._no_replacement(next(fault for row, fault in faults if row == unused[0]))
            labels = np.where(indices < 0, -1, self.source.labels[indices])
            labels[unused] = -1
            numbers = np.maximum(indices, 0)
            shown = numbers.copy()  # with the replacements, whose extras belong to their pixels
            for row, fault in faults:
                shown[row] = max(fault.replacement, 0)
            values = {"image": images, "label": labels, "number": numbers}
            yield tuple(
                Tensor(
                    np.ascontiguousarray(self.extras[name][shown])
                    if name in self.extras
                    else values[name].astype(np.float32 if name == "image" else np.int32, copy=False)
                )
                for name in columns
            )

    def _fits(self, fault: Fault, columns: Sequence[str]) -> bool:
        """Whether there is a replacement, and one of the same class if labels are used."""
        if fault.replacement < 0 or "label" not in columns:
            return fault.replacement >= 0
        labels = self.source.labels
        return bool(labels[fault.replacement] == labels[fault.image])

    def _no_replacement(self, fault: Fault) -> DataError:
        name, classes = self.source.name(fault.image), self.source.classes
        what = f"class {classes[self.source.labels[fault.image]]}" if classes else str(self.source.place)
        return DataError(
            f"data.train: {name}: {fault.reason}; no other image of {what} can be used instead; repair the images, or "
            "leave the class out"
        )


def with_epoch(indices: np.ndarray, epoch: int, copies: np.ndarray | int) -> np.ndarray:
    """Return (n, 3) image, epoch and copy."""
    items = np.empty((len(indices), 3), np.int64)
    items[:, 0], items[:, 1], items[:, 2] = indices, epoch, copies
    return items


def images_of_epoch(count: int, repeats: int) -> int:
    """Return the images of an epoch of `count` files: all, or with repeats a multiple of 256 (DeiT samplers.py).

    With fewer than 256 files, which give an empty epoch in DeiT, all are used.
    """
    return count // 256 * 256 or count if repeats > 1 else count
