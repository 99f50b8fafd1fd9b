"""Several ranks in one process: shards, sums, shared errors, and what the self-test finds.

Ranks are threads here, and the sum over ranks is made of what each of them brings; real processes are started in
test_launchers.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from src.config import DataConfig
from src.data.loader import Loader
from src.data.sources import DataError, Files, Names
from src.engine import parallel
from src.engine.bad_images import BadImages
from src.engine.parallel import RankError

pytestmark = pytest.mark.usefixtures("graph_mode")

#: runs work(rank) on so many ranks and returns what each returned or raised
OnRanks = Callable[[int, Callable[[int], Any]], list[Any]]


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> OnRanks:
    """Threads that see themselves as ranks; `parallel.total` sums over them."""
    place = threading.local()

    def run(ranks: int, work: Callable[[int], Any]) -> list[Any]:
        barrier = threading.Barrier(ranks, timeout=5)
        brought: list[Any] = [None] * ranks
        results: list[Any] = [None] * ranks

        def total(values: Any) -> np.ndarray:
            brought[place.rank] = np.asarray(values, np.float32)
            barrier.wait()
            found = np.sum(brought, axis=0)
            barrier.wait()
            return found

        def thread(rank: int) -> None:
            place.rank = rank
            try:
                results[rank] = work(rank)
            except Exception as error:
                results[rank] = error

        monkeypatch.setattr(parallel, "rank", lambda: place.rank)
        monkeypatch.setattr(parallel, "size", lambda: ranks)
        monkeypatch.setattr(parallel, "total", total)
        threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(ranks)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return results

    return run


def source(count: int, name: str = "a") -> Files:
    names = Names.of([f"{name}/{number}.jpg" for number in range(count)])
    return Files(Path("data"), Path("data"), names, np.zeros(count, np.int32), [name])


def shard(count: int, batch: int, rank: int, ranks: int, training: bool = True) -> Loader:
    return Loader(source(count), DataConfig(), (16, 16), 3, batch, ("image",), 3, training, rank, ranks)


# --- shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [64, 83])
def test_a_global_batch_is_the_same_whichever_way_it_is_split(count: int) -> None:
    for epoch in range(2):
        whole = shard(count, 8, 0, 1).order(epoch).reshape(-1, 8)
        passes = shard(count, 4, 0, 1).order(epoch).reshape(-1, 4)
        ranks = [shard(count, 4, rank, 2).order(epoch).reshape(-1, 4) for rank in range(2)]
        assert [len(part) for part in ranks] == [len(whole)] * 2
        for update, images in enumerate(whole):
            np.testing.assert_array_equal(np.concatenate([part[update] for part in ranks]), images)
            np.testing.assert_array_equal(passes[2 * update : 2 * update + 2].ravel(), images)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [8, 9, 11])
def test_an_evaluation_counts_every_image_once(count: int, ranks: int) -> None:
    orders = [shard(count, 4, rank, ranks, training=False) for rank in range(ranks)]
    seen = np.concatenate([loader.order(0) for loader in orders])
    assert sorted(seen[seen >= 0]) == list(range(count))
    for loader in orders:
        assert len(loader.order(0)) == 4 * len(loader)


def test_a_rank_without_a_batch_has_none() -> None:
    assert list(shard(4, 4, 1, 2, training=False).epoch(0)) == []


def test_too_few_images_for_the_ranks() -> None:
    with pytest.raises(
        DataError, match=r"train.batch_size: 8 on each of 2 ranks is more than the 13 images .* write 6"
    ):
        shard(13, 8, 0, 2)


# --- sums and errors --------------------------------------------------------------------------------------------


def test_gather_and_broadcast(on_ranks: OnRanks) -> None:
    tables = on_ranks(3, lambda rank: parallel.gather([rank, 10 * rank]))
    for table in tables:
        np.testing.assert_array_equal(table, [[0, 0], [1, 10], [2, 20]])
    weights = [Parameter(Tensor(np.full(4, rank + 0.1, np.float32)), name="w") for rank in range(3)]
    on_ranks(3, lambda rank: parallel.broadcast([weights[rank]]))
    for weight in weights:
        np.testing.assert_array_equal(weight.asnumpy(), np.full(4, 0.1, np.float32))


def test_an_error_of_one_rank_ends_all_with_one_line(on_ranks: OnRanks) -> None:
    def work(failing: tuple[int, ...]) -> Callable[[int], Any]:
        def step() -> int:
            if parallel.rank() in failing:
                raise DataError("data: there is no folder x\u00e9")
            return parallel.rank()

        return lambda rank: parallel.together(step)

    assert on_ranks(3, work(())) == [0, 1, 2]
    for failing, text in (
        ((1, 2), "rank 1: data: there is no folder x\u00e9"),
        ((0, 1, 2), "data: there is no folder x\u00e9"),
    ):
        found = on_ranks(3, work(failing))
        assert [(type(error), str(error)) for error in found] == [(RankError, text)] * 3


def test_texts_of_all_ranks_arrive_in_their_order(on_ranks: OnRanks) -> None:
    texts = {0: [], 1: ["\u00e9\u4e2d", "two words"], 2: ["x" * 3000]}
    found = on_ranks(3, lambda rank: parallel.gather_texts(list(texts[rank])))
    assert found == [["\u00e9\u4e2d", "two words", "x" * 3000]] * 3
    assert on_ranks(2, lambda rank: parallel.gather_texts([])) == [[], []]


class Quiet:
    """A run folder."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def writes(self) -> bool:
        return parallel.rank() == 0


def fault(number: int) -> dict[str, str]:
    return {"image": f"{number}.jpg", "reason": "it is empty", "replacement": "0.jpg"}


def test_rank_0_lists_the_unusable_images_of_all_ranks_once(on_ranks: OnRanks, tmp_path: Path) -> None:
    (tmp_path / "bad_images.jsonl").write_text(json.dumps(fault(3)) + "\n" + '{"image": "torn')

    def work(rank: int) -> list[int]:
        bad = BadImages(Quiet(tmp_path), shard(83, 4, rank, 2))  # type: ignore[arg-type]
        return [bad.report([fault(number) for number in numbers]) for numbers in ((rank,), (), (rank, 3), (8 + rank,))]

    assert on_ranks(2, work) == [[2, 2, 3, 5]] * 2
    lines = (tmp_path / "bad_images.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines[2:]] == ["0.jpg", "1.jpg", "8.jpg", "9.jpg"]


def test_too_many_unusable_images_end_every_rank(on_ranks: OnRanks, tmp_path: Path) -> None:
    """Of 83 images one per cent is less than the ten that are always allowed."""

    def work(share: float, count: int) -> list[Any]:
        def report(rank: int) -> int:
            loader = replace(shard(83, 4, rank, 2), config=DataConfig(bad_limit=share))
            bad = BadImages(Quiet(tmp_path), loader)  # type: ignore[arg-type]
            return bad.report([fault(number) for number in range(count) if number % 2 == rank])

        return on_ranks(2, report)

    assert work(0.01, 10) == [10, 10] and work(0.3, 24) == [24, 24]
    for share, count, limit in ((0.01, 11, 10), (0.3, 25, 24)):
        for error in work(share, count):
            assert str(error) == (
                f"data.bad_limit: {count} of 83 training images cannot be used, more than {limit}; "
                f"{tmp_path}/bad_images.jsonl lists them: repair or remove them, or write a larger data.bad_limit"
            )


# --- self-test --------------------------------------------------------------------------------------------------


def weights_of(rank: int) -> dict[str, Parameter]:
    """Equal on all ranks; the counter is beyond what float32 can tell apart."""
    values = {"encoder.w": np.arange(6, dtype=np.float32), "mask.draws": np.array(2**40 + 1, np.int64)}
    return {name: Parameter(Tensor(value), name=name) for name, value in values.items()}


def refusals(on_ranks: OnRanks, **faults: Any) -> list[str]:
    """What the self-test says on three ranks, rank 2 having the faults."""

    def work(rank: int) -> str:
        loader, weights, recipe = shard(83, 4, rank, 3), weights_of(rank), "seed: 0\n"
        if rank == 2:
            loader, weights = faults.get("loader", loader), {**weights, **faults.get("weights", {})}
            recipe = faults.get("recipe", recipe)
        return parallel.self_test(loader, weights, recipe)

    return [str(found) for found in on_ranks(3, work)]


def test_the_self_test_passes_what_is_right(on_ranks: OnRanks) -> None:
    text = "3 ranks: self-test passed (24 images each in an epoch, disjoint; 2 parameters equal)"
    assert refusals(on_ranks) == [text] * 3


def test_repeated_images_pass_the_self_test(on_ranks: OnRanks) -> None:
    config = DataConfig(repeats=3)

    def work(rank: int) -> str:
        loader = Loader(source(300), config, (16, 16), 3, 4, ("image",), 3, True, rank, 3)
        return parallel.self_test(loader, weights_of(rank), "seed: 0\n")

    right = "3 ranks: self-test passed (84 images each in an epoch, repeated; 2 parameters equal)"
    assert on_ranks(3, work) == [right] * 3


ONE_OFF = {"mask.draws": Parameter(Tensor(np.array(2**40, np.int64)), name="mask.draws")}
OTHER_FILES = replace(shard(83, 4, 2, 3), source=source(83, "b"))


class Uneven(Loader):
    """Forgets its last batch."""

    def order(self, epoch: int) -> np.ndarray:
        return super().order(epoch)[:-4]


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ({"weights": ONE_OFF}, "rank 2: 1 parameters differ from rank 0's, first mask.draws"),
        ({"weights": {"x": ONE_OFF["mask.draws"]}}, "rank 2: has other parameters than rank 0"),
        ({"recipe": "seed: 1\n"}, "rank 2: has another recipe than rank 0"),
        ({"loader": OTHER_FILES}, "rank 2: lists other images than rank 0"),
        ({"loader": shard(83, 4, 1, 3)}, "rank 1: reads 24 images of an epoch that are read twice, as does rank 2"),
        ({"loader": Uneven(source(83), DataConfig(), (16, 16), 3, 4, ("image",), 3, True, 2, 3)}, "rank 2: reads 20 "),
    ],
    ids=["weights", "names", "recipe", "files", "same shard", "uneven"],
)
def test_the_self_test_names_the_rank(on_ranks: OnRanks, faults: dict[str, Any], text: str) -> None:
    found = refusals(on_ranks, **faults)
    assert len(set(found)) == 1 and found[0].startswith(text), found


def test_images_nobody_reads(on_ranks: OnRanks) -> None:
    """Every rank forgets its last batch: the shards are disjoint but not complete."""

    def work(rank: int) -> None:
        parallel.check_shards(Uneven(source(83), DataConfig(), (16, 16), 3, 4, ("image",), 3, True, rank, 3))

    texts = {str(found) for found in on_ranks(3, work)}
    assert texts == {"rank 0: no rank reads 23 images, more than the incomplete last batch"}


def test_sums_that_do_not_arrive(on_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> None:
        if rank == 0:
            total = parallel.total
            monkeypatch.setattr(parallel, "total", lambda values: total(values) * (0.5 if parallel.rank() == 1 else 1))
        started.wait()
        parallel.check_sums()

    started = threading.Barrier(2, timeout=20)
    found = on_ranks(2, work)
    assert str(found[1]) == "rank 1: an all-reduce of ones over 2 ranks gives 1"
