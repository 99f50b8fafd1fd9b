"""A worker process: takes tasks from a socket and writes images into shared memory (`workers`)."""

from __future__ import annotations

import functools
import mmap
import os
import pickle
import signal
import socket
import struct
import traceback
from collections import OrderedDict
from typing import Any, NamedTuple

import cv2
import numpy as np

from .job import ImageJob

MESSAGE = 2**16  # bytes of the largest message on the sockets
KEPT = 8  # streams whose memory stays mapped
#: what a worker is doing, in the shared status memory: number of the task (0: none) and image
STATUS = struct.Struct("qq")


class Task(NamedTuple):
    """Some rows of a batch.

    Attributes:
        number: of the task, from 1.
        stream, file, size, job, slots: a stream's number, and its shared memory: file descriptor in the parent, bytes,
            position of the pickled job (start, end), and start and shape of the batches.
        slot, row: batch and first row to write.
        items: (n, 3) image, epoch and copy; image -1 is padding.
        crashed: images whose decoding ended a worker.
    """

    number: int
    stream: int
    file: int
    size: int
    job: tuple[int, int]
    slots: tuple[int, tuple[int, ...]]
    slot: int
    row: int
    items: np.ndarray
    crashed: tuple[int, ...]


class Reply(NamedTuple):
    """A finished task: faults with their row, or the text of an error of our own."""

    number: int
    faults: list[tuple[int, Any]]
    error: str


def map_stream(parent: int, file: int, size: int) -> mmap.mmap:
    """Map the shared memory of a stream, a file that the parent has open."""
    handle = os.open(f"/proc/{parent}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(handle, size)
    finally:
        os.close(handle)


def write_job(job: ImageJob) -> tuple[bytes, list[memoryview]]:
    """Pickle a job; its arrays are buffers beside the pickle."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(job, protocol=5, buffer_callback=buffers.append)
    return content, [buffer.raw() for buffer in buffers]


def read_job(memory: mmap.mmap, start: int, end: int) -> ImageJob:
    """Unpickle a job; its arrays stay in the shared memory."""
    content, places = pickle.loads(memory[start:end])
    view = memoryview(memory)
    job: ImageJob = pickle.loads(content, buffers=[view[first:last] for first, last in places])
    return job


def slots_of(memory: mmap.mmap, slots: tuple[int, tuple[int, ...]]) -> np.ndarray:
    """Return the batches in the shared memory, (slots, batch, channels, H, W) float32."""
    start, shape = slots
    return np.frombuffer(memory, np.float32, int(np.prod(shape)), start).reshape(shape)


def main(tasks: int, replies: int, status: int, number: int) -> None:
    """Work until the parent closes its socket, however it ends.

    Args:
        tasks, replies: file descriptors of the sockets.
        status: file descriptor of the status memory.
        number: of this worker.
    """
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent decides when to stop
        signal.signal(name, signal.SIG_IGN)
    cv2.setNumThreads(1)
    inbox, outbox = socket.socket(fileno=tasks), socket.socket(fileno=replies)
    notes = mmap.mmap(status, 0)
    parent = os.getppid()
    streams: OrderedDict[int, tuple[ImageJob, np.ndarray]] = OrderedDict()

    def note(task: int, index: int) -> None:
        STATUS.pack_into(notes, number * STATUS.size, task, index)

    while content := inbox.recv(MESSAGE):
        task = Task(*pickle.loads(content))
        note(task.number, -1)
        faults: list[tuple[int, Any]] = []
        error = ""
        try:
            if task.stream not in streams:
                memory = map_stream(parent, task.file, task.size)
                streams[task.stream] = read_job(memory, *task.job), slots_of(memory, task.slots)
                if len(streams) > KEPT:
                    streams.popitem(last=False)
            job, slots = streams[task.stream]
            job.crashed.update(task.crashed)
            faults = job.fill(slots[task.slot, task.row :], task.items, functools.partial(note, task.number))
        except Exception:  # an error of our own: the parent raises it
            error = traceback.format_exc()[-4000:]
        note(0, -1)
        try:
            outbox.send(pickle.dumps(tuple(Reply(task.number, faults, error))))
        except OSError:  # the parent has ended
            return
