"""Cells with our own CPU kernels against cells of MindSpore's operations: values, gradients, updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from src.config import (
    CaiTConfig,
    ClassifyConfig,
    EncoderConfig,
    Recipe,
    SwinConfig,
    SwinV2Config,
    TrainConfig,
    ViTConfig,
)
from src.engine.optim import build_optimizer
from src.engine.step import Accumulate, TrainStep
from src.methods import build_method
from src.models.relative import SpreadBias
from src.operations import kernels, rows, updates
from src.operations.forms import build
from tests.helpers import WithGradients, counted, numbers, snapshot

pytestmark = [pytest.mark.usefixtures("graph_mode", "our_kernels"), pytest.mark.compiles]

#: relative to the largest value; both are float32 with sums in another order
ERROR = 5e-6


@pytest.fixture(scope="module")
def our_kernels(graph_mode: None) -> Iterator[None]:
    description = kernels.set_up(threads=2)
    if not kernels.available():
        pytest.skip(description)
    yield


def assert_close(found: Any, expected: Any, error: float, what: object) -> None:
    found, expected = (np.asarray(value.asnumpy(), np.float64) for value in (found, expected))
    assert found.shape == expected.shape, what
    assert np.abs(found - expected).max() <= error * np.abs(expected).max(), what


def both(make: Callable[[], Any]) -> tuple[Any, Any]:
    """What `make` builds with our kernels, and without."""
    ours = make()
    with kernels.builtin():
        theirs = make()
    return ours, theirs


# --- operations on rows -----------------------------------------------------------------------------------------------


#: tokens of a window -> its rows and columns
GRIDS = {9: (3, 3), 10: (2, 5), 16: (4, 4)}


class Attending(nn.Cell):
    """An attention on rows with fixed sizes and mask.

    Args:
        attend: the cell.
        sizes: outer, tokens, inner.
        biased: whether the last input is a position table.
        mask: constant, or None.
    """

    def __init__(self, attend: nn.Cell, sizes: tuple[int, int, int], biased: bool, mask: np.ndarray | None):
        super().__init__()
        self.attend, self.sizes, self.biased = attend, sizes, biased
        self.mask = None if mask is None else Tensor(mask)

    def construct(self, *inputs: Tensor) -> Tensor:
        outer, tokens, inner = self.sizes
        if not self.biased:
            return self.attend(*inputs, outer, tokens, inner, None, self.mask)
        bias = self.attend.bias_of(inputs[-1])
        return self.attend(*inputs[:-1], outer, tokens, inner, bias, self.mask)


@dataclass(frozen=True)
class Case:
    """An operation with the shapes of its inputs and of its output.

    Attributes:
        operation: builds it.
        shapes, out: of its inputs and of its output.
        several: whether it returns a tuple, whose first part counts.
    """

    operation: Callable[[], nn.Cell]
    shapes: tuple[tuple[int, ...], ...]
    out: tuple[int, ...]
    several: bool = False

    @classmethod
    def attention(
        cls, sizes: tuple[int, int, int], heads: int, dim: int, biased: bool, masked: bool, cosine: bool = False
    ) -> Case:
        outer, tokens, inner = sizes
        mask = np.where(numbers(7, outer, tokens, tokens) < -0.5, np.float32(-100), np.float32(0)) if masked else None

        def make() -> nn.Cell:
            arguments = (rows.AttendCosine, heads) if cosine else (rows.Attend, heads, dim**-0.5)
            positions = SpreadBias(GRIDS[tokens], heads) if biased else None
            return Attending(build(*arguments, positions), sizes, biased, mask)

        shapes: list[tuple[int, ...]] = [(outer * tokens * inner, 3 * heads * dim)]
        shapes += [(heads,)] if cosine else []
        shapes += [((2 * GRIDS[tokens][0] - 1) * (2 * GRIDS[tokens][1] - 1), heads)] if biased else []
        return cls(make, tuple(shapes), (outer * tokens * inner, heads * dim))


NORM = ((24,), (24,))
CASES = {
    "affine": Case(partial(build, rows.Affine), ((37, 24), (19, 24), (19,)), (37, 19)),
    "affine of one row": Case(partial(build, rows.Affine), ((1, 8), (3, 8), (3,)), (1, 3)),
    "product": Case(partial(build, rows.Product), ((37, 24), (19, 24)), (37, 19)),
    "normalize": Case(partial(build, rows.Normalize, 1e-3), ((37, 24), (24,), (24,)), (37, 24), several=True),
    "affine onto rows": Case(partial(build, rows.AffineOnto), ((37, 24), (19, 24), (19,), (37, 19)), (37, 19)),
    "gelu and affine onto rows": Case(
        partial(build, rows.GeluAffineOnto), ((37, 24), (19, 24), (19,), (37, 19)), (37, 19)
    ),
    "norm and affine": Case(partial(build, rows.NormAffine, 1e-3), ((37, 24), *NORM, (19, 24), (19,)), (37, 19)),
    "norm and product": Case(partial(build, rows.NormProduct, 1e-3), ((37, 24), *NORM, (19, 24)), (37, 19)),
    "gelu and affine": Case(partial(build, rows.GeluAffine), ((37, 24), (19, 24), (19,)), (37, 19)),
    "attend": Case.attention((3, 17, 1), 2, 12, biased=False, masked=False),
    "attend, bias": Case.attention((2, 10, 1), 3, 16, biased=True, masked=False),
    "attend, windows": Case.attention((4, 9, 2), 1, 8, biased=True, masked=True),
    "attend, mask": Case.attention((4, 16, 3), 2, 20, biased=False, masked=True),
    "cosine, windows": Case.attention((4, 9, 2), 3, 8, biased=True, masked=True, cosine=True),
    "cosine": Case.attention((2, 16, 1), 2, 20, biased=True, masked=False, cosine=True),
}


@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, True) for name in CASES), *((name, False) for name in CASES if name.startswith(("attend", "cosine")))],
)
def test_a_kernel_gives_values_and_gradients_of_mindspores_operations(name: str, training: bool) -> None:
    case = CASES[name]
    inputs = [Tensor(2 * numbers(number, *shape)) for number, shape in enumerate(case.shapes)]
    factor = Tensor(numbers(9, *case.out))
    cells = (WithGradients(cell, case.several, len(inputs)) for cell in both(case.operation))
    (found, ours), (expected, theirs) = (cell.set_train(training)(factor, *inputs) for cell in cells)
    assert_close(found, expected, ERROR, "value")
    assert len(ours) == len(theirs) == len(inputs)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(other.asnumpy()).max() > 0.01
        assert_close(one, other, ERROR, f"gradient {number}")


@pytest.fixture
def bfloat16(our_kernels: None) -> Iterator[None]:
    description = kernels.set_up(threads=2, precision="bfloat16")
    usable = kernels.available()
    if usable:
        yield
    kernels.set_up(threads=2)
    if not usable:
        pytest.skip(description)


@pytest.mark.parametrize("name", ["affine", "product", "gelu and affine"])
def test_products_in_bfloat16_are_exact_to_its_eight_bits(bfloat16: None, name: str) -> None:
    case = CASES[name]
    inputs = [Tensor(numbers(number, *shape)) for number, shape in enumerate(case.shapes)]
    factor = Tensor(numbers(9, *case.out))
    cells = (WithGradients(cell, case.several, len(inputs)) for cell in both(case.operation))
    (found, ours), (expected, theirs) = (cell(factor, *inputs) for cell in cells)
    for one, other in zip((found, *ours[:2]), (expected, *theirs[:2]), strict=True):
        assert_close(one, other, 1e-2, name)
        assert np.abs(one.asnumpy() - other.asnumpy()).max() > 1e-4 * np.abs(other.asnumpy()).max()  # not float32
    for one, other in zip(ours[2:], theirs[2:], strict=True):  # the bias
        assert_close(one, other, ERROR, name)


def operations_used(cell: nn.Cell) -> set[str]:
    return {type(part).__name__ for _, part in cell.cells_and_names()}


def test_every_form_with_kernels_is_tested() -> None:
    """By the cases above and by the updates below."""
    tested = {name for case in CASES.values() for name in operations_used(case.operation())}
    tested |= {"GlobalNormKernel", "AdamWUpdateKernel"}
    forms = {name: form for name, form in vars(kernels).items() if name.endswith("Kernel")}
    assert {name for name, form in forms.items() if form.construct is not nn.Cell.construct} <= tested  # others: bases
    with kernels.builtin():
        assert not any(name.endswith("Kernel") for case in CASES.values() for name in operations_used(case.operation()))


# --- updates ----------------------------------------------------------------------------------------------------------

SHAPES = ((5, 7), (3,), (2, 1, 9))


def parameters(prefix: str, seed: int, positive: bool = False) -> ParameterTuple:
    arrays = [numbers(seed + number, *shape) for number, shape in enumerate(SHAPES)]
    named = zip(arrays, "abc", strict=True)
    return ParameterTuple([Parameter(np.abs(a) if positive else a, name=f"{prefix}{name}") for a, name in named])


class Updates(nn.Cell):
    """The norm of gradients and an update with a factor; `factor` None: without."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = parameters("weight", 10)
        self.first, self.second = parameters("first", 20), parameters("second", 30, positive=True)
        self.norm = build(updates.GlobalNorm)
        self.update = build(updates.AdamWUpdate, (0.9, 0.99), [0, 1, 0], self.weights, self.first, self.second)

    def construct(self, values: Tensor, factor: Tensor | None, *grads: Tensor) -> Tensor:
        norm = self.norm(grads)
        return ops.depend(norm, self.update(values, factor, grads))


@pytest.mark.parametrize("factor", [None, 0.5])
def test_updates_with_kernels_equal_mindspores(factor: float | None) -> None:
    values = Tensor(np.array([0.1, 0.02, 0.1, 0.0, 1e-3], np.float32))
    scale = None if factor is None else Tensor(factor, ms.float32)
    grads = [Tensor(numbers(40 + number, *shape)) for number, shape in enumerate(SHAPES)]
    ours, theirs = both(Updates)
    start = snapshot(ours.get_parameters())
    for _ in range(2):
        norm, expected = (cell(values, scale, *grads) for cell in (ours, theirs))
        assert float(norm) == pytest.approx(float(expected), rel=1e-6) and norm.shape == expected.shape
    after, wanted = snapshot(ours.get_parameters()), snapshot(theirs.get_parameters())
    assert set(after) == set(wanted) and len(after) == 9
    for name, value in after.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.abs(value - start[name]).max() > 1e-3


# --- networks ---------------------------------------------------------------------------------------------------------

SIDE, BATCH, CLASSES = 32, 4, 3
VIT = ViTConfig(
    image_size=(SIDE, SIDE), patch_size=8, embed_dim=24, depth=2, num_heads=2, position="learned", drop_path=0.3
)
SWIN = SwinConfig(
    image_size=(SIDE, SIDE + 8), embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=3, drop_path=0.2
)
ENCODERS: dict[str, EncoderConfig] = {
    "vit, a table per block": replace(
        VIT, relative_position="block", k_bias=False, layer_scale=0.5, position="none", init="scaled"
    ),
    "vit, one table": replace(VIT, relative_position="shared", qkv_bias=False, class_token=True),
    "swin": SWIN,
    "swin v2": SwinV2Config(
        image_size=(SIDE, SIDE + 8), embed_dim=8, depths=(2,), num_heads=(2,), window_size=3, main_norm_every=1
    ),
    "cait": CaiTConfig(
        image_size=(SIDE, SIDE),
        patch_size=8,
        embed_dim=24,
        depth=1,
        depth_token_only=1,
        num_heads=2,
        layer_scale=0.5,
        drop_path=0.2,
    ),
}


def network(encoder: EncoderConfig) -> Any:
    """A classifier whose parameters are all random, so that every gradient matters; the same at each call."""
    ms.set_seed(1)
    head = ClassifyConfig(num_classes=CLASSES, pool="cls" if encoder.num_prefix_tokens else "mean", fc_norm=False)
    method = build_method(Recipe(encoder=encoder, method=head))
    for number, parameter in enumerate(method.trainable_params()):
        noise = 0.1 * numbers(number, *parameter.shape)
        parameter.set_data(Tensor(parameter.asnumpy() + noise))
    return method


def batch(seed: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return Tensor(numbers(seed, BATCH, 3, height, width)), Tensor(np.arange(BATCH, dtype=np.int32) % CLASSES)


class Gradients(nn.Cell):
    """Loss and gradients of all weights."""

    def __init__(self, method: Any):
        super().__init__(auto_prefix=False)
        self.method = method
        self.weights = ParameterTuple(method.trainable_params())
        self.run = ops.value_and_grad(method, None, self.weights, has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        outputs, grads = self.run(*inputs)
        return outputs[0], grads


@pytest.mark.parametrize("name", ENCODERS)
def test_networks_have_the_loss_and_gradients_of_mindspores_operations(name: str) -> None:
    encoder = ENCODERS[name]
    ours, theirs = (Gradients(cell).set_train(True) for cell in both(lambda: network(encoder)))
    inputs = batch(0, *encoder.image_size)
    (loss, found), (expected_loss, expected) = (cell(*inputs) for cell in (ours, theirs))
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    names = [parameter.name for parameter in theirs.weights]
    largest = max(np.abs(gradient.asnumpy()).max() for gradient in expected)
    for key, one, other in zip(names, found, expected, strict=True):
        error = np.abs(one.asnumpy() - other.asnumpy()).max()
        # a key bias has no gradient: what is left are rounding errors of gradients of the size of the others
        assert error <= 1e-5 * max(np.abs(other.asnumpy()).max(), 0.1 * largest), key
        assert np.abs(other.asnumpy()).max() > 0, key


def trainer() -> tuple[TrainStep, Accumulate]:
    """Two passes for an update, with weight decay, layer decay and a norm above which gradients are scaled down."""
    method = network(replace(VIT, depth=1, drop_path=0.0))
    optimizer = build_optimizer(method, TrainConfig(eps=1e-3, weight_decay=0.1, layer_decay=0.7))
    step = TrainStep(method, optimizer, clip_norm=0.5, accumulate=2)
    accumulate = Accumulate(step)
    return step.set_train(True), accumulate.set_train(True)


def test_training_with_kernels_moves_the_weights_as_mindspores_operations_do() -> None:
    """Weights and moments after three updates of two passes each."""
    norms: list[list[float]] = [[], []]
    ends = []
    for found, (step, accumulate) in zip(norms, both(trainer), strict=True):
        optimizer = step.optimizer
        start = snapshot(optimizer.weights)
        for number in range(3):
            counted(accumulate, BATCH, *batch(2 * number, SIDE, SIDE))
            values = optimizer.step_values(lambda scale: 0.02 * scale, number + 1)
            found.append(float(counted(step, BATCH, values, *batch(2 * number + 1, SIDE, SIDE))[-1]))
        ends.append(snapshot([*optimizer.weights, *optimizer.state().values()]))
        assert all(np.abs(ends[-1][name] - value).max() > 1e-3 for name, value in start.items())
    assert min(norms[0]) > 0.5  # the gradients are scaled down
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for name, value in ends[1].items():
        np.testing.assert_allclose(ends[0][name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=name)
