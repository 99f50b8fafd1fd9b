"""Learning rates as pure functions of the position in training."""

from __future__ import annotations

import math

from ..config import TrainConfig


def effective_batch(train: TrainConfig, devices: int = 1) -> int:
    """Images per update over all devices."""
    return train.batch_size * train.accumulate * devices


def peak_rate(train: TrainConfig, devices: int = 1) -> float:
    """The learning rate after warm-up: base_lr * effective batch / lr_batch (linear scaling rule)."""
    if not train.lr_batch:
        return train.base_lr
    return train.base_lr * effective_batch(train, devices) / train.lr_batch


def learning_rate(train: TrainConfig, peak: float, epoch: float, scale: float = 1.0) -> float:
    """Learning rate of a parameter group at a fractional epoch (FastMIM util/lr_sched.py).

    Linear from 0 to `peak` during the warm-up, then half a cosine to `min_lr` (schedule: cosine) or a factor `gamma`
    every `decay_epochs` counted from the start (schedule: step). `scale` is the group's layer-decay factor; it
    multiplies everything, `min_lr` too.
    """
    if epoch < train.warmup_epochs:
        rate = peak * epoch / train.warmup_epochs
    elif train.schedule == "cosine":
        done = (epoch - train.warmup_epochs) / (train.epochs - train.warmup_epochs)
        rate = train.min_lr + (peak - train.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        rate = peak * train.gamma ** (epoch // train.decay_epochs)
    return rate * scale


def position(epoch: int, forward_pass: int, passes_per_epoch: int, accumulate: int) -> float:
    """Fractional epoch whose rate an update uses: that of the first of its forward passes."""
    return epoch + (forward_pass - forward_pass % accumulate) / passes_per_epoch
