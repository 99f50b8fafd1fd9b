"""What both sides of the benchmark share: they answer lines on stdin and measure their own process (Linux).

(start)  ready <seconds from process start to the end of the first step> <CPU seconds> <number of parameters>
step     time <seconds of one step> <CPU seconds of all threads>
quit     peak <largest resident size in bytes>, then it ends
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable
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
