"""Data, augmentation, optimisation and progressive resolution of a training run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .checks import LARGEST_SIZE, check_not_negative, check_positive, check_rate, check_sizes, legal_near, need, plural
from .paths import PathText

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Kernels = Literal["auto", "builtin"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """RandAugment, parsed from timm's syntax (timm data/auto_augment.py rand_augment_transform)."""

    magnitude: int = 10  # m, of 10
    operations: int = 2  # n, operations drawn for each image
    std: float = 0.0  # mstd, standard deviation of the magnitude
    increasing: bool = False  # inc1: a higher magnitude always means a stronger operation


def parse_auto_augment(text: str) -> RandAugmentConfig:
    """Parse `rand` followed by parts joined by `-`, in any order: m0 to m10, n1 or more, mstd0 to mstd100, inc1.

    Raises:
        FieldError: for anything else, including timm's other policies.
    """
    options: dict[str, Any] = {}
    policy, *parts = text.split("-")
    need(policy == "rand", "auto_augment", _auto_augment_help(text, policy))
    for part in parts:
        match = re.fullmatch(r"(m|n|mstd|inc)(\d+|\d*\.\d+)", part)
        key, value = (match[1], float(match[2])) if match else ("", 0.0)
        low, high = {"m": (0, 10), "n": (1, 100), "mstd": (0, 100), "inc": (1, 1)}.get(key, (1, 0))
        whole = key == "mstd" or "." not in part
        legal = low <= value <= high and whole and key not in options
        need(legal, "auto_augment", _auto_augment_help(text, part))
        options[key] = value
    return RandAugmentConfig(
        magnitude=int(options.get("m", 10)),
        operations=int(options.get("n", 2)),
        std=options.get("mstd", 0.0),
        increasing="inc" in options,
    )


def _auto_augment_help(text: str, part: str) -> str:
    return (
        f"{part!r} in {text!r} is not valid; write for example rand-m9-mstd0.5-inc1: rand comes first, each part at "
        "most once; m0 to m10 is the magnitude, mstd0 to mstd100 its standard deviation, n1 or more the number of "
        "operations, inc1 makes every operation stronger with the magnitude"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images in root/train and root/val: folders of class folders or of images, lists or MindRecord files."""

    root: PathText = "data/imagenet"
    # in root: a folder of class folders or of images, a list file (.txt, .csv, .tsv, .jsonl) with a path and maybe a
    # label on each line, or a MindRecord file (.mindrecord)
    train: PathText = "train"
    val: PathText = "val"  # as train; its classes are those of train, or a part of them. Empty: no evaluation
    labels_per_class: int = 0  # training images used of each class; 0: all
    # repeated augmentation (DeiT's RASampler uses 3): each image is drawn this many times in a row with different
    # augmentation, on different ranks if there are several. The epoch length stays, so fewer images are seen. 1: off
    repeats: int = 1
    mean: tuple[float, ...] = IMAGENET_MEAN  # of pixels scaled to 0..1, one number per channel
    std: tuple[float, ...] = IMAGENET_STD
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random resized crop as a fraction of the image
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height of the crop
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of training crops; evaluation is always bicubic
    hflip: float = 0.5
    # these four need 1 or 3 channels and act on 8 bits: other values must be in the scale 0 to 1, and are rounded
    brightness: float = 0.0
    contrast: float = 0.0
    color_jitter: float = 0.0  # c: brightness, contrast, saturation x a factor in [1 - c, 1 + c], random order (timm)
    auto_augment: str = ""  # RandAugment in timm's syntax, for example rand-m9-mstd0.5-inc1; empty: off
    erasing: float = 0.0  # probability of a box of normal noise in the normalised image (timm, mode pixel)
    erasing_area: tuple[float, float] = (0.02, 1 / 3)  # of the box as a fraction of the image
    eval_crop: float = 0.875  # evaluation: resize the short side to image_size / eval_crop, then crop the centre
    # processes of a rank that read, decode and augment images, at most one for each core; 0: in the training process
    workers: int = 4
    # exact: pixels as Pillow decodes and resizes them. fast: training images of JPEG files are decoded at half, a
    # quarter or an eighth of their size where the crop stays at least as large as the result, and their colours are not
    # interpolated (docs/data.md); evaluation is always exact
    decode: Literal["exact", "fast"] = "exact"
    exif: Literal["ignore", "apply"] = "ignore"  # whether to turn images as their EXIF orientation says
    max_pixels: int = 178_956_970  # larger images cannot be used (decompression bombs); the limit of Pillow
    bad_limit: float = 0.01  # of the training files; if more than these and more than 10 are unusable, the run stops
    # channels that pictures show as red, green and blue, or one channel in grey. Empty: the first three, or the first
    # one in grey where there are fewer
    show_bands: tuple[int, ...] = ()

    @property
    def training_place(self) -> Path:
        """The folder or file of the training images."""
        return Path(self.root) / self.train

    @property
    def evaluation_place(self) -> Path:
        """The folder or file of the validation images; of the training images where `val` is empty."""
        return Path(self.root) / (self.val or self.train)

    def __post_init__(self) -> None:
        check_not_negative(self, "workers")
        check_positive(self, "eval_crop", "repeats", "max_pixels")
        need(bool(self.root), "root", "is empty; write the folder of your images, or . for the working folder")
        need(bool(self.train), "train", "is empty; write the folder of the training images, or . for data.root itself")
        for key in ("crop_scale", "crop_ratio", "erasing_area"):
            low, high = getattr(self, key)
            need(0 < low <= high, key, f"[{low}, {high}] is not an increasing range above 0")
        for key in ("crop_scale", "erasing_area"):
            high = getattr(self, key)[1]
            need(high <= 1, key, f"{high} is above 1, the whole image")
        need(self.eval_crop <= 1, "eval_crop", f"{self.eval_crop} is above 1, the whole image")
        need(self.labels_per_class >= 0, "labels_per_class", "is negative; write 0 for all")
        for key in ("hflip", "brightness", "contrast", "erasing", "bad_limit"):
            check_rate(self, key, closed=True)
        check_not_negative(self, "color_jitter")
        if self.auto_augment:
            parse_auto_augment(self.auto_augment)
            need(
                not self.color_jitter,
                "color_jitter",
                f"{self.color_jitter:g} has no effect together with auto_augment in timm; write 0",
            )
        need(all(s > 0 for s in self.std), "std", f"{list(self.std)} has a value that is not above 0")
        need(len(self.mean) == len(self.std), "std", f"has {len(self.std)} values, mean has {len(self.mean)}")
        need(
            len(self.show_bands) in (0, 1, 3),
            "show_bands",
            f"has {plural(len(self.show_bands), 'channel')}; write three for red, green and blue, or one for grey",
        )


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Precision of matrix products on each kind of device. A recipe may also have one word, for all of them."""

    CPU: Precision = "float32"
    GPU: Precision = "float32"
    Ascend: Precision = "float32"

    def on(self, device: str) -> Precision:
        """The precision on a device (`CPU`, `GPU`, `Ascend`)."""
        precision: Precision = getattr(self, device)
        return precision


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, schedule, and intervals of logging, evaluation and saving."""

    epochs: int = 100
    batch_size: int = 64  # images per device and forward pass
    accumulate: int = 1  # forward passes per update
    # images per update over all devices; it decides the number of passes. 0: batch_size x accumulate x devices
    effective_batch: int = 0
    base_lr: float = 1.5e-4  # for lr_batch images; the run uses base_lr * effective batch / lr_batch
    lr_batch: int = 256  # 0: base_lr is not scaled
    warmup_epochs: float = 0.0  # linear from 0
    warmup_lr: float = 0.0  # learning rate at the start of the warm-up (rules timm and mmengine)
    per_epoch: bool = False  # timm: the rate changes between epochs only, each uses that of the epoch before (DeiT)
    warmup_prefix: bool = False  # timm: the cosine starts after the warm-up, not with it; mmengine always does that
    rule: Literal["mae", "timm", "mmengine"] = "mae"  # how warm-up, minimum, layer decay combine: engine/schedule.py
    schedule: Literal["cosine", "step", "multistep", "linear"] = "cosine"  # after the warm-up
    min_lr: float = 0.0  # at the end of the cosine; scaled with the batch under rules timm and mmengine, not under mae
    cosine_epochs: int = 0  # mmengine: length of the cosine; 0: the epochs after the warm-up
    decay_epochs: int = 30  # step: epochs between two multiplications by gamma
    milestones: tuple[int, ...] = ()  # multistep: epochs of the multiplications by gamma
    gamma: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05  # not for biases and other 1-D parameters
    decayed: tuple[str, ...] = ()  # names of tokens and tables that are decayed although the encoder excludes them
    layer_decay: float = 1.0  # learning-rate factor from one layer to the one below
    clip_norm: float = 0.0  # maximum global gradient norm; 0: no clipping, the norm is still measured
    log_every: int = 50  # updates between log lines
    eval_every: int = 1  # epochs between evaluations; 0: at the end only
    save_every: int = 1  # epochs between checkpoints; the last epoch is always saved
    gallery_every: int = 0  # epochs between galleries of reconstructions; 0: at the end only
    knn: int = 0  # neighbours of the k-NN probe of the frozen encoder, before training and at evaluations; 0: off
    kernels: Kernels = "auto"  # on CPU: our own kernels where they can be compiled, or MindSpore's (builtin)
    threads: int = 0  # CPU threads of a machine, divided among its ranks; 0: one for each core
    precision: PrecisionConfig = PrecisionConfig()  # of matrix products; the rest is always float32

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "batch_size", "accumulate", "base_lr", "eps", "log_every", "save_every")
        check_positive(self, "layer_decay", "decay_epochs", "gamma")
        for key in ("batch_size", "accumulate", "effective_batch", "epochs"):
            value = getattr(self, key)
            need(value <= LARGEST_SIZE, key, f"{value} is too large; write at most {LARGEST_SIZE}")
        check_not_negative(
            self, "effective_batch", "lr_batch", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "clip_norm"
        )
        check_not_negative(self, "effective_batch", "eval_every", "gallery_every", "knn", "cosine_epochs", "threads")
        shapes = {"mae": ("cosine", "step"), "mmengine": ("cosine", "multistep")}
        need(
            self.schedule in shapes.get(self.rule, (self.schedule,)),
            "schedule",
            f"{self.schedule} needs rule: timm; with rule: {self.rule} write {' or '.join(shapes.get(self.rule, ()))}",
        )
        for key in ("warmup_prefix", "per_epoch"):
            need(self.rule == "timm" or not getattr(self, key), key, "needs rule: timm; write false")
        need(self.rule == "mmengine" or not self.cosine_epochs, "cosine_epochs", "needs rule: mmengine; write 0")
        need(
            not self.effective_batch or self.accumulate == 1,
            "accumulate",
            f"{self.accumulate}, but effective_batch {self.effective_batch} already sets the number of passes; write 1",
        )
        for beta in self.betas:
            need(0 <= beta < 1, "betas", f"{beta} is not in [0, 1)")
        need(self.layer_decay <= 1, "layer_decay", f"{self.layer_decay} is above 1, which means no decay")
        need(
            self.warmup_epochs < self.epochs,
            "warmup_epochs",
            f"{self.warmup_epochs:g} is as long as all {self.epochs} epochs; write less than {self.epochs}",
        )

    def passes(self, devices: int) -> int:
        """Return the forward passes per update on this many devices.

        Raises:
            UserError: `effective_batch` is not a multiple of batch_size * devices.
        """
        if not self.effective_batch:
            return self.accumulate
        each = self.batch_size * devices
        if self.effective_batch % each:
            share, rest = divmod(self.effective_batch, devices)
            legal = [size for size in range(1, share + 1) if not rest and share % size == 0]
            near = [*[size for size in legal if size < self.batch_size][-1:]]
            near += [size for size in legal if size > self.batch_size][:1]
            fit = f"train.batch_size={' or '.join(map(str, near))}, or " if near else ""
            raise UserError(
                f"train.effective_batch: {self.effective_batch} is not a multiple of batch_size {self.batch_size} "
                f"x {devices} device{'s' * (devices > 1)}; write {fit}train.effective_batch="
                f"{legal_near(self.effective_batch, each)}"
            )
        return self.effective_batch // each


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of progressive resolution: some epochs at one image size (FastMIM-P)."""

    epochs: int = 0
    image_size: tuple[int, int] = (0, 0)
    window_size: int = 0  # tokens per side; 0: encoder.window_size
    batch_size: int = 0  # images per device and forward pass; 0: train.batch_size
    accumulate: int = 0  # forward passes per update; 0: train.accumulate

    def __post_init__(self) -> None:
        check_positive(self, "epochs")
        check_sizes(self)
        check_not_negative(self, "window_size", "batch_size", "accumulate")
