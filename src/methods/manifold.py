"""Manifold distillation: learn the relations among a teacher's features (Hao et al., NeurIPS 2022).

As in the authors' code, Hao840/manifold-distillation 1096b82, losses.py. Features are scaled to length 1. The loss of a
pair of layers is the mean squared difference of Gram matrices. There are three Gram matrices: among the tokens of an
image, among the images of a pass at one token, and among tokens drawn at random from all images. They are of size
tokens x tokens, images x images and samples x samples.
"""

from __future__ import annotations

import math

import numpy as np
from mindspore import Tensor, nn, ops

from ..config import ManifoldConfig
from ..models import Classifier
from ..models.random import CounterUniform
from ..operations.rows import scale_rows
from .classify import Classify, entropy, soft_cross_entropy
from .method import freeze
from .mixing import Mixing, soft_targets

_GRAM, _ROWS_GRAM = ops.BatchMatMul(transpose_b=True), ops.MatMul(transpose_b=True)
_RSQRT, _MAXIMUM, _SUM = ops.Rsqrt(), ops.Maximum(), ops.ReduceSum(keep_dims=True)

EPS = 1e-12  # lower limit of the length that features are divided by
FAR = 10.0  # gap of logits from which `soft_distance` takes logarithms first; exp(-2 * FAR) is negligible


# --- relations --------------------------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    """Features (..., C) divided by their length."""
    rows = x.reshape(-1, x.shape[-1])
    length = _MAXIMUM(_SUM(rows * rows, -1), EPS**2)
    return scale_rows(rows, _RSQRT(length)).reshape(x.shape)


def patch_gram(x: Tensor) -> Tensor:
    """Relations among the tokens of each image (intra-sample): (B, N, C) -> (B, N, N)."""
    return _GRAM(x, x)


def sample_gram(x: Tensor) -> Tensor:
    """Relations among the images at each token (inter-sample): (B, N, C) -> (N, B, B)."""
    x = x.transpose(1, 0, 2)
    return _GRAM(x, x)


def rand_gram(x: Tensor, index: Tensor) -> Tensor:
    """Relations among the tokens at `index` (K,) of all B*N: (B, N, C) -> (K, K)."""
    rows = ops.gather(x.reshape(-1, x.shape[-1]), index, 0)
    return _ROWS_GRAM(rows, rows)


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference."""
    gap = student - teacher
    return (gap * gap).mean()


def constant_distance(teacher: Tensor) -> Tensor:
    """`gram_distance` of a student with constant features, whose Gram matrices are all 1."""
    return 1.0 - 2.0 * teacher.mean() + (teacher * teacher).mean()


def merge(x: Tensor, max_patch_num: int) -> Tensor:
    """Concatenate k x k neighbouring tokens of a square map: (B, N, C) -> (B, m*m, k*k*C), m*m <= `max_patch_num`.

    Unchanged if N is not above the limit or the limit is 0. m is the root of the limit, rounded down; k = side of the
    map / m must be whole. Order inside a merged token: y, x, channel.
    """
    batch, tokens, dim = x.shape
    if not max_patch_num or tokens <= max_patch_num:
        return x
    side = math.isqrt(max_patch_num)
    joined = math.isqrt(tokens) // side
    x = x.reshape(batch, side, joined, side, joined, dim).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, side * side, joined * joined * dim)


def draw_tokens(noise: Tensor, samples: int) -> Tensor:
    """Indices (K,) int32 of the `samples` tokens with the largest of the uniform numbers (B, N)."""
    noise = noise.reshape(-1)
    return ops.topk(noise, min(samples, noise.shape[0]))[1]


# --- logits -----------------------------------------------------------------------------------------------------


def soft_distance(logits: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """KL(teacher || student) of the softened predictions, mean over the batch, times tau**2.

    It is log E_p[exp(g - E_p[g])] with the teacher's prediction p and the gaps g between the logits. The difference of
    two log-softmax, each exact to 2e-6 on CPU, would be mostly rounding for a close student; it is used only for images
    whose gaps are too large for exp.

    Args:
        logits, teacher: (B, classes).
        tau: temperature; both are divided by it.
    """
    ours, theirs = logits / tau, teacher / tau
    share, gap = ops.softmax(theirs, -1), (logits - teacher) / tau
    gap = gap - (share * gap).sum(axis=-1, keepdims=True)
    near = log1p((share * expm1(ops.clamp(gap, -2 * FAR, FAR))).sum(axis=-1))
    logs = ops.log_softmax(theirs, -1)
    far = (ops.exp(logs) * (logs - ops.log_softmax(ours, -1))).sum(axis=-1)
    return ops.where(gap.max(axis=-1) < FAR, near, far).mean() * tau**2


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1; MindSpore's subtracts 1 on CPU, which is inexact for small x."""
    return 2.0 * ops.sinh(x / 2) * ops.exp(x / 2)


def log1p(x: Tensor) -> Tensor:
    """log(1 + x) of x >= 0; MindSpore's adds 1 on CPU, which is inexact for small x."""
    return 2.0 * ops.atanh(x / (2.0 + x))


# --- the Method -------------------------------------------------------------------------------------------------


class Relations(nn.Cell):
    """The three relation losses, averaged over the pairs of layers.

    Args:
        config: weights and limits.
        maps: map sizes of each pair from `config.relation_maps`: student, teacher, merged.
    """

    def __init__(self, config: ManifoldConfig, maps: tuple[tuple[tuple[int, int], ...], ...]):
        super().__init__()
        self.patches = tuple([tuple([math.prod(size) for size in sizes]) for sizes in maps])
        self.samples, self.max_patch_num = config.samples, config.max_patch_num
        self.w_sample = config.beta * config.w_sample / len(maps)
        self.w_patch = config.beta * config.w_patch / len(maps)
        self.w_rand = config.beta * config.w_rand / len(maps)
        self.drawn = CounterUniform("relations")

    def construct(
        self, students: tuple[Tensor, ...], teachers: tuple[Tensor, ...], indices: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Weighted losses.

        Args:
            students, teachers: sequences (B, prefix tokens + N, C) of each pair.
            indices: drawn tokens of each pair, (K,) int32, among the B * `length` tokens.

        Returns:
            Losses sample, patch and rand, and the sum of the three for constant features.
        """
        zero = ops.zeros((), students[0].dtype)
        sample, patch, rand, constant = zero, zero, zero, zero
        for number in range(len(students)):
            student, teacher = self.features(students[number], teachers[number], number)
            if self.w_sample > 0:
                target = sample_gram(teacher)
                sample = sample + self.w_sample * gram_distance(sample_gram(student), target)
                constant = constant + self.w_sample * constant_distance(target)
            if self.w_patch > 0:
                target = patch_gram(teacher)
                patch = patch + self.w_patch * gram_distance(patch_gram(student), target)
                constant = constant + self.w_patch * constant_distance(target)
            if self.w_rand > 0:
                target = rand_gram(teacher, indices[number])
                rand = rand + self.w_rand * gram_distance(rand_gram(student, indices[number]), target)
                constant = constant + self.w_rand * constant_distance(target)
        return sample, patch, rand, constant

    def draw(self, students: tuple[Tensor, ...], teachers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Indices of random tokens for each pair; a pure function of the seed and the numbers of the samples."""
        if self.w_rand == 0:
            return ()
        lengths = [self.length(students[i], teachers[i], i) for i in range(len(students))]
        noise = self.drawn(students[0].shape[0], sum(lengths))
        indices, start = [], 0
        for length in lengths:
            indices.append(draw_tokens(noise[:, start : start + length], self.samples))
            start += length
        return tuple(indices)

    def features(self, student: Tensor, teacher: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Features of a pair, scaled to length 1: (B, N, C) with the same N and different C.

        Prefix tokens are dropped, with one exception as in the reference: if nothing is merged and the student has at
        least as many prefix tokens as the teacher, those of the teacher and as many of the student take part.
        """
        if self.uses_prefix_tokens(student, teacher, number):
            return unit(student[:, student.shape[1] - teacher.shape[1] :]), unit(teacher)
        student_patches, teacher_patches, _ = self.patches[number]
        student = student[:, student.shape[1] - student_patches :]
        teacher = teacher[:, teacher.shape[1] - teacher_patches :]
        return unit(merge(student, self.max_patch_num)), unit(merge(teacher, self.max_patch_num))

    def uses_prefix_tokens(self, student: Tensor, teacher: Tensor, number: int) -> bool:
        student_patches, teacher_patches, merged = self.patches[number]
        return student_patches == teacher_patches == merged and student.shape[1] >= teacher.shape[1]

    def length(self, student: Tensor, teacher: Tensor, number: int) -> int:
        """Number of tokens in the features of a pair."""
        return teacher.shape[1] if self.uses_prefix_tokens(student, teacher, number) else self.patches[number][2]


class ManifoldDistiller(Classify):
    """A classifier that learns from labels, from a teacher's logits, and from relations among the teacher's features.

    Teacher and student get the same mixed images. The teacher is not a sub-cell, so it stays in evaluation mode, and
    its parameters are neither trained nor saved. Relations are among the images of one pass on one device, as in the
    reference, where each process relates its own images.

    Args:
        classifier: the student. With a distillation token its second head learns from the teacher, and its first from
            the labels, as in DeiT.
        config: layers, weights, temperature.
        maps: as in `Relations`.
        teacher: a classifier of the same classes.
        mixing: as in `Classify`.
    """

    teacher: Classifier
    parts: tuple[str, ...] = ("base", "distillation", "sample", "patch", "rand")

    def __init__(
        self,
        classifier: Classifier,
        config: ManifoldConfig,
        maps: tuple[tuple[tuple[int, int], ...], ...],
        teacher: Classifier,
        mixing: Mixing | None = None,
    ):
        super().__init__(classifier, config.label_smoothing, mixing)
        self.kind, self.tau = config.distillation, config.tau
        self.scale = config.tau**2 if config.distillation == "soft" else 1.0
        self.alpha = 0.0 if config.distillation == "none" else config.alpha
        pairs = list(zip(config.student_layers, config.teacher_layers, strict=True)) if config.relates else []
        self.student_layers, self.teacher_layers = (tuple(sorted({pair[i] for pair in pairs})) for i in (0, 1))
        self.pair_indices = tuple([(self.student_layers.index(s), self.teacher_layers.index(t)) for s, t in pairs])
        self.relations = Relations(config, maps) if pairs else None
        if config.cache:
            self.columns = (*Classify.columns, *self.teacher_columns)
        self.cached = bool(config.cache)
        self.__dict__["teacher"] = freeze(teacher)  # not a sub-cell

    @property
    def teacher_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("teacher_logits", *(f"teacher_block_{number}" for number in self.teacher_layers))

    def construct(self, image: Tensor, label: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        """Images, labels as in `Classify`, and the teacher's outputs if they are cached -> loss, parts, sums."""
        image, target = self.mixed(image, label)
        return self.run(image, target, outputs if self.cached else self.teacher_outputs(image), None)

    def run(
        self, image: Tensor, target: Tensor, outputs: tuple[Tensor, ...], indices: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        """Loss, weighted parts, sums.

        Args:
            image, target: images and soft targets.
            outputs: `teacher_outputs` of the images.
            indices: as in `Relations`; None draws them.
        """
        encoder = self.classifier.encoder
        sequence, blocks = encoder.outputs(encoder.embed(image), self.student_layers)
        logits, second = self.classifier.heads(sequence)
        base = soft_cross_entropy(logits, target) * (1.0 - self.alpha)
        zero = base * 0.0
        distillation, sample, patch, rand, constant = zero, zero, zero, zero, zero
        teacher_target, certainty = target, zero
        if self.alpha > 0:
            distance, teacher_target, certainty = self.distance(second, outputs[0])
            distillation = distance * self.alpha
        if self.relations is not None:
            students = tuple([blocks[pair[0]] for pair in self.pair_indices])
            teachers = tuple([outputs[1 + pair[1]] for pair in self.pair_indices])
            if indices is None:
                indices = self.relations.draw(students, teachers)
            sample, patch, rand, constant = self.relations(students, teachers, indices)
        images = image.shape[0]
        scalars = ops.stack((zero + images, certainty, constant * images))
        sums = ops.stop_gradient(ops.cat((scalars, target.sum(axis=0), teacher_target.sum(axis=0))))
        return base + distillation + sample + patch + rand, base, distillation, sample, patch, rand, sums

    def baseline(self, sums: np.ndarray) -> float:
        """Loss of predicting the mean target, the teacher's mean prediction, and constant features.

        `sums` are: the number of images; the sum of p log p over the teacher's softened predictions p; the relation
        loss of constant features, times images; the sum of the targets and the sum of p, class by class.
        """
        images, certainty, constant = sums[:3] / np.array([1.0, max(sums[0], 1), max(sums[0], 1)])
        target, teacher_target = np.split(sums[3:], 2)
        distillation = max(entropy(teacher_target) + float(certainty), 0.0) * self.scale if images else 0.0
        return entropy(target) * (1.0 - self.alpha) + distillation * self.alpha + float(constant)

    def teacher_outputs(self, image: Tensor) -> tuple[Tensor, ...]:
        """The teacher's logits (B, classes), and its sequences after `teacher_layers`, without gradients."""
        encoder = self.teacher.encoder
        sequence, blocks = encoder.outputs(encoder.embed(image), self.teacher_layers)
        return tuple([ops.stop_gradient(x) for x in (self.teacher.logits(sequence), *blocks)])

    def distance(self, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distillation loss of the student's logits; the teacher's prediction p (B, classes); the sum of p log p."""
        if self.kind == "hard":
            target = soft_targets(teacher.argmax(axis=1), self.num_classes, 0.0)
            return soft_cross_entropy(logits, target), target, (target * 0.0).sum()
        logs = ops.log_softmax(teacher / self.tau, -1)
        share = ops.exp(logs)
        return soft_distance(logits, teacher, self.tau), share, (share * logs).sum()
