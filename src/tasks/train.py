"""Train: the module that wires every layer together."""

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
from ..data.sources import ImageFolder
from ..engine import checkpoint, device, parallel
from ..engine.evaluate import evaluate, features, knn_accuracy
from ..engine.log import RunFolder
from ..engine.loop import Fit, Hooks, State, attempt
from ..engine.schedule import effective_batch, peak_rate
from ..methods import Method, build_method
from ..models.graph import AsGraph
from ..visual.curves import draw_curves
from ..visual.gallery import write_grid
from ..weights.load import Origin, carry_over, load_encoder
from .images import evaluation_batches, load_sources, loader
from .networks import origin_of
from .teacher import digest_of, keep_answers, kept_answers, load_teacher

STILL = 256  # training images that a Method may look at before the first step
PICTURES = 6  # images of a gallery


def train(recipe: Recipe, resume: str = "") -> dict[str, float]:
    """Run a recipe to its end; returns the metrics of the last evaluation.

    Args:
        recipe: the resolved recipe.
        resume: a checkpoint of this run, or `auto` for the last one in the output folder (a fresh start, said so, if
            there is none).
    """
    used = device.set_up(recipe.device, recipe.seed)
    found = parallel.together(lambda: find_checkpoint(recipe, resume))
    ends = recipe.stage_ends()
    first = parallel.rank() == 0
    folder = parallel.together(lambda: RunFolder(Path(recipe.output), bool(resume), writes=first))
    try:
        if found is not None and found.meta["epoch"] >= ends[-1]:
            folder.info(f"{found.path}: all {plural(ends[-1], 'epoch')} are done; nothing is left to train")
            return dict(found.meta["metrics"])
        # a checkpoint at a border has the shapes of the stage it ended
        start = min(bisect.bisect_left(ends, found.meta["epoch"]), len(ends) - 1) if found else 0
        view = at_stage(recipe, start)
        parts = parallel.together(lambda: training_parts(view))
        training = Training(view, *parts, folder, used)
        fit = parallel.together(lambda: training.prepare(found, bool(resume), ends[start]))
        parallel.together(lambda: folder.open(dump_recipe(recipe), used, parallel.size()))
        if found is not None:
            folder.drop_metrics_after(fit.state.epoch, fit.state.step)
        training.run(fit)
        for number in range(start + 1, len(ends)):
            training, fit = parallel.together(partial(training.next_stage, recipe, number, fit))
            training.run(fit)
        training.finish()
        return training.metrics
    finally:
        folder.close()


def find_checkpoint(recipe: Recipe, resume: str) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; None for a fresh start."""
    if not resume:
        return None
    path = Path(recipe.output) / "last.ckpt" if resume == "auto" else Path(resume)
    if resume == "auto" and not path.exists():
        return None
    found = checkpoint.load(path)
    if not found.state:
        raise checkpoint.CheckpointError(
            f"{path}: has weights but no training state; resume from last.ckpt, or use --init-from"
        )
    return found


def training_parts(recipe: Recipe) -> tuple[Method, Loader, ImageFolder | None]:
    """Method, training batches and validation images."""
    source, validation = load_sources(recipe)
    method = build_method(recipe, load_teacher(recipe, source.classes))
    return method, loader(recipe, source, method.columns, training=True), validation


class Training:
    """One training run, or a stage of one: what `train` wires together."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        train_loader: Loader,
        validation: ImageFolder | None,
        folder: RunFolder,
        used: str,
    ):
        self.recipe, self.method, self.folder, self.used = recipe, method, folder, used
        self.validation = validation
        self.train_loader = self._with_answers(train_loader)
        self.measure = AsGraph(method, method.measure)
        self.probe = AsGraph(method.encoder, method.encoder.pooled)
        self.metrics: dict[str, float] = {}

    def prepare(self, found: checkpoint.Checkpoint | None, resumed: bool, until: int) -> Fit:
        """Everything before the first step that can go wrong on a single rank; writes nothing.

        Args:
            found: the checkpoint to go on from.
            resumed: whether one was asked for.
            until: epochs after which this stage ends.
        """
        if resumed and found is None:
            self.folder.info(f"nothing to resume in {self.folder.path}: a fresh start")
        fit = self._fit(State(), until)
        if found is not None:
            self._restore(fit, found)
            fit.hooks.meta["origins"] = list(origin_of(found).sources)
        elif self.recipe.init_from:
            origin = self._init_from()
            if self.recipe.method.classifier:
                fit.hooks.meta["origins"] = list(origin.sources)
        return fit

    def next_stage(self, whole: Recipe, number: int, before: Fit) -> tuple[Training, Fit]:
        """The same training at the size of another stage.

        Weights go over, tables and learned positions resized; the optimiser's moments and the draw counters go over
        where shapes stay, moments of what is resized start at zero. Graphs and data pipeline are new.
        """
        recipe = at_stage(whole, number)
        self.folder.info(f"stage {number + 1} of {len(whole.stages)}")
        following = Training(recipe, *training_parts(recipe), self.folder, self.used)
        fit = following._fit(before.state, whole.stage_ends()[number])
        fit.hooks.meta["origins"] = before.hooks.meta["origins"]
        weights = {name: p.asnumpy() for name, p in checkpoint.weights_of(self.method).items()}
        origin = Origin(tuple(before.hooks.meta["origins"]), self.recipe.trained_encoder)
        report = carry_over(checkpoint.weights_of(following.method), weights, origin, recipe.trained_encoder)
        self.folder.info(f"weights of the stage before: {report}")
        old = before.state_arrays()
        for name, parameter in fit.state_arrays().items():
            if name in old and old[name].shape == parameter.shape:
                parameter.set_data(Tensor(old[name].asnumpy()))
        return following, fit

    def _fit(self, state: State, until: int) -> Fit:
        """The training loop of this recipe, with fresh weights as yet."""
        recipe = self.recipe
        self._introduce()
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
        return Fit(self.method, self.train_loader, recipe.train, self.folder, hooks, state, until)

    def _with_answers(self, batches: Loader) -> Loader:
        """Training batches with the teacher's answers beside the images, if they are kept; rank 0 asks."""
        recipe, method = self.recipe, self.method
        if not recipe.method.cache:
            return batches
        first = parallel.rank() == 0
        said = parallel.together(lambda: keep_answers(recipe, method, batches) if first else "")
        if said:
            self.folder.info(said)
        return replace(batches, extras=kept_answers(recipe, method, batches))

    def run(self, fit: Fit) -> None:
        """All steps of this stage that are left."""
        fit.align_ranks()
        self.method.prepare(self._still_images())
        if fit.state.epoch == 0 and self.recipe.train.knn:
            self._log_metrics(self._knn(), 0)
        fit.run()

    def finish(self) -> None:
        """After the last step."""
        if self.folder.writes:
            attempt(self.folder, "curves", lambda: draw_curves(self.folder.path))
        self.folder.info(f"done: {self.folder.path}")

    def _introduce(self) -> None:
        recipe = self.recipe
        weights = checkpoint.weights_of(self.method)
        size = sum(p.size for p in weights.values() if p.requires_grad) / 1e6
        ranks = parallel.size()
        place = f"{self.used}, rank {parallel.rank()} of {ranks}" if ranks > 1 else self.used
        self.folder.info(f"output {self.folder.path}, device {place}, seed {recipe.seed}")
        height, width = recipe.encoder.image_size
        self.folder.info(
            f"{height}x{width} pixels, {recipe.encoder.name} + {recipe.method.name}: {size:.2f} M trained parameters"
        )
        teacher = recipe.method.teacher_network
        if teacher is not None and self.method.teacher is not None:
            held = sum(p.size for p in self.method.teacher.get_parameters()) / 1e6
            self.folder.info(f"teacher {teacher.file}: {teacher.encoder.name}, {held:.2f} M parameters")
        self.folder.info(self.train_loader.source.summary())
        if self.validation is not None:
            self.folder.info(self.validation.summary())
        self._introduce_batches(ranks)

    def _introduce_batches(self, ranks: int) -> None:
        """Effective batch, learning rate, updates, and the images that no update takes."""
        train, passes = self.recipe.train, self.recipe.train.passes(ranks)
        batch, of_ranks = effective_batch(train, ranks), f" x {ranks} ranks" if ranks > 1 else ""
        updates = len(self.train_loader) // passes
        scaled = f" x {batch} / {train.lr_batch})" if train.lr_batch else ", not scaled)"
        self.folder.info(
            f"effective batch {batch} ({train.batch_size} x {plural(passes, 'pass', 'passes')}{of_ranks}), "
            f"learning rate {peak_rate(train, ranks):.3g} (train.base_lr {train.base_lr:g}{scaled}, "
            f"{plural(updates, 'update')} per epoch, {plural(train.epochs, 'epoch')}"
        )
        left = self.train_loader.images - updates * batch
        if left and updates:
            self.folder.info(
                f"{left} of {plural(self.train_loader.images, 'image')} are left out of each epoch, others each time: "
                f"they do not fill an update of {batch}"
            )

    def _restore(self, fit: Fit, found: checkpoint.Checkpoint) -> None:
        self._warn_about_changes(found)
        checkpoint.assign(checkpoint.weights_of(self.method), found.weights, found.path)
        fit.restore(found.state, found.path)
        fit.state.epoch, fit.state.step, fit.state.best = (found.meta[k] for k in ("epoch", "step", "best"))
        self.folder.info(f"resumed from {found.path} after epoch {fit.state.epoch} (step {fit.state.step})")

    def _warn_about_changes(self, found: checkpoint.Checkpoint) -> None:
        before = flatten(parse_recipe(found.meta["recipe"], str(found.path)))
        now = flatten(self.recipe)
        for key in sorted(now):
            if before.get(key) != now[key] and key not in ("output", "init_from"):
                self.folder.info(f"changed since the checkpoint: {key} was {before.get(key)}, is {now[key]}")
        teacher = self.recipe.method.teacher_network
        if teacher is not None:
            digest = digest_of(teacher.file)
            if found.meta.get("teacher", digest) != digest:
                self.folder.info(f"changed since the checkpoint: what is in the file {teacher.key}")
        ranks = found.meta.get("ranks", 1)
        if ranks != parallel.size():
            self.folder.info(f"changed since the checkpoint: ranks was {ranks}, is {parallel.size()}")

    def _init_from(self) -> Origin:
        found = checkpoint.load(Path(self.recipe.init_from))
        origin = origin_of(found)
        classes = self.train_loader.source.classes
        weights = checkpoint.weights_of(self.method)
        report = load_encoder(weights, found.weights, found.path, origin, self.recipe.trained_encoder, classes)
        self.folder.info(f"encoder from {found.path} (epoch {found.meta['epoch']}): {report}")
        return origin

    def _evaluate(self, epoch: int) -> dict[str, float]:
        if self.validation is None:
            return {}
        batches = loader(self.recipe, self.validation, ("image", "label", "number"), training=False)
        self.metrics = self.method.metrics(evaluate(self.measure, batches.epoch(0))) | self._knn()
        self._log_metrics(self.metrics, epoch)
        return self.metrics

    def _knn(self) -> dict[str, float]:
        """k-NN accuracy of the frozen encoder: all training images are the bank."""
        k = self.recipe.train.knn
        if not k or self.validation is None or not self.validation.classes:
            return {}
        bank = self._features(self.train_loader.source)
        rows, labels = self._features(self.validation)
        own = slice(parallel.rank(), None, parallel.size())  # each rank looks up its share
        share = knn_accuracy(bank, (rows[own], labels[own]), k) * len(labels[own]) if len(labels[own]) else 0.0
        return {"knn_top1": float(parallel.total([share])[0]) / len(labels)}

    def _features(self, source: ImageFolder) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, dim) and labels (n,) of all images; each rank computes its share."""
        batches = loader(self.recipe, source, ("image", "label"), training=False)
        found = np.zeros((len(source), self.method.encoder.out_dim), np.float32)
        order = batches.order(0)
        if len(order):
            found[order[order >= 0]] = features(self.probe, batches.epoch(0))
        return parallel.total(found), np.array(source.labels)

    def _log_metrics(self, metrics: dict[str, float], epoch: int) -> None:
        if not metrics:
            return
        self.folder.metrics("eval", epoch=epoch, **{k: round(v, 6) for k, v in metrics.items()})
        classifier = self.recipe.method.classifier
        hidden = ("top5",) if classifier and classifier.num_classes <= 5 else ()
        shown = ", ".join(f"{name} {show_metric(name, metrics[name])}" for name in metrics if name not in hidden)
        self.folder.info(f"evaluation{' before training' if epoch == 0 else ''}: {shown}")

    def _still_images(self) -> Iterator[np.ndarray]:
        """Up to `STILL` training images, spread evenly, as evaluation sees them: the same on every rank."""
        source = self.train_loader.source
        some = chosen(source, STILL)
        batches = evaluation_batches(self.recipe, some.files, min(len(some), self.recipe.train.batch_size))
        left = len(some)
        for (image,) in batches:
            yield image.asnumpy()[:left]
            left -= image.shape[0]

    def _pictures(self, epoch: int) -> None:
        """The gallery of a few validation images; rank 0 alone."""
        if not self.folder.writes:
            return
        some = chosen(self.validation or self.train_loader.source, PICTURES)
        image, number = next(evaluation_batches(self.recipe, some.files, len(some), ("image", "number")))
        panels = self.method.panels(image, number, self.recipe.data.mean, self.recipe.data.std)
        if panels:
            path = self.folder.path / "gallery" / f"epoch_{epoch:04d}.png"
            write_grid([panel.pictures for panel in panels], [panel.title for panel in panels], path)
            self.folder.info(f"gallery {path}")


def chosen(source: ImageFolder, count: int) -> ImageFolder:
    """Up to so many images of a source, spread evenly."""
    places = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
    return replace(source, files=[source.files[i] for i in places], labels=[source.labels[i] for i in places])


def show_metric(name: str, value: float) -> str:
    """Accuracies in per cent, counts whole, everything else with four decimals."""
    if "top" in name:
        return f"{100 * value:.2f} %"
    return f"{value:.0f}" if name == "count" else f"{value:.4f}"


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value of every field."""

    def walk(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat = {}
        for key, value in tree.items():
            flat.update(walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return flat

    return walk(to_tree(recipe), "")
