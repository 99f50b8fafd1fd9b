"""The training loop for any Method and any data, starting at any epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from ..config import TrainConfig, plural
from . import checkpoint, parallel
from .bad_images import BadImages
from .compile_cache import compile_graph
from .contracts import Batches, Trainable
from .log import Clock, Progress, RunError, RunFolder, duration, finite
from .optim import build_optimizer
from .schedule import effective_batch, learning_rate, peak_rate, position
from .step import Accumulate, TrainStep

WATCHED_SIZE = 2**14  # largest parameter of the check of the first update


@dataclass
class State:
    """Progress of a run. Together with the arrays of a checkpoint it is all that resuming needs."""

    epoch: int = 0  # completed epochs
    step: int = 0  # completed updates
    best: float | None = None  # best value of the Method's main metric


@dataclass
class Hooks:
    """Callbacks into layers that the loop does not import.

    Attributes:
        evaluate: completed epochs -> metrics of the current weights (empty without validation data).
        pictures: completed epochs -> writes the gallery.
        meta: meta data of every checkpoint, in addition to the state.
    """

    evaluate: Callable[[int], dict[str, float]]
    pictures: Callable[[int], None]
    meta: dict[str, Any] = field(default_factory=dict)


class Fit:
    """A training run of any Method, or one stage of progressive resolution. `run()` trains to the end of `until`.

    Args:
        method: the network to train.
        loader: training batches.
        train: optimisation and intervals.
        folder: output folder.
        hooks: evaluation, gallery, meta data.
        state: progress so far; updated during training.
        until: last epoch; `train.epochs`, or earlier for a stage of progressive resolution.
        bad_images: collects the images that cannot be used.

    Raises:
        RunError: the loss is not finite, or an epoch has no update.
    """

    def __init__(
        self,
        method: Trainable,
        loader: Batches,
        train: TrainConfig,
        folder: RunFolder,
        hooks: Hooks,
        state: State,
        until: int,
        bad_images: BadImages,
    ):
        self.method = method
        self.loader = loader
        self.train = train
        self.folder = folder
        self.hooks = hooks
        self.state = state
        self.until = until
        self.ranks = parallel.size()
        self.passes = train.passes(self.ranks)
        self.updates = len(loader) // self.passes
        if not self.updates:
            raise RunError(
                f"train.accumulate: {plural(self.passes, 'pass', 'passes')} of {plural(train.batch_size, 'image')} are "
                f"more than an epoch; write {len(loader)} or less"
            )
        self.bad_images = bad_images
        self.peak = peak_rate(train, self.ranks)
        self.optimizer = build_optimizer(method, train)
        self.step = TrainStep(method, self.optimizer, train.clip_norm, self.passes)
        self.accumulate = Accumulate(self.step) if self.passes > 1 else None
        self.compiled = False
        self.moved = False  # whether an update has changed the weights
        self.clock = Clock()

    def restore(self, arrays: dict[str, np.ndarray], source: Path) -> None:
        """Set optimiser moments and draw counters from a checkpoint."""
        checkpoint.assign(self.state_arrays(), arrays, source)

    def align_ranks(self) -> None:
        """Give every rank the weights of rank 0, and run the self-test of the ranks before the first step."""
        if self.ranks == 1:
            return
        weights, state = checkpoint.weights_of(self.method), self.state_arrays()
        parallel.broadcast(list(weights.values()))
        parameters = {**weights, **state}
        self.folder.info(parallel.self_test(self.loader, parameters, str(self.hooks.meta.get("recipe", ""))))

    def run(self, stop_after: int) -> None:
        """Train until epoch `until`, or until epoch `stop_after` if that comes first."""
        train, state = self.train, self.state
        end = min(self.until, stop_after)
        self.draws = self.method.draws()  # the counts are restored by now
        progress = Progress((end - state.epoch) * self.updates)
        # one stream for all epochs, so that the first images of an epoch are loaded before the epoch before ends
        batches = self.loader.stream(range(state.epoch, end), self.updates * self.passes)
        try:
            for epoch in range(state.epoch, end):
                self.step.set_train(True)
                self._epoch(epoch, batches, progress)
                state.epoch = epoch + 1
                last = state.epoch == self.until
                metrics: dict[str, float] = {}
                try:
                    metrics = self._evaluate(last)
                finally:  # save even if the evaluation fails
                    if state.epoch == end or state.epoch % train.save_every == 0:
                        self._save("last", metrics)
                if last or (train.gallery_every and state.epoch % train.gallery_every == 0):
                    attempt(self.folder, "gallery", lambda: self.hooks.pictures(state.epoch))
        finally:
            progress.close()
            batches.close()

    def _epoch(self, epoch: int, batches: Iterator[tuple[Tensor, ...]], progress: Progress) -> None:
        """Run all updates of an epoch; outputs stay on the device until a line is logged."""
        pending: list[list[tuple[Tensor, ...]]] = []  # for each update the outputs of its passes
        self.clock.reset()
        for number in range(self.updates):
            passes = []
            for _ in range(self.passes - 1):
                assert self.accumulate is not None
                batch = self._next(batches)
                compile_graph(self.accumulate, *batch)
                passes.append(self._pass(self.accumulate, *batch))
            rate, values = self._values(epoch, number)
            passes.append(self._update(rate, values, self._next(batches)))
            pending.append(passes)
            self.state.step += 1
            if (number + 1) % self.train.log_every == 0 or number + 1 == self.updates:
                self._log(epoch, number, rate, pending, progress)
                pending = []
            else:
                progress.advance()

    def _next(self, batches: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        start = time.perf_counter()
        batch = next(batches)
        self.clock.waited += time.perf_counter() - start
        self.clock.images += batch[0].shape[0]
        return batch

    def _values(self, epoch: int, number: int) -> tuple[float, Tensor]:
        """Return the highest learning rate of this update, and the values that the optimiser needs."""
        fractional_epoch = position(epoch, number * self.passes, len(self.loader), self.passes)

        def rate_of(scale: float) -> float:
            return learning_rate(self.train, self.peak, fractional_epoch, scale, self.updates)

        return rate_of(1.0), self.optimizer.step_values(rate_of, self.state.step + 1)

    def _update(self, rate: float, values: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.moved or not rate:
            return self._last_pass(values, batch)
        before = self._small_weights()
        outputs = self._last_pass(values, batch)
        self._check_moved(before, float(outputs[-1]))
        return outputs

    def _last_pass(self, values: Tensor, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.compiled:
            return self._pass(self.step, values, *batch)
        self.folder.info("compiling the graph; the first step takes a while")
        start = time.perf_counter()
        if compile_graph(self.step, values, *batch):
            self.folder.info("the graph is that of an earlier run")
        outputs = self._pass(self.step, values, *batch)
        float(outputs[0])  # waits for the step
        self.folder.info(f"first step done after {duration(time.perf_counter() - start)}")
        self.compiled = True
        self.clock.reset()
        return outputs

    def _small_weights(self) -> list[np.ndarray]:
        """Copy the trained parameters of at most `WATCHED_SIZE` values, such as biases."""
        return [p.asnumpy().copy() for p in self.optimizer.weights if p.size <= WATCHED_SIZE]

    def _check_moved(self, before: list[np.ndarray], norm: float) -> None:
        """Check that the first update changed the weights, which a damaged kernel might not.

        Raises:
            RunError: none of the small ones changed although the gradient norm is above 0.
        """
        self.moved = True
        same = all(map(np.array_equal, before, self._small_weights()))
        if before and same and norm > 0:
            raise RunError(
                f"the first update changed no weight although the gradient norm is {norm:.3g}; write "
                "train.kernels=builtin"
            )

    def _pass(self, cell: nn.Cell, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = cell(*inputs)
        self.draws.advance(self.train.batch_size)
        return outputs

    def _log(
        self, epoch: int, number: int, rate: float, pending: list[list[tuple[Tensor, ...]]], progress: Progress
    ) -> None:
        """Log the means of the pending updates to terminal, train.log and metrics.jsonl."""
        means = self._means(pending)
        bad = self.bad_images.report(self.loader.take_faults())
        if not math.isfinite(means["loss"] + means["grad_norm"]):
            hint = "; the last checkpoint is unchanged" if (self.folder.path / "last.ckpt").exists() else ""
            raise RunError(
                f"the loss is not finite before update {self.state.step} (epoch {epoch + 1}){hint}; lower "
                "train.base_lr, or set train.clip_norm"
            )
        relative = means["loss"] / means["baseline"] if means["baseline"] > 0 else None
        rates = self.clock.report()
        speed, waited = (rates[0] * self.ranks, rates[1]) if rates else (None, None)
        self.folder.metrics(
            "train",
            epoch=epoch + (number + 1) / self.updates,
            step=self.state.step,
            **{name: round(value, 8) for name, value in means.items()},
            relative=None if relative is None else round(relative, 5),
            lr=rate,
            images_per_second=None if speed is None else round(speed, 2),
            data_wait=None if waited is None else round(waited, 4),
        )
        ratio = "" if relative is None else f" = {relative:.3f} x baseline"
        pace = ""
        if speed:
            done = epoch * self.updates + number + 1
            remaining = (self.until * self.updates - done) * effective_batch(self.train, self.ranks)
            pace = f"  {speed:.1f} images/s  data wait {waited:.0%}  ETA {duration(remaining / speed)}"
        replaced = f"  {plural(bad, 'unusable image')} replaced" if bad and number + 1 == self.updates else ""
        self.folder.info(
            f"epoch {epoch + 1}/{self.train.epochs} step {number + 1}/{self.updates}  loss {means['loss']:.4f}{ratio}  "
            f"lr {rate:.2e}  grad norm {means['grad_norm']:.3f}{pace}{replaced}"
        )
        progress.advance(loss=f"{means['loss']:.4f}", **({} if relative is None else {"relative": f"{relative:.3f}"}))

    def _means(self, pending: list[list[tuple[Tensor, ...]]]) -> dict[str, float]:
        """Average loss, baseline, parts and gradient norm over updates, each over its whole effective batch.

        The figures do not depend on how the images of an update are split over passes and ranks.
        """
        count = 1 + len(self.method.parts)
        updates = []
        for passes in pending:
            scalars = np.mean([[float(value) for value in outputs[:count]] for outputs in passes], axis=0)
            sums = np.sum([outputs[count].asnumpy().astype(np.float64) for outputs in passes], axis=0)
            updates.append(np.concatenate([scalars, [float(passes[-1][-1])], sums]))
        table = parallel.total(np.array(updates))
        baseline = float(np.mean([self.method.baseline(update[count + 1 :]) for update in table]))
        loss, *parts, norm = (table[:, : count + 1].mean(axis=0) / self.ranks).tolist()
        return {
            "loss": loss,
            "baseline": baseline,
            **dict(zip(self.method.parts, parts, strict=True)),
            "grad_norm": norm,
        }

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
        """Write `last` with the training state, or `best` with the network only."""
        if not self.folder.writes:  # every rank has the same arrays; rank 0 writes them
            return
        meta = {
            **self.hooks.meta,
            "epoch": self.state.epoch,
            "step": self.state.step,
            "best": self.state.best,
            "metrics": finite(metrics),
        }
        arrays = self.state_arrays() if name == "last" else {}
        checkpoint.save(self.folder.path / f"{name}.ckpt", checkpoint.weights_of(self.method), arrays, meta)

    def state_arrays(self) -> dict[str, Parameter]:
        """Return what resuming needs in addition to the weights: optimiser moments and draw counters, by name."""
        return {**self.optimizer.state(), **checkpoint.counters_of(self.method)}


def attempt(folder: RunFolder, what: str, work: Callable[[], object]) -> None:
    """Do optional work, such as pictures; an error is logged and the run continues."""
    try:
        work()
    except Exception as error:  # any error: it must not end the training
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        folder.info(f"no {what}: {reason}")
