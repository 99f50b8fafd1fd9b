"""The gallery of a Method: pictures with titles in a grid, of the same images at every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_grid(columns: Sequence[np.ndarray], titles: Sequence[str], path: Path) -> None:
    """Write columns of pictures (B, H, W, 3) as a grid, one row per image with titles on top; creates the folder."""
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
    figure.savefig(path, dpi=140)
