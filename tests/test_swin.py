"""Windows, shifts, padding and order of Swin, against the plain formulation on raster maps."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from src.config import METHODS, SwinConfig, SwinV2Config
from src.methods import MaskedImageModel
from src.models import build_encoder
from src.models.graph import AsGraph
from src.models.layers import LayerNorm
from src.models.relative import SpreadBias
from src.models.swin import BLOCKED, Reorder, merging_order, shift_mask, window_order
from src.models.swin_v2 import log_coordinates
from src.operations import kernels
from tests.helpers import numbers

pytestmark = pytest.mark.usefixtures("graph_mode")


def test_window_order_is_padding_then_rolling_then_cutting() -> None:
    height, width, window, shift = 5, 7, 4, 2
    raster = np.full((8, 8), -1)
    raster[:height, :width] = np.arange(height * width).reshape(height, width)
    rolled = np.roll(raster, (-shift, -shift), axis=(0, 1))
    expected = [rolled[r : r + 4, c : c + 4].reshape(-1) for r in (0, 4) for c in (0, 4)]
    np.testing.assert_array_equal(window_order((height, width), window, shift), np.concatenate(expected))


def test_window_order_may_roll_before_it_pads() -> None:
    """timm models/swin_transformer.py since 0.9."""
    height, width, window, shift = 5, 7, 4, 2
    rolled = np.roll(np.arange(height * width).reshape(height, width), (-shift, -shift), axis=(0, 1))
    padded = np.pad(rolled, ((0, 3), (0, 1)), constant_values=-1)
    expected = [padded[r : r + 4, c : c + 4].reshape(-1) for r in (0, 4) for c in (0, 4)]
    np.testing.assert_array_equal(window_order((height, width), window, shift, True), np.concatenate(expected))
    whole = ((8, 8), window, shift)  # nothing to pad: the same
    np.testing.assert_array_equal(window_order(*whole, True), window_order(*whole))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (4, 7), (5, 6), (1, 1)])
@pytest.mark.parametrize("seed", [2, 3])
def test_merging_joins_four_neighbours_and_pads_odd_sides(size: tuple[int, int], seed: int) -> None:
    """From rows and to rows in any order; beyond the map there are zeros, as in Hugging Face and current timm."""
    height, width = size
    x = numbers(0, height, width, 3)
    padded = np.pad(x, ((0, height % 2), (0, width % 2), (0, 0)))
    parts = [padded[down::2, right::2] for right in (0, 1) for down in (0, 1)]
    expected = np.concatenate(parts, axis=-1).reshape(-1, 12)
    rng = np.random.default_rng(seed)
    layout, following = rng.permutation(height * width), rng.permutation(len(expected))
    order = merging_order(layout, size, following)
    moved = Reorder(order, height * width)(Tensor(x.reshape(-1, 1, 3)[layout])).asnumpy()
    np.testing.assert_array_equal(moved.reshape(-1, 12), expected[following])


@pytest.mark.compiles
def test_an_image_of_any_whole_patches_is_classified() -> None:
    config = SwinConfig(image_size=(20, 36), embed_dim=8, depths=(2, 2, 1), num_heads=(1, 2, 2), window_size=3)
    assert config.stage_maps == [(5, 9), (3, 5), (2, 3)] and config.num_tokens == 6
    encoder = build_encoder(config)
    assert encoder(Tensor(numbers(0, 2, 3, 20, 36))).shape == (2, 6, 32) and encoder.grid((20, 36)) == (2, 3)


def test_norms_of_embedding_and_merging_may_have_an_epsilon_of_their_own() -> None:
    sizes = {"image_size": (32, 32), "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    with kernels.builtin():
        network = build_encoder(SwinConfig(**sizes, norm_eps=1e-3, merge_norm_eps=1e-5))
    norms = {name: cell for name, cell in network.cells_and_names() if isinstance(cell, LayerNorm)}
    found = {name: (norm.normalize.eps, norm.norm_affine.normalize.eps) for name, norm in norms.items()}
    apart = {name for name, eps in found.items() if eps == (1e-5, 1e-5)}
    assert apart == {"patch_embed.norm", "layers.0.downsample.norm"}
    assert all(eps == (1e-3, 1e-3) for name, eps in found.items() if name not in apart)


def test_shift_mask_blocks_what_the_roll_brought_together() -> None:
    size, window, shift = (8, 4), 4, 2
    mask = shift_mask(size, window, shift)
    source = np.arange(32).reshape(size)
    rolled = np.roll(source, (-shift, -shift), axis=(0, 1))
    for number, top in enumerate((0, 4)):
        index = rolled[top : top + 4, :4].reshape(-1)
        row, col = index // 4, index % 4
        # together before the roll: no edge of the map lies between them after it
        wrapped = (row < shift)[:, None] != (row < shift) if top == 4 else np.zeros((16, 16), bool)
        wrapped |= (col < shift)[:, None] != (col < shift)
        np.testing.assert_array_equal(mask[number] == BLOCKED, wrapped)


class WithGradient(nn.Cell):
    def __init__(self, cell: nn.Cell):
        super().__init__()
        self.gradient = ops.grad(cell)

    def construct(self, *inputs: Tensor) -> Tensor:
        return self.gradient(*inputs)


class Weighted(nn.Cell):
    """Sum of an output times fixed numbers, so that its gradient tells the rows apart."""

    def __init__(self, cell: nn.Cell, factor: np.ndarray):
        super().__init__()
        self.cell, self.factor = cell, Tensor(factor)

    def construct(self, x: Tensor) -> Tensor:
        return (self.cell(x) * self.factor).sum()


def test_reorder_and_its_gradient() -> None:
    index = np.array([2, -1, 0, 1, -1, 3])
    x, factor = numbers(0, 4, 2, 3), numbers(1, 6, 2, 3)
    moved = Reorder(index, 4)(Tensor(x)).asnumpy()
    np.testing.assert_array_equal(moved, np.concatenate([x, np.zeros((1, 2, 3), np.float32)])[index])
    gradient = WithGradient(Weighted(Reorder(index, 4), factor))(Tensor(x)).asnumpy()
    np.testing.assert_array_equal(gradient, factor[[2, 3, 0, 5]])


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_spread_bias_is_a_lookup_by_offset(grid: tuple[int, int]) -> None:
    height, width = grid
    table = numbers(0, (2 * height - 1) * (2 * width - 1), 2)
    row, col = (part.reshape(-1) for part in np.indices(grid))
    index = (row[:, None] - row + height - 1) * (2 * width - 1) + col[:, None] - col + width - 1
    expected = table[index].transpose(2, 0, 1)
    np.testing.assert_allclose(SpreadBias(grid, 2)(Tensor(table)).asnumpy(), expected, atol=1e-6)


def test_log_coordinates_span_the_window_of_pre_training() -> None:
    own, other = log_coordinates(4, 0), log_coordinates(8, 4)
    assert own.shape == (49, 2) and other.shape == (225, 2)
    np.testing.assert_allclose(own[0], [-np.log2(9) / 3] * 2, rtol=1e-6)  # the farthest offset is 8
    assert np.abs(other).max() > 1 and np.abs(own).max() == pytest.approx(np.log2(9) / 3)


# --- a whole stage against raster maps --------------------------------------------------------------------------


def layer_norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str, eps: float) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def plain_attention(x: np.ndarray, w: dict[str, np.ndarray], name: str, heads: int, window: int, shift: int) -> Any:
    """Windows of a map (H, W, C) cut and put back one by one; zeros pad the map, as the Swin detectors do."""
    height, width, dim = x.shape
    rows, cols = -(-height // window) * window, -(-width // window) * window
    padded = np.zeros((rows, cols, dim))
    padded[:height, :width] = x
    rolled = np.roll(padded, (-shift, -shift), axis=(0, 1))
    mask = shift_mask((height, width), window, shift) if shift else np.zeros((rows * cols // window**2, 1, 1))
    row, col = (part.reshape(-1) for part in np.indices((window, window)))
    index = (row[:, None] - row + window - 1) * (2 * window - 1) + col[:, None] - col + window - 1
    bias = w[f"{name}.relative_position_bias_table"][index].transpose(2, 0, 1)
    out = np.zeros_like(rolled)
    places = [(r, c) for r in range(0, rows, window) for c in range(0, cols, window)]
    for number, (r, c) in enumerate(places):
        qkv = linear(rolled[r : r + window, c : c + window].reshape(-1, dim), w, f"{name}.qkv")
        q, k, v = (part.reshape(-1, heads, dim // heads).transpose(1, 0, 2) for part in np.split(qkv, 3, axis=1))
        scores = q @ k.transpose(0, 2, 1) * (dim // heads) ** -0.5 + bias + mask[number]
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        mixed = linear(mixed.transpose(1, 0, 2).reshape(-1, dim), w, f"{name}.proj")
        out[r : r + window, c : c + window] = mixed.reshape(window, window, dim)
    return np.roll(out, (shift, shift), axis=(0, 1))[:height, :width]


def plain_gelu(x: np.ndarray) -> np.ndarray:
    return ops.gelu(Tensor(x.astype(np.float32)), approximate="none").asnumpy()


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("size", "window", "cap"),
    [((8, 8), 4, True), ((6, 10), 4, True), ((5, 7), 3, True), ((4, 8), 6, True), ((3, 3), 6, False)],
    ids=["windows fit", "padded", "padded, odd sides", "window capped by the shorter side", "padded to one window"],
)
def test_one_stage_equals_windows_cut_by_hand(size: tuple[int, int], window: int, cap: bool) -> None:
    config = SwinConfig(
        image_size=(4 * size[0], 4 * size[1]),
        embed_dim=8,
        depths=(3,),
        num_heads=(2,),
        window_size=window,
        cap_window=cap,
    )
    ms.set_seed(1)
    encoder = build_encoder(config)
    for parameter in encoder.get_parameters():  # so that biases, tables and norms take part
        parameter.set_data(Tensor(parameter.asnumpy() + 0.3 * numbers(len(parameter.name), *parameter.shape)))
    weights = {p.name: p.asnumpy().astype(np.float64) for p in encoder.get_parameters()}
    tokens = numbers(3, 2, size[0] * size[1], 8)
    ours = AsGraph(encoder, encoder.encode)(Tensor(tokens)).asnumpy()
    capped = cap and min(size) <= window
    effective = min(size) if capped else window
    for sample in range(2):
        x = tokens[sample].reshape(*size, 8).astype(np.float64)
        for number in range(3):
            name = f"layers.0.blocks.{number}"
            shift = window // 2 if number % 2 and not capped else 0
            normed = layer_norm(x, weights, f"{name}.norm1", 1e-5)
            x = x + plain_attention(normed, weights, f"{name}.attn", 2, effective, shift)
            hidden = plain_gelu(linear(layer_norm(x, weights, f"{name}.norm2", 1e-5), weights, f"{name}.mlp.fc1"))
            x = x + linear(hidden, weights, f"{name}.mlp.fc2")
        expected = layer_norm(x, weights, "norm", 1e-5).reshape(-1, 8)
        np.testing.assert_allclose(ours[sample], expected, atol=2e-4)


@pytest.mark.compiles
@pytest.mark.parametrize("kind", [SwinConfig, SwinV2Config])
def test_taps_and_non_square_maps(kind: type[SwinConfig]) -> None:
    config = kind(
        image_size=(32, 48), in_chans=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, drop_path=0.5
    )
    encoder = build_encoder(config, final_norm=False)
    encoder.set_train(False)
    image = Tensor(numbers(0, 2, 4, 32, 48))
    tokens = AsGraph(encoder, encoder.embed)(image)
    assert tokens.shape == (2, 96, 8)
    first, last = AsGraph(encoder, encoder.blocks_of, (0, 3))(tokens)
    assert first.shape == (2, 96, 8) and last.shape == (2, 24, 16) and encoder.grid((32, 48)) == (4, 6)
    np.testing.assert_allclose(encoder(image).asnumpy(), last.asnumpy(), atol=1e-6)


@pytest.mark.compiles
def test_simmim_learns_one_batch() -> None:
    """Token mask, linear decoder, L1: the loss of one batch with one mask falls, and starts near the constant's."""
    from src.config import TrainConfig
    from src.engine.optim import build_optimizer
    from src.engine.step import TrainStep

    class Fixed(nn.Cell):
        def __init__(self, method: MaskedImageModel):
            super().__init__(auto_prefix=False)
            self.method = method

        def construct(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            loss, sums, _, _ = self.method.run(image, mask)
            return loss, sums

    ms.set_seed(0)
    config = SwinConfig(image_size=(64, 64), embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4)
    method = MaskedImageModel(build_encoder(config), METHODS["simmim"], config.image_size)
    optimizer = build_optimizer(method, TrainConfig())
    step = TrainStep(Fixed(method), optimizer)
    image, mask = Tensor(numbers(0, 2, 3, 64, 64) * 0.1 + 1.0), Tensor(np.array([[[1, 0], [1, 0]]] * 2, np.float32))
    method.prepare([image.asnumpy()])
    losses = []
    for number in range(30):
        loss, sums, _ = step(optimizer.step_values(lambda scale: 5e-3 * scale, number + 1), image, mask)
        losses.append(float(loss) / method.baseline(sums.asnumpy()))
    assert losses[0] > 2 and losses[-1] < 0.5 * losses[0]
