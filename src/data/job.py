"""What a worker does for one image: read, transform, and replace what cannot be used."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from . import affine, resample
from .picture import TOO_LARGE, Undecodable
from .sources import Source
from .transform import Key, Transform, generator

#: number of the random draw of a replacement (`transform.generator`)
REPLACE = 10
TRIES = 64  # images drawn for a replacement before the run stops
MAX_REASON = 200  # characters


class Fault(NamedTuple):
    """An image that could not be used."""

    image: int
    replacement: int  # the image used instead; -1: none
    reason: str


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turn every error of an image's file or content into `Undecodable` with a reason of one short line."""
    try:
        yield
    except Undecodable as error:
        reason = str(error) or type(error).__name__
    except MemoryError:
        reason = TOO_LARGE
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    else:
        return
    raise Undecodable(" ".join(reason.split())[:MAX_REASON])


@dataclass(frozen=True)
class ImageJob:
    """Load images of a source; a worker process has a copy.

    Args:
        source, transform: what to load and how.
        seed: of the augmentation.
        replaces: an image that cannot be used is replaced by another one of its class, the same in every epoch; by any
            other one if no image of its class can be used. False: it becomes zeros.
        library: of `resample` and `affine`; empty: Pillow.
        crashed: images whose decoding ended a worker process.
    """

    source: Source
    transform: Transform
    seed: int
    replaces: bool
    library: str = ""
    crashed: set[int] = field(default_factory=set)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image: channels, height, width."""
        return (self.transform.channels, *self.transform.size)

    def fill(
        self, rows: np.ndarray, items: np.ndarray, note: Callable[[int], None] = lambda index: None
    ) -> list[tuple[int, Fault]]:
        """Load images into rows of a batch; returns the faults with their rows.

        Args:
            rows: (n or more, channels, H, W) float32.
            items: (n, 3) image, epoch and copy; image -1 is padding and becomes zeros.
            note: is told each image before it is decoded.
        """
        resample.use(self.library)
        affine.use(self.library)
        faults = []
        for row, (index, epoch, copy) in enumerate(items.tolist()):
            if index < 0:
                rows[row] = 0
            elif fault := self.load(index, epoch, copy, rows[row], note):
                faults.append((row, fault))
        return faults

    def load(self, index: int, epoch: int, copy: int, out: np.ndarray, note: Callable[[int], None]) -> Fault | None:
        """Write an image into `out`, (channels, H, W) float32; returns what was wrong with it.

        Args:
            copy: number of this copy of the image in the epoch.
            note: is told each image before it is decoded.
        """
        key = (self.seed, epoch, index, copy)
        try:
            self._load(index, key, out, note)
            return None
        except Undecodable as error:
            reason = str(error)
        for candidate in self._candidates(index) if self.replaces else ():
            try:
                self._load(candidate, key, out, note)
                return Fault(index, candidate, reason)
            except Undecodable:
                continue
        out[:] = 0
        return Fault(index, -1, reason)

    def _load(self, index: int, key: Key, out: np.ndarray, note: Callable[[int], None]) -> None:
        if index in self.crashed:
            raise Undecodable("its decoding ended the process, or took too long")
        note(index)
        with readable():
            self.transform(self.source.read(index), key, out)

    def _candidates(self, index: int) -> Iterator[int]:
        """Yield images in an order drawn from seed and image: of the same class, and if it has none, any others."""
        order, ends = self._by_class
        label = int(self.source.labels[index])
        members = order[int(ends[label - 1]) if label else 0 : int(ends[label])]
        rng = generator((self.seed, 0, index, 0), REPLACE)
        for drawn in (members, order) if len(members) < len(order) else (order,):
            draws = rng.integers(len(drawn), size=TRIES)
            yield from (int(drawn[draw]) for draw in draws if drawn[draw] != index)

    @functools.cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """The images sorted by class, and the end of each class in them."""
        labels = self.source.labels
        return np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))
