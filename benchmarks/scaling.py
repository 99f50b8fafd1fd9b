"""Speed and memory of the training step against batch, resolution and depth, beside the number of operations.

    python benchmarks/scaling.py [--output scaling.png] [--steps 5]

FastMIM ViT-B; each point is a process of its own, so that its peak memory is its own. Prints a table; with `--output`
it draws the curves. Operations are multiply-adds of the forward pass of the whole batch (`method.flops` of the recipe).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

from cases import operations, recipe_of
from step import EndedError, our_process, processor

CASE = "fastmim_vit_base"


class Setting(NamedTuple):
    """What a point varies; the defaults are what the other curves keep."""

    batch: int = 8
    pixels: int = 128
    blocks: int = 12

    @property
    def overrides(self) -> list[str]:
        return [f"encoder.image_size={self.pixels}", f"method.encoder_blocks={self.blocks}"]


class Point(NamedTuple):
    """What was measured."""

    images_per_second: float
    gigabytes: float
    gigaoperations: float


CURVES = {
    "batch": [Setting(batch=batch) for batch in (2, 8, 16, 24, 32)],
    "pixels": [Setting(pixels=pixels) for pixels in (64, 96, 128, 160, 192, 224)],
    "blocks": [Setting(blocks=blocks) for blocks in (2, 4, 6, 8, 10, 12)],
}


def measure(setting: Setting, steps: int) -> Point:
    process = our_process(CASE, setting.batch, len(os.sched_getaffinity(0)), *setting.overrides)
    process.step()  # warm-up
    process.times = [process.step() for _ in range(steps)]
    count = setting.batch * operations(recipe_of(CASE, setting.overrides)) / 1e9
    return Point(setting.batch / process.median(), process.quit() / 1e9, count)


def draw(points: dict[Setting, Point], output: Path) -> None:
    """Images/s and memory of each curve; dashed: images/s if the time were proportional to the operations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(CURVES), figsize=(11, 6), sharex="col", layout="constrained")
    base, base_speed = points[Setting()].gigaoperations / Setting().batch, points[Setting()].images_per_second
    for (name, settings), (above, below) in zip(CURVES.items(), axes.T, strict=True):
        x, measured = [getattr(setting, name) for setting in settings], [points[setting] for setting in settings]
        predicted = [
            base_speed * base * setting.batch / point.gigaoperations
            for setting, point in zip(settings, measured, strict=True)
        ]
        above.plot(x, [point.images_per_second for point in measured], "o-", label="measured")
        above.plot(x, predicted, "--", color="grey", label="by operations")
        below.plot(x, [point.gigabytes for point in measured], "o-")
        for axis in (above, below):
            axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
        below.set_xticks(x)
        below.set_xlabel(name)
    axes[0, 0].set_ylabel("images/s")
    axes[1, 0].set_ylabel("peak memory, GB")
    axes[0, 0].legend()
    figure.suptitle(f"FastMIM ViT-B, {processor()[0]}; others: batch 8, 128 pixels, 12 blocks")
    figure.savefig(output, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="speed and memory against batch, resolution and depth")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="draw the curves")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a point")
    args = parser.parse_args()
    print(f"{CASE}, {processor()[0]}")
    print(f"{'batch':>6} {'pixels':>6} {'blocks':>6} {'images/s':>9} {'GB':>6} {'Gop a step':>11}")
    points: dict[Setting, Point] = {}
    for setting in dict.fromkeys(setting for settings in CURVES.values() for setting in settings):
        points[setting] = point = measure(setting, args.steps)
        print(f"{setting.batch:6} {setting.pixels:6} {setting.blocks:6}", end=" ")
        print(f"{point.images_per_second:9.2f} {point.gigabytes:6.2f} {point.gigaoperations:11.1f}", flush=True)
    if args.output:
        draw(points, args.output)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EndedError as error:
        sys.exit(f"error: {error}")
