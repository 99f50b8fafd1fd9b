"""Our own CPU kernels against formulas in float64, without graphs: values, gradients, NaN, threads, forks."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.operations import kernels
from src.operations.kernels import KernelError
from tests.helpers import ROOT, numbers

#: Largest error relative to the largest value. Rounding a float32 costs 6e-8, our exp and erf 2e-7 (kernels.cpp), and
#: sums over some hundred terms in several registers add a few roundings; a wrong term or index costs 1e-2 and more.
ERROR = 3e-6
Arrays = tuple[np.ndarray, ...]


@pytest.fixture(scope="session")
def library() -> str:
    """Path of the compiled kernels."""
    try:
        return str(kernels.library())
    except KernelError as error:
        pytest.skip(f"no kernels: {error}")


@pytest.fixture(autouse=True)
def two_threads(library: str) -> Iterator[None]:
    kernels.open_library(library).set_threads(2)
    yield
    kernels.open_library(library).set_threads(2)


# --- formulas: each takes the inputs of a kernel in float64 and returns its outputs ----------------------------------


def linear(x: np.ndarray, weight: np.ndarray, *added: np.ndarray) -> Arrays:
    """`added`: nothing, a bias, or a bias and rows."""
    return (x @ weight.T + sum(added),)


def linear_grad(x: np.ndarray, weight: np.ndarray, grad: np.ndarray) -> Arrays:
    return grad @ weight, grad.T @ x, grad.sum(axis=0)


def phi(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.vectorize(math.erf)(x * math.sqrt(0.5)))


def gelu(x: np.ndarray) -> np.ndarray:
    return np.where(np.isneginf(x), 0, x * phi(x))


def slope(x: np.ndarray) -> np.ndarray:
    """The derivative of GELU."""
    return np.where(np.isinf(x), x > 0, phi(x) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))


def gelu_linear(x: np.ndarray, *others: np.ndarray) -> Arrays:
    return linear(gelu(x), *others)


def gelu_linear_grad(x: np.ndarray, weight: np.ndarray, grad: np.ndarray) -> Arrays:
    dx, *others = linear_grad(gelu(x), weight, grad)
    return dx * slope(x), *others


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: np.ndarray) -> Arrays:
    return (unit(x, eps)[0] * weight + bias,)


def unit(x: np.ndarray, eps: np.ndarray) -> Arrays:
    """Normalised rows and the factors (rows, 1) that normalise them."""
    rate = 1 / np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    return (x - x.mean(axis=-1, keepdims=True)) * rate, rate


def layer_norm_grad(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: np.ndarray, grad: np.ndarray) -> Arrays:
    normed, rate = unit(x, eps)
    inner = grad * weight
    slope = (inner * normed).mean(axis=-1, keepdims=True)
    dx = rate * (inner - inner.mean(axis=-1, keepdims=True) - normed * slope)
    return dx, (grad * normed).sum(axis=0), grad.sum(axis=0)


def norm_linear(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, eps: np.ndarray, *others: np.ndarray) -> Arrays:
    return linear(*layer_norm(x, scale, shift, eps), *others)


def norm_linear_grad(*inputs: np.ndarray) -> Arrays:
    *norm, weight, grad = inputs
    dx, dw, db = linear_grad(*layer_norm(*norm), weight, grad)
    return *layer_norm_grad(*norm, dx), dw, db


def heads_first(x: np.ndarray) -> np.ndarray:
    """(outer, tokens, inner, heads, dim) -> (outer, inner, heads, tokens, dim); its inverse is `tokens_first`."""
    return x.transpose(0, 2, 3, 1, 4)


def tokens_first(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 3, 1, 2, 4)


def attention(qkv: np.ndarray, table: np.ndarray, index: np.ndarray, mask: np.ndarray, scale: np.ndarray) -> Arrays:
    """Mixed values (outer, tokens, inner, heads, dim) and shares (outer, inner, heads, tokens, tokens)."""
    q, k, v = (heads_first(qkv[:, :, :, part]) for part in range(3))
    scores = scale * (q @ k.swapaxes(-1, -2))
    if table.ndim == 2:
        scores = scores + table[index.astype(int)].transpose(2, 0, 1)
    if mask.ndim == 3:
        scores = scores + mask[:, None, None]
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = shares / shares.sum(axis=-1, keepdims=True)
    return tokens_first(shares @ v), shares


def attention_grad(
    qkv: np.ndarray,
    table: np.ndarray,
    index: np.ndarray,
    mask: np.ndarray,
    scale: np.ndarray,
    shares: np.ndarray,
    grad: np.ndarray,
) -> Arrays:
    q, k, v = (heads_first(qkv[:, :, :, part]) for part in range(3))
    g = heads_first(grad)
    of_shares = g @ v.swapaxes(-1, -2)
    of_scores = shares * (of_shares - (of_shares * shares).sum(axis=-1, keepdims=True))
    parts = (scale * (of_scores @ k), scale * (of_scores.swapaxes(-1, -2) @ q), shares.swapaxes(-1, -2) @ g)
    of_table = np.zeros(table.shape)
    if table.ndim == 2:
        np.add.at(of_table, index.astype(int), of_scores.sum(axis=(0, 1)).transpose(1, 2, 0))
    return np.stack([tokens_first(part) for part in parts], axis=3), of_table


def cosine(qkv: np.ndarray, scale: np.ndarray) -> Arrays:
    """qkv (rows, 3, heads, dim) -> q of length `scale`, k of length 1, v."""
    lengths = np.maximum(np.sqrt((qkv * qkv).sum(axis=-1, keepdims=True)), 1e-12)
    lengths[:, 2] = 1
    out = qkv / lengths
    out[:, 0] *= scale[:, None]
    return (out,)


def cosine_grad(qkv: np.ndarray, scale: np.ndarray, grad: np.ndarray) -> Arrays:
    factors = np.stack([scale, np.ones_like(scale)])[:, :, None]
    x, g = qkv[:, :2], grad[:, :2]
    lengths = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    short = lengths < 1e-12  # there, the length is a constant
    lengths = np.where(short, 1e-12, lengths)
    direction = x / lengths
    along = (direction * g).sum(axis=-1, keepdims=True)
    dx = factors / lengths * (g - np.where(short, 0, along) * direction)
    return np.concatenate([dx, grad[:, 2:]], axis=1), along[:, 0, :, 0].sum(axis=0)


def square_sum(*arrays: np.ndarray) -> Arrays:
    return (np.array([sum((array * array).sum() for array in arrays)]),)


# --- calling ------------------------------------------------------------------------------------------------------


def run(library: str, name: str, inputs: Arrays, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Outputs of a kernel; an element that it does not write is NaN."""
    outputs = [np.full(shape, np.nan, np.float32) for shape in shapes]
    kernels.call(library, name, *inputs, *outputs)
    return outputs


def exact(formula: Callable[..., Arrays], inputs: Arrays) -> Arrays:
    with np.errstate(all="ignore"):
        return formula(*(array.astype(np.float64) for array in inputs))


def assert_close(found: np.ndarray, expected: np.ndarray, error: float, what: object) -> None:
    """An error of at most `error` times the largest value; NaN fails."""
    assert found.shape == expected.shape, what
    worst = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert worst <= error, f"{what}: {worst:.1e}"


def check(library: str, name: str, formula: Callable[..., Arrays], inputs: Arrays, error: float = ERROR) -> Arrays:
    """Compare all outputs of a kernel with a formula; returns those of the kernel."""
    expected = exact(formula, inputs)
    found = run(library, name, inputs, *(array.shape for array in expected))
    shapes = [array.shape for array in inputs]
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_close(ours, theirs, error, (name, "output", number, "of", shapes))
    return tuple(found)


# --- values and gradients ---------------------------------------------------------------------------------------------

DRAWN = np.random.default_rng(0).integers(1, 70, (8, 3))
SIZES = [(1, 1, 1), (1, 5, 3), (7, 1, 9), (33, 17, 1), (16, 64, 48), (197, 31, 65), (3, 200, 130)]
SIZES += [(int(rows), int(out), int(width)) for rows, out, width in DRAWN]


def linear_inputs(rows: int, out: int, width: int) -> tuple[np.ndarray, ...]:
    """x, weight, bias and the gradient of the result."""
    return numbers(1, rows, width), numbers(2, out, width), numbers(3, out), numbers(4, rows, out)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear(library: str, sizes: tuple[int, int, int]) -> None:
    x, weight, bias, grad = linear_inputs(*sizes)
    check(library, "linear_float32", linear, (x, weight, bias))
    check(library, "linear_float32", linear, (x, weight))
    check(library, "linear_float32", linear, (x, weight, bias, grad))
    check(library, "linear_float32_grad", linear_grad, (x, weight, grad))
    check(library, "linear_float32_grad", lambda *inputs: linear_grad(*inputs)[:2], (x, weight, grad))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_norm_linear(library: str, sizes: tuple[int, int, int]) -> None:
    x, weight, bias, grad = linear_inputs(*sizes)
    norm = (x, numbers(5, x.shape[1]), numbers(6, x.shape[1]), np.array([1e-1], np.float32))
    check(library, "norm_linear_float32", norm_linear, (*norm, weight, bias))
    check(library, "norm_linear_float32", norm_linear, (*norm, weight))
    found = run(library, "norm_linear_float32_grad", (*norm, weight, grad), x.shape, *[x[0].shape] * 2, weight.shape)
    expected = exact(norm_linear_grad, (*norm, weight, grad))
    term = (np.abs(grad) @ np.abs(weight)).max() * 3  # in one or two dimensions, the terms of the gradient cancel
    for ours, theirs, size in zip(found, expected, (term, term * len(x), term * len(x), np.inf), strict=False):
        assert np.abs(ours - theirs).max() <= ERROR * min(size, max(np.abs(theirs).max(), term))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gelu_linear(library: str, sizes: tuple[int, int, int]) -> None:
    x, weight, bias, grad = linear_inputs(*sizes)
    check(library, "gelu_linear_float32", gelu_linear, (2 * x, weight, bias))
    check(library, "gelu_linear_float32_grad", gelu_linear_grad, (2 * x, weight, grad))


def gelu_of(library: str, x: np.ndarray) -> np.ndarray:
    """What the kernel takes for GELU(x): its product with 1."""
    one = np.ones((1, 1), np.float32)
    (found,) = run(library, "gelu_linear_float32", (x.reshape(-1, 1), one), (x.size, 1))
    return found.reshape(x.shape)


def test_gelu(library: str) -> None:
    """From -30 to 30 and where it bends; the error is that of erf times x, so also in the tails."""
    ranges = np.linspace(-30, 30, 4001), np.linspace(-6, 6, 4001), np.array([0.0, -0.0, 1e-30, 1e30, -1e30])
    for x in (part.astype(np.float32) for part in ranges):
        (expected,), (steepness,) = exact(lambda x: (gelu(x),), (x,)), exact(lambda x: (slope(x),), (x,))
        assert (np.abs(gelu_of(library, x) - expected) <= 3e-7 * np.abs(x)).all()
        column, grad = x.reshape(-1, 1), numbers(1, x.size, 1)
        inputs = (column, np.ones((1, 1), np.float32), grad)
        dx, dw = run(library, "gelu_linear_float32_grad", inputs, column.shape, (1, 1))
        assert (np.abs(dx[:, 0] - grad[:, 0] * steepness) <= 1e-6 * np.abs(grad[:, 0])).all()
        assert np.abs(dw - (grad[:, 0] * expected).sum()) <= 1e-6 * np.abs(grad[:, 0] * x).sum()


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 17, 96, 768])
@pytest.mark.parametrize("rows", [1, 33, 600])
def test_layer_norm(library: str, rows: int, dim: int) -> None:
    x, weight, bias, grad = 2 * numbers(1, rows, dim) + 1, numbers(2, dim), numbers(3, dim), numbers(4, rows, dim)
    eps = np.array([1e-2], np.float32)
    check(library, "layer_norm", layer_norm, (x, weight, bias, eps))
    found = run(library, "layer_norm_grad", (x, weight, bias, eps, grad), (rows, dim), (dim,), (dim,))
    expected = exact(layer_norm_grad, (x, weight, bias, eps, grad))
    # in one or two dimensions, the terms of the gradient cancel: the error is relative to them
    term = (unit(x.astype(np.float64), eps)[1] * np.abs(grad * weight).max(axis=-1, keepdims=True)).max()
    assert np.abs(found[0] - expected[0]).max() <= ERROR * term
    assert np.abs(found[1] - expected[1]).max() <= ERROR * np.abs(grad).sum(axis=0).max()
    assert_close(found[2], expected[2], ERROR, "bias")


def test_layer_norm_of_rows_that_hardly_vary(library: str) -> None:
    """A variance far below epsilon, and far above; a mean far from zero; no variance at all."""
    weight, bias, eps = np.ones(48, np.float32), np.zeros(48, np.float32), np.array([1e-6], np.float32)
    for x in (1e-5 * numbers(1, 5, 48), 1e4 * numbers(2, 5, 48), 100 + numbers(3, 5, 48), np.full((5, 48), 7.0)):
        x = x.astype(np.float32)
        check(library, "layer_norm", layer_norm, (x, weight, bias, eps), 2e-5)
        check(library, "layer_norm_grad", layer_norm_grad, (x, weight, bias, eps, numbers(4, 5, 48)), 2e-5)


TOKENS = [1, 2, 16, 36, 49, 50, 196, 197]
DIMS = [8, 12, 20, 24, 32, 48, 64, 80, 128]
NONE = np.zeros(1, np.float32)


def attention_inputs(outer: int, tokens: int, inner: int, heads: int, dim: int, biased: bool, masked: bool) -> Arrays:
    """qkv, table, index, mask (about a third of the pairs are -100), scale, and the gradient of the result."""
    qkv, grad = numbers(1, outer, tokens, inner, 3, heads, dim), numbers(2, outer, tokens, inner, heads, dim)
    table = numbers(3, 2 * tokens + 3, heads) if biased else NONE
    index = np.random.default_rng(5).integers(0, 2 * tokens + 3, (tokens, tokens), np.int32)
    mask = NONE
    if masked:
        mask = np.where(numbers(4, outer, tokens, tokens) < -0.4, np.float32(-100), np.float32(0))
    return qkv, table, index, mask, np.array([dim**-0.5], np.float32), grad


def check_attention(library: str, inputs: Arrays, error: float = ERROR) -> None:
    *forward, grad = inputs
    _, shares = check(library, "attention", attention, tuple(forward), error)
    check(library, "attention", lambda *given: attention(*given)[:1], tuple(forward), error)
    check(library, "attention_grad", attention_grad, (*forward, shares, grad), error)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention(library: str, tokens: int, dim: int) -> None:
    """All sizes of windows and heads; outer, inner, number of heads, bias and mask in turn."""
    turn = TOKENS.index(tokens) * len(DIMS) + DIMS.index(dim)
    for biased in (False, True):
        outer, inner, heads = (1, 5, 2)[turn % 3], (1, 3)[turn % 2], (1, 3, 2, 4)[turn % 4]
        check_attention(library, attention_inputs(outer, tokens, inner, heads, dim, biased, turn % 5 < 2))
        turn += 1


@pytest.mark.parametrize(("biased", "masked"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 3), (5, 1), (5, 3), (40, 1)])
def test_attention_of_many_windows(library: str, outer: int, inner: int, biased: bool, masked: bool) -> None:
    for tokens, heads, dim in ((16, 3, 32), (9, 1, 20), (65, 2, 16)):
        check_attention(library, attention_inputs(outer, tokens, inner, heads, dim, biased, masked))


def test_attention_to_one_token(library: str) -> None:
    """Scores of some hundreds: a score's rounding error, 6e-8 of it, is a relative error of its share."""
    qkv, *others = attention_inputs(2, 49, 1, 2, 32, True, False)
    check_attention(library, (10 * qkv, *others), 6e-8 * 500 * 4)


def test_shares_far_below_the_largest(library: str) -> None:
    """exp as far as float32 reaches, 1e-38; below, a share may be that small, or 0."""
    tokens = 512
    below = np.linspace(0, 200, tokens).astype(np.float32)
    table = -below[:, None]
    index = np.stack([np.roll(np.arange(tokens, dtype=np.int32), turn) for turn in range(tokens)])
    qkv = np.zeros((1, tokens, 1, 3, 1, 8), np.float32)
    shapes = ((1, tokens, 1, 1, 8), (1, 1, 1, tokens, tokens))
    _, shares = run(library, "attention", (qkv, table, index, NONE, np.ones(1, np.float32)), *shapes)
    expected = exact(attention, (qkv, table, index, NONE, np.ones(1)))[1]
    assert (np.abs(shares - expected) <= 1e-6 * expected + 2e-38).all()
    np.testing.assert_allclose(shares.sum(axis=-1, dtype=np.float64), 1, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize(("heads", "dim"), [(1, 1), (1, 8), (3, 12), (2, 20), (4, 32), (1, 80)])
def test_cosine(library: str, rows: int, heads: int, dim: int) -> None:
    qkv, scale, grad = numbers(1, rows, 3, heads, dim), numbers(2, heads), numbers(3, rows, 3, heads, dim)
    check(library, "cosine", cosine, (qkv, scale))
    found = run(library, "cosine_grad", (qkv, scale, grad), qkv.shape, (heads,))
    dx, of_scale = exact(cosine_grad, (qkv, scale, grad))
    # a vector's gradient is larger the shorter the vector is; in one dimension it is the rounding error of 0
    steepness = np.maximum(np.abs(grad / np.sqrt((qkv * qkv).sum(-1, keepdims=True))).max(-1, keepdims=True), 1)
    assert (np.abs(found[0] - dx) <= ERROR * steepness * np.maximum(np.abs(scale)[:, None], 1)).all()
    assert np.abs(found[1] - of_scale).max() <= ERROR * np.abs(grad[:, 0]).sum(axis=(0, 2)).max()


def test_cosine_of_vectors_of_zeros_and_hardly_more(library: str) -> None:
    """PyTorch's normalize: the length is at least 1e-12, and below that a constant for the gradient."""
    qkv, scale, grad = numbers(1, 5, 3, 2, 8), numbers(2, 2), numbers(3, 5, 3, 2, 8)
    qkv[1] = 0
    qkv[2] *= 1e-13
    (found,) = check(library, "cosine", cosine, (qkv, scale))
    np.testing.assert_array_equal(found[1], 0)
    dx, _ = check(library, "cosine_grad", cosine_grad, (qkv, scale, grad))
    np.testing.assert_allclose(dx[1, 1], 1e12 * grad[1, 1], rtol=1e-6)


SHAPES: list[tuple[int, ...]] = [(3, 4), (1,), (), (5, 1, 7), (70_000,), (300, 301), (1, 1, 1)]


def drawn(seed: int) -> list[np.ndarray]:
    """An array of each of `SHAPES`."""
    return [np.array(numbers(seed + number, *shape), np.float32) for number, shape in enumerate(SHAPES)]


def test_square_sum(library: str) -> None:
    arrays = tuple(drawn(0))
    for some in (arrays, arrays[1:2], arrays[2:3], arrays * 20):
        check(library, "square_sum", square_sum, some)


def adamw_inputs(factor: float, skip: float) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """The first five inputs, and weights, both moments and gradients, for parameters in three groups."""
    values = np.array([0.1, 0.02, 0.003, 0.1, 0.0, 0.05, 1e-3], np.float32)  # rates, decays, epsilon
    group = np.array([0, 2, 1, 1, 0, 2, 2], np.int32)
    head = [values, np.array([0.9, 0.99], np.float32), group]
    head += [np.array([number], np.float32) for number in (factor, skip)]
    state = [drawn(seed) for seed in (0, 100, 200, 300)]
    for second in state[2]:
        np.abs(second, out=second)
    return head, state


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_adamw(library: str, factor: float) -> None:
    head, state = adamw_inputs(factor, skip=0)
    values, betas, group = (array.astype(np.float64) for array in head[:3])
    before = [[array.astype(np.float64) for array in arrays] for arrays in state]
    done = np.zeros(1, np.float32)
    kernels.call(library, "adamw", *head, *(array for arrays in state for array in arrays), done)
    for number, (weight, first, second, grad) in enumerate(zip(*before, strict=True)):
        rate, decay = values[int(group[number])], values[3 + int(group[number])]
        first = betas[0] * first + (1 - betas[0]) * factor * grad
        second = betas[1] * second + (1 - betas[1]) * (factor * grad) ** 2
        weight = weight - rate * (first / (np.sqrt(second) + values[6]) + decay * weight)
        for found, expected in zip(state, (weight, first, second, grad), strict=True):
            assert_close(found[number], expected, 1e-6, number)
    assert done == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_adamw_leaves_everything_as_it_is_if_the_update_is_skipped(library: str, bad: float) -> None:
    head, state = adamw_inputs(float("nan"), skip=1)
    for grad in state[3]:
        grad[...] = bad
    before = [[array.copy() for array in arrays] for arrays in state]
    kernels.call(library, "adamw", *head, *(array for arrays in state for array in arrays), np.zeros(1, np.float32))
    for found, expected in zip(state, before, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.tobytes() == theirs.tobytes()


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bfloat16_library(library: str) -> str:
    if not {"avx512_bf16", "amx_bf16"} & set(kernels.processor().split()):
        pytest.skip("this processor has neither avx512_bf16 nor AMX")
    return library


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16, of two equally near the even one, in float64; infinity follows the largest."""
    low = x.view(np.uint32) & np.uint32(0xFFFF0000)
    high = low + np.uint32(0x10000)
    down = low.view(np.float32).astype(np.float64)
    up = high.view(np.float32).astype(np.float64)
    finite_up = np.where(np.isinf(up), np.sign(down) * 2.0**128, up)
    x = x.astype(np.float64)
    nearer_up = np.abs(finite_up - x) < np.abs(x - down)
    tie = np.abs(finite_up - x) == np.abs(x - down)
    return np.where(nearer_up | (tie & (low >> np.uint32(16) & np.uint32(1) == 1)), up, down)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear_bfloat16(bfloat16_library: str, sizes: tuple[int, int, int]) -> None:
    """Products of the rounded inputs, summed in float32: each sum is exact to 1e-6 of the sum of absolute products."""
    x, weight, bias, grad = linear_inputs(*sizes)
    rx, rw, rg = rounded(x), rounded(weight), rounded(grad)
    for extra in ((), (bias,)):
        (found,) = run(bfloat16_library, "linear_bfloat16", (x, weight, *extra), grad.shape)
        most = np.abs(rx) @ np.abs(rw).T + (np.abs(bias) if extra else 0)
        assert (np.abs(found - rx @ rw.T - (bias if extra else 0)) <= 1e-6 * most).all()
    dx, dw, db = run(bfloat16_library, "linear_bfloat16_grad", (x, weight, grad), x.shape, weight.shape, bias.shape)
    assert (np.abs(dx - rg @ rw) <= 1e-6 * (np.abs(rg) @ np.abs(rw))).all()
    assert (np.abs(dw - rg.T @ rx) <= 1e-6 * (np.abs(rg).T @ np.abs(rx))).all()
    assert_close(db, grad.astype(np.float64).sum(axis=0), ERROR, "the bias gradient is not rounded")
    pair = run(bfloat16_library, "linear_bfloat16_grad", (x, weight, grad), x.shape, weight.shape)
    np.testing.assert_array_equal(pair[0], dx)
    np.testing.assert_array_equal(pair[1], dw)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gelu_linear_bfloat16(bfloat16_library: str, sizes: tuple[int, int, int]) -> None:
    """GELU and its slope in float32, then products of rounded numbers."""
    x, weight, bias, grad = linear_inputs(*sizes)
    rx, rw, rg = rounded(gelu_of(bfloat16_library, x)), rounded(weight), rounded(grad)
    (found,) = run(bfloat16_library, "gelu_linear_bfloat16", (x, weight, bias), grad.shape)
    assert (np.abs(found - rx @ rw.T - bias) <= 1e-6 * (np.abs(rx) @ np.abs(rw).T + np.abs(bias))).all()
    inputs, shapes = (x, weight, grad), (x.shape, weight.shape, bias.shape)
    dx, dw, db = run(bfloat16_library, "gelu_linear_bfloat16_grad", inputs, *shapes)
    assert (np.abs(dx - rg @ rw * slope(x.astype(np.float64))) <= 2e-6 * (np.abs(rg) @ np.abs(rw))).all()
    assert (np.abs(dw - rg.T @ rx) <= 1e-6 * (np.abs(rg).T @ np.abs(rx))).all()
    assert_close(db, grad.astype(np.float64).sum(axis=0), ERROR, "the bias gradient is not rounded")


def test_rounding_to_bfloat16(bfloat16_library: str) -> None:
    """A product with 1 is the rounded number: ties, the largest numbers, zeros, infinity, NaN, subnormal numbers."""
    bits = np.random.default_rng(0).integers(0, 2**32, 4000, np.uint32)
    halves = np.arange(0x3F80, 0x4080, dtype=np.uint32) << 16
    edges = [0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0xFF800000, 0, 0x80000000, 0x00800000]
    nans = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F80FFFF, 0x7FBFFFFF]
    small = [1, 0x7FFFFF, 0x8000, 0x80000001, 0x807FFFFF]
    special = np.array([*edges, *nans, *small], np.uint32)
    x = np.concatenate([bits, halves, halves + 0x7FFF, halves + 0x8000, halves + 0x8001, special]).view(np.float32)
    with np.errstate(all="ignore"):
        expected = rounded(x)
    (found,) = run(bfloat16_library, "linear_bfloat16", (x.reshape(-1, 1), np.ones((1, 1), np.float32)), (len(x), 1))
    found = found.reshape(-1)
    nan, tiny = np.isnan(x), np.abs(x) < 1.2e-38
    assert np.isnan(found[nan]).all() and not np.isnan(found[~nan]).any()
    np.testing.assert_array_equal(found[~nan & ~tiny], expected[~nan & ~tiny])
    assert (np.abs(found[tiny]) < 1.2e-38).all()  # the processor may take them for 0


# --- NaN and infinity -------------------------------------------------------------------------------------------------


def attention_case(masked: bool) -> Arrays:
    return attention_inputs(2, 19, 3, 2, 20, True, masked)


def with_shares(*inputs: np.ndarray) -> Arrays:
    """Inputs of the gradient of attention from those of `attention_inputs`."""
    *forward, grad = inputs
    return (*forward, exact(attention, tuple(forward))[1].astype(np.float32), grad)


X, WEIGHT, BIAS, GRAD = linear_inputs(37, 19, 40)
EPS = np.array([1e-5], np.float32)
QKV, FACTOR, QKV_GRAD = numbers(1, 37, 3, 2, 20), numbers(2, 2), numbers(3, 37, 3, 2, 20)
#: kernel -> its formula, inputs, and which of them are drawn a bad number into
CASES: dict[str, tuple[Callable[..., Arrays], Arrays, tuple[int, ...]]] = {
    "linear_float32": (linear, (X, WEIGHT, BIAS), (0, 1, 2)),
    "linear_float32_grad": (linear_grad, (X, WEIGHT, GRAD), (0, 1, 2)),
    "gelu_linear_float32": (gelu_linear, (X, WEIGHT, BIAS), (0, 1, 2)),
    "gelu_linear_float32_grad": (gelu_linear_grad, (X, WEIGHT, GRAD), (0, 1, 2)),
    "layer_norm": (layer_norm, (X, X[0].copy(), X[1].copy(), EPS), (0, 1, 2)),
    "layer_norm_grad": (layer_norm_grad, (X, X[0].copy(), X[1].copy(), EPS, X[::-1].copy()), (0, 1, 4)),
    "norm_linear_float32": (norm_linear, (X, X[0].copy(), X[1].copy(), EPS, WEIGHT, BIAS), (0, 1, 2, 4, 5)),
    "norm_linear_float32_grad": (norm_linear_grad, (X, X[0].copy(), X[1].copy(), EPS, WEIGHT, GRAD), (0, 1, 4, 5)),
    "attention": (attention, attention_case(True)[:5], (0, 1, 3)),
    "attention_grad": (attention_grad, with_shares(*attention_case(True)), (0, 5, 6)),
    "cosine": (cosine, (QKV, FACTOR), (0, 1)),
    "cosine_grad": (cosine_grad, (QKV, FACTOR, QKV_GRAD), (0, 1, 2)),
    "square_sum": (square_sum, (X, WEIGHT, np.array(3.0, np.float32)), (0, 1, 2)),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", CASES)
def test_nan_and_infinity_show(library: str, name: str, bad: float) -> None:
    """Wherever the formula is not a finite number for an input with a bad one, neither is the kernel's output."""
    formula, inputs, poisoned = CASES[name]
    check(library, name, formula, inputs)
    rng = np.random.default_rng(0)
    for number in poisoned:
        for _ in range(4):
            given = [array.copy() for array in inputs]
            given[number].reshape(-1)[rng.integers(given[number].size)] = bad
            expected = exact(formula, tuple(given))
            found = run(library, name, tuple(given), *(array.shape for array in expected))
            for ours, theirs in zip(found, expected, strict=True):
                assert not np.isfinite(ours[~np.isfinite(theirs)]).any(), (name, number)
                if np.isnan(bad):
                    assert np.isnan(ours[np.isnan(theirs)]).all(), (name, number)
            if np.isnan(bad):
                assert any(np.isnan(array).any() for array in found), (name, number)


def test_a_nan_in_q_k_or_v_reaches_all_that_depend_on_it(library: str) -> None:
    """In q: the row of its token; in k: all rows of its head; in v: its column; nothing in other areas and heads."""
    qkv, *others, _ = attention_inputs(2, 7, 2, 3, 8, False, False)
    for part in range(3):
        given = qkv.copy()
        given[1, 4, 0, part, 2, 5] = np.nan
        (mixed,) = run(library, "attention", (given, *others), (2, 7, 2, 3, 8))
        expected = np.zeros(mixed.shape, bool)
        expected[1, 4 if part == 0 else slice(None), 0, 2, 5 if part == 2 else slice(None)] = True
        np.testing.assert_array_equal(np.isnan(mixed), expected)


def test_nan_in_gradients_shows(library: str) -> None:
    """In the one weight and its moments."""
    head, state = adamw_inputs(1.0, skip=0)
    state[3][0][1, 2] = np.nan
    kernels.call(library, "adamw", *head, *(array for arrays in state for array in arrays), np.zeros(1, np.float32))
    assert all(np.isnan(arrays[0][1, 2]) for arrays in state)
    assert sum(int(np.isnan(array).sum()) for arrays in state for array in arrays) == 4


# --- threads, repetitions, forks ----------------------------------------------------------------------------------


def large_cases() -> dict[str, tuple[Arrays, list[tuple[int, ...]]]]:
    """Kernel -> inputs that are shared among threads, and shapes of the outputs."""
    x, weight, bias, grad = linear_inputs(301, 67, 257)
    qkv, *others = attention_inputs(5, 49, 3, 3, 20, True, True)
    forward, areas = (qkv, *others[:4]), (5, 3, 3, 49, 49)
    rows, factor, rows_grad = numbers(1, 700, 3, 2, 20), numbers(2, 2), numbers(3, 700, 3, 2, 20)
    tall = numbers(5, 1100, 33)
    cases: dict[str, tuple[Arrays, list[tuple[int, ...]]]] = {
        "linear_float32": ((x, weight, bias), [grad.shape]),
        "linear_float32_grad": ((x, weight, grad), [x.shape, weight.shape, bias.shape]),
        "gelu_linear_float32": ((x, weight, bias), [grad.shape]),
        "gelu_linear_float32_grad": ((x, weight, grad), [x.shape, weight.shape, bias.shape]),
        "layer_norm": ((tall, tall[0], tall[1], EPS), [tall.shape]),
        "layer_norm_grad": ((tall, tall[0], tall[1], EPS, tall), [tall.shape, (33,), (33,)]),
        "attention": (forward, [others[4].shape, areas]),
        "attention_grad": (with_shares(*forward, others[4]), [qkv.shape, others[0].shape]),
        "cosine": ((rows, factor), [rows.shape]),
        "cosine_grad": ((rows, factor, rows_grad), [rows.shape, (2,)]),
        "square_sum": (tuple(drawn(0) * 3), [(1,)]),
    }
    return cases


LARGE = large_cases()


def all_bits(library: str, name: str) -> bytes:
    """What a kernel returns, or leaves of the arrays that it changes."""
    if name == "adamw":
        head, state = adamw_inputs(0.5, skip=0)
        arrays = [*head, *(array for arrays in state for array in arrays), np.zeros(1, np.float32)]
        kernels.call(library, name, *arrays)
    else:
        inputs, shapes = LARGE[name]
        arrays = run(library, name, inputs, *shapes)
    return b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize("name", [*LARGE, "adamw"])
def test_the_bits_depend_on_neither_the_number_of_threads_nor_chance(library: str, name: str) -> None:
    """Products are oneDNN's: shared among another number of threads they may be rounded otherwise."""
    for threads in (1, 2, 3, 7):
        kernels.open_library(library).set_threads(threads)
        expected = all_bits(library, name)
        assert all(all_bits(library, name) == expected for _ in range(20)), threads
        if threads == 1:
            alone = expected
        elif "linear" not in name:
            assert expected == alone, threads


def in_a_fork(work: Callable[[], bool], seconds: int = 30) -> bool:
    """Whether a child process returned True in time."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not pytest's, which waits for the kernel to return
        signal.alarm(seconds)  # ends the child
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["gelu_linear_float32", "linear_float32", "attention", "layer_norm_grad", "adamw"])
def test_a_forked_process_has_threads_of_its_own(library: str, name: str) -> None:
    kernels.open_library(library).set_threads(3)
    expected = all_bits(library, name)  # starts the threads, which the child does not have
    assert in_a_fork(lambda: all(all_bits(library, name) == expected for _ in range(3)))
    assert all_bits(library, name) == expected


def test_a_fork_while_another_thread_runs_kernels(library: str) -> None:
    expected = all_bits(library, "attention")
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(lambda: [all_bits(library, "attention") for _ in range(60)])
        for _ in range(5):
            assert in_a_fork(lambda: all_bits(library, "attention") == expected)
        assert set(busy.result()) == {expected}


def test_several_callers_take_turns(library: str) -> None:
    names: list[Any] = ["gelu_linear_float32", "attention", "layer_norm_grad", "square_sum"]
    expected = {name: all_bits(library, name) for name in names}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: (name, all_bits(library, name)), names * 20))
    assert all(bits == expected[name] for name, bits in found)


# --- memory -----------------------------------------------------------------------------------------------------------

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
OPTIONS = ["-std=c++17", "-O1", "-g", "-pthread", "-fopenmp-simd", *SANITIZERS]


@pytest.mark.compiles
def test_every_kernel_stays_inside_its_arrays(tmp_path: Path) -> None:
    """tests/kernels_driver.cpp calls them with arrays of exactly their size, under the compiler's checks."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler")

    def compiled(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [compiler, *OPTIONS, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    if compiled(tmp_path / "empty.cpp", "-o", tmp_path / "empty").returncode:
        pytest.skip(f"{compiler} has no sanitizers")
    program = tmp_path / "driver"
    done = compiled("-march=native", ROOT / "tests" / "kernels_driver.cpp", kernels.SOURCE, "-o", program)
    assert done.returncode == 0, done.stderr
    # another number of threads leaves those of before asleep, which counts as a leak
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
