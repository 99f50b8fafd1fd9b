"""Pictures with titles in a grid: the gallery of a Method, of the same images at every epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import DataConfig

DPI = 140
MOST = 30_000  # pixels of a side


def displayed(data: DataConfig, pixels: np.ndarray) -> np.ndarray:
    """Normalised images (B, C, H, W) -> RGB (B, H, W, 3) in 0..1: the channels `data.show_bands`.

    Of 1 or 3 channels, 0 to 1 is black to white. Other bands have scales of their own, so black is the mean minus two
    standard deviations and white the mean plus two; so are 1 or 3 channels whose mean is not in the scale 0 to 1.
    """
    channels = pixels.shape[1]
    bands = list(data.show_bands or ((0, 1, 2) if channels >= 3 else (0,)))
    image = pixels[:, bands]
    if channels in (1, 3) and all(0 <= mean <= 1 for mean in data.mean):
        std, mean = (np.take(values, bands).reshape(1, -1, 1, 1) for values in (data.std, data.mean))
        image = image * std + mean
    else:
        image = image / 4 + 0.5
    image = np.clip(image, 0, 1).transpose(0, 2, 3, 1)
    return image if len(bands) == 3 else np.repeat(image, 3, axis=-1)


def write_grid(columns: Sequence[np.ndarray], titles: Sequence[str], path: Path) -> None:
    """Write columns of pictures (B, H, W, 3) as a PNG, one row per image with titles on top; creates the folder.

    The file has its name only when it is complete.
    """
    from matplotlib.figure import Figure  # takes a fifth of a second

    count = len(columns[0])
    aspect = columns[0].shape[1] / columns[0].shape[2]
    side = 1.9
    figure = Figure(figsize=(side * len(columns), side * aspect * count + 0.35))
    axes = figure.subplots(count, len(columns), squeeze=False)
    for row in range(count):
        for col, images in enumerate(columns):
            axis = axes[row, col]
            axis.imshow(images[row], interpolation="nearest", vmin=0, vmax=1)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(titles[col], fontsize=8, pad=4)
    top = 0.3 / (side * aspect * count + 0.35)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=1 - top, wspace=0.03, hspace=0.03)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, dpi=min(DPI, MOST / max(figure.get_size_inches())), format="png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
