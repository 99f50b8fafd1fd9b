"""Learning rates as pure functions of the training progress."""

from __future__ import annotations

import bisect
import math

from ..config import TrainConfig


def effective_batch(train: TrainConfig, devices: int = 1) -> int:
    """Return the images per update over all devices."""
    return train.batch_size * train.passes(devices) * devices


def peak_rate(train: TrainConfig, devices: int = 1) -> float:
    """Return the learning rate after warm-up: base_lr * effective batch / lr_batch (linear scaling rule)."""
    if not train.lr_batch:
        return train.base_lr
    return train.base_lr * effective_batch(train, devices) / train.lr_batch


def learning_rate(train: TrainConfig, peak: float, epoch: float, scale: float = 1.0, updates: int = 1) -> float:
    """Return the learning rate of a parameter group at a fractional epoch.

    rule: mae (FastMIM util/lr_sched.py). Warm-up: linear from 0 to `peak`. Then half a cosine to `min_lr` over the
    remaining epochs, or a factor `gamma` every `decay_epochs`. `scale` multiplies the result.

    rule: timm (SimMIM lr_scheduler.py, timm 0.4.12). An update uses the rate of the previous update. Warm-up: linear
    from `warmup_lr` to peak * scale. The schedule after it counts from the start of training, so there is a small jump
    at the end of the warm-up; with `warmup_prefix` the cosine starts after the warm-up (Swin-Transformer
    lr_scheduler.py, used by the Swin V2 recipes). With `per_epoch` the rule counts epochs instead of updates (DeiT
    main.py, timm 0.5.4). `warmup_lr` and `min_lr` are not scaled by layer decay and are given for `lr_batch` images.

    rule: mmengine (mmengine param_scheduler.py, as used by mmpretrain). An update uses its rate, not that of the
    previous one. The last update of the warm-up reaches the peak. The schedule starts after the warm-up: milestones
    count from there, and the cosine can be longer than the remaining epochs (`cosine_epochs`). Layer decay scales the
    start of the warm-up too, but not `min_lr`.

    Args:
        train: rule, schedule and durations.
        peak: the rate after warm-up (`peak_rate`).
        epoch: fractional epoch, see `position`.
        scale: layer-decay factor of the group.
        updates: updates per epoch, for rules timm and mmengine.
    """
    if train.rule == "timm":
        if train.per_epoch:
            epoch, updates = math.floor(epoch), 1
        return _timm_rate(train, peak * scale, peak / train.base_lr, epoch, updates)
    if train.rule == "mmengine":
        return _mmengine_rate(train, peak * scale, peak / train.base_lr, epoch, updates)
    if epoch < train.warmup_epochs:
        rate = peak * epoch / train.warmup_epochs
    elif train.schedule == "cosine":
        done = (epoch - train.warmup_epochs) / (train.epochs - train.warmup_epochs)
        rate = train.min_lr + (peak - train.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        rate = peak * train.gamma ** (epoch // train.decay_epochs)
    return rate * scale


def _timm_rate(train: TrainConfig, base: float, batch_factor: float, epoch: float, updates: int) -> float:
    """`base`: peak of the group; `batch_factor`: effective batch / lr_batch, which scales the other rates."""
    now = max(round(epoch * updates) - 1, 0)
    warmup, total = round(train.warmup_epochs * updates), train.epochs * updates
    start, low = train.warmup_lr * batch_factor, train.min_lr * batch_factor
    if now < warmup:
        return start + now * (base - start) / warmup
    if train.schedule == "cosine":
        first = warmup if train.warmup_prefix else 0
        return low + 0.5 * (base - low) * (1.0 + math.cos(math.pi * (now - first) / (total - first)))
    if train.schedule == "linear":  # to base / 100 over the epochs after the warm-up
        return base - 0.99 * base * (now - warmup) / (total - warmup)
    if train.schedule == "multistep":
        return float(base * train.gamma ** bisect.bisect_right([m * updates for m in train.milestones], now))
    return float(base * train.gamma ** (now // (train.decay_epochs * updates)))


def _mmengine_rate(train: TrainConfig, base: float, batch_factor: float, epoch: float, updates: int) -> float:
    """Arguments as in `_timm_rate`."""
    now, warmup = round(epoch * updates), round(train.warmup_epochs * updates)
    if now < warmup:
        start = train.warmup_lr / train.base_lr
        return base * (start + (1.0 - start) * now / max(warmup - 1, 1))
    if train.schedule == "cosine":
        length = train.cosine_epochs * updates or train.epochs * updates - warmup
        low = train.min_lr * batch_factor
        return low + 0.5 * (base - low) * (1.0 + math.cos(math.pi * (now - warmup) / length))
    return float(base * train.gamma ** bisect.bisect_right([m * updates for m in train.milestones], now - warmup))


def position(epoch: int, forward_pass: int, passes_per_epoch: int, accumulate: int) -> float:
    """Return the fractional epoch of an update, which is that of its first forward pass."""
    return epoch + (forward_pass - forward_pass % accumulate) / passes_per_epoch
