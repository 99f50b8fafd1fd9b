"""The only file that touches mode, device and seeds."""

from __future__ import annotations

import re
from pathlib import Path

import mindspore as ms
import psutil  # a requirement of MindSpore too

from ..errors import UserError
from . import parallel


class DeviceError(UserError):
    """A device that is not there; one line for the user."""


def set_up(device: str, seed: int) -> str:
    """Graph mode on `device` (auto: Ascend, else GPU, else CPU), ranks joined, every seed set; returns the device."""
    ms.set_context(mode=ms.GRAPH_MODE)
    if device == "auto":
        device = next((name for name in ("Ascend", "GPU") if available(name)), "CPU")
    elif device != "CPU" and not available(device):
        raise DeviceError(f"device: this MindSpore {ms.__version__} finds no {device} here; write device=CPU or auto")
    ms.set_device(device)  # under msrun MindSpore gives each rank a device of its own
    parallel.start()
    if device == "CPU":
        share_cpu()
        one_memory_block()
    ms.set_seed(seed)
    return device


def share_cpu() -> None:
    """Divide the cores among the ranks; MindSpore's 25 threads each get in one another's way."""
    if parallel.size() > 1:
        ms.device_context.cpu.op_tuning.threads_num(max(1, (psutil.cpu_count() or 1) // parallel.size()))


def one_memory_block() -> None:
    """Let MindSpore's pool be one large block instead of several of 1 GB, between which it cannot share what is free.

    Memory counts only where it is touched; a ViT-B step at batch 32 peaks at 5.8 GB instead of 6.7.
    """
    half = psutil.virtual_memory().total // 2**31 // parallel.size()
    try:
        ms.runtime.set_memory(init_size=f"{max(half, 1)}GB")
    except RuntimeError:  # only the first call of a process counts
        return


def available(device: str) -> bool:
    """Whether MindSpore can use a device of that kind on this machine."""
    return bool(ms.hal.is_available(device))


def peak_memory(device: str) -> int:
    """The most bytes so far: of this process on CPU, of the device's own memory else."""
    if device != "CPU":
        return int(ms.runtime.max_memory_allocated())
    status = Path("/proc/self/status")  # getrusage of a child begins with its parent's peak
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text("ascii")) if status.exists() else None
    return int(match[1]) * 1024 if match else psutil.Process().memory_info().rss
