"""Worker processes: they end with their parent, survive a decoder that crashes, and give memory back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from src.data import workers
from src.data.job import ImageJob
from src.data.sources import DataError
from src.data.transform import Key
from tests.helpers import ROOT

BATCH = 8


@dataclass(frozen=True)
class Numbers:
    """A source whose image i holds the number i."""

    count: int
    labels: np.ndarray
    place: Path = Path("numbers")
    classes: list[str] = field(default_factory=lambda: ["all"])

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> bytes:
        return str(index).encode()


@dataclass(frozen=True)
class Filled:
    """A transform that fills the image with its number.

    Args:
        kills: for this number it sends `with_signal` to its own process.
        raises: for this number it has a mistake.
        sleeps: for this number it takes ten minutes.
    """

    size: tuple[int, int] = (2, 3)
    channels: int = 1
    kills: int = -1
    with_signal: int = signal.SIGSEGV
    raises: int = -1
    sleeps: int = -1

    def __call__(self, content: bytes, key: Key, out: np.ndarray) -> None:
        number = int(content)
        if number == self.kills:
            os.kill(os.getpid(), self.with_signal)
        if number == self.raises:
            raise ZeroDivisionError("a mistake of ours")
        if number == self.sleeps:
            time.sleep(600)
        out[:] = number


def job(transform: Filled | None = None, count: int = 64) -> ImageJob:
    return ImageJob(Numbers(count, np.zeros(count, np.int32)), transform or Filled(), 0, True)  # type: ignore[arg-type]


def items(count: int = 64, repeats: int = 1, batch: int = BATCH) -> Iterator[np.ndarray]:
    rows = np.stack([np.arange(count), np.zeros(count, int), np.zeros(count, int)], axis=1)
    for _ in range(repeats):
        yield from rows.reshape(-1, batch, 3)


def loaded(transform: Filled | None = None, count: int = 2, repeats: int = 1) -> np.ndarray:
    """The numbers in all images, in order."""
    batches = workers.batches(job(transform), items(repeats=repeats), BATCH, count)
    return np.concatenate([batch.images[:, 0, 0, 0].copy() for batch in batches])


def alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def wait_for(condition: object, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.05)
    return bool(condition())  # type: ignore[operator]


def test_batches_come_in_order_whichever_worker_loads_them() -> None:
    for count in (0, 1, 3):
        np.testing.assert_array_equal(loaded(count=count, repeats=5), np.tile(np.arange(64), 5))


def test_a_batch_of_many_tasks_is_more_than_the_socket_takes() -> None:
    batches = workers.batches(job(count=16384), items(16384, batch=16384), 16384, 1)
    batch = next(batches)
    np.testing.assert_array_equal(batch.images[:, 0, 1, 2], np.arange(16384))


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_an_image_that_crashes_its_worker_is_replaced(name: str) -> None:
    transform = Filled(kills=13, with_signal=getattr(signal, name))
    faults, numbers = [], []
    for batch in workers.batches(job(transform), items(repeats=2), BATCH, 2):
        faults += [fault for _, fault in batch.faults]
        numbers += batch.images[:, 0, 0, 0].tolist()
    assert [fault.image for fault in faults] == [13, 13]
    assert faults[0] == faults[1] and faults[0].reason == "its decoding ended the process, or took too long"
    expected = [faults[0].replacement if number == 13 else number for number in [*range(64)] * 2]
    assert numbers == expected and faults[0].replacement != 13
    np.testing.assert_array_equal(loaded(), np.arange(64))  # the pool works as before


def test_an_image_that_takes_too_long_is_replaced() -> None:
    stream = workers.Stream(workers.Pool(2, slow=1.0), job(Filled(sleeps=13)), items(), BATCH)
    faults, count = [], 0
    for batch in stream.run():
        faults += [fault for _, fault in batch.faults]
        count += len(batch.images)
    assert [fault.image for fault in faults] == [13] and faults[0].reason.endswith("took too long")
    assert count == 64


def test_a_worker_that_is_killed_from_outside_stops_the_run_with_a_line() -> None:
    with pytest.raises(DataError, match=r"^data\.workers: .*\(signal 9: .* smaller data\.workers"):
        loaded(Filled(kills=13, with_signal=signal.SIGKILL), count=2)
    np.testing.assert_array_equal(loaded(), np.arange(64))


def test_a_worker_that_is_killed_without_a_task_is_started_anew() -> None:
    assert len(loaded()) == 64
    pool = workers.pool(2)
    pool.workers[0].kill()
    pool.workers[0].wait()
    np.testing.assert_array_equal(loaded(), np.arange(64))
    assert workers.pool(2) is pool and all(worker.poll() is None for worker in pool.workers)


def test_a_mistake_of_ours_is_raised_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a mistake of ours"):
        loaded(Filled(raises=13))
    np.testing.assert_array_equal(loaded(), np.arange(64))


def test_a_stream_that_is_left_early_leaves_nothing_behind() -> None:
    before = len([*Path("/proc/self/fd").iterdir()])
    pool = workers.pool(2)
    for _ in range(3):
        batches = workers.batches(job(), items(repeats=10), BATCH, 2)
        assert next(batches).images[1, 0, 0, 0] == 1
        batches.close()  # type: ignore[attr-defined]
        assert not pool.sent and not pool.waiting
    assert len([*Path("/proc/self/fd").iterdir()]) <= before + 6  # the sockets and the status of the pool
    np.testing.assert_array_equal(loaded(), np.arange(64))


def test_two_streams_take_turns() -> None:
    training = workers.batches(job(), items(repeats=20), BATCH, 2)
    for number in range(20):
        first = np.concatenate([next(training).images[:, 0, 0, 0].copy() for _ in range(8)])
        np.testing.assert_array_equal(first, np.arange(64))
        if number % 5 == 0:
            np.testing.assert_array_equal(loaded(), np.arange(64))


def test_the_memory_of_a_stream_is_given_back() -> None:
    def shared() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssShmem")).split()[1])  # kB

    large = Filled(size=(512, 512))
    before = shared()
    for _ in range(3):
        batches = workers.batches(job(large), items(repeats=2), BATCH, 2)
        total = sum(float(batch.images.sum()) for batch in batches)
        assert total == 2 * 512 * 512 * sum(range(64))
    assert shared() < before + 1000


def test_a_single_image_cannot_end_this_process() -> None:
    stream = workers.Stream(workers.Pool(8), job(Filled(kills=0), 1), items(1, batch=1), 1)
    (batch,) = stream.run()
    assert len(stream.pool.workers) == 1, "more workers than tasks"
    assert [fault.replacement for _, fault in batch.faults] == [-1]


def test_workers_leave_signals_to_their_parent() -> None:
    batches = workers.batches(job(), items(repeats=4), BATCH, 2)
    next(batches)
    for worker in workers.pool(2).workers:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, name)
    assert len(list(batches)) == 31


#: starts workers, prints their numbers, and ends in a way of its own
PARENT = """
import os, signal, sys, time
from src.data import workers
from tests.test_workers import job, items
batches = workers.batches(job(), items(repeats=1000), 8, 2)
next(batches)
print(*[worker.pid for worker in workers.pool(2).workers], flush=True)
{ending}
"""


@pytest.mark.parametrize(
    "ending",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os._exit(3)",
        "raise KeyboardInterrupt",
        "list(batches); batches = None",
    ],
)
def test_workers_end_with_their_parent_however_it_ends(ending: str) -> None:
    code = PARENT.format(ending=ending)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    processes = [int(word) for word in done.stdout.split()]
    assert len(processes) == 2, done.stderr
    assert wait_for(lambda: not any(alive(process) for process in processes))
    if ending.startswith("list"):
        assert done.returncode == 0 and not done.stderr


def test_a_worker_imports_no_mindspore() -> None:
    code = "import sys; import src.data.worker; print([name for name in sys.modules if 'mindspore' in name])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
