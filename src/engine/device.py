"""The only file that touches mode, device and seeds."""

from __future__ import annotations

import mindspore as ms


class DeviceError(ValueError):
    """A device that is not there; one line for the user."""


def set_up(device: str, seed: int) -> str:
    """Graph mode on `device` (auto: Ascend, else GPU, else CPU) with every seed set; returns the device used."""
    ms.set_context(mode=ms.GRAPH_MODE)
    if device == "auto":
        device = next((name for name in ("Ascend", "GPU") if available(name)), "CPU")
    elif device != "CPU" and not available(device):
        raise DeviceError(f"device: this MindSpore {ms.__version__} finds no {device} here; write device=CPU or auto")
    ms.set_device(device)
    ms.set_seed(seed)
    return device


def available(device: str) -> bool:
    """Whether MindSpore can use a device of that kind on this machine."""
    return bool(ms.hal.is_available(device))
