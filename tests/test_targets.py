"""HOG against a pixel-by-pixel implementation, layouts of the targets, and the way back to a picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mindspore import Tensor

from src.config import HOGConfig, PixelsConfig
from src.methods.panels import glyphs
from src.methods.targets import HOG, Pixels
from src.models.graph import AsGraph
from tests.helpers import numbers

pytestmark = pytest.mark.usefixtures("graph_mode")


def plain_hog(image: np.ndarray, bins: int, cell: int, normalize: bool, window: int) -> np.ndarray:
    """HOG of (B, C, H, W), pixel by pixel: (B, C*bins, H/cell, W/cell) in float64."""
    batch, chans, height, width = image.shape
    out = np.zeros((batch, chans, bins, height // cell, width // cell))
    for sample, channel in np.ndindex(batch, chans):
        padded = np.pad(image[sample, channel].astype(np.float64), 1, mode="reflect")
        for row, col in np.ndindex(height, width):
            a = padded[row : row + 3, col : col + 3]
            gx = (a[0, 0] + 2 * a[1, 0] + a[2, 0]) - (a[0, 2] + 2 * a[1, 2] + a[2, 2])
            gy = (a[0, 0] + 2 * a[0, 1] + a[0, 2]) - (a[2, 0] + 2 * a[2, 1] + a[2, 2])
            length = math.hypot(gx, gy)
            if window:
                sigma, centre = window // 2, (window - 1) / 2
                offsets = np.arange(window) - centre
                total = np.exp(-0.5 * (offsets / sigma) ** 2).sum() ** 2
                distance = (row % window - centre) ** 2 + (col % window - centre) ** 2
                length *= math.exp(-0.5 * distance / sigma**2) / total
            number = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
            out[sample, channel, number, row // cell, col // cell] += length
    if normalize:
        norm = np.sqrt((out**2).sum(axis=2, keepdims=True))
        out = out / np.maximum(norm, 1e-12)
    return out.reshape(batch, chans * bins, height // cell, width // cell)


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("chans", "size", "config"),
    [
        (3, (32, 48), HOGConfig()),
        (1, (32, 16), HOGConfig(normalize=False)),
        (4, (16, 32), HOGConfig(bins=6, cell=4)),
        (3, (32, 32), HOGConfig(bins=12, cell=8, normalize=False, gaussian_window=16)),
        (1, (16, 48), HOGConfig(bins=5, cell=2, gaussian_window=8)),
    ],
)
def test_hog_equals_the_definition(chans: int, size: tuple[int, int], config: HOGConfig) -> None:
    image = numbers(chans, 2, chans, *size)
    target = HOG(config, 16, chans)
    expected = plain_hog(image, config.bins, config.cell, config.normalize, config.gaussian_window)
    ours = AsGraph(target, target.histograms)(Tensor(image)).asnumpy()
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))
    # tokens are the histograms in another layout, and `unfold` is the way back
    tokens = target(Tensor(image)).asnumpy()
    grid = (size[0] // 16, size[1] // 16)
    assert tokens.shape == (2, grid[0] * grid[1], target.dim)
    np.testing.assert_array_equal(target.unfold(tokens, grid), ours)


@pytest.mark.compiles
def test_hog_token_layout() -> None:
    """A token holds its own cells: channel, bin, cell row, cell column."""
    target = HOG(HOGConfig(bins=3, cell=4), 8, 2)
    image = numbers(9, 1, 2, 16, 24)
    hist = AsGraph(target, target.histograms)(Tensor(image)).asnumpy()[0].reshape(2, 3, 4, 6)
    tokens = target(Tensor(image)).asnumpy()[0]
    for row, col in np.ndindex(2, 3):
        own = hist[:, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
        np.testing.assert_array_equal(tokens[row * 3 + col], own.ravel())


@pytest.mark.compiles
def test_hog_of_a_flat_image_is_zero() -> None:
    target = HOG(HOGConfig(), 16, 3)
    tokens = target(Tensor(np.full((1, 3, 32, 32), 0.5, np.float32))).asnumpy()
    np.testing.assert_array_equal(tokens, 0)


def bins_of_the_reference(gx: np.ndarray, gy: np.ndarray, bins: int) -> np.ndarray:
    """HOGLayerC's formula on the nearest float32 angle, in float32 as there."""
    angle = np.arctan2(gx.astype(np.float64), gy.astype(np.float64)).astype(np.float32)
    return np.floor(angle / np.float32(np.pi) * np.float32(bins)).astype(int) % bins


def bins_of_ours(gx: np.ndarray, gy: np.ndarray, bins: int) -> np.ndarray:
    """The bin with the length of each gradient, bins if there is none; the other bins hold exactly 0."""
    target = HOG(HOGConfig(bins=bins, cell=1, normalize=False), 1, 1)
    votes = AsGraph(target, target.votes)(Tensor(gx.reshape(1, 1, -1, 16)), Tensor(gy.reshape(1, 1, -1, 16))).asnumpy()
    length = np.sqrt(gx * gx + gy * gy).ravel()
    np.testing.assert_allclose(votes.sum(axis=0), length, rtol=1e-6)
    np.testing.assert_array_equal((votes != 0).sum(axis=0), length > 0)
    return np.where(length > 0, votes.argmax(axis=0), bins)


@pytest.mark.compiles
@pytest.mark.parametrize("bins", [1, 2, 4, 6, 8, 9, 12, 18])
def test_bins_on_axes_and_diagonals_are_those_of_the_arc_tangent(bins: int) -> None:
    """Zeros of both signs, axes and diagonals lie on borders of bins."""
    values = np.array([0.0, -0.0, 1.0, -1.0, 0.375, -0.375, 3.0, -3.0], np.float32)
    gx, gy = np.meshgrid(values, values)
    exact = (gx == 0) | (gy == 0) | (np.abs(gx) == np.abs(gy))
    expected = np.where((gx == 0) & (gy == 0), bins, bins_of_the_reference(gx, gy, bins))
    ours = bins_of_ours(gx, gy, bins).reshape(gx.shape)
    np.testing.assert_array_equal(ours[exact], expected[exact])
    assert set(np.unique(expected[exact])) > {0, bins // 2}


@pytest.mark.compiles
@pytest.mark.parametrize("bins", [3, 9, 18])
def test_angles_that_round_to_pi_are_in_the_first_bin(bins: int) -> None:
    """Smooth 8-bit areas have them: a difference that is zero but for rounding, across a large one."""
    tiny = np.array([2.98e-8, 5.96e-8, 1.19e-7], np.float32)
    gx = np.concatenate([tiny, -tiny, tiny, -tiny, np.zeros(4, np.float32)])
    gy = np.concatenate([np.full(6, -5.5), np.full(6, 5.5), np.ones(4)]).astype(np.float32)
    expected = bins_of_the_reference(gx, gy, bins)
    assert list(expected[:3]) == [0, 0, 0] and list(expected[9:12]) == [bins - 1] * 3
    np.testing.assert_array_equal(bins_of_ours(gx, gy, bins), expected)


@pytest.mark.compiles
@pytest.mark.parametrize("bins", [3, 5, 6, 9, 12, 18])
def test_bins_are_those_of_the_arc_tangent_but_for_rounding(bins: int) -> None:
    """Random gradients, and gradients within a few units in the last place of a border."""
    rng = np.random.default_rng(bins)
    border = rng.integers(-bins, bins + 1, 200_000) * np.pi / bins
    near = border * (1 + rng.integers(-8, 9, border.shape) * 2.0**-24)
    angle = np.concatenate([near, rng.uniform(-np.pi, np.pi, 800_000)])
    size = np.exp(rng.normal(scale=3, size=angle.shape))
    gx, gy = (size * np.sin(angle)).astype(np.float32), (size * np.cos(angle)).astype(np.float32)
    differ = bins_of_ours(gx, gy, bins) != bins_of_the_reference(gx, gy, bins)
    assert 0 < differ.mean() < 0.1  # of those at borders
    angle = np.arctan2(gx.astype(np.float64), gy.astype(np.float64))[differ]
    distance = np.abs(angle - np.round(angle * bins / np.pi) * np.pi / bins)
    assert (distance / np.spacing(np.abs(angle).astype(np.float32))).max() < 2


# --- weights ----------------------------------------------------------------------------------------------------

TARGETS = [HOG(HOGConfig(bins=3, cell=4), 8, 2), Pixels(PixelsConfig(), 8, 2)]


@pytest.mark.parametrize("target", TARGETS, ids=["hog", "pixels"])
@pytest.mark.parametrize("block", [8, 16])
def test_a_block_of_whole_tokens_weighs_whole_tokens(target: HOG | Pixels, block: int) -> None:
    grid = (4, 6)  # tokens of a 32 x 48 image
    mask = np.random.default_rng(0).integers(0, 2, (2, 32 // block, 48 // block)).astype(np.float32)
    weights = AsGraph(target, target.weights, grid)(Tensor(mask)).asnumpy()
    repeat = block // 8
    expected = mask.repeat(repeat, axis=1).repeat(repeat, axis=2).reshape(2, 24)
    np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize("target", TARGETS, ids=["hog", "pixels"])
def test_a_block_smaller_than_a_token_weighs_the_values_under_it(target: HOG | Pixels) -> None:
    """The target of an image that is 1 under the mask shows which values belong to which block."""
    grid = (4, 6)
    mask = np.random.default_rng(0).integers(0, 2, (2, 8, 12)).astype(np.float32)  # blocks of 4 pixels
    weights = AsGraph(target, target.weights, grid)(Tensor(mask)).asnumpy()
    assert weights.shape == (2, 24, target.dim)
    if isinstance(target, HOG):  # one cell per block
        cells = target.unfold(weights, grid)
        np.testing.assert_array_equal(cells, np.broadcast_to(mask[:, None], cells.shape))
    else:
        image = np.zeros((2, 2, 32, 48), np.float32)
        pixels = mask.repeat(4, axis=1).repeat(4, axis=2)
        np.testing.assert_array_equal(target.to_image(weights, image), np.stack([pixels, pixels], axis=1))


# --- pixels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "patch"])
@pytest.mark.parametrize("chans", [1, 3])
def test_pixels_give_the_image_back(normalize: str, chans: int) -> None:
    target = Pixels(PixelsConfig(normalize=normalize), 8, chans)  # type: ignore[arg-type]
    image = 3 * numbers(1, 2, chans, 16, 24) + 0.5
    tokens = target(Tensor(image)).asnumpy()
    assert tokens.shape == (2, 6, 64 * chans)
    np.testing.assert_allclose(target.to_image(tokens, image), image, atol=1e-5)
    if normalize == "patch":
        np.testing.assert_allclose(tokens.mean(axis=-1), 0, atol=1e-5)
        np.testing.assert_allclose(tokens.var(axis=-1, ddof=1), 1, rtol=1e-4)
    else:
        first = image[0, :, :8, :8].transpose(1, 2, 0).ravel()  # row, column, channel
        np.testing.assert_array_equal(tokens[0, 0], first)


# --- glyphs -----------------------------------------------------------------------------------------------------


def spread(picture: np.ndarray) -> tuple[float, float]:
    """Standard deviation of the brightness along rows and along columns."""
    weight = picture / picture.sum()
    rows, cols = np.mgrid[: picture.shape[0], : picture.shape[1]]
    return tuple(float(np.sqrt((weight * (axis - (weight * axis).sum()) ** 2).sum())) for axis in (rows, cols))  # type: ignore[return-value]


@pytest.mark.compiles
@pytest.mark.parametrize(("direction", "expected"), [("vertical", "|"), ("horizontal", "-"), ("rising", "/")])
def test_glyphs_run_along_the_edge(direction: str, expected: str) -> None:
    rows, cols = np.mgrid[:16, :16].astype(np.float32)
    along = {"vertical": cols, "horizontal": rows, "rising": rows + cols}[direction]  # brightness grows across
    image = (along / along.max())[None, None]
    bins = 9
    target = HOG(HOGConfig(bins=bins, cell=16), 16, 1)
    hist = AsGraph(target, target.histograms)(Tensor(image)).asnumpy()[0]
    # vertical and horizontal gradients stand on a bin's border: look at the strongest bin only
    hist = np.where(hist == hist.max(), hist, 0)
    picture = glyphs(hist, bins, 64, np.zeros((1, 1), bool))
    assert picture.shape == (64, 64, 3) and picture.min() >= 0 and picture.max() <= 1
    grey = picture.mean(axis=-1)
    down, across = spread(grey)
    rows, cols = np.mgrid[:64, :64] - 31.5
    slope = (grey * rows * cols).sum()
    found = "|" if down > 2 * across else "-" if across > 2 * down else "/" if slope < 0 else "\\"
    assert found == expected
