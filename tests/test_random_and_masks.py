"""Random numbers that resume exactly, and block masks with an exact count."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from src.config import masked_count
from src.methods.masking import BlockMask, resize_mask
from src.models.random import CounterUniform
from tests.helpers import counted

pytestmark = pytest.mark.usefixtures("graph_mode")

COUNT = 100_000


#: numbers of one sample: a grid of 14 x 14 and more
WIDTH = 200


class Draw(nn.Cell):
    """So many numbers of a stream, as (samples, WIDTH)."""

    def __init__(self, stream: str, count: int, seed: int = 0, rank: int = 0, ranks: int = 1):
        super().__init__()
        ms.set_seed(seed)
        self.uniform = CounterUniform(stream)
        self.uniform.rank, self.uniform.ranks = rank, ranks
        self.batch = count // WIDTH

    def construct(self) -> Tensor:
        return self.uniform(self.batch, WIDTH).reshape(-1)


def drawn(cell: Any) -> np.ndarray:
    """What a cell draws for the next pass of training."""
    return counted(cell, cell.batch).asnumpy().copy()


@pytest.fixture(scope="module")
def draws() -> dict[str, list[np.ndarray]]:
    """Three draws of 1e5 numbers of two streams and of another seed."""
    cells = {"mask": Draw("mask", COUNT), "drop": Draw("drop", COUNT), "seed 1": Draw("mask", COUNT, seed=1)}
    return {name: [drawn(cell) for _ in range(3)] for name, cell in cells.items()}


@pytest.mark.compiles
def test_numbers_are_uniform_in_zero_to_one(draws: dict[str, list[np.ndarray]]) -> None:
    for values in [draw for stream in draws.values() for draw in stream]:
        assert values.dtype == np.float32 and values.shape == (COUNT,)
        assert values.min() >= 0 and values.max() < 1
        assert abs(values.mean() - 0.5) < 5 * np.sqrt(1 / 12 / COUNT)
        assert abs(values.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / COUNT)
        counts = np.histogram(values, bins=100, range=(0, 1))[0]
        chi_square = ((counts - COUNT / 100) ** 2 / (COUNT / 100)).sum()
        assert chi_square < 99 + 5 * np.sqrt(2 * 99)


def test_draws_streams_seeds_and_neighbours_are_uncorrelated(draws: dict[str, list[np.ndarray]]) -> None:
    mask, drop, other = draws["mask"], draws["drop"], draws["seed 1"]
    pairs = {
        "draws 1 and 2": (mask[0], mask[1]),
        "draws 1 and 3": (mask[0], mask[2]),
        "streams": (mask[0], drop[0]),
        "streams, one draw later": (mask[1], drop[0]),
        "seeds": (mask[0], other[0]),
        "neighbours": (mask[0][1:], mask[0][:-1]),
        "lag 14, a grid's row": (mask[0][14:], mask[0][:-14]),
        "lag 200, a sample": (mask[0][WIDTH:], mask[0][:-WIDTH]),
    }
    found = {name: np.corrcoef(*pair)[0, 1] for name, pair in pairs.items()}
    assert all(abs(value) < 0.02 for value in found.values()), found


@pytest.mark.compiles
def test_the_seed_fixes_the_numbers(draws: dict[str, list[np.ndarray]]) -> None:
    again = Draw("mask", COUNT)
    for _ in range(2):  # only a counted pass draws other numbers
        np.testing.assert_array_equal(again().asnumpy(), draws["mask"][0])
    assert not np.array_equal(draws["mask"][0], draws["seed 1"][0])


@pytest.mark.compiles
def test_restoring_the_counter_continues_the_sequence(draws: dict[str, list[np.ndarray]]) -> None:
    resumed = Draw("mask", COUNT)
    assert int(resumed.uniform.draws) == 0
    resumed.uniform.draws.set_data(Tensor(2 * COUNT // WIDTH, ms.int64))
    np.testing.assert_array_equal(drawn(resumed), draws["mask"][2])
    assert int(resumed.uniform.draws) == 3 * COUNT // WIDTH


@pytest.mark.compiles
def test_a_sample_gets_its_numbers_whoever_computes_it() -> None:
    """Two updates of 8 samples: in one pass, in two passes of 4, and on two ranks of 4."""
    whole, passes = Draw("mask", 8 * WIDTH), Draw("mask", 4 * WIDTH)
    ranks = [Draw("mask", 4 * WIDTH, rank=rank, ranks=2) for rank in range(2)]
    for _ in range(2):
        expected = drawn(whole)
        np.testing.assert_array_equal(np.concatenate([drawn(passes) for _ in range(2)]), expected)
        found = [drawn(cell) for cell in ranks]
        np.testing.assert_array_equal(np.concatenate(found), expected)
        assert not np.array_equal(*found)
    assert [int(cell.uniform.draws) for cell in (whole, passes, *ranks)] == [16] * 4


@pytest.mark.compiles
def test_late_draws_are_as_good_as_early_ones() -> None:
    """The products inside stay within int64 for every draw number a long run reaches."""
    cell = Draw("mask", COUNT)
    cell.uniform.draws.set_data(Tensor(2**31 + 5, ms.int64))
    first, second = drawn(cell), drawn(cell)
    assert first.min() >= 0 and first.max() < 1 and abs(first.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


# --- masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "ratio", "expected"),
    [(196, 0.75, 147), (49, 0.75, 37), (64, 0.6, 39), (16, 0.75, 12), (6, 0.5, 3), (7, 0.5, 4), (144, 0.9, 130)],
)
def test_masked_count(blocks: int, ratio: float, expected: int) -> None:
    """All blocks but int(blocks * (1 - ratio)), as FastMIM and MAE keep them."""
    assert masked_count(blocks, ratio, "floor_visible") == expected


class Mask(nn.Cell):
    def __init__(self, grid: tuple[int, int], ratio: float, batch: int, seed: int = 3):
        super().__init__()
        ms.set_seed(seed)
        self.mask = BlockMask(grid, masked_count(grid[0] * grid[1], ratio, "floor_visible"))
        self.batch = batch

    def construct(self) -> Tensor:
        return self.mask(self.batch)


@pytest.mark.compiles
def test_a_seed_gives_the_masks_of_earlier_versions() -> None:
    """Three passes of four images with 16 blocks, a bit for each block, as version 0.1.0 drew them."""
    cell = Mask((4, 4), 0.75, 4, seed=7)
    found = [np.packbits(drawn(cell).astype(bool).reshape(4, 16), axis=1).tolist() for _ in range(3)]
    assert found == [
        [[126, 175], [190, 111], [249, 63], [223, 213]],
        [[251, 121], [252, 231], [142, 255], [219, 125]],
        [[254, 117], [239, 87], [247, 174], [221, 252]],
    ]


class FromNoise(nn.Cell):
    def __init__(self, grid: tuple[int, int], ratio: float):
        super().__init__()
        self.mask = BlockMask(grid, masked_count(grid[0] * grid[1], ratio, "floor_visible"))

    def construct(self, noise: Tensor) -> Tensor:
        return self.mask.from_noise(noise)


@pytest.mark.compiles
def test_every_sample_hides_exactly_as_many_blocks_in_places_of_its_own() -> None:
    cell = Mask((4, 6), 0.6, 256)
    first, second = drawn(cell), drawn(cell)
    for mask in (first, second):
        assert mask.shape == (256, 4, 6) and mask.dtype == np.float32
        assert set(np.unique(mask)) == {0.0, 1.0}
        np.testing.assert_array_equal(mask.sum(axis=(1, 2)), masked_count(24, 0.6, "floor_visible"))
    assert len({sample.tobytes() for sample in first}) > 250  # independent across samples
    assert np.mean([np.array_equal(a, b) for a, b in zip(first, second, strict=True)]) < 0.01  # another mask per pass
    # every block is hidden equally often: 15 of 24
    share = np.concatenate([first, second]).mean(axis=0)
    assert np.abs(share - 15 / 24).max() < 5 * np.sqrt(0.25 / 512)


def test_the_blocks_with_the_largest_noise_are_hidden() -> None:
    noise = np.random.default_rng(0).random((5, 6), np.float32)
    mask = FromNoise((2, 3), 0.5)(Tensor(noise)).asnumpy()
    assert mask.shape == (5, 2, 3)
    for values, hidden in zip(noise, mask.reshape(5, 6), strict=True):
        assert set(np.flatnonzero(hidden)) == set(np.argsort(values)[3:])


class Resize(nn.Cell):
    def __init__(self, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid

    def construct(self, mask: Tensor) -> Tensor:
        return resize_mask(mask, self.grid)


@pytest.mark.parametrize("grid", [(2, 3), (4, 3), (2, 9), (8, 6)])
def test_resizing_a_mask_repeats_its_blocks(grid: tuple[int, int]) -> None:
    mask = np.random.default_rng(1).integers(0, 2, (3, 2, 3)).astype(np.float32)
    expected = mask.repeat(grid[0] // 2, axis=1).repeat(grid[1] // 3, axis=2)
    np.testing.assert_array_equal(Resize(grid)(Tensor(mask)).asnumpy(), expected)
