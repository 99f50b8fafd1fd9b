"""What both sides of the benchmark share: they answer lines on stdin and measure their own process (Linux).

(start)  ready <seconds from process start to the end of the first step> <CPU seconds> <number of parameters>
step     time <seconds of one step> <CPU seconds of all threads>
quit     peak <largest resident size in bytes>, then it ends
"""

from __future__ import annotations

import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Times = tuple[float, float]  # wall seconds, CPU seconds of all threads


def timed(action: Callable[[], float]) -> Times:
    """Run an action that returns a finite number; returns its seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = action()
    times = time.perf_counter() - wall, time.process_time() - cpu
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value}")
    return times


def take(batches: Iterator[object], count: int, workers: int) -> Times:
    """Take `count` batches from an endless pipeline; returns the wall seconds and the CPU seconds of all its processes.

    The first batches, while the workers start and fill their queues, are not timed.
    """
    for _ in range(1 + 4 * workers):
        next(batches)
    wall, cpu = time.perf_counter(), family_seconds()
    for _ in range(count):
        next(batches)
    times = time.perf_counter() - wall, family_seconds() - cpu
    close = getattr(batches, "close", None)
    if close:
        close()
    return times


def family_seconds() -> float:
    """CPU seconds of this process and of its children and theirs, ended or not (those that run to 0.01 s)."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + ended.ru_utime + ended.ru_stime
    parents: dict[int, list[list[str]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        parents.setdefault(int(rest.split()[1]), []).append([name.split()[0], *rest.split()])
    found = parents.get(os.getpid(), [])
    while found:
        fields = found.pop()
        seconds += sum(map(int, fields[12:16])) / os.sysconf("SC_CLK_TCK")  # with its own ended children
        found += parents.get(int(fields[0]), [])
    return seconds


def serve(step: Callable[[], Times], parameters: int, imported: int) -> None:
    """Run the first step, then one for each line `step`, until `quit` or the end of stdin.

    `imported`: resident bytes after the imports; PyTorch with GPU libraries has more than without.
    """
    step()
    write("ready", since_process_start(), time.process_time(), parameters, imported)
    for line in sys.stdin:
        if line.strip() == "quit":
            write("peak", resident("VmHWM"))
            return
        write("time", *step())


def write(word: str, *numbers: float) -> None:
    print(word, *numbers, flush=True)


def since_process_start() -> float:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of the line; the split drops the first two
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def resident(field: str = "VmRSS") -> int:
    """Return the resident bytes of this process, now or (`VmHWM`) at their peak.

    ru_maxrss of a child process starts at its parent's peak.
    """
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0
