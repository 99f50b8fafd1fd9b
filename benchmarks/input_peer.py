"""The references' input pipelines, as torch Datasets: one line on stdout per line on stdin (see serve.py).

    python benchmarks/input_peer.py FOLDER --case pretrain --size 224 [--workers 2] [--images 1024]

It needs Linux and an environment with torch, torchvision and timm; benchmarks/input.py runs it. A step is `--images`
images in batches of 64 from a DataLoader; without workers they are made in this process.

pretrain: Pillow decodes, a bicubic random resized crop of 20 to 100 % of the area, flip, normalise (FastMIM.pytorch
main_pretrain.py; mae main_pretrain.py). finetune: timm's transform with RandAugment and erasing (FastMIM.pytorch
util/datasets.py, SimMIM data/data_finetune.py). evaluation: shorter side to 256 for 224, bicubic, then the centre.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from serve import resident, serve, take
from timm.data import auto_augment, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

BATCH = 64


def pretraining(size: int) -> Callable[[Image.Image], torch.Tensor]:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            *normalised(),
        ]
    )


def evaluation(size: int) -> Callable[[Image.Image], torch.Tensor]:
    resize = transforms.Resize(size * 256 // 224, interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size), *normalised()])


def normalised() -> list[Callable[..., Any]]:
    return [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """As timm's; at the highest level it asks for 0 bits, which is black in older Pillow and an error in version 13."""
    return auto_augment.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


def fine_tuning(size: int) -> Callable[[Image.Image], torch.Tensor]:
    return create_transform(
        input_size=size,
        is_training=True,
        color_jitter=0.4,  # has no effect beside auto_augment
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        interpolation="bicubic",
    )


CASES = {"pretrain": pretraining, "finetune": fine_tuning, "evaluation": evaluation}


def pil_loader(path: Path) -> Image.Image:
    """As torchvision's ImageFolder reads a file."""
    with path.open("rb") as file:
        return Image.open(file).convert("RGB")


class Images(Dataset):
    """Files below class folders, with the number of the class."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], torch.Tensor]):
        self.files = sorted(folder.glob("*/*.jpg"))
        names = sorted({path.parent.name for path in self.files})
        self.labels = [names.index(path.parent.name) for path in self.files]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(pil_loader(self.files[index])), self.labels[index]


class Endless:
    """Epoch after epoch of shuffled indices."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count).tolist()


def main() -> int:
    imported = resident()
    parser = argparse.ArgumentParser(description="the PyTorch side of the input benchmark")
    parser.add_argument("folder", type=Path, help="class folders of JPEG files")
    parser.add_argument("--case", required=True, choices=sorted(CASES))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--images", type=int, default=1024, help="images of a step, a multiple of 64")
    args = parser.parse_args()
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    torch.set_num_threads(1)  # as in the workers of a DataLoader
    dataset = Images(args.folder, CASES[args.case](args.size))
    loader = DataLoader(dataset, BATCH, sampler=Endless(len(dataset)), num_workers=args.workers)
    serve(lambda: take(iter(loader), args.images // BATCH, args.workers), len(dataset), imported)
    return 0


if __name__ == "__main__":
    sys.exit(main())
