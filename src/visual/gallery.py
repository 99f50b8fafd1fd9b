"""The reconstruction gallery: fixed images, fixed masks, so that epochs can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from mindspore import Tensor

from ..engine.graph import AsGraph
from ..methods.targets import HOG

VISIBLE, HIDDEN = (0.62, 0.66, 0.70), (1.0, 0.72, 0.25)  # glyphs of visible and of predicted cells
MASK_GREY = 0.5


def draw_gallery(method: Any, image: Tensor, mean: tuple[float, ...], std: tuple[float, ...], path: Path) -> None:
    """One row per image: input, masked input, target and prediction of the Method's kind.

    Args:
        method: a masked image model.
        image: (B, C, H, W) normalised images.
        mean, std: of the normalisation, to show them.
        path: the PNG; its folder is made.
    """
    was_training = method.training
    cell = AsGraph(method, method.run)
    cell.set_train(False)
    mask = method.fixed_mask(image.shape[0])
    prediction, target = (part.asnumpy() for part in cell(image, mask)[2:])
    cell.set_train(was_training)
    pixels = image.asnumpy()
    height, width = pixels.shape[2:]
    blocks = mask.asnumpy()
    hidden = np.kron(blocks, np.ones((1, height // blocks.shape[1], width // blocks.shape[2]), np.float32))
    shown = to_display(pixels, mean, std)
    masked = np.where(hidden[..., None] > 0, MASK_GREY, shown)
    if isinstance(method.target, HOG):
        scale = max(1, 256 // max(height, width))
        panels = hog_panels(method, prediction, target, blocks, scale)
        titles = ("input", "masked input", "HOG target", "prediction (amber: masked)")
    else:
        restored = to_display(method.target.to_image(prediction, pixels), mean, std)
        pasted = np.where(hidden[..., None] > 0, restored, shown)
        note = ", patch mean and variance from the input" if method.target.patch_norm else ""
        panels = (restored, pasted)
        titles = ("input", "masked input", f"prediction{note}", "prediction on masked blocks")
    write_grid((shown, masked, *panels), titles, path)


def to_display(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Normalised (B, C, H, W) to RGB (B, H, W, 3) in 0..1; other channel counts show their first channel in grey."""
    image = pixels * np.reshape(std, (1, -1, 1, 1)) + np.reshape(mean, (1, -1, 1, 1))
    image = np.clip(image, 0, 1).transpose(0, 2, 3, 1)
    return image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)


def hog_panels(
    method: Any, prediction: np.ndarray, target: np.ndarray, blocks: np.ndarray, scale: int
) -> tuple[np.ndarray, np.ndarray]:
    """Glyph pictures of target and prediction; the prediction keeps the target where the image is visible."""
    hog = method.target
    wanted, found = (hog.unfold(part, method.grid) for part in (target, prediction))
    rows, cols = wanted.shape[2:]
    hidden = np.kron(blocks, np.ones((1, max(1, rows // blocks.shape[1]), max(1, cols // blocks.shape[2]))))
    hidden = hidden[:, :: hidden.shape[1] // rows, :: hidden.shape[2] // cols] > 0
    mixed = np.where(hidden[:, None], found, wanted)
    nothing = np.zeros_like(hidden)
    bins, side = hog.bins, hog.cell * scale
    return (
        np.stack([glyphs(one, bins, side, none) for one, none in zip(wanted, nothing, strict=True)]),
        np.stack([glyphs(one, bins, side, where) for one, where in zip(mixed, hidden, strict=True)]),
    )


def glyphs(hist: np.ndarray, bins: int, side: int, highlight: np.ndarray) -> np.ndarray:
    """Histograms (C*bins, rows, cols) as line glyphs along the edges: RGB (rows*side, cols*side, 3) in 0..1.

    A bin's line is as bright as its share of the strongest bin of its cell, squared so that the main directions
    stand out; colour channels are averaged.
    """
    hist = np.maximum(hist.reshape(-1, bins, *hist.shape[1:]).mean(axis=0), 0)
    hist = (hist / np.maximum(hist.max(axis=0, keepdims=True), 1e-12)) ** 2
    thickness = max(1, side // 14)
    rows, cols = hist.shape[1:]
    canvas = np.zeros((rows * side, cols * side), np.float32)
    for number in np.argsort(hist, axis=None):  # strong lines last, on top
        b, row, col = np.unravel_index(number, hist.shape)
        # bin centre phi = atan2(gx, gy): the gradient points along (sin phi, cos phi), the edge across it
        phi = (b + 0.5) / bins * np.pi
        reach = 0.46 * side * np.array([np.cos(phi), -np.sin(phi)])
        centre = np.array([col + 0.5, row + 0.5]) * side
        start, end = (tuple(int(v) for v in np.round((centre + sign * reach) * 16)) for sign in (-1, 1))
        cv2.line(canvas, start, end, float(hist[b, row, col]), thickness, cv2.LINE_AA, shift=4)
    colour = np.where(np.kron(highlight, np.ones((side, side)))[..., None] > 0, HIDDEN, VISIBLE)
    return np.clip(canvas, 0, 1)[..., None] * colour


def write_grid(columns: tuple[np.ndarray, ...], titles: tuple[str, ...], path: Path) -> None:
    """Images in a grid, one row per sample, titles on top."""
    count = len(columns[0])
    aspect = columns[0].shape[1] / columns[0].shape[2]
    side = 1.9
    figure, axes = plt.subplots(
        count, len(columns), figsize=(side * len(columns), side * aspect * count + 0.35), squeeze=False
    )
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
    plt.close(figure)
