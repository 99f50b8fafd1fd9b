"""Train a recipe: connects data, Method, engine and pictures."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from ..config import Recipe, at_stage, plural
from ..config.files import dump_recipe, parse_recipe, to_tree
from ..data.loader import Loader
from ..data.sources import DataError, Source
from ..engine import checkpoint, device, parallel
from ..engine.bad_images import BadImages
from ..engine.evaluate import evaluate, features, knn_accuracy
from ..engine.log import RunFolder
from ..engine.loop import Fit, Hooks, State, attempt
from ..engine.schedule import effective_batch, peak_rate
from ..methods import Method, build_method
from ..models.graph import AsGraph
from ..operations import kernels
from ..visual.curves import draw_curves
from ..visual.gallery import displayed, write_grid
from ..weights.load import Origin, carry_over, load_encoder_weights
from .images import check_usable, evaluation_batches, left_out, load_sources, loader
from .networks import check_shapes, origin_of
from .teacher import digest_of, load_teacher, store_outputs, stored_outputs

SAMPLE_IMAGES = 256  # training images that `Method.prepare` sees before the first step
GALLERY_IMAGES = 6


def train(recipe: Recipe, resume: str = "", stop_after: int = 0) -> dict[str, float]:
    """Train a recipe to its end; returns the metrics of the last evaluation.

    Args:
        recipe: the resolved recipe.
        resume: a checkpoint of this run, or `auto` for the last one in the output folder. Without one there, `auto`
            starts from the beginning and logs that.
        stop_after: epoch after which this call ends, with `last.ckpt` written; `resume` continues. 0 trains to the end.
    """
    used = device.set_up(recipe.device, recipe.seed, recipe.train)
    loaded = parallel.together(lambda: resume_checkpoint(recipe, resume))
    ends = recipe.stage_ends()
    stop = min(stop_after or ends[-1], ends[-1])
    first = parallel.rank() == 0
    folder = parallel.together(lambda: RunFolder(Path(recipe.output), bool(resume), writes=first))
    try:
        if loaded is not None and loaded.meta["epoch"] >= stop:
            folder.info(f"{loaded.path}: epoch {loaded.meta['epoch']} of {ends[-1]} is done; nothing is left to train")
            return dict(loaded.meta["metrics"])
        # a checkpoint at the end of a stage has the shapes of that stage
        start = min(bisect.bisect_left(ends, loaded.meta["epoch"]), len(ends) - 1) if loaded else 0
        stage_recipe = at_stage(recipe, start)
        if loaded is not None:
            check_shapes(stage_recipe, loaded)
        parts = parallel.together(lambda: training_parts(stage_recipe, folder))
        training = Training(stage_recipe, *parts, folder, used)
        fit = parallel.together(lambda: training.prepare(loaded, bool(resume), ends[start]))
        parallel.together(lambda: folder.open(dump_recipe(recipe), used, parallel.size()))
        if loaded is not None:
            folder.drop_metrics_after(fit.state.epoch, fit.state.step)
        training.run(fit, stop)
        for number in range(start + 1, len(ends)):
            if fit.state.epoch == stop:
                break
            training, fit = parallel.together(partial(training.next_stage, recipe, number, fit))
            training.run(fit, stop)
        training.finish(stop, ends[-1])
        return training.metrics
    finally:
        folder.close()


def resume_checkpoint(recipe: Recipe, resume: str) -> checkpoint.Checkpoint | None:
    """Load the checkpoint to resume from; None to start from the beginning.

    Raises:
        CheckpointError: it cannot be read, or has no training state.
    """
    if not resume:
        return None
    path = Path(recipe.output) / "last.ckpt" if resume == "auto" else Path(resume)
    if resume == "auto" and not path.exists():
        return None
    loaded = checkpoint.load(path)
    if not loaded.state:
        raise checkpoint.CheckpointError(
            f"{path}: has weights but no training state; resume from last.ckpt, or use --init-from"
        )
    return loaded


def training_parts(recipe: Recipe, folder: RunFolder | None = None) -> tuple[Method, Loader, Source | None]:
    """Return Method, training batches and validation images of a recipe."""
    source, validation = load_sources(recipe)
    note = check_usable(recipe, source, "data.train")
    if note and folder is not None:
        folder.info(note)
    if validation is not None:
        check_usable(recipe, validation, "data.val")
    method = build_method(recipe, load_teacher(recipe, source.classes))
    return method, loader(recipe, source, method.columns, training=True), validation


class Training:
    """A training run, or one stage of progressive resolution.

    Args:
        recipe: the recipe of this stage.
        method: the network to train.
        train_loader: training batches.
        validation: validation images; None: no evaluation.
        folder: output folder.
        used: device, for the log.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        train_loader: Loader,
        validation: Source | None,
        folder: RunFolder,
        used: str,
    ):
        self.recipe = recipe
        self.method = method
        self.folder = folder
        self.used = used
        self.validation = validation
        self.train_loader = self._with_teacher_outputs(train_loader)
        self.measure = AsGraph(method, method.measure)
        self.probe = AsGraph(method.encoder, method.encoder.pooled)
        self.metrics: dict[str, float] = {}

    def prepare(self, loaded: checkpoint.Checkpoint | None, resumed: bool, until: int) -> Fit:
        """Do everything before the first step that can fail on a single rank; writes nothing.

        Args:
            loaded: the checkpoint to resume from.
            resumed: whether the user asked to resume.
            until: last epoch of this stage.
        """
        if resumed and loaded is None:
            self.folder.info(f"nothing to resume in {self.folder.path}: starting from the beginning")
        fit = self._fit(State(), until)
        if loaded is not None:
            self._restore(fit, loaded)
            fit.hooks.meta["origins"] = list(origin_of(loaded).sources)
        elif self.recipe.init_from:
            origin = self._init_from()
            if self.recipe.method.classifier:
                fit.hooks.meta["origins"] = list(origin.sources)
        return fit

    def next_stage(self, whole: Recipe, number: int, before: Fit) -> tuple[Training, Fit]:
        """Continue the training with the sizes of another stage.

        Weights are copied; position tables and learned positions are resized. Optimiser moments and draw counters are
        copied where shapes are equal; moments of resized parameters start at zero. Graphs and data pipeline are new.
        """
        recipe = at_stage(whole, number)
        self.folder.info(f"stage {number + 1} of {len(whole.stages)}")
        following = Training(recipe, *training_parts(recipe, self.folder), self.folder, self.used)
        fit = following._fit(before.state, whole.stage_ends()[number])
        fit.hooks.meta["origins"] = before.hooks.meta["origins"]
        weights = {name: p.asnumpy() for name, p in checkpoint.weights_of(self.method).items()}
        origin = Origin(tuple(before.hooks.meta["origins"]), self.recipe.trained_encoder)
        report = carry_over(checkpoint.weights_of(following.method), weights, origin, recipe.trained_encoder)
        self.folder.info(f"weights of the previous stage: {report}")
        old = before.state_arrays()
        for name, parameter in fit.state_arrays().items():
            if name in old and old[name].shape == parameter.shape:
                parameter.set_data(Tensor(old[name].asnumpy()))
        return following, fit

    def _fit(self, state: State, until: int) -> Fit:
        """Build the training loop of this recipe; weights are still the initial ones."""
        recipe = self.recipe
        self._log_setup()
        meta = {
            "recipe": dump_recipe(recipe),
            "method": recipe.method.name,
            "classes": self.train_loader.source.classes,
            "origins": [recipe.method.origin],
            "ranks": parallel.size(),
        }
        if recipe.method.teacher_network:
            meta["teacher"] = digest_of(recipe.method.teacher_network.file)
        hooks = Hooks(self._evaluate, self._pictures, meta)
        self.bad_images = BadImages(self.folder, self.train_loader)
        parts = (self.train_loader, recipe.train, self.folder, hooks, state, until, self.bad_images)
        return Fit(self.method, *parts)

    def _with_teacher_outputs(self, batches: Loader) -> Loader:
        """Add stored teacher outputs to the training batches if the recipe has a cache; rank 0 computes them."""
        recipe, method = self.recipe, self.method
        if not recipe.method.cache:
            return batches
        first = parallel.rank() == 0
        line = parallel.together(lambda: store_outputs(recipe, method, batches) if first else "")
        if line:
            self.folder.info(line)
        return replace(batches, extras=stored_outputs(recipe, method, batches))

    def run(self, fit: Fit, stop_after: int) -> None:
        """Run the remaining steps of this stage, as far as epoch `stop_after`."""
        fit.align_ranks()
        self.method.prepare(self._sample_images())
        if fit.state.epoch == 0 and self.recipe.train.knn:
            self._log_metrics(self._knn(), 0)
        fit.run(stop_after)

    def finish(self, epoch: int, epochs: int) -> None:
        """Draw the curves after the last step."""
        if self.folder.writes:
            attempt(self.folder, "curves", lambda: draw_curves(self.folder.path))
        done = "done" if epoch == epochs else f"stopped after epoch {epoch} of {epochs}; --resume auto continues"
        self.folder.info(f"{done}: {self.folder.path}")

    def _log_setup(self) -> None:
        """Log output folder, device, kernels, network, teacher and images."""
        recipe = self.recipe
        weights = checkpoint.weights_of(self.method)
        size = sum(p.size for p in weights.values() if p.requires_grad) / 1e6
        ranks = parallel.size()
        where = f"{self.used}, rank {parallel.rank()} of {ranks}" if ranks > 1 else self.used
        self.folder.info(f"output {self.folder.path}, device {where}, seed {recipe.seed}")
        if self.used == "CPU":
            self.folder.info(kernels.description())
        height, width = recipe.encoder.image_size
        self.folder.info(
            f"{height}x{width} pixels, {recipe.encoder.name} + {recipe.method.name}: {size:.2f} M trained parameters"
        )
        teacher = recipe.method.teacher_network
        if teacher is not None and self.method.teacher is not None:
            teacher_size = sum(p.size for p in self.method.teacher.get_parameters()) / 1e6
            self.folder.info(f"teacher {teacher.file}: {teacher.encoder.name}, {teacher_size:.2f} M parameters")
        self.folder.info(self.train_loader.source.summary())
        if self.validation is not None:
            self.folder.info(self.validation.summary())
        self._log_batches(ranks)

    def _log_batches(self, ranks: int) -> None:
        """Log effective batch, learning rate, updates, and the images left out of each epoch."""
        train, passes = self.recipe.train, self.recipe.train.passes(ranks)
        batch, of_ranks = effective_batch(train, ranks), f" x {ranks} ranks" if ranks > 1 else ""
        updates = len(self.train_loader) // passes
        scaled = f" x {batch} / {train.lr_batch})" if train.lr_batch else ", not scaled)"
        self.folder.info(
            f"effective batch {batch} ({train.batch_size} x {plural(passes, 'pass', 'passes')}{of_ranks}), "
            f"learning rate {peak_rate(train, ranks):.3g} (train.base_lr {train.base_lr:g}{scaled}, "
            f"{plural(updates, 'update')} per epoch, {plural(train.epochs, 'epoch')}"
        )
        left_out = self.train_loader.images - updates * batch
        if left_out and updates:
            self.folder.info(
                f"each epoch leaves out {left_out} of {plural(self.train_loader.images, 'image')}, others each time: "
                f"they do not fill an update of {batch}"
            )

    def _restore(self, fit: Fit, loaded: checkpoint.Checkpoint) -> None:
        """Set weights, training state and progress from a checkpoint."""
        self._log_changes(loaded)
        checkpoint.assign(checkpoint.weights_of(self.method), loaded.weights, loaded.path)
        fit.restore(loaded.state, loaded.path)
        fit.state.epoch = loaded.meta["epoch"]
        fit.state.step = loaded.meta["step"]
        fit.state.best = loaded.meta["best"]
        self.folder.info(f"resumed from {loaded.path} after epoch {fit.state.epoch} (step {fit.state.step})")

    def _log_changes(self, loaded: checkpoint.Checkpoint) -> None:
        """Log how recipe, teacher and number of ranks differ from those of the checkpoint."""
        before = flatten(parse_recipe(loaded.meta["recipe"], str(loaded.path)))
        now = flatten(self.recipe)
        for key in sorted(now):
            if before.get(key) != now[key] and key not in ("output", "init_from"):
                self.folder.info(f"changed since the checkpoint: {key} was {before.get(key)}, is {now[key]}")
        teacher = self.recipe.method.teacher_network
        if teacher is not None:
            digest = digest_of(teacher.file)
            if loaded.meta.get("teacher", digest) != digest:
                self.folder.info(f"changed since the checkpoint: the content of the file {teacher.key}")
        ranks = loaded.meta.get("ranks", 1)
        if ranks != parallel.size():
            self.folder.info(f"changed since the checkpoint: ranks was {ranks}, is {parallel.size()}")

    def _init_from(self) -> Origin:
        """Initialise the encoder from the checkpoint `init_from`; returns whose resizing rules it follows."""
        loaded = checkpoint.load(Path(self.recipe.init_from))
        origin = origin_of(loaded)
        classes = self.train_loader.source.classes
        weights = checkpoint.weights_of(self.method)
        report = load_encoder_weights(
            weights, loaded.weights, loaded.path, origin, self.recipe.trained_encoder, classes
        )
        self.folder.info(f"encoder from {loaded.path} (epoch {loaded.meta['epoch']}): {report}")
        return origin

    def _evaluate(self, epoch: int) -> dict[str, float]:
        """Evaluate on the validation images and log the metrics; empty without validation images."""
        if self.validation is None:
            return {}
        batches = loader(self.recipe, self.validation, ("image", "label", "number"), training=False)
        sums = evaluate(self.measure, batches.epoch(0))
        faults = self.bad_images.report_evaluation(batches.take_faults())
        if len(faults) == len(self.validation):
            raise DataError(f"data.val: {left_out(faults, self.validation)}; restore them, and use --resume auto")
        self.metrics = self.method.metrics(sums) | self._knn()
        self._log_metrics(self.metrics, epoch)
        if faults:
            self.folder.info(left_out(faults, self.validation))
        return self.metrics

    def _knn(self) -> dict[str, float]:
        """Measure the k-NN accuracy of the frozen encoder; the bank is all training images."""
        k = self.recipe.train.knn
        if not k or self.validation is None or not self.validation.classes:
            return {}
        bank = self._features(self.train_loader.source)
        vectors, labels = self._features(self.validation)
        if not len(bank[1]) or not len(labels):  # none can be used
            return {}
        part = slice(parallel.rank(), None, parallel.size())  # each rank classifies a part of the images
        correct = knn_accuracy(bank, (vectors[part], labels[part]), k) * len(labels[part]) if len(labels[part]) else 0.0
        return {"knn_top1": float(parallel.total([correct])[0]) / len(labels)}

    def _features(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Compute features (n, dim) and labels (n,) of all usable images; each rank computes a part of them."""
        batches = loader(self.recipe, source, ("image", "label", "number"), training=False)
        vectors = np.zeros((len(source), self.method.encoder.out_dim), np.float32)
        used = np.zeros(len(source), np.float32)
        if len(batches):
            numbers, found = features(self.probe, batches.epoch(0))
            vectors[numbers], used[numbers] = found, 1
        usable = parallel.total(used) > 0
        return parallel.total(vectors)[usable], source.labels[usable]

    def _log_metrics(self, metrics: dict[str, float], epoch: int) -> None:
        if not metrics:
            return
        self.folder.metrics("eval", epoch=epoch, **{k: round(v, 6) for k, v in metrics.items()})
        classifier = self.recipe.method.classifier
        omitted = ("top5",) if classifier and classifier.num_classes <= 5 else ()
        text = ", ".join(f"{name} {show_metric(name, metrics[name])}" for name in metrics if name not in omitted)
        self.folder.info(f"evaluation{' before training' if epoch == 0 else ''}: {text}")

    def _sample_images(self) -> Iterator[np.ndarray]:
        """Yield up to `SAMPLE_IMAGES` training images with the evaluation transform; the same on every rank."""
        sample = evenly_spread(self.train_loader.source, SAMPLE_IMAGES)
        batch = min(len(sample), self.recipe.train.batch_size)
        waiting: list[np.ndarray] = []  # usable images of batches that lack some
        for image, label in evaluation_batches(self.recipe, sample, batch, ("image", "label")):
            waiting += list(image.asnumpy()[label.asnumpy() >= 0])
            if len(waiting) >= batch:
                yield np.stack(waiting[:batch])
                del waiting[:batch]
        if waiting:
            yield np.stack(waiting)

    def _pictures(self, epoch: int) -> None:
        """Write the gallery of a few validation images, on rank 0 only."""
        if not self.folder.writes:
            return
        sample = evenly_spread(self.validation or self.train_loader.source, GALLERY_IMAGES)
        columns = ("image", "number", "label")
        image, number, label = next(evaluation_batches(self.recipe, sample, len(sample), columns))
        usable = np.flatnonzero(label.asnumpy() >= 0)
        if not len(usable):
            self.folder.info("no gallery: none of its images can be used")
            return
        image, number = Tensor(image.asnumpy()[usable]), Tensor(number.asnumpy()[usable])
        panels = self.method.panels(image, number, partial(displayed, self.recipe.data))
        if panels:
            path = self.folder.path / "gallery" / f"epoch_{epoch:04d}.png"
            write_grid([panel.pictures for panel in panels], [panel.title for panel in panels], path)
            self.folder.info(f"gallery {path}")


def evenly_spread(source: Source, count: int) -> Source:
    """Return at most `count` images of a source, spread evenly over it."""
    return source.subset(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))


def show_metric(name: str, value: float) -> str:
    """Format accuracies in per cent, counts as whole numbers, everything else with four decimals."""
    if "top" in name:
        return f"{100 * value:.2f} %"
    return f"{value:.0f}" if name == "count" else f"{value:.4f}"


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return dotted key -> value for every field of a recipe."""

    def walk(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat = {}
        for key, value in tree.items():
            flat.update(walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return flat

    return walk(to_tree(recipe), "")
