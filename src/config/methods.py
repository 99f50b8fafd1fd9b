"""Methods, with the targets and decoders of masked image modelling, and what they ask of encoders."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from .checks import (
    FieldError,
    check_multiples,
    check_not_negative,
    check_positive,
    check_rate,
    legal_near,
    need,
    show_size,
)
from .encoders import EncoderConfig, SwinConfig, ViTConfig

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
        need(
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
        need(self.window > 0 and self.window % 2 == 1, "window", f"{self.window} is not an odd number above 0")

    def values(self, stride: int, in_chans: int) -> int:
        """Numbers predicted for a token of `stride` pixels per side."""
        return in_chans * stride**2


@dataclass(frozen=True, kw_only=True)
class TransformerDecoderConfig:
    """Linear, pre-norm transformer blocks with width/32 heads, norm, linear (FastMIM)."""

    name: str = "transformer"
    width: int = 256
    depth: int = 1  # 0: norm and prediction act on the encoder's output, and width must equal the encoder's
    mlp_ratio: float = 4.0  # hidden width of the blocks' MLPs over their width
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "width", "mlp_ratio")
        need(self.depth >= 0, "depth", f"{self.depth} is negative; 0 leaves the blocks out")
        need(
            self.depth == 0 or (self.width >= 32 and self.width % (self.width // 32) == 0),
            "width",
            f"{self.width} is not shared out evenly by heads of at least 32; write {legal_near(self.width, 32)}",
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
        need(0 < self.mask_ratio < 1, "mask_ratio", f"{self.mask_ratio} is not between 0 and 1")


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
        need(
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
        need(
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

# --- what they ask of encoders -----------------------------------------------------------------------------------


def check_mim(encoder: EncoderConfig, method: MIMConfig) -> None:
    """Mask blocks, tokens and target cells must tile each other."""
    block, stride, target = method.mask_block, encoder.stride, method.target
    meaning = f"{stride} (the side of an output token), which masks and targets need"
    check_multiples("encoder.image_size", encoder.image_size, stride, meaning)
    if isinstance(target, HOGConfig):
        need(
            stride % target.cell == 0,
            "method.target.cell",
            f"{target.cell} does not divide the token side {stride}; "
            f"legal: {', '.join(str(c) for c in range(2, stride + 1) if stride % c == 0)}",
        )
    legal = legal_blocks(encoder, method)
    need(
        block in legal,
        "method.mask_block",
        f"{block} does not fit image {encoder.image_size[0]}x{encoder.image_size[1]} and tokens of {stride} pixels"
        + (f" and HOG cells of {target.cell}" if isinstance(target, HOGConfig) else "")
        + f"; legal: {', '.join(map(str, legal)) or 'none, change the image size'}",
    )
    if isinstance(target, HOGConfig):
        for side in encoder.image_size:
            need(
                target.gaussian_window == 0 or side % target.gaussian_window == 0,
                "method.target.gaussian_window",
                f"{target.gaussian_window} does not divide the image side {side}",
            )
    if method.corrupt == "token":
        need(
            block % encoder.patch_size == 0,
            "method.mask_block",
            f"{block} is not a multiple of the patch side {encoder.patch_size}, whose tokens are masked; "
            f"legal: {', '.join(str(b) for b in legal if b % encoder.patch_size == 0)}",
        )
    if isinstance(method.decoder, TransformerDecoderConfig) and method.decoder.depth == 0:
        need(
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
    need(
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


# --- presets ----------------------------------------------------------------------------------------------------

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
