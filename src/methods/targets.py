"""Targets of masked image models, per token: HOG, pixels or features; and pictures of them.

A target is a Cell without trained parameters; `__init__` computes its constants. Images are (B, C, H, W), normalised
with mean and std; tokens are in raster order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn, ops

from ..config import FeaturesConfig, HOGConfig, PixelsConfig, TargetConfig
from ..models import BareEncoder, Classifier
from .masking import resize_mask
from .method import freeze
from .panels import MaskedImages, Panel, glyphs, principal_colours

BELOW_PI = 3.179e-8  # an angle closer below pi is pi in float32, which the references fold to the first bin


class Target(nn.Cell):
    """Computes the values that are predicted for each token.

    Attributes:
        dim: values per token.
        teacher: a frozen network whose output is the target, or None.
    """

    dim: int
    teacher: nn.Cell | None = None

    def construct(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, dim)."""
        raise NotImplementedError

    def weights(self, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Block mask (B, h, w) -> weights of the target values in the loss, (B, N) or (B, N, dim).

        Args:
            mask: 1 = hidden.
            grid: tokens along height and width.
        """
        return self.token_weights(mask, grid)

    def token_weights(self, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Weights (B, N) for blocks that are not smaller than a token."""
        return resize_mask(mask, grid).reshape(mask.shape[0], grid[0] * grid[1])

    def panels(self, prediction: np.ndarray, target: np.ndarray, images: MaskedImages) -> list[Panel]:
        """Pictures of a prediction and of the target, (B, N, dim) each."""
        return []


class HOG(Target):
    """Histograms of oriented gradients (FastMIM util/hog_layer.py HOGLayerC).

    3x3 Sobel differences with reflected borders. The direction atan2(gx, gy), folded to 180 degrees, falls into one of
    `bins` bins, with the length of the gradient as weight (times a tiled Gaussian if `gaussian_window` is set). Sums
    over cells of cell x cell pixels, L2-normalised over the bins of each cell and channel.

    The tangent gx / gy is compared with those of the bins' lower borders, so that no arc tangent is computed. Only
    directions within 2 units in the last place of a border can fall on its other side (tests/test_targets.py).
    Sums are products with constant matrices, since sums over rows are slow on CPU.

    Order inside a token: image channel, bin, y and x of the cell.

    Args:
        config: bins, cell, normalisation, window.
        stride: pixels per side of a token.
        in_chans: image channels.
    """

    def __init__(self, config: HOGConfig, stride: int, in_chans: int):
        super().__init__()
        self.bins = config.bins
        self.cell = config.cell
        self.normalize = config.normalize
        self.cells_per_side = stride // config.cell  # of a token
        self.in_chans = in_chans
        self.dim = config.values(stride, in_chans)
        window = config.gaussian_window
        self.window = Tensor(gaussian_window(window)) if window else None
        self.borders = tuple(np.tan(np.arange(self.bins) * np.pi / self.bins).astype(np.float32).tolist())
        self.of_steps = Tensor(differences(self.bins))
        self.ones = Tensor(np.ones((self.bins, self.bins), np.float32))
        self.matmul = ops.MatMul()

    def histograms(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> histograms (B, C*bins, H/cell, W/cell)."""
        batch, chans, height, width = image.shape
        hist = self.votes(*self.gradients(image))
        if self.normalize:
            norm = ops.sqrt(self.matmul(self.ones, hist * hist))
            hist = hist / ops.maximum(norm, 1e-12)
        down, across = height // self.cell, width // self.cell
        hist = hist.reshape(self.bins, batch, chans, down, across).transpose(1, 2, 0, 3, 4)
        return hist.reshape(batch, chans * self.bins, down, across)

    def votes(self, gx: Tensor, gy: Tensor) -> Tensor:
        """Gradients (B, C, H, W) -> sums of their lengths by bin, (bins, B * C * H/cell * W/cell)."""
        batch, chans, height, width = gx.shape
        across = width // self.cell
        length = ops.sqrt(gx * gx + gy * gy)
        if self.window is not None:
            size = self.window.shape[0]
            length = length * ops.tile(self.window, (batch, chans, height // size, width // size))
        tangent = gx / gy  # not a number without gradient; the length is 0 then
        first = (gx > 0).astype(length.dtype) * -BELOW_PI
        along_x, along_y = Tensor(cell_sums(across, self.cell)), Tensor(cell_sums(across, self.cell, rows=True))
        # of all gradients, and of those beyond each border; then their sums along x, along y, and by bin
        steps = [length] + [length * (tangent >= border).astype(length.dtype) for border in (first, *self.borders[1:])]
        steps = ops.cat([self.matmul(step.reshape(-1, width), along_x) for step in steps])
        steps = self.matmul(steps.reshape(-1, self.cell * across), along_y).reshape(self.bins + 1, -1)
        return self.matmul(self.of_steps, steps)

    def gradients(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Sobel differences left - right and top - bottom; borders are reflected without repeating the edge.

        They are sums of slices: products with matrices would add in another order, and the sign of a difference that is
        zero but for rounding decides between the first and the last bin.
        """
        height, width = image.shape[2], image.shape[3]
        padded = ops.cat((image[:, :, 1:2], image, image[:, :, height - 2 : height - 1]), axis=2)
        padded = ops.cat((padded[:, :, :, 1:2], padded, padded[:, :, :, width - 2 : width - 1]), axis=3)
        smooth_y = padded[:, :, :-2] + 2.0 * padded[:, :, 1:-1] + padded[:, :, 2:]
        smooth_x = padded[:, :, :, :-2] + 2.0 * padded[:, :, :, 1:-1] + padded[:, :, :, 2:]
        return smooth_y[:, :, :, :-2] - smooth_y[:, :, :, 2:], smooth_x[:, :, :-2] - smooth_x[:, :, 2:]

    def construct(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, dim)."""
        batch, _, height, width = image.shape
        u = self.cells_per_side
        down, across = height // self.cell // u, width // self.cell // u
        hist = self.histograms(image).reshape(batch, self.in_chans * self.bins, down, u, across, u)
        return hist.transpose(0, 2, 4, 1, 3, 5).reshape(batch, down * across, self.dim)

    def weights(self, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        batch, u = mask.shape[0], self.cells_per_side
        if mask.shape[1] <= grid[0]:
            return self.token_weights(mask, grid)
        fine = resize_mask(mask, (grid[0] * u, grid[1] * u)).reshape(batch, grid[0], u, grid[1], u)
        fine = fine.transpose(0, 1, 3, 2, 4).reshape(batch, grid[0] * grid[1], 1, u * u)
        repeated = ops.broadcast_to(fine, (batch, grid[0] * grid[1], self.in_chans * self.bins, u * u))
        return repeated.reshape(batch, grid[0] * grid[1], self.dim)

    def unfold(self, tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Tokens (B, N, dim) -> histograms (B, C*bins, H/cell, W/cell) for glyph pictures."""
        u, chans = self.cells_per_side, self.in_chans * self.bins
        cells = tokens.reshape(len(tokens), grid[0], grid[1], chans, u, u).transpose(0, 3, 1, 4, 2, 5)
        return cells.reshape(len(tokens), chans, grid[0] * u, grid[1] * u)

    def panels(self, prediction: np.ndarray, target: np.ndarray, images: MaskedImages) -> list[Panel]:
        """Glyphs of the target, and of the prediction on hidden blocks."""
        target_hist, predicted_hist = self.unfold(target, images.grid), self.unfold(prediction, images.grid)
        hidden = images.hidden((target_hist.shape[2], target_hist.shape[3]))
        mixed = np.where(hidden[:, None], predicted_hist, target_hist)
        side = self.cell * max(1, 256 // max(images.pixels.shape[2:]))
        nowhere = np.zeros(hidden.shape[1:], bool)
        return [
            Panel("HOG target", np.stack([glyphs(one, self.bins, side, nowhere) for one in target_hist])),
            Panel(
                "prediction (amber: masked)",
                np.stack([glyphs(one, self.bins, side, where) for one, where in zip(mixed, hidden, strict=True)]),
            ),
        ]


def cell_sums(cells: int, cell: int, rows: bool = False) -> np.ndarray:
    """(cells * cell, cells): sums of `cell` neighbours; with `rows` of every `cells`-th value, the rows of a cell."""
    eye = np.eye(cells, dtype=np.float32)
    return np.tile(eye, (cell, 1)) if rows else np.repeat(eye, cell, axis=0)


def differences(bins: int) -> np.ndarray:
    """(bins, bins + 1): sums over all gradients and over those whose tangent reaches border 0, 1, ... -> sums by bin.

    A bin has the tangents from its border to the next one. The tangent jumps from +inf to -inf inside the bin of 90
    degrees, or at its border, so that this bin has all tangents outside the range.
    """
    matrix = np.eye(bins, dtype=np.float32)
    matrix = matrix - np.roll(matrix, 1, axis=1)
    return np.concatenate([(np.arange(bins) == bins // 2).astype(np.float32)[:, None], matrix], axis=1)


def gaussian_window(size: int) -> np.ndarray:
    """(size, size) Gaussian with standard deviation size // 2 that sums to 1 (mmpretrain maskfeat.py)."""
    offsets = np.arange(size, dtype=np.float64) - (size - 1) / 2
    line = np.exp(-0.5 * (offsets / (size // 2)) ** 2)
    window = np.outer(line, line)
    return (window / window.sum()).astype(np.float32)


class Pixels(Target):
    """The pixels of each token, plain or normalised.

    normalize: `patch` uses mean and unbiased variance of the token (MAE norm_pix_loss), `local` those of a window
    around each pixel (Swin-Transformer models/simmim.py norm_targets).

    Order inside a token: y, x, image channel; with `channels_first` channel, y, x, as in PyTorch's pixel shuffle.

    Args:
        config: normalisation and order.
        stride: pixels per side of a token.
        in_chans: image channels.
    """

    EPS = 1e-6  # added to the variance (MAE models_mae.py forward_loss)

    def __init__(self, config: PixelsConfig, stride: int, in_chans: int):
        super().__init__()
        self.patch_norm = config.normalize == "patch"
        self.local = LocalNorm(config.window) if config.normalize == "local" else None
        self.channels_first = config.channels_first
        self.stride, self.in_chans = stride, in_chans
        self.dim = config.values(stride, in_chans)

    def construct(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, dim)."""
        if self.local is not None:
            image = self.local(image)
        tokens = self.patches(image)
        if self.patch_norm:
            centred = tokens - ops.tile(tokens.mean(axis=-1, keep_dims=True), (1, 1, self.dim))
            variance = (centred * centred).sum(axis=-1, keepdims=True) / (self.dim - 1)
            tokens = centred / ops.tile(ops.sqrt(variance + self.EPS), (1, 1, self.dim))
        return tokens

    def patches(self, image: Tensor) -> Tensor:
        batch, chans, height, width = image.shape
        p = self.stride
        tokens = image.reshape(batch, chans, height // p, p, width // p, p)
        order = (0, 2, 4, 1, 3, 5) if self.channels_first else (0, 2, 4, 3, 5, 1)
        return tokens.transpose(*order).reshape(batch, height // p * (width // p), self.dim)

    def weights(self, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        batch, p = mask.shape[0], self.stride
        if mask.shape[1] <= grid[0]:
            return self.token_weights(mask, grid)
        fine = resize_mask(mask, (grid[0] * p, grid[1] * p)).reshape(batch, grid[0], p, grid[1], p)
        fine = fine.transpose(0, 1, 3, 2, 4).reshape(batch, grid[0] * grid[1], p * p)
        if self.channels_first:
            return ops.tile(fine, (1, 1, self.in_chans))
        return ops.tile(fine.expand_dims(-1), (1, 1, 1, self.in_chans)).reshape(batch, grid[0] * grid[1], self.dim)

    def to_image(self, tokens: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Tokens (B, N, dim) -> pixels (B, C, H, W), with the mean and variance of `image` if they are normalised."""
        batch, chans, height, width = image.shape
        p, down, across = self.stride, height // self.stride, width // self.stride
        if self.patch_norm:
            patches = image.reshape(batch, chans, down, p, across, p).transpose(0, 2, 4, 3, 5, 1).reshape(tokens.shape)
            scale = np.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + self.EPS)
            tokens = tokens * scale + patches.mean(axis=-1, keepdims=True)
        shape, order = (p, p, chans), (0, 5, 1, 3, 2, 4)
        if self.channels_first:
            shape, order = (chans, p, p), (0, 3, 1, 4, 2, 5)
        pixels = tokens.reshape(batch, down, across, *shape).transpose(order).reshape(batch, chans, height, width)
        if self.local is not None:
            mean, scale = (part.asnumpy() for part in self.local.statistics(Tensor(image)))
            pixels = pixels * scale + mean
        return pixels

    def panels(self, prediction: np.ndarray, target: np.ndarray, images: MaskedImages) -> list[Panel]:
        """The prediction, and the image with the prediction on hidden blocks."""
        restored = images.display(self.to_image(prediction, images.pixels))
        note = ", patch mean and variance from the input" if self.patch_norm else ""
        return [
            Panel(f"prediction{note}", restored),
            Panel("prediction on masked blocks", images.paste(restored)),
        ]


class LocalNorm(nn.Cell):
    """Normalises each pixel by mean and standard deviation of a window around it (SwinV2's SimMIM, window 47).

    The window is cut at the borders; the variance is unbiased. Sums over windows are products with band matrices, since
    pooling with stride 1 is slow on CPU.

    Args:
        window: pixels per side, odd.
    """

    EPS = 1e-6  # added to the variance

    def __init__(self, window: int):
        super().__init__()
        self.reach = window // 2
        self.matmul = ops.BatchMatMul()

    def construct(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        mean, scale = self.statistics(image)
        return (image - mean) / scale

    def statistics(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each pixel's window, (B, C, H, W) each."""
        shape = image.shape
        band_h, band_w = band(shape[2], self.reach), band(shape[3], self.reach)
        count = np.outer(band_h.sum(axis=1), band_w.sum(axis=1)).reshape(1, 1, shape[2], shape[3])
        shrink = ops.tile(Tensor((1.0 / count).astype(np.float32)), (shape[0], shape[1], 1, 1))
        correct = ops.tile(Tensor((count / np.maximum(count - 1, 1)).astype(np.float32)), (shape[0], shape[1], 1, 1))
        mean = self.windows(image, Tensor(band_h), Tensor(band_w)) * shrink
        square = self.windows(image * image, Tensor(band_h), Tensor(band_w)) * shrink
        variance = ops.relu((square - mean * mean) * correct)
        return mean, ops.sqrt(variance + self.EPS)

    def windows(self, image: Tensor, band_h: Tensor, band_w: Tensor) -> Tensor:
        """Sums over windows."""
        batch, chans, height, width = image.shape
        across = ops.matmul(image.reshape(-1, width), band_w).reshape(batch * chans, height, width)
        down = self.matmul(ops.tile(band_h.expand_dims(0), (batch * chans, 1, 1)), across)
        return down.reshape(batch, chans, height, width)


def band(side: int, reach: int) -> np.ndarray:
    """(side, side): 1 where two positions are at most `reach` apart."""
    position = np.arange(side)
    return (np.abs(position[:, None] - position) <= reach).astype(np.float32)


class Features(Target):
    """The patch tokens of a frozen encoder that gets the whole image.

    The weight of a token in the loss is its hidden share.

    Args:
        config: normalisation.
        stride, in_chans: pixels per side of a token, image channels; the same in the teacher.
        teacher: a network with the frozen encoder.
    """

    EPS = 1e-6  # added to the variance; lower limit of the length
    teacher: BareEncoder | Classifier

    def __init__(self, config: FeaturesConfig, stride: int, in_chans: int, teacher: BareEncoder | Classifier):
        super().__init__()
        self.normalize = config.normalize
        self.dim = config.values(stride, in_chans)
        self.num_prefix_tokens = teacher.encoder.num_prefix_tokens
        self.__dict__["teacher"] = freeze(teacher)  # not a sub-cell

    def construct(self, image: Tensor) -> Tensor:
        x = self.teacher.encoder(image)[:, self.num_prefix_tokens :]
        if self.normalize == "layer":
            x = x - ops.tile(x.mean(axis=-1, keep_dims=True), (1, 1, self.dim))
            return x / ops.tile(ops.sqrt((x * x).mean(axis=-1, keep_dims=True) + self.EPS), (1, 1, self.dim))
        if self.normalize == "length":
            length = ops.sqrt((x * x).sum(axis=-1, keepdims=True))
            return x / ops.tile(ops.maximum(length, self.EPS), (1, 1, self.dim))
        return x

    def weights(self, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        batch, height, width = mask.shape
        if height <= grid[0]:
            return self.token_weights(mask, grid)
        parts = mask.reshape(batch, grid[0], height // grid[0], grid[1], width // grid[1])
        return parts.mean(axis=(2, 4)).reshape(batch, grid[0] * grid[1])

    def panels(self, prediction: np.ndarray, target: np.ndarray, images: MaskedImages) -> list[Panel]:
        """Principal components of the target as colours, and those of the prediction on hidden blocks."""
        size = (images.pixels.shape[2], images.pixels.shape[3])
        target_colours, predicted_colours = (
            part.reshape(len(part), *images.grid, 3)[:, np.arange(size[0]) * images.grid[0] // size[0]][
                :, :, np.arange(size[1]) * images.grid[1] // size[1]
            ]
            for part in principal_colours(target, prediction)
        )
        mixed = np.where(images.hidden(size)[..., None], predicted_colours, target_colours)
        return [Panel("features (main directions)", target_colours), Panel("prediction on masked blocks", mixed)]


#: configuration -> target; arguments: configuration, encoder stride, image channels
TARGETS: dict[type[TargetConfig], Callable[..., Target]] = {
    HOGConfig: HOG,
    PixelsConfig: Pixels,
    FeaturesConfig: Features,
}


def build_target(config: TargetConfig, stride: int, in_chans: int, teacher: nn.Cell | None = None) -> Target:
    """The target of a configuration for tokens of `stride` pixels per side; `teacher` for a feature target."""
    return TARGETS[type(config)](config, stride, in_chans, *([teacher] if teacher else []))
