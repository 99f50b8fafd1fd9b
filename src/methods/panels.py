"""Pictures of what a Method sees and predicts: titled columns that `visual.gallery` lays out."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

VISIBLE, HIDDEN = (0.62, 0.66, 0.70), (1.0, 0.72, 0.25)  # glyphs of visible and of predicted cells
MASK_GREY = 0.5


@dataclass(frozen=True)
class Panel:
    """A column of the gallery: its title and one RGB picture for each image, (B, H, W, 3) in 0..1."""

    title: str
    pictures: np.ndarray


@dataclass(frozen=True)
class Scene:
    """Images whose blocks are hidden.

    Attributes:
        pixels: (B, C, H, W), normalised with `mean` and `std`.
        blocks: the mask (B, rows, cols), 1 = hidden.
        grid: rows and columns of output tokens.
    """

    pixels: np.ndarray
    blocks: np.ndarray
    grid: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def hidden(self, size: tuple[int, int]) -> np.ndarray:
        """The mask at another resolution, (B, *size) bool: where a finer or coarser place is hidden."""
        _, rows, cols = self.blocks.shape
        row, col = (np.arange(side) * count // side for side, count in zip(size, (rows, cols), strict=True))
        return self.blocks[:, row][:, :, col] > 0

    def display(self, pixels: np.ndarray) -> np.ndarray:
        """Normalised (B, C, H, W) to RGB (B, H, W, 3) in 0..1; other channel counts show the first one in grey."""
        image = pixels * np.reshape(self.std, (1, -1, 1, 1)) + np.reshape(self.mean, (1, -1, 1, 1))
        image = np.clip(image, 0, 1).transpose(0, 2, 3, 1)
        return image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)

    def paste(self, pictures: np.ndarray) -> np.ndarray:
        """The images with other pictures (B, H, W, 3), or one grey, on the hidden blocks."""
        hidden = self.hidden((self.pixels.shape[2], self.pixels.shape[3]))
        return np.where(hidden[..., None], pictures, self.display(self.pixels))

    def panels(self) -> list[Panel]:
        """The images, and what the network sees of them."""
        return [
            Panel("input", self.display(self.pixels)),
            Panel("masked input", self.paste(np.full(1, MASK_GREY))),
        ]


def glyphs(hist: np.ndarray, bins: int, side: int, highlight: np.ndarray) -> np.ndarray:
    """Histograms (C*bins, rows, cols) as line glyphs along the edges: RGB (rows*side, cols*side, 3) in 0..1.

    A bin's line is as bright as its share of the strongest bin of its cell, squared so that the main directions
    stand out; colour channels are averaged. `highlight` (rows, cols) bool gives the colour of a cell.
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


def principal_colours(values: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Vectors (B, N, C) as colours (B, N, 3) in 0..1: their three main directions, on which others are shown too."""
    rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
    centre = rows.mean(axis=0)
    _, _, directions = np.linalg.svd(rows - centre, full_matrices=False)
    base = np.zeros((3, rows.shape[1]))
    base[: min(3, len(directions))] = directions[:3]
    shares = [(part - centre) @ base.T for part in (values, *others)]
    low, high = shares[0].min(axis=(0, 1)), shares[0].max(axis=(0, 1))
    return [np.clip((share - low) / np.maximum(high - low, 1e-12), 0, 1) for share in shares]
