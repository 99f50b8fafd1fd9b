"""Apply a function to every image of a source, in processes that never import MindSpore."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.decode import Box, Decoder, Undecodable
from ..data.job import readable
from ..data.sources import Source
from ..errors import UserError

CHUNK = 8  # images of a task
AHEAD = 4  # tasks of each process that wait or are done
ENDED = "its decoding ended the process"

#: takes the content of an image
Work = Callable[[bytes], Any]


@dataclass(frozen=True)
class Bad:
    """An image that cannot be used, and why."""

    reason: str


def decoded(decoder: Decoder, content: bytes) -> np.ndarray:
    """Decode a whole image, (height, width, channels).

    Raises:
        Undecodable: it cannot be used.
    """
    picture = decoder.open(content)
    box: Box = (0, 0, picture.height, picture.width)
    return picture.crop(box, (picture.height, picture.width))


def sweep(
    source: Source, work: Work, processes: int, title: str, indices: Sequence[int] | np.ndarray | None = None
) -> Generator[tuple[int, Any], None, None]:
    """Yield each image and the result of `work`, or `Bad`, in their order, with a progress bar on a terminal.

    An image whose decoding ends the process is bad too.

    Args:
        work: a function or an object that can be pickled; it may raise `Undecodable`.
        indices: images; None is all.
    """
    numbers = list(range(len(source))) if indices is None else [int(index) for index in indices]
    bar = tqdm(total=len(numbers), desc=title, unit=" images", disable=not sys.stderr.isatty(), leave=False)
    with closing(bar), closing(_results(source, work, processes, numbers)) as results:
        for index, result in results:
            bar.update()
            yield index, result


def _results(source: Source, work: Work, processes: int, numbers: list[int]) -> Generator[tuple[int, Any], None, None]:
    chunks = iter([numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)])
    pool = _pool(source, work, processes)
    pending: deque[tuple[list[int], Future[list[Any]] | None]] = deque()
    try:
        while True:
            while len(pending) < AHEAD * processes and (following := next(chunks, None)) is not None:
                pending.append((following, _submitted(pool, following)))
            if not pending:
                return
            chunk, future = pending.popleft()
            try:
                results = future.result() if future is not None else None
            except BrokenProcessPool:
                results = None
            if results is None:  # a process ended, maybe in another chunk: try this one image by image
                results = list(_one_by_one(source, work, chunk))
                pool.shutdown()
                pool = _pool(source, work, processes)
                pending = deque((later, _submitted(pool, later)) for later, _ in pending)
            yield from zip(chunk, results, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(source: Source, work: Work, chunk: list[int]) -> Iterator[Any]:
    pool = _pool(source, work, 1)
    try:
        for index in chunk:
            try:
                future = _submitted(pool, [index])
                yield future.result()[0] if future is not None else Bad(ENDED)
            except BrokenProcessPool:
                yield Bad(ENDED)
                pool.shutdown()
                pool = _pool(source, work, 1)
    finally:
        pool.shutdown()


def _pool(source: Source, work: Work, processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    try:
        with outside():  # the process that watches semaphores starts here
            return ProcessPoolExecutor(processes, context, _start, (source, work))
    except OSError as error:
        raise UserError(
            f"/dev/shm: processes cannot be started without it ({error.strerror or error}); mount it with 1 MB or more"
        ) from None


def _submitted(pool: ProcessPoolExecutor, chunk: list[int]) -> Future[list[Any]] | None:
    """Submit a chunk; None if a process has ended."""
    try:
        # processes start here, and keep Ctrl-C blocked, which their parent handles
        with uninterrupted(), outside():
            return pool.submit(_run, chunk)
    except BrokenProcessPool:
        return None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the end; processes that start meanwhile never see it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield
        return
    pressed: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))  # threads may get it too
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def outside() -> Iterator[None]:
    """Leave the working folder, whose files (numpy.py, socket.py, ...) a process that starts would import."""
    folder = os.open(".", os.O_PATH | os.O_CLOEXEC)
    os.chdir("/")
    try:
        yield
    finally:
        os.fchdir(folder)
        os.close(folder)


#: source and work of a process
_job: list[tuple[Source, Work]] = []


def _start(source: Source, work: Work) -> None:
    """Prepare a process, which ends with its parent."""
    import cv2

    cv2.setNumThreads(1)
    _job[:] = [(source, work)]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run(indices: list[int]) -> list[Any]:
    return [_one(*_job[0], index) for index in indices]


def _one(source: Source, work: Work, index: int) -> Any:
    """Return the result for an image."""
    try:
        with readable():
            return work(source.read(index))
    except Undecodable as error:
        return Bad(str(error))
