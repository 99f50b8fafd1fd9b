"""Mode, device, seeds and CPU kernels; no other file sets them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import mindspore as ms
import psutil  # a requirement of MindSpore too

from .. import native
from ..config import Precision, TrainConfig
from ..errors import UserError
from ..operations import kernels
from . import parallel


class DeviceError(UserError):
    """An unavailable device; the text is one line for the user."""


def set_up(device: str, seed: int, train: TrainConfig) -> str:
    """Set graph mode, device (auto: Ascend, else GPU, else CPU), seed, and kernels; join the other ranks.

    Args:
        device, seed: as in a recipe.
        train: has kernels, threads and precision.

    Returns:
        The device.

    Raises:
        DeviceError: MindSpore has no such device here, or the device lacks the precision.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    if device == "auto":
        device = next((name for name in ("Ascend", "GPU") if available(name)), "CPU")
    elif device != "CPU" and not available(device):
        raise DeviceError(f"device: this MindSpore {ms.__version__} finds no {device} here; write device=CPU or auto")
    ms.set_device(device)  # under msrun MindSpore assigns each rank another device
    parallel.start()
    if device == "CPU":
        threads = share_of_cpu(train.threads)
        with contextlib.suppress(RuntimeError):  # only the first call of a process has an effect
            ms.device_context.cpu.op_tuning.threads_num(threads)
        one_memory_block()
        kernels.set_up(train.kernels, threads, train.precision.on(device))
    check_precision(device, train.precision.on(device))
    ms.set_seed(seed)
    return device


def check_precision(device: str, precision: Precision) -> None:
    """Check that a device has a precision; nothing else is used instead.

    Raises:
        DeviceError: it does not have it.
    """
    if precision == "float32":
        return
    if device != "CPU":
        raise DeviceError(f"train.precision: {precision} is not supported on {device} yet; write float32")
    if kernels.reason():
        raise DeviceError(
            f"train.precision: {precision} on CPU needs our own kernels ({kernels.reason()}); write float32"
        )


def share_of_cpu(threads: int) -> int:
    """Return the CPU threads of this rank; MindSpore's default of 25 in each process slows a step on few cores.

    Args:
        threads: of all ranks of this machine, 0: one for each core.
    """
    return max(1, (threads or native.cores()) // parallel.local_size())


def one_memory_block() -> None:
    """Allocate MindSpore's memory pool as one large block; it cannot use free space across its default 1 GB blocks.

    Only touched memory counts. A ViT-B step at batch 32 peaks at 5.8 GB instead of 6.7 GB.
    """
    half = psutil.virtual_memory().total // 2**31 // parallel.local_size()
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
