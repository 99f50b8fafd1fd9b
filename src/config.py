"""What a run is: every dataclass of a recipe, its presets and the checks that join its fields.

A recipe is one YAML file with five parts: encoder, method, data, train and a few top-level keys. The classes here
are frozen and know nothing of MindSpore or of files; `src.recipe` reads and writes them. `python -m src.config FILE
[key=value ...]` prints the resolved recipe.

Where a field takes one of several classes (encoder, method, target, decoder) the YAML names a preset, and the other
keys change single fields of it: `encoder: {name: vit_base, image_size: 128}`. `encoder: vit_base` is short for it.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FieldError(ValueError):
    """A value that its own dataclass refuses: `key` is relative to that class, the text says what to write."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


def _need(condition: bool, key: str, message: str) -> None:
    if not condition:
        raise FieldError(key, message)


def legal_near(value: int, step: int) -> str:
    """The multiples of `step` around `value`, for error messages."""
    low = value // step * step
    return f"{low} or {low + step}" if low else f"{step}"


# --- encoders ---------------------------------------------------------------------------------------------------


class OneScale:
    """Sizes of encoders with one token per patch, and what they must fulfil."""

    image_size: tuple[int, int]
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int

    def check_sizes(self) -> None:
        """Whole patches, and heads of equal width."""
        for side in self.image_size:
            _need(
                side > 0 and side % self.patch_size == 0,
                "image_size",
                f"{side} is not a multiple of patch_size {self.patch_size}; "
                f"write {legal_near(max(side, 1), self.patch_size)}",
            )
        _need(
            self.embed_dim % self.num_heads == 0,
            "num_heads",
            f"{self.num_heads} does not divide embed_dim {self.embed_dim}",
        )

    @property
    def stride(self) -> int:
        """Pixels per side of one output token."""
        return self.patch_size

    @property
    def out_dim(self) -> int:
        """Width of one output token."""
        return self.embed_dim

    @property
    def num_tokens(self) -> int:
        """Patch tokens of one image, without the class token."""
        return self.image_size[0] * self.image_size[1] // self.stride**2

    @property
    def block_maps(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of patch tokens after each block, class-attention blocks not counted."""
        rows, cols = (side // self.patch_size for side in self.image_size)
        return ((rows, cols),) * self.depth


@dataclass(frozen=True, kw_only=True)
class ViTConfig(OneScale):
    """Vision Transformer; field names follow timm and the MAE family."""

    name: str = "vit"
    image_size: tuple[int, int] = (224, 224)  # height, width in pixels; one number means a square
    in_chans: int = 3
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    k_bias: bool = True  # false: only q and v have biases (BEiT, SimMIM)
    class_token: bool = True
    distilled: bool = False  # a second token after the class token, with a head of its own (DeiT)
    position: Literal["learned", "sincos", "none"] = "sincos"  # sincos is fixed, its class-token row is zero
    relative_position: Literal["none", "shared", "block"] = "none"  # a bias table for all blocks, or one for each
    layer_scale: float = 0.0  # initial value of the factors on both branches; 0 leaves them out
    norm_eps: float = 1e-6
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0 at the first
    # initial weights: xavier (MAE, FastMIM), trunc_normal with deviation 0.02 (timm), scaled: the same with both output
    # projections of block i divided by sqrt(2 * (i + 1)) (BEiT, SimMIM)
    init: Literal["xavier", "trunc_normal", "scaled"] = "xavier"

    def __post_init__(self) -> None:
        check_positive(self, "in_chans", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps")
        self.check_sizes()
        if self.position == "sincos":
            _need(
                self.embed_dim % 4 == 0,
                "embed_dim",
                f"{self.embed_dim} is not a multiple of 4, which position: sincos needs; "
                f"write {legal_near(self.embed_dim, 4)}",
            )
        if self.distilled:
            _need(
                self.class_token and self.position != "sincos" and self.relative_position == "none",
                "distilled",
                "goes with class_token: true, position: learned and relative_position: none",
            )
        check_rate(self, "drop_path")
        check_not_negative(self, "layer_scale")


@dataclass(frozen=True, kw_only=True)
class CaiTConfig(OneScale):
    """CaiT; field names follow timm (models/cait.py)."""

    #: as a ViT's: the class token joins behind the patch blocks
    class_token: ClassVar = True
    distilled: ClassVar = False

    name: str = "cait"
    image_size: tuple[int, int] = (224, 224)  # height, width in pixels; one number means a square
    in_chans: int = 3
    patch_size: int = 16
    embed_dim: int = 384
    depth: int = 24  # blocks with talking heads, on the patches alone
    depth_token_only: int = 2  # blocks with class attention behind them
    num_heads: int = 8
    mlp_ratio: float = 4.0
    mlp_ratio_token_only: float = 4.0
    qkv_bias: bool = True
    layer_scale: float = 1e-5  # initial value of the factors on both branches (timm's init_values)
    norm_eps: float = 1e-6
    drop_path: float = 0.0  # rate of every patch block alike; the others have none

    def __post_init__(self) -> None:
        check_positive(self, "in_chans", "patch_size", "embed_dim", "depth", "depth_token_only", "num_heads")
        check_positive(self, "mlp_ratio", "mlp_ratio_token_only", "layer_scale", "norm_eps")
        self.check_sizes()
        check_rate(self, "drop_path")


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Swin Transformer; field names follow the original code."""

    name: str = "swin"
    image_size: tuple[int, int] = (224, 224)  # height, width in pixels; one number means a square
    in_chans: int = 3
    patch_size: int = 4
    embed_dim: int = 96  # of the first stage; doubles from stage to stage
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7  # tokens per side; capped by small maps, maps it does not divide are padded
    cap_window: bool = True  # false: small maps are padded to a whole window too (mmpretrain's pad_small_map)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    patch_norm: bool = True  # norm after the patch embedding
    absolute_position: bool = False  # a learned table added to the patch embedding (ape)
    norm_eps: float = 1e-5
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0 at the first
    init: Literal["xavier", "trunc_normal"] = "trunc_normal"  # initial weights: xavier (FastMIM), deviation 0.02 (Swin)

    def __post_init__(self) -> None:
        check_positive(self, "in_chans", "patch_size", "embed_dim", "window_size", "mlp_ratio", "norm_eps")
        _need(
            len(self.depths) == len(self.num_heads),
            "num_heads",
            f"has {len(self.num_heads)} stages, depths has {len(self.depths)}",
        )
        for stage, heads in enumerate(self.num_heads):
            _need(self.depths[stage] > 0, "depths", f"stage {stage} has {self.depths[stage]} blocks")
            _need(
                heads > 0 and self.embed_dim * 2**stage % heads == 0,
                "num_heads",
                f"{heads} does not divide {self.embed_dim * 2**stage}, the width of stage {stage}",
            )
        for side in self.image_size:
            _need(
                side > 0 and side % self.stride == 0,
                "image_size",
                f"{side} is not a multiple of {self.stride} (patch_size {self.patch_size}, halved after every stage "
                f"but the last); write {legal_near(max(side, 1), self.stride)}",
            )
        check_rate(self, "drop_path")

    @property
    def stride(self) -> int:
        """Pixels per side of one output token."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def out_dim(self) -> int:
        """Width of one output token."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def num_tokens(self) -> int:
        """Output tokens of one image."""
        return self.image_size[0] * self.image_size[1] // self.stride**2

    @property
    def block_maps(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of tokens after each block of all stages, before merging."""
        rows, cols = (side // self.patch_size for side in self.image_size)
        return tuple((rows >> stage, cols >> stage) for stage, depth in enumerate(self.depths) for _ in range(depth))


@dataclass(frozen=True, kw_only=True)
class SwinV2Config(SwinConfig):
    """Swin Transformer V2: norms after the branches, cosine attention, log-spaced continuous position bias."""

    name: str = "swinv2"
    image_size: tuple[int, int] = (256, 256)
    window_size: int = 8
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)  # per stage, for coordinates after a change; 0: its own
    main_norm_every: int = 0  # a norm on the main branch after every so many blocks of a stage; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "main_norm_every")
        _need(
            len(self.pretrained_window_sizes) >= len(self.depths),
            "pretrained_window_sizes",
            f"has {len(self.pretrained_window_sizes)} values for {len(self.depths)} stages",
        )


EncoderConfig = ViTConfig | CaiTConfig | SwinConfig

# --- targets and decoders of masked image modelling -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HOGConfig:
    """Histograms of oriented gradients (MaskFeat; FastMIM util/hog_layer.py)."""

    name: str = "hog"
    bins: int = 9  # over 180 degrees
    cell: int = 8  # pixels per side
    normalize: bool = True  # L2 over the bins of each cell and channel (FastMIM's norm_pix_loss)
    gaussian_window: int = 0  # pixels per side; 0 is off, MaskFeat uses 16

    def __post_init__(self) -> None:
        check_positive(self, "bins", "cell")
        _need(
            self.gaussian_window >= 0,
            "gaussian_window",
            f"{self.gaussian_window} is negative; 0 turns it off",
        )

    def values(self, stride: int, in_chans: int) -> int:
        """Numbers predicted for a token of `stride` pixels per side."""
        return in_chans * self.bins * (stride // self.cell) ** 2


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    """The pixels of the normalised input image."""

    name: str = "pixels"
    # patch: mean and variance of each token's pixels (MAE); local: of a window around each pixel (SwinV2's SimMIM)
    normalize: Literal["none", "patch", "local"] = "none"
    window: int = 47  # pixels per side, of normalize: local
    channels_first: bool = False  # order inside a token: channel, row, column (SimMIM) or row, column, channel (MAE)

    def __post_init__(self) -> None:
        _need(self.window > 0 and self.window % 2 == 1, "window", f"{self.window} is not an odd number above 0")

    def values(self, stride: int, in_chans: int) -> int:
        """Numbers predicted for a token of `stride` pixels per side."""
        return in_chans * stride**2


@dataclass(frozen=True, kw_only=True)
class TransformerDecoderConfig:
    """Linear, pre-norm transformer blocks with width/32 heads, norm, linear (FastMIM)."""

    name: str = "transformer"
    width: int = 256
    depth: int = 1  # 0: norm and prediction act on the encoder's output, and width must equal the encoder's

    def __post_init__(self) -> None:
        check_positive(self, "width")
        _need(self.depth >= 0, "depth", f"{self.depth} is negative; 0 leaves the blocks out")
        _need(
            self.depth == 0 or self.width % 32 == 0,
            "width",
            f"{self.width} is not a multiple of 32 (one head per 32); write {legal_near(self.width, 32)}",
        )


@dataclass(frozen=True, kw_only=True)
class LinearDecoderConfig:
    """One linear layer on the patch tokens (SimMIM's 1x1 convolution before the pixel shuffle)."""

    name: str = "linear"


# --- methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MIMConfig:
    """Masked image modelling: hide blocks of the image, predict a target there."""

    name: str = "fastmim"
    encoder_blocks: int = 0  # of the encoder, the first of them are trained; 0: all (FastMIM's finding ii)
    mask_ratio: float = 0.75
    mask_block: int = 16  # pixels per side of one masked block
    corrupt: Literal["pixel", "token"] = "pixel"  # what the mask token replaces: pixels, or tokens of the embedding
    target: HOGConfig | PixelsConfig = field(default_factory=HOGConfig)
    decoder: TransformerDecoderConfig | LinearDecoderConfig = field(default_factory=TransformerDecoderConfig)
    loss: Literal["l2", "l1"] = "l2"

    def __post_init__(self) -> None:
        check_positive(self, "mask_block")
        check_not_negative(self, "encoder_blocks")
        _need(0 < self.mask_ratio < 1, "mask_ratio", f"{self.mask_ratio} is not between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Supervised training of encoder, pooling and a linear head."""

    #: what a trained network does not depend on
    training_only: ClassVar[tuple[str, ...]] = ("label_smoothing", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob")

    name: str = "classify"
    num_classes: int = 1000
    pool: Literal["mean", "cls"] = "mean"
    fc_norm: bool = True  # norm after pooling in place of the encoder's final norm (FastMIM, SimMIM and MAE ViT)
    label_smoothing: float = 0.1
    # mixing of each batch with itself in reverse order (timm's Mixup, mode batch): lambda is from Beta(alpha, alpha)
    mixup: float = 0.0  # alpha; 0 is off
    cutmix: float = 0.0  # alpha; 0 is off
    mixup_prob: float = 1.0  # of mixing a batch at all
    mixup_switch_prob: float = 0.5  # of CutMix for a batch that is mixed, where both are on
    head_std: float = 2e-5  # deviation of the head's initial weights: FastMIM 2e-5, SimMIM 2e-5 (ViT) and 0.02 (Swin)

    def __post_init__(self) -> None:
        check_positive(self, "num_classes", "head_std")
        check_rate(self, "label_smoothing")
        check_not_negative(self, "mixup", "cutmix")
        for key in ("mixup_prob", "mixup_switch_prob"):
            check_rate(self, key, closed=True)
        _need(
            self.pool == "mean" or not self.fc_norm,
            "fc_norm",
            "goes with pool: mean; the class token is taken after the encoder's own norm, write fc_norm: false",
        )

    @property
    def mixes(self) -> bool:
        """Whether training mixes images."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True, kw_only=True)
class ManifoldConfig(ClassifyConfig):
    """Supervised training that also copies how a teacher's features relate (manifold distillation).

    Loss: (1 - alpha) * cross-entropy + alpha * distillation + beta * (sample + patch + rand), as in
    Hao840/manifold-distillation 1096b82 losses.py, whose flags are named beside the fields. The defaults are its public
    command for DeiT-Tiny from CaiT-S24, but for the layers, which depend on both networks.
    """

    #: what a trained network does not depend on
    training_only: ClassVar[tuple[str, ...]] = (
        *ClassifyConfig.training_only,
        *("teacher", "teacher_encoder", "student_layers", "teacher_layers", "w_sample", "w_patch", "w_rand", "beta"),
        *("samples", "max_patch_num", "distillation", "alpha", "tau", "cache"),
    )

    name: str = "manifold"
    teacher: str = ""  # checkpoint of a classifier: ours, or converted (--teacher-path)
    teacher_encoder: EncoderConfig = field(default_factory=ViTConfig)  # what that file holds (--teacher-model)
    student_layers: tuple[int, ...] = ()  # blocks, counted from 0 through all stages, before the final norm (--s-id)
    teacher_layers: tuple[int, ...] = ()  # the teacher's block for each of them (--t-id)
    w_sample: float = 0.1  # relations between the images of a pass, at each token (--w-sample)
    w_patch: float = 4.0  # relations between the tokens of an image (--w-patch)
    w_rand: float = 0.2  # relations between tokens drawn from all images of a pass (--w-rand)
    beta: float = 1.0  # of all three (--distillation-beta)
    samples: int = 192  # tokens drawn for each pair of layers; all, where there are fewer (--K)
    max_patch_num: int = 0  # larger maps are cut to so many tokens by joining neighbours; 0: as they are
    # of the logits. soft: KL divergence from the teacher's at temperature tau, times tau**2; hard: cross-entropy with
    # its likeliest class; none: cross-entropy with the labels alone (the reference's none leaves out the relations too,
    # as method classify does) (--distillation-type)
    distillation: Literal["soft", "hard", "none"] = "soft"
    alpha: float = 1.0  # share of soft and hard; 1 leaves the labels out (--distillation-alpha)
    tau: float = 1.0  # temperature of soft (--distillation-tau)
    cache: str = ""  # folder that keeps the teacher's answers to images without augmentation; empty: it is asked anew

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "samples", "tau")
        check_not_negative(self, "w_sample", "w_patch", "w_rand", "beta", "max_patch_num")
        check_rate(self, "alpha", closed=True)
        count, wanted = len(self.student_layers), len(self.teacher_layers)
        _need(
            count == wanted,
            "teacher_layers",
            f"has {wanted} blocks, student_layers has {count}; write one for each of them",
        )

    @property
    def relates(self) -> bool:
        """Whether relations count."""
        return self.beta > 0 and (self.w_sample > 0 or self.w_patch > 0 or self.w_rand > 0)

    @property
    def teacher_classifier(self) -> ClassifyConfig:
        """Pooling and head that the teacher has where no file says it: those of its own training."""
        cls = not isinstance(self.teacher_encoder, SwinConfig) and self.teacher_encoder.class_token
        return ClassifyConfig(num_classes=self.num_classes, pool="cls" if cls else "mean", fc_norm=False)


def plain_classifier(method: ClassifyConfig) -> ClassifyConfig:
    """What a trained classifier is, whichever method trained it: evaluation, export and hub need no teacher."""
    if type(method) is ClassifyConfig:
        return method
    kept = {item.name: getattr(method, item.name) for item in fields(ClassifyConfig) if item.name != "name"}
    return ClassifyConfig(**kept)


MethodConfig = MIMConfig | ClassifyConfig

# --- data and training ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RandAugmentConfig:
    """RandAugment as timm's text says it (timm data/auto_augment.py rand_augment_transform)."""

    magnitude: int = 10  # m, of 10
    operations: int = 2  # n, drawn for each image
    std: float = 0.0  # mstd, deviation of the magnitude
    increasing: bool = False  # inc1: a higher magnitude is always the stronger change


def parse_auto_augment(text: str) -> RandAugmentConfig:
    """`rand` and parts joined by `-`, in any order: m0 to m10, n1 or more, mstd0 to mstd100, inc1.

    Raises:
        FieldError: for anything else, timm's other policies included.
    """
    found: dict[str, Any] = {}
    policy, *parts = text.split("-")
    _need(policy == "rand", "auto_augment", _auto_augment_help(text, policy))
    for part in parts:
        match = re.fullmatch(r"(m|n|mstd|inc)(\d+|\d*\.\d+)", part)
        key, value = (match[1], float(match[2])) if match else ("", 0.0)
        low, high = {"m": (0, 10), "n": (1, 100), "mstd": (0, 100), "inc": (1, 1)}.get(key, (1, 0))
        whole = key == "mstd" or "." not in part
        legal = low <= value <= high and whole and key not in found
        _need(legal, "auto_augment", _auto_augment_help(text, part))
        found[key] = value
    return RandAugmentConfig(
        magnitude=int(found.get("m", 10)),
        operations=int(found.get("n", 2)),
        std=found.get("mstd", 0.0),
        increasing="inc" in found,
    )


def _auto_augment_help(text: str, part: str) -> str:
    return (
        f"{part!r} in {text!r} is not understood; write for example rand-m9-mstd0.5-inc1 (each part at most once): "
        "rand first, m0 to m10 magnitude, mstd0 to mstd100 its deviation, n1 or more operations, inc1 for operations "
        "that grow with the magnitude"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Image folders: root/train/<class>/... and root/val/<class>/..., or images directly below train."""

    root: str = "data/imagenet"
    train: str = "train"
    val: str = "val"  # empty: no evaluation
    labels_per_class: int = 0  # use so many training images of each class; 0 is all
    # repeated augmentation (DeiT's RASampler, 3 there): an image comes so many times in a row, augmented anew each
    # time, on different ranks where there are several; an epoch is as long as ever and shows fewer images. 1 is off
    repeats: int = 1
    mean: tuple[float, ...] = IMAGENET_MEAN  # of pixels scaled to 0..1, one number per channel
    std: tuple[float, ...] = IMAGENET_STD
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random resized crop, as a share of the image
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height of the crop
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of training crops; evaluation is bicubic
    hflip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    color_jitter: float = 0.0  # brightness, contrast and saturation x (1 - this to 1 + this), in random order (timm)
    auto_augment: str = ""  # RandAugment in timm's syntax, for example rand-m9-mstd0.5-inc1; empty is off
    erasing: float = 0.0  # probability of a box of normal noise in the normalised image (timm, mode pixel)
    erasing_area: tuple[float, float] = (0.02, 1 / 3)  # of the box, as a share of the image
    eval_crop: float = 0.875  # evaluation: resize the short side to image_size / eval_crop, cut the centre
    workers: int = 4  # threads of each input operation

    def __post_init__(self) -> None:
        check_positive(self, "workers", "eval_crop", "repeats")
        for key in ("crop_scale", "crop_ratio", "erasing_area"):
            low, high = getattr(self, key)
            _need(0 < low <= high, key, f"[{low}, {high}] is not an increasing range above 0")
        for key in ("crop_scale", "erasing_area"):
            high = getattr(self, key)[1]
            _need(high <= 1, key, f"{high} is above 1, the whole image")
        _need(self.eval_crop <= 1, "eval_crop", f"{self.eval_crop} is above 1, the whole image")
        _need(self.labels_per_class >= 0, "labels_per_class", "is negative; 0 takes all")
        for key in ("hflip", "brightness", "contrast", "erasing"):
            check_rate(self, key, closed=True)
        check_not_negative(self, "color_jitter")
        if self.auto_augment:
            parse_auto_augment(self.auto_augment)
            _need(
                not self.color_jitter,
                "color_jitter",
                f"{self.color_jitter:g} would be ignored by timm beside auto_augment; write 0, which is the same there",
            )
        _need(all(s > 0 for s in self.std), "std", f"{list(self.std)} has a value that is not above 0")
        _need(len(self.mean) == len(self.std), "std", f"has {len(self.std)} values, mean has {len(self.mean)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, schedule and what is written when."""

    epochs: int = 100
    batch_size: int = 64  # images of one device in one forward pass
    accumulate: int = 1  # forward passes per update
    base_lr: float = 1.5e-4  # for lr_batch images; the run uses base_lr * effective batch / lr_batch
    lr_batch: int = 256  # 0: base_lr is used as it is
    warmup_epochs: float = 0.0  # linear from 0
    warmup_lr: float = 0.0  # where the warm-up starts (rules timm and mmengine)
    per_epoch: bool = False  # timm: the rate changes between epochs only, each with that of the one before it (DeiT)
    warmup_prefix: bool = False  # timm: the cosine begins after the warm-up instead of with it; mmengine always does so
    rule: Literal["mae", "timm", "mmengine"] = "mae"  # how warm-up, minimum, layer decay combine: engine/schedule.py
    schedule: Literal["cosine", "step", "multistep", "linear"] = "cosine"  # after the warm-up
    min_lr: float = 0.0  # at the end of the cosine; scaled with the batch under rules timm and mmengine, not under mae
    cosine_epochs: int = 0  # mmengine: length of the cosine; 0: the epochs after the warm-up
    decay_epochs: int = 30  # step: every so many epochs ...
    milestones: tuple[int, ...] = ()  # multistep: at these epochs ...
    gamma: float = 0.1  # ... times this
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05  # not for biases and other 1-D parameters
    decayed: tuple[str, ...] = ()  # names decayed all the same, of the tokens and tables that the encoder spares
    layer_decay: float = 1.0  # learning-rate factor from one layer to the one below
    clip_norm: float = 0.0  # global gradient norm; 0 measures without clipping
    log_every: int = 50  # updates
    eval_every: int = 1  # epochs; 0: at the end only
    save_every: int = 1  # epochs between checkpoints; the last epoch is always saved
    gallery_every: int = 0  # epochs between pictures of the reconstruction; 0: at the end only
    knn: int = 0  # neighbours of the k-NN probe of the frozen encoder, before training and at evaluations; 0 is off

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "batch_size", "accumulate", "base_lr", "eps", "log_every", "save_every")
        check_positive(self, "layer_decay", "decay_epochs", "gamma")
        check_not_negative(self, "lr_batch", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "clip_norm")
        check_not_negative(self, "eval_every", "gallery_every", "knn", "cosine_epochs")
        shapes = {"mae": ("cosine", "step"), "mmengine": ("cosine", "multistep")}
        _need(
            self.schedule in shapes.get(self.rule, (self.schedule,)),
            "schedule",
            f"{self.schedule} goes with rule: timm; rule: {self.rule} has {' and '.join(shapes.get(self.rule, ()))}",
        )
        for key in ("warmup_prefix", "per_epoch"):
            _need(self.rule == "timm" or not getattr(self, key), key, "goes with rule: timm; write false")
        _need(self.rule == "mmengine" or not self.cosine_epochs, "cosine_epochs", "goes with rule: mmengine; write 0")
        for beta in self.betas:
            _need(0 <= beta < 1, "betas", f"{beta} is not in [0, 1)")
        _need(self.layer_decay <= 1, "layer_decay", f"{self.layer_decay} is above 1, which means no decay")
        _need(
            self.warmup_epochs < self.epochs,
            "warmup_epochs",
            f"{self.warmup_epochs:g} leaves nothing of {self.epochs} epochs; write less than {self.epochs}",
        )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A part of a training at a resolution of its own (FastMIM-P)."""

    epochs: int = 0
    image_size: tuple[int, int] = (0, 0)
    window_size: int = 0  # tokens per side; 0: the encoder's
    batch_size: int = 0  # images of one device in one forward pass; 0: that of train
    accumulate: int = 0  # forward passes per update; 0: that of train

    def __post_init__(self) -> None:
        check_positive(self, "epochs")
        check_not_negative(self, "window_size", "batch_size", "accumulate")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run does."""

    encoder: EncoderConfig = field(default_factory=ViTConfig)
    method: MethodConfig = field(default_factory=MIMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: tuple[StageConfig, ...] = ()  # progressive resolution; train.epochs is their sum
    seed: int = 0
    device: Literal["auto", "CPU", "GPU", "Ascend"] = "auto"
    output: str = ""  # folder of the run; empty: runs/<name of the recipe file>
    init_from: str = ""  # checkpoint whose encoder the run starts from

    def __post_init__(self) -> None:
        _need(self.seed >= 0, "seed", f"{self.seed} is negative")
        channels = self.encoder.in_chans
        _need(
            len(self.data.mean) == channels,
            "data.mean",
            f"has {len(self.data.mean)} values for encoder.in_chans {channels}; write one per channel",
        )
        if isinstance(self.method, MIMConfig):
            check_mim(self.trained_encoder, self.method)
        if isinstance(self.method, ManifoldConfig):
            check_manifold(self)
        if isinstance(self.method, ClassifyConfig) and self.method.mixes:
            batch = self.train.batch_size
            _need(
                batch % 2 == 0,
                "train.batch_size",
                f"{batch} is odd, and method.mixup and cutmix pair the images; write {legal_near(batch, 2)}",
            )
        self._check_stages()

    def _check_stages(self) -> None:
        if not self.stages:
            return
        total = sum(stage.epochs for stage in self.stages)
        _need(
            total == self.train.epochs,
            "train.epochs",
            f"{self.train.epochs}, but the stages have {total}; write {total}",
        )
        for number in range(len(self.stages)):
            try:
                at_stage(self, number)
            except FieldError as error:
                raise FieldError(f"stages.{number}", f"{error.key.removeprefix('encoder.')}: {error}") from None

    @property
    def trained_encoder(self) -> EncoderConfig:
        """The encoder that the run builds: without the blocks that pre-training leaves out."""
        blocks = self.method.encoder_blocks if isinstance(self.method, MIMConfig) else 0
        return first_blocks(self.encoder, blocks) if blocks else self.encoder

    def stage_ends(self) -> list[int]:
        """The epoch each stage ends with; one stage if there are none."""
        return list(itertools.accumulate(stage.epochs for stage in self.stages)) or [self.train.epochs]


def at_stage(recipe: Recipe, number: int) -> Recipe:
    """A recipe as it is during a stage: sizes and batches of the stage, and no stages."""
    if not recipe.stages:
        return recipe
    stage = recipe.stages[number]
    sizes: dict[str, Any] = {"image_size": stage.image_size}
    if stage.window_size:
        _need(
            isinstance(recipe.encoder, SwinConfig),
            "window_size",
            f"{recipe.encoder.name} has no windows; leave window_size out",
        )
        sizes["window_size"] = stage.window_size
    batches = {key: getattr(stage, key) or getattr(recipe.train, key) for key in ("batch_size", "accumulate")}
    return replace(recipe, encoder=replace(recipe.encoder, **sizes), train=replace(recipe.train, **batches), stages=())


def first_blocks(encoder: EncoderConfig, blocks: int) -> EncoderConfig:
    """An encoder cut off after its first blocks, which keep their rates of stochastic depth; stages left empty go."""
    total = num_blocks(encoder)
    _need(blocks <= total, "method.encoder_blocks", f"{blocks}, but {encoder.name} has {total}; write {total} or less")
    if blocks == total:
        return encoder
    if isinstance(encoder, CaiTConfig):  # one rate for all
        return replace(encoder, depth=blocks)
    sizes: dict[str, Any] = {"drop_path": encoder.drop_path * (blocks - 1) / (total - 1)}
    if isinstance(encoder, SwinConfig):
        left = itertools.accumulate(encoder.depths, lambda rest, depth: rest - depth, initial=blocks)
        depths = tuple(min(depth, rest) for depth, rest in zip(encoder.depths, left, strict=False) if rest > 0)
        return replace(encoder, depths=depths, num_heads=encoder.num_heads[: len(depths)], **sizes)
    return replace(encoder, depth=blocks, **sizes)


def num_blocks(encoder: EncoderConfig) -> int:
    """Transformer blocks of an encoder."""
    return sum(encoder.depths) if isinstance(encoder, SwinConfig) else encoder.depth


def check_mim(encoder: EncoderConfig, method: MIMConfig) -> None:
    """Mask blocks, tokens and target cells must tile each other."""
    block, stride, target = method.mask_block, encoder.stride, method.target
    if isinstance(target, HOGConfig):
        _need(
            stride % target.cell == 0,
            "method.target.cell",
            f"{target.cell} does not divide the token side {stride}; "
            f"legal: {', '.join(str(c) for c in range(2, stride + 1) if stride % c == 0)}",
        )
    legal = legal_blocks(encoder, method)
    _need(
        block in legal,
        "method.mask_block",
        f"{block} does not fit image {encoder.image_size[0]}x{encoder.image_size[1]} and tokens of {stride} pixels"
        + (f" and HOG cells of {target.cell}" if isinstance(target, HOGConfig) else "")
        + f"; legal: {', '.join(map(str, legal)) or 'none, change the image size'}",
    )
    if isinstance(target, HOGConfig):
        for side in encoder.image_size:
            _need(
                target.gaussian_window == 0 or side % target.gaussian_window == 0,
                "method.target.gaussian_window",
                f"{target.gaussian_window} does not divide the image side {side}",
            )
    if method.corrupt == "token":
        _need(
            block % encoder.patch_size == 0,
            "method.mask_block",
            f"{block} is not a multiple of the patch side {encoder.patch_size}, whose tokens are masked; "
            f"legal: {', '.join(str(b) for b in legal if b % encoder.patch_size == 0)}",
        )
    if isinstance(method.decoder, TransformerDecoderConfig) and method.decoder.depth == 0:
        _need(
            method.decoder.width == encoder.out_dim,
            "method.decoder.width",
            f"must equal the encoder's width {encoder.out_dim} when decoder.depth is 0",
        )


def legal_blocks(encoder: EncoderConfig, method: MIMConfig) -> list[int]:
    """Mask blocks that tile the image, tile or are tiled by a token, and hold whole HOG cells."""
    height, width = encoder.image_size
    unit = method.target.cell if isinstance(method.target, HOGConfig) else 1
    return [
        b
        for b in range(unit, min(height, width) + 1, unit)
        if height % b == 0 and width % b == 0 and (b % encoder.stride == 0 or encoder.stride % b == 0)
        if height // b * (width // b) > 1
    ]


def check_manifold(recipe: Recipe) -> None:
    """Teacher and student see the same images, and the blocks of a pair have the same map."""
    method = recipe.method
    assert isinstance(method, ManifoldConfig)
    student, teacher = recipe.encoder, method.teacher_encoder
    _need(
        bool(method.student_layers) or not method.relates,
        "method.student_layers",
        "names no block; write for example student_layers: [0, 3] and teacher_layers: [0, 3], or beta: 0 for logits "
        "alone",
    )
    for key in ("image_size", "in_chans"):
        ours, theirs = getattr(student, key), getattr(teacher, key)
        _need(
            ours == theirs,
            f"method.teacher_encoder.{key}",
            f"{show_size(theirs)}, but the student has {show_size(ours)} and both see the same images; "
            f"write {list(ours) if isinstance(ours, tuple) else ours}",
        )
    for key, encoder in (("student_layers", student), ("teacher_layers", teacher)):
        blocks = len(encoder.block_maps)
        for number in getattr(method, key):
            _need(
                0 <= number < blocks,
                f"method.{key}",
                f"{number} is not a block of {encoder.name}, which has {blocks}; write 0 to {blocks - 1}",
            )
    relation_maps(recipe.encoder, method)
    if method.cache:
        check_cache(recipe)


def relation_maps(
    student: EncoderConfig, method: ManifoldConfig
) -> tuple[tuple[tuple[int, int], tuple[int, int], tuple[int, int]], ...]:
    """For each pair of layers: map of the student's block, of the teacher's, and of both after merging.

    Raises:
        FieldError: they differ, or a map cannot be merged.
    """
    found = []
    teacher = method.teacher_encoder
    for ours, theirs in zip(method.student_layers, method.teacher_layers, strict=True):
        own, given = student.block_maps[ours], teacher.block_maps[theirs]
        merged, wanted = (merged_map(method, *place) for place in (("student", ours, own), ("teacher", theirs, given)))
        if merged != wanted:
            fit = [
                number
                for number, size in enumerate(teacher.block_maps)
                if size == own or (method.max_patch_num and wanted_map(size, method.max_patch_num) == merged)
            ]
            remedy = f"teacher blocks {fit[0]} to {fit[-1]}" if fit else "a block of the student with the teacher's map"
            raise FieldError(
                "method.teacher_layers",
                f"student block {ours} has {show_size(own)} tokens, teacher block {theirs} {show_size(given)}; "
                f"write {remedy}, or a max_patch_num that merges both to one map",
            )
        found.append((own, given, merged))
    return tuple(found)


def wanted_map(size: tuple[int, int], max_patch_num: int) -> tuple[int, int]:
    """The map that merging aims at: its own if it is small enough, else the largest square below the limit."""
    if not max_patch_num or math.prod(size) <= max_patch_num:
        return size
    return (math.isqrt(max_patch_num),) * 2


def merged_map(method: ManifoldConfig, whose: str, block: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a block after merging."""
    rows, cols = wanted_map(size, method.max_patch_num)
    _need(
        size == (rows, cols) or (size[0] == size[1] and size[0] % rows == 0),
        "method.max_patch_num",
        f"{method.max_patch_num} asks for {rows}x{cols} tokens, which do not tile the {show_size(size)} of {whose} "
        f"block {block}; write "
        + (
            ", ".join(str(side**2) for side in range(1, size[0] + 1) if size[0] % side == 0)
            if size[0] == size[1]
            else "0, only square maps are merged"
        ),
    )
    return rows, cols


def check_cache(recipe: Recipe) -> None:
    """Kept answers need images that are the same in every epoch."""
    still: dict[str, Any] = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "auto_augment": ""}
    still |= dict.fromkeys(("hflip", "brightness", "contrast", "color_jitter", "erasing"), 0.0)
    moving = [f"data.{key}: {show_value(rest)}" for key, rest in still.items() if getattr(recipe.data, key) != rest]
    if recipe.stages:
        moving.append("no stages")
    if recipe.method.mixes:  # type: ignore[union-attr]
        moving += ["method.mixup: 0", "method.cutmix: 0"]
    _need(
        not moving,
        "method.cache",
        "keeps the teacher's answers to images that never change; write "
        + ", ".join(moving)
        + ", or leave method.cache out",
    )


def show_size(size: Any) -> str:
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def show_value(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else "''"


# --- checks shared by the classes -------------------------------------------------------------------------------


def check_positive(config: Any, *keys: str) -> None:
    for key in keys:
        _need(getattr(config, key) > 0, key, f"{getattr(config, key)} is not above 0")


def check_not_negative(config: Any, *keys: str) -> None:
    for key in keys:
        _need(getattr(config, key) >= 0, key, f"{getattr(config, key)} is negative")


def check_rate(config: Any, key: str, closed: bool = False) -> None:
    value = getattr(config, key)
    _need(0 <= value < 1 or (closed and value == 1), key, f"{value} is not a rate from 0 to 1")


# --- presets ----------------------------------------------------------------------------------------------------

ENCODERS: dict[str, Any] = {
    "vit": ViTConfig(),
    "vit_demo": ViTConfig(image_size=(64, 64), patch_size=8, embed_dim=96, depth=4, num_heads=3),
    "vit_tiny": ViTConfig(embed_dim=192, num_heads=3),
    "vit_small": ViTConfig(embed_dim=384, num_heads=6),
    "vit_base": ViTConfig(),
    "vit_large": ViTConfig(embed_dim=1024, depth=24, num_heads=16),
    # SimMIM's ViT-B as it pre-trains; fine-tuning has relative_position: block
    "vit_base_simmim": ViTConfig(
        position="none", relative_position="shared", k_bias=False, layer_scale=0.1, init="scaled", drop_path=0.1
    ),
    "cait": CaiTConfig(),
    "cait_xxs24": CaiTConfig(embed_dim=192, num_heads=4),
    "cait_xxs36": CaiTConfig(embed_dim=192, num_heads=4, depth=36),
    "cait_xs24": CaiTConfig(embed_dim=288, num_heads=6),
    "cait_s24": CaiTConfig(),
    "cait_s36": CaiTConfig(depth=36, layer_scale=1e-6),
    "cait_m36": CaiTConfig(embed_dim=768, num_heads=16, depth=36, layer_scale=1e-6),
    "cait_m48": CaiTConfig(embed_dim=768, num_heads=16, depth=48, layer_scale=1e-6),
    "swin": SwinConfig(),
    "swin_demo": SwinConfig(image_size=(64, 64), embed_dim=48, depths=(2, 2, 2), num_heads=(2, 4, 8), window_size=4),
    "swin_tiny": SwinConfig(),
    "swin_small": SwinConfig(depths=(2, 2, 18, 2)),
    "swin_base": SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "swin_large": SwinConfig(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "swinv2": SwinV2Config(),
    "swinv2_tiny": SwinV2Config(),
    "swinv2_small": SwinV2Config(depths=(2, 2, 18, 2)),
    "swinv2_base": SwinV2Config(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "swinv2_large": SwinV2Config(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    # 655 M and 1.06 B parameters, as published; neither code nor heads are. Heads of 32 channels as in all the others
    # (mmpretrain guesses 8 to 64 for huge); the norms on the main branch are the paper's (2111.09883) for huge models.
    "swinv2_huge": SwinV2Config(
        embed_dim=352,
        depths=(2, 2, 18, 2),
        num_heads=(11, 22, 44, 88),
        main_norm_every=6,
        image_size=(192, 192),
        window_size=12,
    ),
    "swinv2_giant": SwinV2Config(
        embed_dim=448,
        depths=(2, 2, 18, 2),
        num_heads=(14, 28, 56, 112),
        main_norm_every=6,
        image_size=(192, 192),
        window_size=12,
    ),
}
SIMMIM = MIMConfig(
    mask_ratio=0.6,
    mask_block=32,
    corrupt="token",
    target=PixelsConfig(channels_first=True),
    decoder=LinearDecoderConfig(),
    loss="l1",
)
METHODS: dict[str, Any] = {
    "fastmim": MIMConfig(),
    "simmim": SIMMIM,
    "classify": ClassifyConfig(),
    "manifold": ManifoldConfig(),
}
TARGETS: dict[str, Any] = {"hog": HOGConfig(), "pixels": PixelsConfig()}
DECODERS: dict[str, Any] = {"transformer": TransformerDecoderConfig(), "linear": LinearDecoderConfig()}

#: field name -> preset name -> the dataclass with its defaults
PRESETS = {
    "encoder": ENCODERS,
    "teacher_encoder": ENCODERS,
    "method": METHODS,
    "target": TARGETS,
    "decoder": DECODERS,
}


if __name__ == "__main__":
    from .recipe import main

    raise SystemExit(main())
