"""Pictures of inputs and predictions, as titled columns for `visual.gallery`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

VISIBLE, HIDDEN = (0.62, 0.66, 0.70), (1.0, 0.72, 0.25)  # glyph colours of visible and predicted cells
MASK_GREY = 0.5

#: normalised images (B, C, H, W) -> RGB (B, H, W, 3) in 0..1
Display = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Panel:
    """A column of the gallery: a title and one RGB picture per image, (B, H, W, 3) in 0..1."""

    title: str
    pictures: np.ndarray


@dataclass(frozen=True)
class MaskedImages:
    """Images with hidden blocks.

    Attributes:
        pixels: (B, C, H, W), normalised.
        mask: block mask (B, h, w), 1 = hidden.
        grid: output tokens along height and width.
        display: how pixels are shown.
    """

    pixels: np.ndarray
    mask: np.ndarray
    grid: tuple[int, int]
    display: Display

    def hidden(self, size: tuple[int, int]) -> np.ndarray:
        """The mask at another resolution (nearest block), (B, *size) bool."""
        y, x = (np.arange(side) * blocks // side for side, blocks in zip(size, self.mask.shape[1:], strict=True))
        return self.mask[:, y][:, :, x] > 0

    def paste(self, pictures: np.ndarray) -> np.ndarray:
        """The images with other pictures (B, H, W, 3), or a constant, on the hidden blocks."""
        hidden = self.hidden((self.pixels.shape[2], self.pixels.shape[3]))
        return np.where(hidden[..., None], pictures, self.display(self.pixels))

    def panels(self) -> list[Panel]:
        """The images, and the images with grey hidden blocks."""
        return [
            Panel("input", self.display(self.pixels)),
            Panel("masked input", self.paste(np.full(1, MASK_GREY))),
        ]


def glyphs(hist: np.ndarray, bins: int, side: int, highlight: np.ndarray) -> np.ndarray:
    """Histograms (C*bins, h, w) as lines along the edges: RGB (h*side, w*side, 3) in 0..1.

    The brightness of a bin's line is its share of the strongest bin in the cell, squared so that the main directions
    stand out; image channels are averaged. Cells in `highlight` (h, w) bool have the colour `HIDDEN`.
    """
    import cv2  # takes a tenth of a second

    hist = np.maximum(hist.reshape(-1, bins, *hist.shape[1:]).mean(axis=0), 0)
    hist = (hist / np.maximum(hist.max(axis=0, keepdims=True), 1e-12)) ** 2
    thickness = max(1, side // 14)
    canvas = np.zeros((hist.shape[1] * side, hist.shape[2] * side), np.float32)
    for number in np.argsort(hist, axis=None):  # strong lines last, on top
        b, y, x = np.unravel_index(number, hist.shape)
        # bin centre phi = atan2(gx, gy): the gradient points along (sin phi, cos phi), the edge across it
        phi = (b + 0.5) / bins * np.pi
        reach = 0.46 * side * np.array([np.cos(phi), -np.sin(phi)])
        centre = np.array([x + 0.5, y + 0.5]) * side
        start, end = (tuple(int(v) for v in np.round((centre + sign * reach) * 16)) for sign in (-1, 1))
        cv2.line(canvas, start, end, float(hist[b, y, x]), thickness, cv2.LINE_AA, shift=4)
    colour = np.where(np.kron(highlight, np.ones((side, side)))[..., None] > 0, HIDDEN, VISIBLE)
    return np.clip(canvas, 0, 1)[..., None] * colour


def principal_colours(values: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Vectors (B, N, C) -> colours (B, N, 3) in 0..1: their three principal components, for `others` too."""
    rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
    centre = rows.mean(axis=0)
    _, _, directions = np.linalg.svd(rows - centre, full_matrices=False)
    base = np.zeros((3, rows.shape[1]))
    base[: min(3, len(directions))] = directions[:3]
    components = [(part - centre) @ base.T for part in (values, *others)]
    low, high = components[0].min(axis=(0, 1)), components[0].max(axis=(0, 1))
    return [np.clip((part - low) / np.maximum(high - low, 1e-12), 0, 1) for part in components]
