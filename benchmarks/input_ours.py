"""This project's input pipelines: one line on stdout per line on stdin (see serve.py).

    python benchmarks/input_ours.py FOLDER --case pretrain --size 224 [--workers 2] [--decode fast] [--images 1024]
    python benchmarks/input_ours.py FOLDER --first     # the first batch of a large folder, then the end

Reads FOLDER with the settings of a recipe, as training does. A step is `--images` images in batches of 64; without
workers they are made in this process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")

from cases import ROOT  # adds the project to sys.path
from mindspore import Tensor
from serve import family_seconds, resident, serve, take, write

from src.config import Recipe
from src.config.files import load_recipe
from src.tasks import images

BATCH = 64
EPOCHS = 10**6  # more than any step takes
#: case -> recipe, and whether its images are those of training
CASES = {
    "pretrain": ("config/fastmim/vit_base_128_800e_pretrain.yaml", True),
    "finetune": ("config/fastmim/vit_base_224_finetune.yaml", True),
    "evaluation": ("config/fastmim/vit_base_224_finetune.yaml", False),
}


def recipe_of(args: argparse.Namespace) -> Recipe:
    settings = {
        "data.root": args.folder.resolve(),
        "data.train": ".",
        "data.val": "''",
        "data.workers": args.workers,
        "data.decode": args.decode,
        "encoder.image_size": args.size,
        "train.batch_size": BATCH,
        "train.effective_batch": 0,
        "method.num_classes": sum(path.is_dir() for path in args.folder.iterdir()),
    }
    if args.case == "pretrain":
        del settings["method.num_classes"]
    return load_recipe(ROOT / CASES[args.case][0], [f"{key}={value}" for key, value in settings.items()])


def batches(args: argparse.Namespace) -> Iterator[tuple[Tensor, ...]]:
    """The batches of epoch after epoch."""
    recipe, training = recipe_of(args), CASES[args.case][1]
    source = images.load_sources(recipe)[0]
    return images.loader(recipe, source, ("image", "label"), training).stream(range(EPOCHS))


def first_batch(args: argparse.Namespace) -> None:
    """Print `first`, seconds and CPU seconds from the listing of the folder to the first batch, and the peak memory."""
    imported, wall, cpu = resident(), time.perf_counter(), family_seconds()
    next(batches(args))
    write("first", time.perf_counter() - wall, family_seconds() - cpu, resident("VmHWM"), imported)


def main() -> int:
    imported = resident()
    parser = argparse.ArgumentParser(description="this project's side of the input benchmark")
    parser.add_argument("folder", type=Path, help="class folders of image files")
    parser.add_argument("--case", default="pretrain", choices=sorted(CASES))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--decode", choices=["exact", "fast"], default="exact")
    parser.add_argument("--images", type=int, default=1024, help="images of a step, a multiple of 64")
    parser.add_argument("--first", action="store_true", help="time the first batch only")
    args = parser.parse_args()
    if args.first:
        first_batch(args)
        return 0
    serve(lambda: take(batches(args), args.images // BATCH, args.workers), 0, imported)
    return 0


if __name__ == "__main__":
    sys.exit(main())
