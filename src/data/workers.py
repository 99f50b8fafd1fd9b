"""Batches of images from worker processes, through shared memory.

The workers are clean interpreters that never import MindSpore, so Pillow's work does not wait for the training, and a
decoder that crashes does not end it. They end with the process that started them, however that ends. Which worker loads
an image changes nothing (`job`).
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .job import Fault, ImageJob
from .sources import DataError
from .worker import STATUS, Reply, Task, slots_of, write_job

AHEAD = 4  # batches that are loaded or being loaded before they are asked for, less if they take more than LARGE
LARGE = 2**30  # bytes of these batches
ROWS = 16  # most images of a task
#: signals of a crash inside a decoder; others, such as the kernel's when memory is short, are not the image's fault
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
WAIT = 0.2  # seconds between two looks at whether the workers are alive
SLOW = 60.0  # seconds after which a decoder is ended: some files make it work for hours

_START = "import sys; sys.path[0] = {folder!r}; from {package}.data.worker import main; main({arguments})"
_local = threading.local()


class Loaded(NamedTuple):
    """A batch in memory that the next one overwrites, and its faults with their rows."""

    images: np.ndarray
    faults: list[tuple[int, Fault]]


def batches(job: ImageJob, items: Iterable[np.ndarray], batch: int, workers: int) -> Iterator[Loaded]:
    """Yield batches of images.

    Args:
        job: how an image is loaded.
        items: for each batch (batch, 3): image, epoch and copy; image -1 is padding.
        batch: images of a batch.
        workers: processes, at most one for each core; 0 loads in this process.
    """
    if not workers:
        return here(job, items, batch)
    return Stream(pool(workers), job, iter(items), batch).run()


def here(job: ImageJob, items: Iterable[np.ndarray], batch: int) -> Iterator[Loaded]:
    """Load batches in this process."""
    images = np.zeros((batch, *job.shape), np.float32)
    for rows in items:
        faults = job.fill(images, rows)
        yield Loaded(images, faults)


def pool(count: int) -> Pool:
    """Return the workers of this thread; each is started once, when it is needed."""
    pools: dict[int, Pool] = _local.__dict__.setdefault("pools", {})
    if count not in pools or pools[count].broken:
        pools[count] = Pool(count)
    return pools[count]


class Pool:
    """Worker processes with one queue of tasks.

    Args:
        count: most processes; each starts when there is a task that no other one does.
        slow: seconds that one image may take.

    Raises:
        DataError: a worker was ended from outside.
    """

    def __init__(self, count: int, slow: float = SLOW):
        self.count, self.slow = count, slow
        self.seen = [(0, 0, 0.0)] * count  # of each worker: task and image, and since when
        self.inbox, self._task_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.outbox, self._reply_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.inbox.setblocking(False)
        self.outbox.settimeout(WAIT)
        status = os.memfd_create("status")
        os.ftruncate(status, count * STATUS.size)
        self._status_file = status
        self.status = mmap.mmap(status, 0)
        self.waiting: deque[Task] = deque()  # not sent yet
        self.sent: dict[int, tuple[Task, Stream]] = {}
        self.broken = False
        self.numbers = itertools.count(1)
        self.workers: list[subprocess.Popen[bytes]] = []
        handles = (self.inbox, self.outbox, self._task_end, self._reply_end)
        weakref.finalize(self, end_workers, self.workers, handles, status)

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        package = Path(__file__).resolve().parents[1]
        ends = (self._task_end.fileno(), self._reply_end.fileno(), self._status_file)
        arguments = ", ".join(map(str, (*ends, number)))
        code = _START.format(folder=str(package.parent), package=package.name, arguments=arguments)
        # one thread of each library: the workers share the cores
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=ends, env=environment, cwd="/"
        )

    def submit(self, stream: Stream, slot: int, row: int, items: np.ndarray) -> None:
        """Queue a task."""
        task = Task(
            next(self.numbers), stream.number, stream.file, stream.size, stream.job_place, stream.layout, slot, row,
            items, (),
        )  # fmt: skip
        self.sent[task.number] = task, stream
        if len(self.workers) < min(self.count, len(self.sent)):
            self.workers.append(self._start(len(self.workers)))
        self.waiting.append(task)
        self.flush()

    def flush(self) -> None:
        """Send as many queued tasks as the socket takes."""
        while self.waiting:
            try:
                self.inbox.send(pickle.dumps(tuple(self.waiting[0])))
            except BlockingIOError:
                return
            self.waiting.popleft()

    def pump(self) -> None:
        """Wait for a reply and hand it to its stream; replace workers that crashed."""
        self.flush()
        try:
            reply = Reply(*pickle.loads(self.outbox.recv(2**20)))
        except TimeoutError:
            self.check()
            return
        task, stream = self.sent.pop(reply.number, (None, None))
        if task is not None and stream is not None:
            stream.finished(task, reply)

    def check(self) -> None:
        """Start a worker anew if it crashed or takes too long, without the image that it was decoding."""
        for number, worker in enumerate(self.workers):
            task_number, index = STATUS.unpack_from(self.status, number * STATUS.size)
            late = self._is_late(number, task_number, index)
            if late:
                worker.kill()
                worker.wait()
            if worker.poll() is None:
                continue
            idle = worker.returncode < 0 and task_number not in self.sent
            crashed = late or -worker.returncode in CRASHES
            if not idle and (not crashed or index < 0):
                self.broken = True
                raise DataError(f"data.workers: a worker process ended ({ending(worker.returncode)})")
            STATUS.pack_into(self.status, number * STATUS.size, 0, -1)
            self.workers[number] = self._start(number)
            if idle:
                continue
            task, stream = self.sent.pop(task_number)
            stream.crashed.add(index)
            again = task._replace(number=next(self.numbers), crashed=tuple(stream.crashed))
            self.sent[again.number] = again, stream
            self.waiting.append(again)

    def _is_late(self, number: int, task: int, index: int) -> bool:
        """Whether a worker has been busy with one image for too long."""
        known_task, known_index, since = self.seen[number]
        now = time.monotonic()
        if (task, index) != (known_task, known_index):
            self.seen[number] = (task, index, now)
            return False
        return task > 0 and index >= 0 and now - since > self.slow


def ending(code: int) -> str:
    """Describe the exit code of a worker, and what to do."""
    if code >= 0:
        return f"exit code {code}, its error is printed above"
    remedy = (
        ": memory may be short, write a smaller data.workers or train.batch_size" if code == -signal.SIGKILL else ""
    )
    return f"signal {-code}{remedy}"


def end_workers(workers: list[subprocess.Popen[bytes]], handles: tuple[socket.socket, ...], status: int) -> None:
    """Close the sockets, which ends the workers, and wait for them."""
    for handle in handles:
        handle.close()
    os.close(status)
    for worker in workers:
        try:
            worker.wait(timeout=10)
        except subprocess.TimeoutExpired:  # a decoder that does not return
            worker.kill()
            worker.wait()


class Stream:
    """The batches of one job, in order.

    Its shared memory has the pickled job, the arrays of the job, and 2 to `AHEAD` batches that are used in turn.
    """

    counter = itertools.count(1)

    def __init__(self, pool: Pool, job: ImageJob, items: Iterator[np.ndarray], batch: int):
        self.pool = pool
        self.items = items
        self.number = next(self.counter)
        self.crashed: set[int] = set()
        self.error = ""
        self.ahead = max(2, min(AHEAD, LARGE // (4 * batch * int(np.prod(job.shape)))))
        self.open_rows = [0] * self.ahead  # rows of each slot that are not loaded yet
        self.faults: list[list[tuple[int, Fault]]] = [[] for _ in range(self.ahead)]
        self.rows = max(1, min(ROWS, -(-batch // (2 * pool.count))))
        self._share(job, batch)

    def _share(self, job: ImageJob, batch: int) -> None:
        """Write the job into shared memory."""
        content, buffers = write_job(job)
        ends = np.cumsum([len(part) for part in buffers], dtype=int).tolist()
        places = list(zip([0, *ends], ends, strict=False))
        whole = pickle.dumps((content, places))
        data = ends[-1] if ends else 0
        start = -(-(data + len(whole)) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.job_place = (data, data + len(whole))
        self.layout = (start, (self.ahead, batch, *job.shape))
        self.size = start + int(np.prod(self.layout[1])) * 4
        self.file = os.memfd_create("images")
        os.ftruncate(self.file, self.size)
        self.memory = mmap.mmap(self.file, self.size)
        for part, (first, last) in zip(buffers, places, strict=True):
            self.memory[first:last] = part.tobytes()
        self.memory[data : data + len(whole)] = whole
        self.slots = slots_of(self.memory, self.layout)

    def run(self) -> Iterator[Loaded]:
        """Yield the batches; those after the current one are loaded meanwhile."""
        queued: deque[int] = deque()
        try:
            for slot in range(self.ahead):
                if self._submit(slot):
                    queued.append(slot)
            while queued:
                slot = queued.popleft()
                while self.open_rows[slot] and not self.error:
                    self.pool.pump()
                if self.error:
                    raise RuntimeError(self.error)
                yield Loaded(self.slots[slot], self.faults[slot])
                if self._submit(slot):
                    queued.append(slot)
        finally:
            self._close()

    def _submit(self, slot: int) -> bool:
        """Queue the next batch; False at the end."""
        items = next(self.items, None)
        if items is None:
            return False
        self.pool.check()  # of workers that were ended while they had no task
        self.open_rows[slot], self.faults[slot] = len(items), []
        for row in range(0, len(items), self.rows):
            self.pool.submit(self, slot, row, items[row : row + self.rows])
        return True

    def finished(self, task: Task, reply: Reply) -> None:
        """Note that a task is done."""
        self.open_rows[task.slot] -= len(task.items)
        self.faults[task.slot] += [(task.row + row, Fault(*fault)) for row, fault in reply.faults]
        self.error = self.error or reply.error

    def _close(self) -> None:
        """Withdraw the tasks that were not sent, and give the memory back once no worker writes into it."""
        waiting = [task for task in self.pool.waiting if task.stream == self.number]
        for task in waiting:
            self.pool.waiting.remove(task)
            del self.pool.sent[task.number]
        try:
            while not self.pool.broken and any(stream is self for _, stream in self.pool.sent.values()):
                self.pool.pump()
        finally:
            os.close(self.file)
            self.memory.madvise(mmap.MADV_REMOVE)
