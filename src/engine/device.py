"""Mode, device and seeds; no other file sets them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import mindspore as ms
import psutil  # a requirement of MindSpore too

from ..errors import UserError
from . import parallel


class DeviceError(UserError):
    """An unavailable device; the text is one line for the user."""


def set_up(device: str, seed: int) -> str:
    """Set graph mode, device (auto: Ascend, else GPU, else CPU) and seed, and join the other ranks.

    Returns:
        The device.

    Raises:
        DeviceError: MindSpore has no such device here.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    if device == "auto":
        device = next((name for name in ("Ascend", "GPU") if available(name)), "CPU")
    elif device != "CPU" and not available(device):
        raise DeviceError(f"device: this MindSpore {ms.__version__} finds no {device} here; write device=CPU or auto")
    ms.set_device(device)  # under msrun MindSpore assigns each rank another device
    parallel.start()
    if device == "CPU":
        share_cpu()
        one_memory_block()
    ms.set_seed(seed)
    return device


def share_cpu() -> None:
    """Give each rank its share of the CPU cores as threads; MindSpore's default of 25 slows a step on few cores."""
    threads = max(1, (psutil.cpu_count() or 1) // parallel.size())
    with contextlib.suppress(RuntimeError):  # only the first call of a process has an effect
        ms.device_context.cpu.op_tuning.threads_num(threads)


def one_memory_block() -> None:
    """Allocate MindSpore's memory pool as one large block; it cannot use free space across its default 1 GB blocks.

    Only touched memory counts. A ViT-B step at batch 32 peaks at 5.8 GB instead of 6.7 GB.
    """
    half = psutil.virtual_memory().total // 2**31 // parallel.size()
    with contextlib.suppress(RuntimeError):  # only the first call of a process has an effect
        ms.runtime.set_memory(init_size=f"{max(half, 1)}GB")


def available(device: str) -> bool:
    """Whether MindSpore can use this kind of device on this machine."""
    return bool(ms.hal.is_available(device))


def peak_memory(device: str) -> int:
    """Return the peak memory so far in bytes: of this process on CPU, of the device elsewhere."""
    if device != "CPU":
        return int(ms.runtime.max_memory_allocated())
    status = Path("/proc/self/status")  # getrusage of a child process starts at the peak of its parent
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text("ascii")) if status.exists() else None
    return int(match[1]) * 1024 if match else psutil.Process().memory_info().rss
