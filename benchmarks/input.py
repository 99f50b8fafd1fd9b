"""Compare input pipelines with those of the references on torchvision and timm (the peer).

    python benchmarks/input.py [--case pretrain_128] [--cores 1] [--decode fast] [--folder data/jpeg]
    python benchmarks/input.py paths [--count 1000000]     # from a folder of that many files to the first batch
    python benchmarks/input.py wait [--against COMMIT]     # the share of training time that waits for images

Run it with the Python of this project, on Linux. The peer has an environment of its own (.venv-peer-images), where the
newest PyTorch, torchvision and timm are installed on first use. The images are 500 x 375 JPEG files, cut from the
photographs of scikit-image.

All processes stay loaded and take turns, so all run under the same load; figures are medians over the rounds. A line is

    <case> <size> px cores=<> decode=<> ours=<> peer=<> images/s ratio=<> cpu_ratio=<>

ratio: of images per second. cpu_ratio: of images per CPU second, all processes together, which other programs hardly
change. One core: everything in one process. More: as many worker processes, and the process that takes the batches.
Evaluation decodes exactly whatever `--decode` says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cases import ROOT
from PIL import Image
from step import EndedError, StepProcess, checkout, interleave, peer_python, peer_versions, processor

from scripts.prepare_demo import PHOTOGRAPHS, DemoError, photograph_folder

PEER = ROOT / ".venv-peer-images"
PEER_PACKAGES = ["torch", "torchvision", "timm", "pillow"]
#: name -> case of input_ours.py and input_peer.py, pixels
CASES = {
    "pretrain_128": ("pretrain", 128),
    "pretrain_192": ("pretrain", 192),
    "pretrain_224": ("pretrain", 224),
    "finetune_224": ("finetune", 224),
    "evaluation_224": ("evaluation", 224),
}
BATCH = 64
SIZE = (500, 375)  # width and height, the most frequent ones of ImageNet
PER_PHOTOGRAPH = 30
QUALITY = 90
#: the training of `wait`: FastMIM on ViT-Tiny
WAIT_RECIPE = """\
encoder: {name: vit_tiny, image_size: 128}
method: {name: fastmim, mask_block: 16, mask_ratio: 0.75, decoder: {width: 96, depth: 1}}
data: {val: "", crop_scale: [0.2, 1.0], workers: 2}
train: {epochs: 6, batch_size: 60, base_lr: 1.0e-4, lr_batch: 0, log_every: 8, save_every: 6, eval_every: 0}
"""


# --- files ----------------------------------------------------------------------------------------------------------


def make_images(folder: Path) -> None:
    """Write JPEG files, each a random box of a photograph; the same library versions always write the same bytes."""
    rng = np.random.default_rng(0)
    for name, file_name in PHOTOGRAPHS.items():
        photograph = Image.open(photograph_folder() / file_name).convert("RGB")
        (folder / name).mkdir(parents=True)
        for number in range(PER_PHOTOGRAPH):
            most = min(photograph.width, photograph.height * SIZE[0] / SIZE[1])
            width = rng.uniform(min(SIZE[0], most), most)
            height = width * SIZE[1] / SIZE[0]
            left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
            box = (left, top, left + width, top + height)
            image = photograph.resize(SIZE, Image.Resampling.BICUBIC, box)
            image.save(folder / name / f"{number:04d}.jpg", quality=QUALITY, subsampling="4:2:0")


@contextmanager
def image_folder(folder: Path | None) -> Iterator[Path]:
    """The folder of the images, which are made if it does not exist; a temporary one without `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary, "jpeg")
        if not place.exists():
            made = Path(temporary, "made")
            make_images(made)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, place)
        files = list(place.glob("*/*.jpg"))
        if len(files) != len(PHOTOGRAPHS) * PER_PHOTOGRAPH:
            raise SystemExit(f"error: --folder {place}: it has other files; name a folder that does not exist")
        size = statistics.mean(path.stat().st_size for path in files)
        print(f"{len(files)} JPEG files of {SIZE[0]} x {SIZE[1]} pixels, {size / 1000:.0f} kB on average")
        yield place


# --- images per second ----------------------------------------------------------------------------------------------


def compare(name: str, cores: int, folder: Path, args: argparse.Namespace) -> None:
    """Print images per second of a case relative to the peer."""
    case, size = CASES[name]
    options = ["--case", case, "--size", size, "--images", args.images, "--workers", 0 if cores == 1 else cores]
    command = [folder, *options]
    python = peer_python(PEER, PEER_PACKAGES)
    peer = StepProcess([python, ROOT / "benchmarks/input_peer.py", *command], cores)
    decodes = [args.decode] if args.decode else ["exact", "fast"]
    ours = {
        decode: StepProcess([sys.executable, ROOT / "benchmarks/input_ours.py", *command, "--decode", decode], cores)
        for decode in (decodes if case != "evaluation" else ["exact"])
    }
    interleave([peer, *ours.values()], args.repeats)
    for decode, process in ours.items():
        wall, cpu = (paired_ratio(peer, process, clock) for clock in (0, 1))
        print(
            f"{case} {size} px cores={cores} decode={decode} ours={args.images / process.median():.0f} "
            f"peer={args.images / peer.median():.0f} images/s ratio={wall:.2f} cpu_ratio={cpu:.2f}",
            flush=True,
        )
    for process in [peer, *ours.values()]:
        process.quit()


def paired_ratio(peer: StepProcess, process: StepProcess, clock: int) -> float:
    """Return the median over the rounds of the seconds of the peer relative to those of a process."""
    pairs = zip(peer.times, process.times, strict=True)
    return statistics.median(theirs[clock] / ours[clock] for theirs, ours in pairs)


# --- many paths -----------------------------------------------------------------------------------------------------


def measure_paths(count: int) -> None:
    """Print seconds and memory from a folder of `count` files to the first batch, at the first and the second start."""
    with tempfile.TemporaryDirectory() as temporary, image_folder(None) as images:
        folder = Path(temporary, "many")
        link_images(sorted(images.glob("*/*.jpg")), folder, count)
        first_batch(images, temporary)  # compiles
        for start in ("first", "second"):
            wall, cpu, peak, imported = first_batch(folder, temporary)
            print(
                f"paths={count} start={start} seconds={wall:.1f} cpu={cpu:.1f} peak={peak / 1e9:.2f} GB "
                f"before={imported / 1e9:.2f} GB",
                flush=True,
            )


def first_batch(folder: Path, cache: str) -> list[float]:
    """Start a process; returns seconds, CPU seconds and peak bytes to its first batch, and bytes after the imports."""
    command = [sys.executable, ROOT / "benchmarks/input_ours.py", folder, "--first", "--workers", "2"]
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("first ")]
    if done.returncode or not lines:
        raise EndedError(f"{' '.join(map(str, command))} ended without a batch")
    return list(map(float, lines[0].split()[1:]))


def link_images(images: Sequence[Path], folder: Path, count: int, classes: int = 1000) -> None:
    """Fill 1000 class folders with links to some images; a file system allows about 65000 links to a file."""
    folder.mkdir()
    folders = [folder / f"n{number:08d}" for number in range(min(classes, count))]
    for path in folders:
        path.mkdir()
    for number in range(count):
        label, place = number % len(folders), number // len(folders)
        os.link(images[number % len(images)], folders[label] / f"{folders[label].name}_{place}.JPEG")


# --- waiting --------------------------------------------------------------------------------------------------------


def measure_wait(folder: Path, against: str | None) -> None:
    """Print the share of time that a training waits for its images, of this tree and of an older commit."""
    report_wait("ours decode=exact", *train(ROOT, folder))
    report_wait("ours decode=fast", *train(ROOT, folder, "data.decode=fast"))
    if against:
        with checkout(against) as root:
            report_wait(f"commit {against}", *train(root, folder))


def report_wait(title: str, share: float, speed: float) -> None:
    print(f"wait {title} share={share:.3f} {speed:.0f} images/s", flush=True)


def train(root: Path, folder: Path, *overrides: str) -> tuple[float, float]:
    """Train on two cores; returns share of waiting and images per second of all epochs but the first."""
    with tempfile.TemporaryDirectory() as temporary:
        recipe, output = Path(temporary, "wait.yaml"), Path(temporary, "run")
        recipe.write_text(WAIT_RECIPE)
        command = [sys.executable, root / "train.py", "--config", recipe, f"output={output}", f"data.root={folder}"]
        done = subprocess.run(
            [*command, "data.train=.", *overrides], check=False, stdout=subprocess.DEVNULL, cwd=temporary
        )
        if done.returncode:
            raise EndedError(f"the training of {root} ended with exit code {done.returncode}")
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steady = [row for row in rows if row.get("data_wait") is not None and row["epoch"] > 1]
    return tuple(statistics.mean(row[name] for row in steady) for name in ("data_wait", "images_per_second"))


def parse() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description="compare input pipelines with torchvision and timm")
    parser.add_argument("what", nargs="?", choices=["speed", "paths", "wait"], default="speed")
    parser.add_argument("--case", choices=sorted(CASES), help="default: all")
    parser.add_argument("--decode", choices=["exact", "fast"], help="default: both")
    parser.add_argument("--cores", type=int, help="default: 1, and all of this machine")
    parser.add_argument("--images", type=int, default=512, help="of a turn, a multiple of 64 (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="turns (%(default)s)")
    parser.add_argument("--folder", type=Path, help="keep the JPEG files there; default: a temporary folder")
    parser.add_argument("--count", type=int, default=1_000_000, help="paths: files (%(default)s)")
    parser.add_argument("--against", metavar="COMMIT", help="wait: compare with this commit")
    args = parser.parse_args()
    if args.cores is not None and not 1 <= args.cores <= cores:
        parser.error(f"--cores: {args.cores}; write 1 to {cores}, the cores of this machine")
    if args.images < BATCH or args.images % BATCH:
        parser.error(f"--images: {args.images}; write a multiple of {BATCH}")
    for key in ("repeats", "count"):
        if getattr(args, key) < 1:
            parser.error(f"--{key}: {getattr(args, key)}; write 1 or more")
    if args.against and args.what != "wait":
        parser.error("--against: only `wait` compares with a commit")
    return args


def main() -> int:
    args = parse()
    if args.what == "paths":
        measure_paths(args.count)
        return 0
    with image_folder(args.folder) as folder:
        if args.what == "wait":
            measure_wait(folder.resolve(), args.against)
            return 0
        versions = peer_versions(peer_python(PEER, PEER_PACKAGES), *PEER_PACKAGES)
        print(f"peer: {versions}; {processor()[0]}")
        cores = [args.cores] if args.cores else sorted({1, len(os.sched_getaffinity(0))})
        for name in [args.case] if args.case else CASES:
            for count in cores:
                compare(name, count, folder.resolve(), args)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DemoError, EndedError) as error:
        sys.exit(f"error: {error}")
