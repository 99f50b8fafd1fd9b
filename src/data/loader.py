"""Batches of an epoch: which images (a pure function of seed and epoch), and the operations on each.

Decoding, cropping and normalising are MindSpore operations, which run outside Python; RandAugment and erasing are in
`augment`. The order is a permutation drawn from (seed, epoch), so a resumed run continues with the images that the
uninterrupted run would have seen.

Inter.PILCUBIC resizes images and crops bit for bit like Pillow 9.1 to 12.3: first the width, then the height, rounded
to 8 bits between the two. Inter.BICUBIC is another filter. Pillow 13 resizes the height first if the height shrinks,
the width changes, and the height loses more than twice as many pixels as the width (a width that grows loses less than
none). Only then does its result differ: by at most two grey levels where the first pass stays within 0..255, by more at
sharp edges where values are clipped to that range. An evaluation that shrinks images and keeps their aspect ratio is
affected for images more than twice as tall as wide. The published recipes are older than Pillow 13.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mindspore.dataset as ds
import numpy as np
from mindspore import Tensor
from mindspore import dtype as mstype
from mindspore.dataset import transforms, vision
from mindspore.dataset.vision import Inter

from ..config import DataConfig, plural
from .augment import crop_augmentation, erasing_augmentation, pixel_augmentation
from .sources import DataError, ImageFolder


@dataclass(frozen=True)
class Loader:
    """Batches of one split.

    Args:
        source: the files.
        config: augmentation and evaluation transform.
        image_size: height and width of the result.
        channels: 3 (RGB) or 1 (grey).
        batch_size: images per batch.
        columns: any of `image`, `label`, `number` (index of the file in the source) and the names in `extras`.
        seed: of order and augmentation.
        training: true: augmented and shuffled, an incomplete last batch is dropped. False: resized and centre-cropped,
            in order, the last batch is padded with label -1.
        rank, ranks: in training each rank takes its slice of every global batch; the global batch does not depend on
            how it is split over ranks and passes. With `config.repeats` a rank takes every `ranks`-th image, so copies
            of an image go to different ranks. In evaluation whole batches are dealt out to the ranks in turn.
        extras: further columns, arrays with one entry per file.
    """

    source: ImageFolder
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

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise DataError(f"encoder.in_chans: image files give 1 or 3 channels, not {self.channels}")
        if self.training and not len(self):
            each = f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
            raise DataError(
                f"train.batch_size: {self.batch_size}{each} is more than the {plural(len(self.source), 'image')} "
                f"of {self.source.folder}; write {len(self.source) // self.ranks} or less"
            )

    def __len__(self) -> int:
        """Number of batches of an epoch on this rank."""
        if self.training:
            return self.images // (self.batch_size * self.ranks)
        batches = -(-len(self.source) // self.batch_size)
        return len(range(self.rank, batches, self.ranks))

    @property
    def images(self) -> int:
        """Images of an epoch over all ranks, before an incomplete last batch is dropped."""
        return images_of_epoch(len(self.source), self.config.repeats) if self.training else len(self.source)

    def order(self, epoch: int) -> np.ndarray:
        """Return the indices of this rank's images in an epoch; -1 pads the last batch of an evaluation."""
        count, batch = len(self.source), self.batch_size
        if self.training:
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(count)
            repeated = np.repeat(shuffled, self.config.repeats)[: len(self) * self.ranks * batch]
            if self.config.repeats > 1:
                return repeated[self.rank :: self.ranks]
            return repeated.reshape(-1, self.ranks, batch)[:, self.rank].ravel()
        padded = np.concatenate([np.arange(count), np.full(-count % batch, -1)])
        return padded.reshape(-1, batch)[self.rank :: self.ranks].ravel()

    def checksum(self) -> list[int]:
        """Return a checksum of the list of files and labels as two numbers below 2**16."""
        value = 0
        for path, label in zip(self.source.files, self.source.labels, strict=True):
            value = zlib.crc32(f"{path.relative_to(self.source.folder)} {label}\n".encode(), value)
        return [value >> 16, value & 0xFFFF]

    def epoch(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches of an epoch as tensors in the order of `columns`.

        Raises:
            DataError: a file cannot be decoded; the text names it.
        """
        if len(self):  # 0: fewer batches than ranks
            yield from self._batches(self.order(number), self._operation_seed(number), self.columns)

    def every(self, columns: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        """Yield each file once, in order, with the transform of this split; the first file pads the last batch."""
        count = len(self.source)
        order = np.concatenate([np.arange(count), np.zeros(-count % self.batch_size, int)])
        return self._batches(order, self._operation_seed(0), columns)

    def _batches(self, order: np.ndarray, seed: int, columns: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        workers = min(self.config.workers, os.cpu_count() or 1)  # MindSpore refuses more
        ds.config.set_seed(seed)
        files = _FileReader(self.source, order, seed, list(self.extras.values()))
        names = ["image", "label", "number", "key", *self.extras]
        data = ds.GeneratorDataset(files, names, shuffle=False, num_parallel_workers=1)
        for operations, inputs in self.operations():
            data = data.map(operations, inputs, num_parallel_workers=workers)
        data = data.batch(self.batch_size).project(list(columns))
        done = 0
        try:
            for batch in data.create_tuple_iterator(num_epochs=1, do_copy=False):
                yield batch
                done += 1
        except RuntimeError as error:
            Path("abnormal_image.jpg").unlink(missing_ok=True)  # MindSpore writes a copy of the file here
            raise self._unreadable(order[done * self.batch_size :], error) from None

    def _unreadable(self, order: np.ndarray, error: Exception) -> DataError:
        """Return an error that names the first file of `order` that cannot be decoded; MindSpore's error does not."""
        import cv2  # takes a tenth of a second

        for path in (self.source.files[max(int(index), 0)] for index in order):
            content = np.fromfile(path, np.uint8)
            if not content.size or cv2.imdecode(content, cv2.IMREAD_REDUCED_COLOR_8) is None:
                return DataError(f"data: {path} cannot be read as an image; replace or remove it")
        return DataError(f"data: an image below {self.source.folder} cannot be read ({_cause(error)})")

    def _operation_seed(self, epoch: int) -> int:
        return int(np.random.default_rng([self.seed, epoch, 1, self.rank]).integers(2**31))

    def operations(self) -> list[tuple[list, list[str]]]:
        """Return the operations on a file (decode, crop, augment, normalise to (channels, H, W) float32).

        The list has one entry per step of the pipeline: its operations and the columns they take.
        """
        config, image, keyed = self.config, ["image"], ["image", "key"]
        if not self.training:
            evaluation = [vision.Decode(), *evaluation_operations(self.image_size, config.eval_crop)]
            return [([*evaluation, *self._normalise()], image)]
        steps: list[tuple[list, list[str]]] = [([vision.Decode()], image)]

        def add(operations: list, columns: list[str]) -> None:
            if columns == steps[-1][1] == image:
                steps[-1][0].extend(operations)
            else:
                steps.append((operations, columns))

        crop = crop_augmentation(config, self.image_size)
        if crop is None:
            sizes = self.image_size, config.crop_scale, config.crop_ratio
            add([vision.RandomResizedCrop(*sizes, Inter.PILCUBIC)], image)
        else:
            add([crop], keyed)
        add([vision.RandomHorizontalFlip(config.hflip)], image)
        if config.brightness or config.contrast:
            add([vision.RandomColorAdjust(config.brightness, config.contrast)], image)
        pixels, erasing = pixel_augmentation(config), erasing_augmentation(config)
        if pixels is not None:
            add([pixels], keyed)
        add(self._normalise(), image)
        if erasing is not None:
            add([erasing], keyed)
        return steps

    def _normalise(self) -> list:
        steps: list = []
        if self.channels == 1:  # luminance as in Pillow's mode "L", in three equal planes; one of them is taken below
            steps += [
                vision.ConvertColor(vision.ConvertMode.COLOR_RGB2GRAY),
                vision.ConvertColor(vision.ConvertMode.COLOR_GRAY2BGR),
            ]
        steps += [vision.Rescale(1 / 255.0, 0.0), vision.HWC2CHW()]
        if self.channels == 1:
            steps.append(transforms.Slice(slice(0, 1, 1), ...))
        steps.append(vision.Normalize(list(self.config.mean), list(self.config.std), is_hwc=False))
        return [*steps, transforms.TypeCast(mstype.float32)]


def images_of_epoch(count: int, repeats: int) -> int:
    """Return the images of an epoch of `count` files: all, or with repeats a multiple of 256 (DeiT samplers.py).

    With fewer than 256 files, which give an empty epoch in DeiT, all are used.
    """
    return count // 256 * 256 or count if repeats > 1 else count


def evaluation_operations(image_size: tuple[int, int], eval_crop: float) -> list:
    """Resize so that the crop is `eval_crop` of the shorter side, then crop the centre (torchvision on PIL images)."""
    height, width = image_size
    resize: vision.Resize | ShorterSide
    if height != width:
        resize = vision.Resize((int(height / eval_crop), int(width / eval_crop)), Inter.PILCUBIC)
    else:
        shorter = int(height / eval_crop)
        # for a power of two, such as 256 for 224, MindSpore's rounding is exact too, and its operation avoids Python
        exact = shorter & (shorter - 1) == 0
        resize = vision.Resize(shorter, Inter.PILCUBIC) if exact else ShorterSide(shorter)
    return [resize, CentreCrop(image_size)]


class ShorterSide:
    """Resize the shorter side to `size` and the longer side to floor(size * longer / shorter), as in torchvision.

    vision.Resize(size) divides first, in 32 bits. It can be one pixel short if the exact result is a whole number:
    140 x 155 pixels become 224 x 247, not 224 x 248.
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        longer = int(self.size * max(height, width) / min(height, width))
        return vision.Resize((longer, self.size) if width <= height else (self.size, longer), Inter.PILCUBIC)(image)


class CentreCrop:
    """Crop the centre; half a pixel rounds to even as in torchvision (vision.CenterCrop rounds down)."""

    def __init__(self, image_size: tuple[int, int]):
        self.height, self.width = image_size

    def __call__(self, image: np.ndarray) -> np.ndarray:
        top = round((image.shape[0] - self.height) / 2)
        left = round((image.shape[1] - self.width) / 2)
        return image[top : top + self.height, left : left + self.width]


class _FileReader:
    """Bytes, label, number, key (for `augment`) and entries of `extras` of each image in `order`.

    A random-access source for GeneratorDataset.
    """

    def __init__(self, source: ImageFolder, order: np.ndarray, seed: int, extras: Sequence[np.ndarray] = ()):
        self.source = source
        self.order = order
        self.seed = seed
        self.extras = extras

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[np.ndarray, ...]:
        index = int(self.order[position])
        path = self.source.files[max(index, 0)]
        label = self.source.labels[index] if index >= 0 else -1
        # with the position, since an epoch may contain an image more than once
        key = np.array([self.seed, max(index, 0), position], np.int64)
        content = np.fromfile(path, np.uint8)
        if not has_scan(content.data):
            content = np.zeros(1, np.uint8)  # an invalid image raises an error; the broken JPEG would end the process
        number = np.array(max(index, 0), np.int32)
        extras = (np.array(values[max(index, 0)]) for values in self.extras)
        return content, np.array(label, np.int32), number, key, *extras


def has_scan(content: memoryview) -> bool:
    """Return False for a JPEG that ends before its first scan; MindSpore's decoder would divide by zero."""
    if bytes(content[:2]) != b"\xff\xd8":
        return True  # not a JPEG
    offset = 2
    while offset + 4 <= len(content) and content[offset] == 0xFF:
        marker, length = content[offset + 1], 256 * content[offset + 2] + content[offset + 3]
        if marker == 0xDA:
            return offset + 2 + length <= len(content)
        if marker == 0xFF:  # a fill byte
            offset += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # a marker without a segment
            offset += 2
        else:
            offset += 2 + length
    return False


def _cause(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("-")]
    return lines[0] if lines else type(error).__name__
