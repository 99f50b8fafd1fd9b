"""The training loop: any Method, any data, from any epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import Tensor

from ..config import TrainConfig
from . import checkpoint, parallel
from .log import Clock, Progress, RunError, RunFolder, duration
from .optim import build_optimizer
from .schedule import effective_batch, learning_rate, peak_rate, position
from .step import Accumulate, TrainStep


@dataclass
class State:
    """Where a run stands; everything here and in the checkpoint's arrays is what resuming needs."""

    epoch: int = 0  # epochs done
    step: int = 0  # updates done
    best: float | None = None


@dataclass
class Hooks:
    """What the loop asks of the layers it does not know.

    evaluate: metrics of the weights after so many epochs (empty when there is no validation data).
    pictures: write the gallery after so many epochs.
    meta: what every checkpoint says besides the state.
    """

    evaluate: Callable[[int], dict[str, float]]
    pictures: Callable[[int], None]
    meta: dict[str, Any] = field(default_factory=dict)


class Fit:
    """One run of any Method, or a stage of one: `run()` trains to the end of epoch `until`; `state` follows.

    Args:
        method, loader, train, folder, hooks: what is trained, on what, how, where it is written, what else is done.
        state: where the run is.
        until: epochs after which this part of the run ends, `train.epochs` but for a stage of a progressive one.

    Raises:
        RunError: the loss is not finite, or an epoch holds no update.
    """

    def __init__(
        self,
        method: Any,
        loader: Any,
        train: TrainConfig,
        folder: RunFolder,
        hooks: Hooks,
        state: State,
        until: int,
    ):
        self.method, self.loader, self.train, self.folder, self.hooks = method, loader, train, folder, hooks
        self.state, self.until = state, until
        self.updates = len(loader) // train.accumulate
        if not self.updates:
            raise RunError(
                f"train.accumulate: {train.accumulate} passes of {train.batch_size} images are more than an epoch; "
                f"write {len(loader)} or less"
            )
        self.ranks = parallel.size()
        self.peak = peak_rate(train, self.ranks)
        self.optimizer = build_optimizer(method, train)
        self.step = TrainStep(method, self.optimizer, train.clip_norm, train.accumulate)
        self.accumulate = Accumulate(self.step) if train.accumulate > 1 else None
        self.compiled = False
        self.clock = Clock()

    def restore(self, arrays: dict[str, np.ndarray], source: Any) -> None:
        """Optimiser moments and draw counters of a checkpoint."""
        checkpoint.assign(self.state_arrays(), arrays, source)

    def align_ranks(self) -> None:
        """Give every rank the weights of rank 0, and check before the first step that ranks do what one would do."""
        if self.ranks == 1:
            return
        weights, state = checkpoint.weights_of(self.method), self.state_arrays()
        parallel.broadcast(list(weights.values()))
        parameters = {**weights, **state}
        self.folder.info(parallel.self_test(self.loader, parameters, str(self.hooks.meta.get("recipe", ""))))

    def run(self) -> None:
        """All epochs that are left."""
        train, state = self.train, self.state
        progress = Progress((self.until - state.epoch) * self.updates)
        try:
            for epoch in range(state.epoch, self.until):
                self.step.set_train(True)
                self._epoch(epoch, progress)
                state.epoch = epoch + 1
                last = state.epoch == self.until
                metrics = self._evaluate(last)
                if last or (train.gallery_every and state.epoch % train.gallery_every == 0):
                    self.hooks.pictures(state.epoch)
                if last or state.epoch % train.save_every == 0:
                    self._save("last", metrics)
        finally:
            progress.close()

    def _epoch(self, epoch: int, progress: Progress) -> None:
        """All updates of an epoch; outputs stay on the device until a line is logged."""
        waiting: list[tuple[Tensor, ...]] = []
        batches = iter(self.loader.epoch(epoch))
        self.clock.reset()
        for number in range(self.updates):
            outputs: tuple[Tensor, ...] = ()
            passes = []
            for turn in range(self.train.accumulate):
                batch = self._next(batches)
                if turn + 1 < self.train.accumulate:
                    assert self.accumulate is not None
                    passes.append(self.accumulate(*batch))
                else:
                    rate, values = self._values(epoch, number)
                    outputs = self._update(values, batch)
            waiting += [(*early, outputs[-1]) for early in passes] + [outputs]
            self.state.step += 1
            if (number + 1) % self.train.log_every == 0 or number + 1 == self.updates:
                self._log(epoch, number, rate, waiting, progress)
                waiting = []
            else:
                progress.advance()

    def _next(self, batches: Any) -> tuple[Tensor, ...]:
        start = time.perf_counter()
        batch = next(batches)
        self.clock.waited += time.perf_counter() - start
        self.clock.images += batch[0].shape[0]
        return batch

    def _values(self, epoch: int, number: int) -> tuple[float, Tensor]:
        """The highest learning rate of this update and what the optimiser needs."""
        first = number * self.train.accumulate
        here = position(epoch, first, len(self.loader), self.train.accumulate)

        def rate_of(scale: float) -> float:
            return learning_rate(self.train, self.peak, here, scale, self.updates)

        return rate_of(1.0), self.optimizer.step_values(rate_of, self.state.step + 1)

    def _update(self, values: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.compiled:
            return self.step(values, *batch)
        self.folder.info("compiling the graph; the first step takes a while")
        start = time.perf_counter()
        outputs = self.step(values, *batch)
        float(outputs[0])  # waits for the step
        self.folder.info(f"first step done after {duration(time.perf_counter() - start)}")
        self.compiled = True
        self.clock.reset()
        return outputs

    def _log(self, epoch: int, number: int, rate: float, waiting: list[tuple[Tensor, ...]], progress: Progress) -> None:
        values = np.array([[float(value) for value in outputs] for outputs in waiting])
        over_all = parallel.total(values.mean(axis=0)) / self.ranks
        means = dict(zip(("loss", *self.method.parts, "grad_norm"), over_all.tolist(), strict=True))
        if not math.isfinite(means["loss"] + means["grad_norm"]):
            raise RunError(
                f"the loss is not finite before update {self.state.step} (epoch {epoch + 1}); the last checkpoint is "
                "kept. Lower train.base_lr, or set train.clip_norm"
            )
        speed, waited = self.clock.report()
        relative = means["loss"] / means["baseline"] if means["baseline"] > 0 else float("nan")
        speed *= self.ranks
        done = epoch * self.updates + number + 1
        left = (self.until * self.updates - done) * effective_batch(self.train, self.ranks)
        eta = duration(left / speed) if speed else "?"
        self.folder.metrics(
            "train",
            epoch=epoch + (number + 1) / self.updates,
            step=self.state.step,
            **{name: round(value, 8) for name, value in means.items()},
            relative=round(relative, 5),
            lr=rate,
            images_per_second=round(speed, 2),
            data_wait=round(waited, 4),
        )
        self.folder.info(
            f"epoch {epoch + 1}/{self.train.epochs} step {number + 1}/{self.updates}  "
            f"loss {means['loss']:.4f} = {relative:.3f} x constant predictor  lr {rate:.2e}  "
            f"grad norm {means['grad_norm']:.3f}  {speed:.1f} images/s  data wait {waited:.0%}  ETA {eta}"
        )
        progress.advance(loss=f"{means['loss']:.4f}", relative=f"{relative:.3f}")

    def _evaluate(self, last: bool) -> dict[str, float]:
        every = self.train.eval_every
        if not (last or (every and self.state.epoch % every == 0)):
            return {}
        metrics = self.hooks.evaluate(self.state.epoch)
        if metrics:
            name, direction = self.method.best
            value = metrics[name]
            better = self.state.best is None or (value > self.state.best) == (direction == "max")
            if better and value != self.state.best:
                self.state.best = value
                self._save("best", metrics)
        return metrics

    def _save(self, name: str, metrics: dict[str, float]) -> None:
        """`last` carries the training state; `best` only the network. Rank 0 has all of it."""
        if not self.folder.writes:
            return
        meta = {
            **self.hooks.meta,
            "epoch": self.state.epoch,
            "step": self.state.step,
            "best": self.state.best,
            "metrics": metrics,
        }
        arrays = self.state_arrays() if name == "last" else {}
        checkpoint.save(self.folder.path / f"{name}.ckpt", checkpoint.weights_of(self.method), arrays, meta)

    def state_arrays(self) -> dict[str, Any]:
        """What a checkpoint needs besides the weights: optimiser moments and draw counters, by name."""
        return {**self.optimizer.state(), **checkpoint.counters_of(self.method)}
