"""The encoder contract, stochastic depth, pooling, positions, sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import erf, prod, sqrt
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters

from src.config import ENCODERS, ClassifyConfig, SwinConfig, SwinV2Config, ViTConfig
from src.models import Classifier, build_classifier, build_encoder
from src.models.graph import AsGraph
from src.models.layers import DropPath, Linear, sincos_position
from src.models.relative import SpreadBias
from src.operations import rows
from tests.helpers import Contract, WithGradients, counted, numbers, snapshot

pytestmark = pytest.mark.usefixtures("graph_mode")


def small(**changes: Any) -> ViTConfig:
    sizes = {"image_size": (32, 48), "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return ViTConfig(**(sizes | changes))


@pytest.mark.compiles
@pytest.mark.parametrize(
    "config",
    [
        small(),
        small(in_chans=1, class_token=False, position="learned"),
        small(in_chans=5, image_size=(64, 32), qkv_bias=False, mlp_ratio=2.0),
    ],
    ids=["default", "1 channel, no class token, learned positions", "5 channels, tall, no qkv bias"],
)
def test_the_encoder_contract(config: ViTConfig) -> None:
    ms.set_seed(0)
    encoder = build_encoder(config)
    bare = build_encoder(config, final_norm=False)
    for ours, theirs in ((p, q) for p in bare.get_parameters() for q in encoder.get_parameters() if p.name == q.name):
        ours.set_data(theirs.value())
    image = Tensor(numbers(0, 2, config.in_chans, *config.image_size))
    tokens, encoded, whole, (first, last) = Contract(encoder, (0, 1))(image)
    down, across = encoder.grid(config.image_size)
    length = down * across + encoder.num_prefix_tokens
    assert (down, across) == (config.image_size[0] // 16, config.image_size[1] // 16)
    assert encoder.num_prefix_tokens == int(config.class_token)
    assert tokens.shape == (2, down * across, encoder.out_dim)
    assert encoded.shape == first.shape == last.shape == (2, length, encoder.out_dim)
    np.testing.assert_array_equal(whole.asnumpy(), encoded.asnumpy())
    assert not np.allclose(first.asnumpy(), last.asnumpy())
    # the last block is what an encoder without final norm gives; the final norm is all that separates the two
    np.testing.assert_allclose(bare(image).asnumpy(), last.asnumpy(), atol=1e-5)
    bare_rows = last.asnumpy().astype(np.float64)
    mean, var = bare_rows.mean(-1, keepdims=True), bare_rows.var(-1, keepdims=True)
    np.testing.assert_allclose(encoded.asnumpy(), (bare_rows - mean) / np.sqrt(var + config.norm_eps), atol=1e-4)


def shrunk(config: Any) -> Any:
    """A preset with two blocks, or four stages of one."""
    if isinstance(config, SwinConfig):
        return replace(config, depths=(1, 1, 1, 1), embed_dim=6, num_heads=(1, 2, 3, 6))
    return replace(config, depth=2, embed_dim=24, num_heads=3)


#: those that differ by more than their size -> the first of their names
SHRUNK = {shrunk(ENCODERS[name]): name for name in sorted(ENCODERS, reverse=True)}


@pytest.mark.compiles
@pytest.mark.parametrize("config", SHRUNK, ids=SHRUNK.values())
def test_the_presets_shrunk_to_two_blocks_keep_their_promises(config: Any) -> None:
    """Sizes as the configuration states them, for every encoder; the top layer may be the head's alone."""
    classifier = build_classifier(config, ClassifyConfig(fc_norm=False))
    encoder = classifier.encoder
    assert (encoder.out_dim, encoder.stride) == (config.out_dim, config.stride)
    down, across = encoder.grid(config.image_size)
    assert down * across == config.num_tokens
    shape = AsGraph(encoder, encoder.construct)(Tensor(numbers(0, 1, 3, *config.image_size))).shape
    assert shape == (1, config.num_tokens + encoder.num_prefix_tokens, config.out_dim)
    names = {p.name for p in classifier.get_parameters()}
    assert {f"encoder.{name}" for name in encoder.no_weight_decay()} <= names
    assert {classifier.layer_of(each) for each in names} == set(range(encoder.num_layers))


@pytest.mark.parametrize("final_norm", [True, False])
def test_every_parameter_has_a_layer(final_norm: bool) -> None:
    encoder = build_encoder(small(), final_norm)
    layers = {p.name: encoder.layer_of(p.name) for p in encoder.get_parameters()}
    assert set(layers.values()) <= set(range(encoder.num_layers)) and encoder.num_layers == 4
    assert layers["pos_embed"] == layers["cls_token"] == layers["patch_embed.proj.weight"] == 0
    assert layers["blocks.0.attn.qkv.weight"] == 1 and layers["blocks.1.mlp.fc2.bias"] == 2
    assert layers.get("norm.weight", 3) == 3
    assert encoder.no_weight_decay() <= set(layers)


# --- stochastic depth -------------------------------------------------------------------------------------------


class Factors(nn.Cell):
    def __init__(self, rate: float, depth: int, batch: int, constant: bool = False):
        super().__init__()
        ms.set_seed(0)
        self.drop_path = DropPath(rate, depth, constant)
        self.batch = batch

    def construct(self) -> Tensor:
        return self.drop_path(self.batch)


@pytest.mark.compiles
@pytest.mark.parametrize(("constant", "rates"), [(False, (0.0, 0.2, 0.4)), (True, (0.4, 0.4, 0.4))])
def test_drop_path_skips_whole_samples_at_the_stated_rate(constant: bool, rates: tuple[float, ...]) -> None:
    batch, depth = 20_000, 3
    by_sample = Factors(0.4, depth, batch, constant)().asnumpy()
    assert by_sample.shape == (depth, 2, batch)
    for number, rate in enumerate(rates):  # linear from the first to the last block, or all alike
        for branch in by_sample[number]:
            assert set(np.unique(branch)) <= {np.float32(0), np.float32(1) / np.float32(1 - rate)}
            assert abs((branch == 0).mean() - rate) < 0.02
            assert abs(branch.mean() - 1) < 0.02  # the expectation stays
    attention, mlp = by_sample[2]
    assert abs(np.corrcoef(attention, mlp)[0, 1]) < 0.03  # branches are drawn independently


class AlmostOne(nn.Cell):
    """The largest number CounterUniform can give."""

    def __init__(self) -> None:
        super().__init__()
        self.value = Tensor(np.array([1 - 2**-24], np.float32))  # a Python number would be rounded to 1

    def construct(self, batch: int, count: int) -> Tensor:
        return ops.tile(self.value.reshape(1, 1), (batch, count))


def test_drop_path_never_doubles_a_branch() -> None:
    """keep probability + number must not round up to 2: a block of rate 0 is always kept, with factor 1."""
    cell = Factors(0.5, 2, 1)
    cell.drop_path.uniform = AlmostOne()
    first, last = cell().asnumpy().reshape(2, 2)
    np.testing.assert_array_equal(first, 1)
    assert set(last) <= {0.0, 2.0}


@pytest.mark.compiles
def test_drop_path_acts_in_training_only() -> None:
    encoder = build_encoder(small(drop_path=0.5))
    image = Tensor(numbers(0, 8, 3, 32, 48))
    encoder.set_train(False)
    still = [encoder(image).asnumpy().copy() for _ in range(2)]
    np.testing.assert_array_equal(*still)
    without = build_encoder(small())
    for own in without.get_parameters():
        own.set_data({p.name: p for p in encoder.get_parameters()}[own.name].value())
    np.testing.assert_array_equal(without(image).asnumpy(), still[0])
    encoder.set_train(True)
    moving = [counted(encoder, 8, image).asnumpy().copy() for _ in range(2)]
    assert not np.allclose(moving[0], still[0]) and not np.allclose(moving[0], moving[1])


# --- classifier -------------------------------------------------------------------------------------------------


class GivenSequence(nn.Cell):
    """Stands for an encoder: its image is the sequence."""

    out_dim, num_prefix_tokens, num_layers = 16, 1, 1
    norm_eps = 1e-6

    def construct(self, sequence: Tensor) -> Tensor:
        return sequence


@pytest.mark.parametrize("fc_norm", [True, False])
def test_pool_mean_never_sees_the_class_token(fc_norm: bool) -> None:
    head = Classifier(GivenSequence(), ClassifyConfig(num_classes=3, pool="mean", fc_norm=fc_norm))
    features = AsGraph(head, head.features)
    sequence = numbers(0, 2, 5, 16)
    other = sequence.copy()
    other[:, 0] += 100
    found = features(Tensor(sequence)).asnumpy().copy()
    np.testing.assert_array_equal(features(Tensor(other)).asnumpy(), found)
    expected = sequence[:, 1:].mean(axis=1)
    if fc_norm:
        expected = (expected - expected.mean(-1, keepdims=True)) / np.sqrt(expected.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pool_cls_is_the_class_token() -> None:
    head = Classifier(GivenSequence(), ClassifyConfig(num_classes=3, pool="cls", fc_norm=False))
    sequence = numbers(0, 2, 5, 16)
    np.testing.assert_array_equal(AsGraph(head, head.features)(Tensor(sequence)).asnumpy(), sequence[:, 0])


@pytest.mark.compiles
@pytest.mark.parametrize("config", [ClassifyConfig(), ClassifyConfig(pool="cls", fc_norm=False)], ids=["mean", "cls"])
def test_vit_base_has_the_published_number_of_parameters(config: ClassifyConfig) -> None:
    """86,567,656: timm's vit_base_patch16_224; the norm moves from the encoder to the pooled features or stays."""
    classifier = build_classifier(ViTConfig(position="learned"), config)
    names = {p.name for p in classifier.get_parameters()}
    assert ("fc_norm.weight" in names) != ("encoder.norm.weight" in names)
    assert sum(p.size for p in classifier.get_parameters()) == 86_567_656


@pytest.mark.compiles
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_added_onto_rows(bias: bool) -> None:
    layer = Linear(8, 5, bias=bias)
    x, onto = Tensor(numbers(0, 6, 8)), Tensor(numbers(1, 6, 5))
    added = AsGraph(layer, layer.construct)(x, onto).asnumpy()
    np.testing.assert_allclose(added, layer(x).asnumpy() + onto.asnumpy(), atol=1e-6)


# --- the two forms of the row operations ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stock", "fast", "shapes", "several"),
    [
        (rows.Affine, rows.AffineCPU, [(6, 8), (5, 8), (5,)], False),
        (rows.ChannelAffine, rows.ChannelAffineCPU, [(2, 4, 6), (3, 4), (3,)], False),
        (partial(rows.Normalize, 1e-3), partial(rows.NormalizeCPU, 1e-3), [(6, 8), (8,), (8,)], True),
        (rows.ExactGelu, rows.ExactGeluCPU, [(6, 8)], True),
        (rows.Softmax, rows.SoftmaxCPU, [(2, 3, 4, 4)], False),
    ],
    ids=["affine", "channels", "normalize", "gelu", "softmax"],
)
def test_the_cpu_form_equals_the_stock_form(
    stock: Callable[[], nn.Cell], fast: Callable[[], nn.Cell], shapes: list[tuple[int, ...]], several: bool
) -> None:
    inputs = [2 * numbers(number, *shape) for number, shape in enumerate(shapes)]
    (found, expected) = (
        WithGradients(make(), several, len(inputs))(factor, *map(Tensor, inputs))
        for factor in [Tensor(numbers(9, *output_shape(shapes)))]
        for make in (fast, stock)
    )
    np.testing.assert_allclose(found[0].asnumpy(), expected[0].asnumpy(), atol=1e-6)
    assert len(found[1]) == len(expected[1]) == len(inputs)
    for ours, theirs, given in zip(found[1], expected[1], inputs, strict=True):
        assert ours.shape == theirs.shape == given.shape
        assert np.abs(theirs.asnumpy()).max() > 0.1
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), atol=1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("stock", "fast", "shape", "more"),
    [
        (rows.SplitHeads, rows.SplitHeadsCPU, (6, 8), (2, 3, 4)),
        (rows.SplitHeads, rows.SplitHeadsCPU, (6, 8), (2, 3, 1)),
        *(
            (rows.SwapMiddle, rows.SwapMiddleCPU, (2, m, n, 5), (known,))
            for m, n in ((3, 4), (1, 3), (3, 1))
            for known in (1, 2)
        ),
    ],
)
def test_heads_and_axes_move_without_transpositions_as_with_them(
    stock: Callable[[], nn.Cell], fast: Callable[[], nn.Cell], shape: tuple[int, ...], more: tuple[int, ...]
) -> None:
    x = Tensor(numbers(0, *shape))
    (expected, found), (there, here) = zip(*(moved(make(), x, more) for make in (stock, fast)), strict=True)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(here, there)


class Attended(nn.Cell):
    """An attention form with its position table."""

    def __init__(self, attend: nn.Cell, sizes: tuple[int, int, int], mask: np.ndarray | None, cosine: bool):
        super().__init__()
        self.attend, self.sizes, self.cosine = attend, sizes, cosine
        self.mask = None if mask is None else Tensor(mask)

    def construct(self, qkv: Tensor, table: Tensor, factor: Tensor) -> Tensor:
        bias = self.attend.bias_of(table)
        if self.cosine:
            return self.attend(qkv, factor, *self.sizes, bias, self.mask)
        return self.attend(qkv, *self.sizes, bias, self.mask)


@pytest.mark.compiles
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("outer", "inner"), [(3, 1), (2, 3)])
@pytest.mark.parametrize(
    ("stock", "fast", "cosine"),
    [
        (partial(rows.Attend, 2, 0.5), partial(rows.AttendCPU, 2, 0.5), False),
        (partial(rows.AttendCosine, 2), partial(rows.AttendCosineCPU, 2), True),
    ],
    ids=["dot", "cosine"],
)
def test_attention_without_transpositions_is_the_same(
    stock: Callable[..., nn.Cell], fast: Callable[..., nn.Cell], cosine: bool, outer: int, inner: int, masked: bool
) -> None:
    """The form for Ascend and GPU, and the one for MindSpore's operations on CPU: values and gradients."""
    qkv, table = numbers(0, outer * 6 * inner, 3 * 2 * 4), numbers(1, 3 * 5, 2)
    mask = numbers(2, outer, 6, 6) if masked else None
    inputs = [Tensor(part) for part in (qkv, table, np.abs(numbers(3, 2)) + 1)]
    results = []
    for make in (stock, fast):
        cell = Attended(make(SpreadBias((2, 3), 2)), (outer, 6, inner), mask, cosine)
        out = cell(*inputs)
        grads = ops.GradOperation(get_all=True, sens_param=True)(cell)(*inputs, Tensor(numbers(4, *out.shape)))
        results.append([out, *grads])
    assert results[0][0].shape == (outer * 6 * inner, 8)
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), atol=1e-5)


def moved(cell: nn.Cell, x: Tensor, more: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What a cell gives, and the gradient of a sum of it with different factors."""
    moving = AsGraph(cell, cell.construct, *more)
    out = moving(x)
    (gradient,) = ops.GradOperation(get_all=True, sens_param=True)(moving)(x, Tensor(numbers(1, *out.shape)))
    return out.asnumpy(), gradient.asnumpy()


def output_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Of an affine map (rows, out), over channels (B, out, n), of the others that of the first input."""
    if len(shapes[0]) == 3:
        return shapes[0][0], shapes[1][0], shapes[0][2]
    return (shapes[0][0], shapes[1][0]) if len(shapes) > 1 and len(shapes[1]) == 2 else shapes[0]


# --- details ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 5), (4, 4)])
def test_sincos_positions_follow_the_formula(grid: tuple[int, int]) -> None:
    dim = 16
    table = sincos_position(dim, grid, class_token=True)
    assert table.shape == (1, 1 + grid[0] * grid[1], dim) and table.dtype == np.float32
    np.testing.assert_array_equal(table[0, 0], 0)
    for row, col in np.ndindex(*grid):
        expected = [
            wave(position / 10000 ** (i / (dim / 4)))
            for position in (col, row)
            for wave in (np.sin, np.cos)
            for i in range(dim // 4)
        ]
        np.testing.assert_allclose(table[0, 1 + row * grid[1] + col], expected, atol=1e-7)
    np.testing.assert_array_equal(sincos_position(dim, grid, class_token=False), table[:, 1:])


def test_positions_are_trained_only_when_learned() -> None:
    assert not build_encoder(small()).pos_embed.requires_grad
    assert build_encoder(small(position="learned")).pos_embed.requires_grad


def test_gelu_is_the_exact_one() -> None:
    x = np.linspace(-4, 4, 81).astype(np.float32)
    expected = [v * 0.5 * (1 + erf(v / sqrt(2))) for v in x.astype(np.float64)]
    np.testing.assert_allclose(
        rows.ExactGelu()(Tensor(x))[0].asnumpy(), expected, atol=1e-6
    )  # tanh GELU is off by 5e-4


def test_the_seed_fixes_the_weights() -> None:
    def weights(seed: int) -> dict[str, np.ndarray]:
        ms.set_seed(seed)
        return snapshot(build_encoder(small()).get_parameters())

    first, again, other = weights(1), weights(1), weights(2)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    assert not np.array_equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


# --- initial weights and huge models ----------------------------------------------------------------------------


def deviations(encoder: Any, *names: str) -> list[float]:
    weights = {p.name: p.asnumpy() for p in encoder.get_parameters()}
    return [float(weights[name].std()) for name in names]


def test_scaled_initial_weights_shrink_the_ends_of_branches_with_depth() -> None:
    """BEiT's fix_init_weight, which SimMIM's ViT uses."""
    ms.set_seed(0)
    encoder = build_encoder(small(embed_dim=128, init="scaled"))
    ends = ("attn.proj.weight", "mlp.fc2.weight")
    first, second = (deviations(encoder, *(f"blocks.{block}.{end}" for end in ends)) for block in (0, 1))
    np.testing.assert_allclose(first, 0.02 / sqrt(2), rtol=0.03)
    np.testing.assert_allclose(second, 0.02 / sqrt(4), rtol=0.03)
    inner = deviations(encoder, "blocks.1.attn.qkv.weight", "blocks.1.mlp.fc1.weight")
    np.testing.assert_allclose(inner, 0.02, rtol=0.03)


@pytest.mark.parametrize(("init", "expected"), [("trunc_normal", 0.02), ("xavier", sqrt(2 / (64 + 4 * 64)))])
def test_both_initial_weights_of_swin(init: Any, expected: float) -> None:
    ms.set_seed(0)
    encoder = build_encoder(SwinConfig(embed_dim=64, depths=(1,), num_heads=(2,), image_size=(32, 32), init=init))
    np.testing.assert_allclose(deviations(encoder, "layers.0.blocks.0.mlp.fc1.weight"), expected, rtol=0.03)


def test_the_head_starts_with_the_stated_deviation() -> None:
    ms.set_seed(0)
    classifier = build_classifier(small(embed_dim=64), ClassifyConfig(num_classes=500, head_std=0.5))
    np.testing.assert_allclose(deviations(classifier, "head.weight"), 0.5, rtol=0.03)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("swinv2_small", 49), ("swinv2_base", 87), ("swinv2_large", 195), ("swinv2_huge", 655), ("swinv2_giant", 1061)],
)
def test_swin_v2_is_as_large_as_published(name: str, millions: int) -> None:
    """Backbone parameters as Swin-Transformer's MODELHUB.md states them (giant: 1.06B)."""
    with no_init_parameters():  # names and shapes only
        encoder = build_encoder(ENCODERS[name])
    assert round(sum(prod(p.shape) for p in encoder.get_parameters()) / 1e6) == millions
    norms = [p.name for p in encoder.get_parameters() if p.name.endswith("norm3.weight")]
    huge = name in ("swinv2_huge", "swinv2_giant")
    assert norms == [f"layers.2.blocks.{block}.norm3.weight" for block in (5, 11, 17) if huge]


@pytest.mark.compiles
def test_the_norm_on_the_main_branch_acts_after_every_nth_block() -> None:
    config = SwinV2Config(embed_dim=8, depths=(3,), num_heads=(2,), image_size=(32, 32), window_size=4)
    image, outputs = Tensor(numbers(0, 1, 3, 32, 32)), []
    for every in (0, 2):
        ms.set_seed(0)
        encoder = build_encoder(replace(config, main_norm_every=every), final_norm=False)
        tokens = encoder.embed(image)
        outputs.append([part.asnumpy() for part in AsGraph(encoder, encoder.blocks_of, (0, 1))(tokens)])
    (first, second), (same, normed) = outputs
    np.testing.assert_array_equal(same, first)
    expected = (second - second.mean(-1, keepdims=True)) / np.sqrt(second.var(-1, keepdims=True) + config.norm_eps)
    np.testing.assert_allclose(normed, expected, atol=1e-4)
