"""Manifold distillation: the relations among a teacher's features as a target (Hao et al., NeurIPS 2022).

The numbers are those of the authors' code, Hao840/manifold-distillation 1096b82, losses.py: features are normalised to
length 1, and the loss of a pair of layers is the mean of the squared differences of two Gram matrices. There are three:
among the tokens of an image, among the images of a pass at one token, and among tokens drawn from all images. None is
larger than tokens x tokens, images x images or samples x samples.
"""

from __future__ import annotations

import math

import numpy as np
from mindspore import Tensor, nn, ops

from ..config import ManifoldConfig
from ..models import Classifier
from ..models.random import CounterUniform
from ..models.rows import scale_rows
from .classify import Classify, entropy, soft_cross_entropy
from .method import freeze
from .mixing import Mixing, soft_targets

_GRAM, _ROWS_GRAM = ops.BatchMatMul(transpose_b=True), ops.MatMul(transpose_b=True)
_RSQRT, _MAXIMUM, _SUM = ops.Rsqrt(), ops.Maximum(), ops.ReduceSum(keep_dims=True)

EPS = 1e-12  # smallest length that features are divided by
FAR = 10.0  # gap between logits from which `soft_distance` takes logarithms first; exp(-2 * FAR) is nothing


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
    """Mean of squared differences."""
    gap = student - teacher
    return (gap * gap).mean()


def constant_distance(teacher: Tensor) -> Tensor:
    """`gram_distance` of a student whose features are all the same, and its relations 1."""
    return 1.0 - 2.0 * teacher.mean() + (teacher * teacher).mean()


def merge(x: Tensor, max_patch_num: int) -> Tensor:
    """Tokens (B, N, C) of a square map -> at most `max_patch_num` tokens of k x k neighbours, (B, m*m, k*k*C).

    Unchanged where N is not above the limit or the limit is 0. The side m is the whole root of the limit, and k = side
    of the map / m must be whole. Inside a merged token: row, column, channel.
    """
    batch, tokens, dim = x.shape
    if not max_patch_num or tokens <= max_patch_num:
        return x
    side = math.isqrt(max_patch_num)
    joined = math.isqrt(tokens) // side
    x = x.reshape(batch, side, joined, side, joined, dim).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, side * side, joined * joined * dim)


def chosen(noise: Tensor, samples: int) -> Tensor:
    """Which tokens are drawn: those with the `samples` largest of the uniform numbers (B, N) -> (K,) int32."""
    noise = noise.reshape(-1)
    return ops.topk(noise, min(samples, noise.shape[0]))[1]


# --- logits -----------------------------------------------------------------------------------------------------


def soft_distance(logits: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """KL divergence of the teacher's softened prediction from the student's, mean over the batch, times tau**2.

    With p the teacher's prediction and g the gaps between the logits, it is log E_p[exp(g - E_p[g])]. A difference of
    two log-softmax, each good to 2e-6 on CPU, would be rounding for the most part once the student is close; that is
    taken only for images with gaps whose exponential is too large.

    Args:
        logits, teacher: (B, classes).
        tau: temperature that both are divided by.
    """
    ours, theirs = logits / tau, teacher / tau
    share, gap = ops.softmax(theirs, -1), (logits - teacher) / tau
    gap = gap - (share * gap).sum(axis=-1, keepdims=True)
    near = log1p((share * expm1(ops.clamp(gap, -2 * FAR, FAR))).sum(axis=-1))
    logs = ops.log_softmax(theirs, -1)
    far = (ops.exp(logs) * (logs - ops.log_softmax(ours, -1))).sum(axis=-1)
    return ops.where(gap.max(axis=-1) < FAR, near, far).mean() * tau**2


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1; MindSpore's own subtracts on CPU, which leaves nothing of a small x."""
    return 2.0 * ops.sinh(x / 2) * ops.exp(x / 2)


def log1p(x: Tensor) -> Tensor:
    """log(1 + x) of x >= 0; MindSpore's own adds on CPU."""
    return 2.0 * ops.atanh(x / (2.0 + x))


# --- the Method -------------------------------------------------------------------------------------------------


class Relations(nn.Cell):
    """The three relation losses of all pairs of layers.

    Args:
        config: weights and limits.
        maps: of each pair as `config.relation_maps` gives them; how many tokens of a sequence are patches follows.
    """

    def __init__(self, config: ManifoldConfig, maps: tuple[tuple[tuple[int, int], ...], ...]):
        super().__init__()
        self.patches = tuple([(math.prod(own), math.prod(given), math.prod(merged)) for own, given, merged in maps])
        self.samples, self.max_patch_num = config.samples, config.max_patch_num
        weights = (config.w_sample, config.w_patch, config.w_rand)
        self.w_sample, self.w_patch, self.w_rand = (config.beta * weight / len(maps) for weight in weights)
        self.drawn = CounterUniform("relations")

    def construct(
        self, students: tuple[Tensor, ...], teachers: tuple[Tensor, ...], indices: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Means over the pairs with their weights.

        Args:
            students, teachers: sequences (B, prefix + N, C) of each pair.
            indices: tokens drawn for each pair, (K,) int32, in B * (tokens that are related).

        Returns:
            sample, patch, rand, and the sum of the three for constant features.
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
        """Tokens of each pair for the relations at random: a pure function of seed and number of the sample."""
        if self.w_rand == 0:
            return ()
        lengths = [self.length(students[i], teachers[i], i) for i in range(len(students))]
        noise = self.drawn(students[0].shape[0], sum(lengths))
        found, start = [], 0
        for length in lengths:
            found.append(chosen(noise[:, start : start + length], self.samples))
            start += length
        return tuple(found)

    def features(self, student: Tensor, teacher: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The features of a pair that are related, (B, N, C) each with its own C, of length 1.

        Tokens before the patches are left out, unless nothing is merged and the student has no fewer of them than the
        teacher: then the teacher's take part, and the student's surplus is cut off, as in the reference.
        """
        if self.keeps_prefix(student, teacher, number):
            return unit(student[:, student.shape[1] - teacher.shape[1] :]), unit(teacher)
        own, given, _ = self.patches[number]
        student, teacher = student[:, student.shape[1] - own :], teacher[:, teacher.shape[1] - given :]
        return unit(merge(student, self.max_patch_num)), unit(merge(teacher, self.max_patch_num))

    def keeps_prefix(self, student: Tensor, teacher: Tensor, number: int) -> bool:
        own, given, merged = self.patches[number]
        return own == given == merged and student.shape[1] >= teacher.shape[1]

    def length(self, student: Tensor, teacher: Tensor, number: int) -> int:
        """Tokens of an image that a pair relates."""
        return teacher.shape[1] if self.keeps_prefix(student, teacher, number) else self.patches[number][2]


class ManifoldDistiller(Classify):
    """A classifier that learns from labels, from a teacher's logits and from the relations among its features.

    The teacher sees the images of the student, mixed as they are. It is no part of the tree of cells: it stays in
    evaluation mode, and neither optimiser nor checkpoint meets its parameters. Relations are those of the images of one
    pass on one device, as in the reference, where every process relates its own images.

    Args:
        classifier: the student. With a distillation token its second head learns from the teacher, and the first from
            the labels, as in DeiT.
        config: layers, weights, temperature.
        maps: of each pair of layers as `config.relation_maps` gives them.
        teacher: of the same classes.
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
        self.places = tuple([(self.student_layers.index(s), self.teacher_layers.index(t)) for s, t in pairs])
        self.relations = Relations(config, maps) if pairs else None
        if config.cache:
            self.columns = (*Classify.columns, *self.answers)
        self.cached = bool(config.cache)
        self.__dict__["teacher"] = freeze(teacher)  # not as a cell of this one

    @property
    def answers(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("teacher_logits", *(f"teacher_block_{number}" for number in self.teacher_layers))

    def construct(self, image: Tensor, label: Tensor, *answers: Tensor) -> tuple[Tensor, ...]:
        """Images, labels as in `Classify` and the teacher's answers if they are kept -> loss, weighted parts, sums."""
        image, target = self.mixed(image, label)
        return self.run(image, target, answers if self.cached else self.ask(image), None)

    def run(
        self, image: Tensor, target: Tensor, given: tuple[Tensor, ...], indices: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        """Loss, parts and sums; `given` are the teacher's answers, `indices` tokens of each pair (None: drawn here)."""
        encoder = self.classifier.encoder
        sequence, blocks = encoder.outputs(encoder.embed(image), self.student_layers)
        logits, second = self.classifier.heads(sequence)
        base = soft_cross_entropy(logits, target) * (1.0 - self.alpha)
        zero = base * 0.0
        distillation, sample, patch, rand, constant = zero, zero, zero, zero, zero
        taught, certainty = target, zero
        if self.alpha > 0:
            distance, taught, certainty = self.distance(second, given[0])
            distillation = distance * self.alpha
        if self.relations is not None:
            students = tuple([blocks[place[0]] for place in self.places])
            teachers = tuple([given[1 + place[1]] for place in self.places])
            if indices is None:
                indices = self.relations.draw(students, teachers)
            sample, patch, rand, constant = self.relations(students, teachers, indices)
        images = image.shape[0]
        scalars = ops.stack((zero + images, certainty, constant * images))
        sums = ops.stop_gradient(ops.cat((scalars, target.sum(axis=0), taught.sum(axis=0))))
        return base + distillation + sample + patch + rand, base, distillation, sample, patch, rand, sums

    def baseline(self, sums: np.ndarray) -> float:
        """Of the labels, of the teacher's logits, and of features that are all the same.

        `sums` are images; of the teacher's softened predictions p the sum of p log p; the relations' loss of constant
        features; and the sums of the targets and of p, class by class.
        """
        images, certainty, constant = sums[:3] / np.array([1.0, max(sums[0], 1), max(sums[0], 1)])
        target, taught = np.split(sums[3:], 2)
        distillation = max(entropy(taught) + float(certainty), 0.0) * self.scale if images else 0.0
        return entropy(target) * (1.0 - self.alpha) + distillation * self.alpha + float(constant)

    def ask(self, image: Tensor) -> tuple[Tensor, ...]:
        """The teacher's logits (B, classes) and the sequences of its blocks in ascending order, without gradients."""
        encoder = self.teacher.encoder
        sequence, blocks = encoder.outputs(encoder.embed(image), self.teacher_layers)
        return tuple([ops.stop_gradient(x) for x in (self.teacher.logits(sequence), *blocks)])

    def distance(self, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the student's logits to the teacher's; the teacher's prediction p (B, classes), and the sum of p log p."""
        if self.kind == "hard":
            target = soft_targets(teacher.argmax(axis=1), self.num_classes, 0.0)
            return soft_cross_entropy(logits, target), target, (target * 0.0).sum()
        logs = ops.log_softmax(teacher / self.tau, -1)
        share = ops.exp(logs)
        return soft_distance(logits, teacher, self.tau), share, (share * logs).sum()
