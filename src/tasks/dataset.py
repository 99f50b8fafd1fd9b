"""Look at all images of a data set: which cannot be used, how many there are, mean and standard deviation."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..config import DataConfig, plural
from ..config.files import load_recipe
from ..config.paths import expanded
from ..data.augment import luminance
from ..data.decode import Decoder, Undecodable
from ..data.folders import images_below
from ..data.listing import EXTENSIONS
from ..data.opening import open_source
from ..data.sources import Source, plain_files
from ..data.transform import MOST_OF_OPENCV
from ..engine import log
from ..errors import UserError
from .command import line
from .sweep import Bad, decoded, sweep

FAR = 10  # standard deviations that the mean of a few images may be from `data.mean`
PART = 2**22  # values of an image whose sums are computed at once, which bounds the memory


@dataclass(frozen=True)
class Check:
    """Decode an image."""

    decoder: Decoder

    def __call__(self, content: bytes) -> None:
        decoded(self.decoder, content)


def verify(paths: Sequence[str], decoder: Decoder, processes: int, out: str = "", as_json: bool = False) -> bool:
    """Decode every image and report the bad ones; returns whether all are good.

    Args:
        paths: folders with images at any depth, list files, MindRecord files, or images.
        out: file for the bad images, in the form of `bad_images.jsonl`; empty: none.
        as_json: report in JSON.

    Raises:
        UserError: a path cannot be used.
    """
    sources = [images_of(expanded(path, "command line")) for path in paths]
    target = writable(out) if out else None
    bad: list[tuple[str, str]] = []
    for source in sources:
        for index, result in sweep(source, Check(decoder), processes, source.place.name):
            if isinstance(result, Bad):
                bad.append((source.name(index), result.reason))
    if target is not None:
        entries = [json.dumps({"image": name, "reason": reason}) + "\n" for name, reason in bad]
        replace_text(target, "".join(entries))
    skipped = sum((source.skipped for source in sources), Counter[str]())
    images = sum(len(source) for source in sources)
    reasons = Counter(reason for _, reason in bad)
    if as_json:
        report = {"images": images, "bad": len(bad), "reasons": dict(reasons.most_common()), "skipped": dict(skipped)}
        line(json.dumps({**report, "files": [{"image": name, "reason": reason} for name, reason in bad]}))
        return not bad
    for source in sources:
        line(source.summary())
    for name, reason in bad:
        line(f"bad: {name}: {reason}")
    for reason, count in reasons.most_common():
        line(f"{count} x {reason}")
    line(f"{plural(images, 'image')} decoded, {len(bad)} bad")
    return not bad


def images_of(text: str) -> Source:
    """Return the images below a folder, or of a list, a MindRecord set or a single file."""
    path = Path(text)
    if path.is_dir():
        return images_below(path, "command line")
    if path.is_file() and path.suffix.lower() in EXTENSIONS:
        return plain_files([path])
    return open_source(path, "command line")


def writable(text: str) -> Path:
    """Return the path of a file to write.

    Raises:
        UserError: it is a folder, or its folder does not exist or cannot be written.
    """
    path = Path(expanded(text, "--out"))
    if path.is_dir():
        raise UserError(f"--out: {path} is a folder; name a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out: the folder of {path} does not exist or cannot be written; name another file")
    return path


def replace_text(path: Path, text: str) -> None:
    """Write a file under its name only when it is complete.

    Raises:
        UserError: it cannot be written.
    """
    try:
        log.replace_text(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); name another file") from None


@dataclass(frozen=True)
class Sums:
    """Size of an image, and sums over its pixels.

    Attributes:
        height, width: in pixels.
        sums, squares: of the values and of their squares for each channel. Whole grey levels are exact whole numbers.
        levels: highest value of the scale: 255 for grey levels, 1 for other values.
    """

    height: int
    width: int
    sums: list[Any]
    squares: list[Any]
    levels: int


@dataclass(frozen=True)
class Measure:
    """Decode an image and add up its pixels."""

    decoder: Decoder

    def __call__(self, content: bytes) -> Sums:
        pixels = decoded(self.decoder, content)
        if self.decoder.channels == 1 and pixels.shape[2] == 3:
            pixels = luminance(pixels)
        height, width, channels = pixels.shape
        rows = PART // (width * channels) + 1
        parts = [pixels[start : start + rows] for start in range(0, height, rows)]
        if pixels.dtype == np.uint8:
            levels = np.arange(256)
            counts = sum(map(histograms, parts))
            return Sums(height, width, (counts @ levels).tolist(), (counts @ levels**2).tolist(), levels=255)
        totals = np.zeros((2, channels))
        for part in parts:
            values = part.reshape(-1, channels).astype(np.float64)
            totals += np.stack([values.sum(0), np.einsum("ij,ij->j", values, values)])
        if not np.isfinite(totals).all():
            raise Undecodable("has values that are no finite numbers")
        return Sums(height, width, totals[0].tolist(), totals[1].tolist(), levels=1)


def histograms(pixels: np.ndarray) -> np.ndarray:
    """Count the grey levels of each channel, (channels, 256) int64; OpenCV counts up to 2**24 exactly."""
    channels = pixels.shape[2]
    if channels > MOST_OF_OPENCV:
        return np.concatenate([histograms(pixels[:, :, [channel]]) for channel in range(channels)])
    image = np.ascontiguousarray(pixels)
    counts = [cv2.calcHist([image], [channel], None, [256], [0, 256])[:, 0] for channel in range(channels)]
    return np.stack(counts).astype(np.int64)


class Moments:
    """Mean and standard deviation of each channel of the pixels of many images."""

    def __init__(self) -> None:
        self.pixels = 0
        self.totals: dict[int, list[list[Any]]] = {}

    def add(self, image: Sums) -> None:
        """Count the pixels of an image."""
        self.pixels += image.height * image.width
        before = self.totals.setdefault(image.levels, [[0] * len(image.sums), [0] * len(image.sums)])
        for total, values in zip(before, (image.sums, image.squares), strict=True):
            total[:] = [old + new for old, new in zip(total, values, strict=True)]

    def result(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation in the scale 0 to 1."""
        count = max(len(sums) for sums, _ in self.totals.values())
        means, deviations = [], []
        for channel in range(count):
            total = sum(sums[channel] / levels for levels, (sums, _) in self.totals.items())
            square = sum(squares[channel] / levels**2 for levels, (_, squares) in self.totals.items())
            mean = total / self.pixels
            means.append(mean)
            deviations.append(max(0.0, square / self.pixels - mean**2) ** 0.5)
        return means, deviations


def statistics(
    path: str, overrides: list[str], channels: int, sample: int, processes: int, max_pixels: int, as_json: bool = False
) -> None:
    """Print what a data set has, with mean and standard deviation as a block for a recipe.

    Args:
        path: a recipe, or training images: a folder, a folder with a folder `train`, a list or a MindRecord file.
        channels: of the images; 0: those of the recipe, or 3.
        sample: images that are decoded, spread evenly; 0 is all.
        max_pixels: of an image; 0: that of the recipe, or Pillow's.

    Raises:
        UserError: the path cannot be used, or no image can.
    """
    source, decoder = training_images(path, overrides, channels, max_pixels)
    count = min(sample or len(source), len(source))
    indices = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
    moments, sizes, bad = Moments(), list[tuple[int, int]](), list[tuple[str, str]]()
    for index, result in sweep(source, Measure(decoder), processes, source.place.name, indices):
        if isinstance(result, Bad):
            bad.append((source.name(index), result.reason))
        else:
            moments.add(result)
            sizes.append((result.height, result.width))
    if not sizes:
        raise UserError(f"{bad[0][0]} and all other images decoded cannot be used: {bad[0][1]}; see --channels")
    mean, std = moments.result()
    report = {
        "images": len(source),
        "classes": len(source.classes),
        "decoded": count,
        "bad": len(bad),
        "per_class": class_range(source),
        "height": spread([height for height, _ in sizes]),
        "width": spread([width for _, width in sizes]),
        "mean": mean,
        "std": std,
    }
    if as_json:
        line(json.dumps(report))
    else:
        print_report(source, report, bad)


def far_off(data: DataConfig, images: np.ndarray) -> str:
    """Return a line if normalised images (B, C, H, W) are far from 0, so that mean and std cannot be theirs."""
    means = images.mean(axis=(0, 2, 3), dtype=np.float64)
    channel = int(np.abs(means).argmax())
    if abs(means[channel]) < FAR:
        return ""
    mean, std = data.mean[channel], data.std[channel]
    return (
        f"data.mean: {mean:g} and data.std {std:g} do not fit the images: channel {channel} has the mean "
        f"{mean + std * means[channel]:.4g} in the first ones; python scripts/dataset_stats.py "
        f"{shlex.quote(str(data.training_place))} --channels {len(means)} measures both"
    )


def training_images(path: str, overrides: list[str], channels: int, max_pixels: int) -> tuple[Source, Decoder]:
    """Return the training images of a recipe or at a path, and how to decode them."""
    if path.endswith((".yaml", ".yml")):
        recipe = load_recipe(path, overrides)
        source = open_source(recipe.data.training_place, "data.train")
        data = replace(recipe.data, max_pixels=max_pixels or recipe.data.max_pixels)
        return source, Decoder.of(data, channels or recipe.encoder.in_chans)
    if overrides:
        raise UserError(f"command line: {overrides[0]!r} changes a recipe; name a recipe, or leave it out")
    place = Path(expanded(path, "command line"))
    place = place / "train" if (place / "train").is_dir() else place
    return open_source(place, "command line"), Decoder(channels or 3, max_pixels=max_pixels or Decoder.max_pixels)


def class_range(source: Source) -> list[tuple[str, int]]:
    """Return the classes with the fewest and the most images; empty without labels."""
    if not source.classes:
        return []
    counts = np.bincount(source.labels, minlength=len(source.classes))
    return [(source.classes[i], int(counts[i])) for i in (int(counts.argmin()), int(counts.argmax()))]


def spread(values: list[int]) -> list[float]:
    """Return least, median and largest value."""
    return [min(values), float(np.median(values)), max(values)]


def print_report(source: Source, report: dict[str, Any], bad: list[tuple[str, str]]) -> None:
    line(source.summary())
    if report["per_class"]:
        (few, fewest), (many, most) = report["per_class"]
        line(f"images of a class: {fewest} ({few}) to {most} ({many})")
    part = "all images" if report["decoded"] == report["images"] else f"{report['decoded']} images, spread evenly"
    line(f"decoded: {part}; {len(bad)} bad" + (f", first {bad[0][0]}: {bad[0][1]}" if bad else ""))
    for side in ("height", "width"):
        low, median, high = report[side]
        line(f"{side}: {low} to {high} pixels, median {median:g}")
    for number, value in enumerate(report["std"]):
        if value == 0:
            line(f"channel {number} has one value in all images; write a std above 0 for it")
    line("for the recipe:")
    sys.stdout.write("data:\n")
    for name in ("mean", "std"):
        sys.stdout.write(f"  {name}: [{', '.join(map(shown, report[name]))}]\n")


def shown(value: float) -> str:
    """Show four digits, without an exponent, which YAML reads as text."""
    return np.format_float_positional(value, 4, fractional=False, trim="0")
