"""Methods, the targets and decoders of masked image modelling, and the checks between them and encoders."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .checks import (
    FieldError,
    check_blocks,
    check_multiples,
    check_not_negative,
    check_positive,
    check_rate,
    check_sizes,
    legal_near,
    need,
    show_size,
)
from .cost import NORM, BlockGroup
from .encoders import EncoderConfig, ViTConfig
from .paths import PathText

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

    from .recipe import Recipe

HEAD_WIDTH = 32  # FastMIM: heads = decoder width / 32

# --- targets and decoders of masked image modelling -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen network of a distillation or of a feature target.

    Attributes:
        file: its checkpoint; empty if the recipe names none yet.
        key: the recipe key that names the file.
        encoder: the encoder in the file.
        classifier: its pooling and head; None where only the encoder is used.
    """

    file: str
    key: str
    encoder: EncoderConfig
    classifier: ClassifyConfig | None = None


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Interface of every target configuration."""

    if TYPE_CHECKING:
        name: str

    @property
    def unit(self) -> int:
        """The side of a mask block must be a multiple of this number of pixels."""
        return 1

    def values(self, stride: int, in_chans: int) -> int:
        """Return how many numbers are predicted for a token of `stride` pixels per side."""
        raise NotImplementedError

    def check(self, encoder: EncoderConfig) -> None:
        """Check that the target fits the encoder."""

    @property
    def teacher_network(self) -> Teacher | None:
        """The frozen network whose output is the target; None without one."""
        return None


@dataclass(frozen=True, kw_only=True)
class HOGConfig(TargetConfig):
    """Histograms of oriented gradients (MaskFeat; FastMIM util/hog_layer.py)."""

    name: str = "hog"
    bins: int = 9  # over 180 degrees
    cell: int = 8  # pixels per side
    normalize: bool = True  # L2 over the bins of each cell and channel (FastMIM's norm_pix_loss)
    gaussian_window: int = 0  # pixels per side; 0: off, MaskFeat uses 16

    def __post_init__(self) -> None:
        check_positive(self, "bins", "cell")
        check_sizes(self)
        need(
            self.gaussian_window >= 0,
            "gaussian_window",
            f"{self.gaussian_window} is negative; write 0 to turn it off",
        )

    @property
    def unit(self) -> int:
        return self.cell

    def values(self, stride: int, in_chans: int) -> int:
        return in_chans * self.bins * (stride // self.cell) ** 2

    def check(self, encoder: EncoderConfig) -> None:
        stride = encoder.stride
        need(
            stride % self.cell == 0,
            "method.target.cell",
            f"{self.cell} does not divide the token side {stride}; "
            f"legal: {', '.join(str(c) for c in range(2, stride + 1) if stride % c == 0)}",
        )
        for side in encoder.image_size:
            need(
                self.gaussian_window == 0 or side % self.gaussian_window == 0,
                "method.target.gaussian_window",
                f"{self.gaussian_window} does not divide the image side {side}",
            )


@dataclass(frozen=True, kw_only=True)
class PixelsConfig(TargetConfig):
    """The pixels of the normalised input image."""

    name: str = "pixels"
    # patch: by mean and variance of each token's pixels (MAE); local: of a window around each pixel (SwinV2's SimMIM)
    normalize: Literal["none", "patch", "local"] = "none"
    window: int = 47  # pixels per side, for normalize: local
    # order of values in a token. true: channel, row, column (SimMIM); false: row, column, channel (MAE)
    channels_first: bool = False

    def __post_init__(self) -> None:
        check_sizes(self)
        need(self.window > 0 and self.window % 2 == 1, "window", f"{self.window} is not an odd number above 0")

    def values(self, stride: int, in_chans: int) -> int:
        return in_chans * stride**2


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(TargetConfig):
    """The features of a frozen encoder for the whole image (as in the target comparisons of MaskFeat and MVP)."""

    name: str = "features"
    teacher: PathText = ""  # a checkpoint of any Method, trained here or converted; only its encoder is used
    teacher_encoder: EncoderConfig = field(default_factory=ViTConfig)  # the encoder in that file
    # of each token. layer: mean 0 and variance 1 over its channels; length: L2 norm 1
    normalize: Literal["layer", "length", "none"] = "layer"

    def values(self, stride: int, in_chans: int) -> int:
        return self.teacher_encoder.out_dim

    @property
    def teacher_network(self) -> Teacher:
        return Teacher(file=self.teacher, key="method.target.teacher", encoder=self.teacher_encoder)

    def check(self, encoder: EncoderConfig) -> None:
        check_same_images(encoder, self.teacher_encoder, "method.target.teacher_encoder")
        student_map, teacher_map = encoder.stage_maps[-1], self.teacher_encoder.stage_maps[-1]
        need(
            student_map == teacher_map,
            "method.target.teacher_encoder",
            f"{self.teacher_encoder.name} outputs {show_size(teacher_map)} tokens, but {encoder.name} outputs "
            f"{show_size(student_map)}; write a teacher with tokens of {encoder.stride} pixels",
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Interface of every decoder configuration."""

    if TYPE_CHECKING:
        name: str

    def check(self, encoder: EncoderConfig) -> None:
        """Check that the decoder fits the encoder."""

    @property
    def takes_mask_tokens(self) -> bool:
        """Whether mask tokens can be added after the encoder (MAE)."""
        return False

    def check_positions(self) -> None:
        """Check that the decoder can have a position embedding."""

    def weight_shapes(self, encoder: EncoderConfig, values: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights that decide how large the decoder is, as `EncoderConfig.weight_shapes`."""
        raise NotImplementedError

    def flops(self, encoder: EncoderConfig, values: int, embedded: int = 0) -> int:
        """Return the multiply-adds of one image from the encoder's output to `values` numbers per token.

        `embedded`: tokens that come from the encoder when mask tokens are added after it; 0: all.
        """
        raise NotImplementedError

    def saved_values(self, encoder: EncoderConfig) -> int:
        """Return how many values of one image the backward pass needs; only blocks are counted."""
        return 0


@dataclass(frozen=True, kw_only=True)
class TransformerDecoderConfig(DecoderConfig):
    """Linear, pre-norm transformer blocks with width/32 heads, norm, linear (FastMIM)."""

    name: str = "transformer"
    width: int = 256
    depth: int = 1  # 0: norm and prediction act on the encoder's output, and width must equal the encoder's
    num_heads: int = 0  # of each block; 0: width / 32
    mlp_ratio: float = 4.0  # hidden width of the MLPs / width
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "width", "mlp_ratio")
        check_sizes(self)
        check_blocks(self.depth, "depth")
        need(self.depth >= 0, "depth", f"{self.depth} is negative; write 0 for no blocks")
        need(self.num_heads >= 0, "num_heads", f"{self.num_heads} is negative; write 0 for width / 32")
        need(
            not self.num_heads or self.width % self.num_heads == 0,
            "num_heads",
            f"{self.num_heads} does not divide width {self.width}",
        )
        need(
            self.depth == 0 or self.num_heads > 0 or (self.width >= 32 and self.width % (self.width // 32) == 0),
            "width",
            f"{self.width} does not divide into equal heads of at least 32; write {legal_near(self.width, 32)}",
        )

    @property
    def heads(self) -> int:
        """Attention heads of each block."""
        return self.num_heads or self.width // HEAD_WIDTH

    @property
    def takes_mask_tokens(self) -> bool:
        return True

    def check_positions(self) -> None:
        need(self.depth > 0, "method.decoder.depth", "0 has no blocks, but mask tokens need at least one; write 1")
        need(
            self.width % 4 == 0,
            "method.decoder.width",
            f"{self.width} is not a multiple of 4, which sine-cosine positions need; write {legal_near(self.width, 4)}",
        )

    def check(self, encoder: EncoderConfig) -> None:
        need(
            self.depth > 0 or self.width == encoder.out_dim,
            "method.decoder.width",
            f"must equal the encoder's width {encoder.out_dim} when decoder.depth is 0",
        )

    def weight_shapes(self, encoder: EncoderConfig, values: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "pred.weight", (values, self.width)
        for number in range(self.depth):
            yield f"blocks.{number}.mlp.fc1.weight", (int(self.width * self.mlp_ratio), self.width)

    def blocks(self, encoder: EncoderConfig) -> BlockGroup:
        """Return the blocks for cost estimates; they process prefix tokens too."""
        length = encoder.output_length
        return BlockGroup(self.depth, length, length, length, self.width, self.heads, self.mlp_ratio)

    def flops(self, encoder: EncoderConfig, values: int, embedded: int = 0) -> int:
        inside = (embedded or encoder.output_length) * encoder.out_dim * self.width if self.depth else 0
        outside = NORM * self.width + self.width * values
        return inside + encoder.output_length * outside + self.blocks(encoder).flops()

    def saved_values(self, encoder: EncoderConfig) -> int:
        return self.blocks(encoder).saved_values()


@dataclass(frozen=True, kw_only=True)
class LinearDecoderConfig(DecoderConfig):
    """One linear layer on the patch tokens (SimMIM's 1x1 convolution before its pixel shuffle)."""

    name: str = "linear"

    def weight_shapes(self, encoder: EncoderConfig, values: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "pred.weight", (values, encoder.out_dim)

    def flops(self, encoder: EncoderConfig, values: int, embedded: int = 0) -> int:
        return encoder.num_tokens * encoder.out_dim * values


# --- methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Interface of every Method configuration, so that no other code depends on the kind of Method."""

    if TYPE_CHECKING:
        name: str
    #: the implementation whose rules later resize the encoder's position tables, by its name in `weights.names`;
    #: supervised networks follow timm
    origin = "timm"
    #: the encoder is cut to this number of blocks; 0: all
    encoder_blocks = 0
    #: folder of stored teacher outputs; empty: the teacher runs in every step
    cache = ""

    @property
    def mixes(self) -> bool:
        """Whether training mixes the images of a batch."""
        return False

    @property
    def classifier(self) -> ClassifyConfig | None:
        """Pooling and head of the trained network; None for pre-training."""
        return None

    @property
    def teacher_network(self) -> Teacher | None:
        """The teacher of this Method; None without one."""
        return None

    def without_cache(self) -> Self:
        """Return the same configuration with a teacher that runs in every step."""
        return self

    def check(self, recipe: Recipe) -> None:
        """Check that the Method fits the other parts of the recipe."""

    def weight_shapes(self, encoder: EncoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights beside the encoder, as `EncoderConfig.weight_shapes`."""
        raise NotImplementedError

    def flops(self, encoder: EncoderConfig) -> dict[str, int]:
        """Return part of the network -> multiply-adds of one image, without a teacher."""
        raise NotImplementedError

    def saved_values(self, encoder: EncoderConfig) -> int:
        """Return how many values of one image the backward pass needs."""
        return encoder.saved_values()

    def masked(self, encoder: EncoderConfig) -> dict[str, int] | None:
        """Return the number of mask blocks, of masked blocks, and of output tokens masked at least in part.

        None for a Method without a mask.
        """
        return None


def masked_count(blocks: int, ratio: float, rounding: str) -> int:
    """Return how many of `blocks` are masked, in double precision.

    Args:
        rounding: floor_visible masks all but int(blocks * (1 - ratio)) (FastMIM, MAE); ceil_masked masks
            ceil(blocks * ratio) (SimMIM). With 100 blocks and ratio 0.9 they give 91 and 90.
    """
    return math.ceil(blocks * ratio) if rounding == "ceil_masked" else blocks - int(blocks * (1 - ratio))


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(MethodConfig):
    """Mask blocks of the image and predict a target there."""

    encoder_blocks: int = 0  # pre-train only the first blocks of the encoder; 0: all (FastMIM's finding ii)
    mask_ratio: float = 0.75
    mask_block: int = 16  # pixels per side of one mask block
    mask_rounding: Literal["floor_visible", "ceil_masked"] = "floor_visible"  # of the number of blocks: `masked_count`
    target: TargetConfig = field(default_factory=HOGConfig)
    decoder: DecoderConfig = field(default_factory=TransformerDecoderConfig)
    loss: Literal["l2", "l1"] = "l2"

    def __post_init__(self) -> None:
        check_positive(self, "mask_block")
        check_sizes(self)
        check_not_negative(self, "encoder_blocks")
        need(0 < self.mask_ratio < 1, "mask_ratio", f"{self.mask_ratio} is not between 0 and 1")

    @property
    def hides_tokens(self) -> bool:
        """Whether a mask block must consist of whole encoder patches."""
        return True

    @property
    def teacher_network(self) -> Teacher | None:
        return self.target.teacher_network

    def legal_blocks(self, encoder: EncoderConfig) -> list[int]:
        """Return the valid `mask_block` sizes: they tile the image, tile a token or are tiled by it, and consist of
        whole target units."""
        height, width = encoder.image_size
        unit = self.target.unit
        tile = encoder.patch_size if self.hides_tokens else 1
        return [
            b
            for b in range(unit, min(height, width) + 1, unit)
            if height % b == 0 and width % b == 0 and (b % encoder.stride == 0 or encoder.stride % b == 0)
            if height // b * (width // b) > 1 and b % tile == 0
        ]

    def check(self, recipe: Recipe) -> None:
        """Check that mask blocks, tokens and target units tile each other."""
        encoder, block = recipe.trained_encoder, self.mask_block
        meaning = f"{encoder.stride} (the side of an output token), which masks and targets need"
        check_multiples("encoder.image_size", encoder.image_size, encoder.stride, meaning)
        self.target.check(encoder)
        legal = self.legal_blocks(encoder)
        need(
            block in legal,
            "method.mask_block",
            f"{block} does not fit image {show_size(encoder.image_size)} and tokens of {encoder.stride} pixels"
            + (f" and HOG cells of {self.target.unit}" if self.target.unit > 1 else "")
            + (f" and patches of {encoder.patch_size}, whose tokens are masked" if self.hides_tokens else "")
            + f"; legal: {', '.join(map(str, legal)) or 'none, change the image size'}",
        )
        self.decoder.check(encoder)

    def mask_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of mask blocks."""
        return image_size[0] // self.mask_block, image_size[1] // self.mask_block

    def hidden_blocks(self, image_size: tuple[int, int]) -> int:
        """Number of masked blocks of an image."""
        return masked_count(math.prod(self.mask_grid(image_size)), self.mask_ratio, self.mask_rounding)

    def masked(self, encoder: EncoderConfig) -> dict[str, int]:
        """As in the base class; if a token contains several blocks, the token count is the largest possible."""
        hidden, tokens = self.hidden_blocks(encoder.image_size), encoder.num_tokens
        blocks, per_side = math.prod(self.mask_grid(encoder.image_size)), self.mask_block // encoder.stride
        masked_tokens = hidden * per_side**2 if per_side else min(hidden, tokens)
        return {"blocks": blocks, "masked_blocks": hidden, "masked_tokens": masked_tokens}

    def weight_shapes(self, encoder: EncoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        values = self.target.values(encoder.stride, encoder.in_chans)
        for name, shape in self.decoder.weight_shapes(encoder, values):
            yield f"decoder.{name}", shape

    def flops(self, encoder: EncoderConfig) -> dict[str, int]:
        return {
            "encoder": encoder.flops(),
            "decoder": self.decoder.flops(encoder, self.target.values(encoder.stride, encoder.in_chans)),
        }

    def saved_values(self, encoder: EncoderConfig) -> int:
        return encoder.saved_values() + self.decoder.saved_values(encoder)


@dataclass(frozen=True, kw_only=True)
class MIMConfig(MaskedConfig):
    """Masked image modelling on all tokens: a mask token replaces masked pixels or patches (SimMIM, FastMIM)."""

    name: str = "fastmim"
    corrupt: Literal["pixel", "token"] = "pixel"  # the mask token replaces pixels or embedded patches
    origin: Literal["fastmim", "simmim"] = "fastmim"  # whose rules later resize the encoder's position tables

    @property
    def hides_tokens(self) -> bool:
        return self.corrupt == "token"


@dataclass(frozen=True, kw_only=True)
class MAEConfig(MaskedConfig):
    """Masked autoencoder (2111.06377): the encoder sees only visible tokens, the decoder also mask tokens."""

    name: str = "mae"
    target: TargetConfig = field(default_factory=lambda: PixelsConfig(normalize="patch"))
    decoder: TransformerDecoderConfig = field(default_factory=lambda: TransformerDecoderConfig(width=512, depth=8))

    origin = "mae"

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        encoder = recipe.trained_encoder
        need(
            encoder.drops_tokens,
            "method.name",
            f"{self.name} runs the encoder on visible tokens only, but {encoder.name} needs all tokens for its windows "
            "or relative positions; write fastmim or simmim, or another encoder, such as vit_base",
        )
        need(
            self.decoder.takes_mask_tokens,
            "method.decoder.name",
            f"{self.decoder.name} has no blocks for mask tokens; write transformer",
        )
        self.decoder.check_positions()

    def visible_tokens(self, encoder: EncoderConfig) -> int:
        """Number of patch tokens of an image that the encoder sees."""
        return encoder.num_tokens - self.masked(encoder)["masked_tokens"]

    def flops(self, encoder: EncoderConfig) -> dict[str, int]:
        visible, values = self.visible_tokens(encoder), self.target.values(encoder.stride, encoder.in_chans)
        return {
            "encoder": encoder.flops(visible=visible),
            "decoder": self.decoder.flops(encoder, values, embedded=visible + encoder.num_prefix_tokens),
        }

    def saved_values(self, encoder: EncoderConfig) -> int:
        return encoder.saved_values(self.visible_tokens(encoder)) + self.decoder.saved_values(encoder)


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(MethodConfig):
    """Supervised training of encoder, pooling and a linear head."""

    #: fields that matter during training only
    training_only: ClassVar[tuple[str, ...]] = ("label_smoothing", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob")

    name: str = "classify"
    num_classes: int = 1000
    pool: Literal["mean", "cls"] = "mean"
    fc_norm: bool = True  # norm after pooling instead of the encoder's final norm (FastMIM, SimMIM and MAE ViT)
    label_smoothing: float = 0.1
    # each batch is mixed with its reverse (timm's Mixup, mode batch); lambda is drawn from Beta(alpha, alpha)
    mixup: float = 0.0  # alpha; 0: off
    cutmix: float = 0.0  # alpha; 0: off
    mixup_prob: float = 1.0  # probability of mixing a batch
    mixup_switch_prob: float = 0.5  # probability of CutMix instead of mixup for a mixed batch, if both are on
    head_std: float = 2e-5  # deviation of the head's initial weights: FastMIM 2e-5, SimMIM 2e-5 (ViT) and 0.02 (Swin)

    def __post_init__(self) -> None:
        check_positive(self, "num_classes", "head_std")
        check_sizes(self)
        check_rate(self, "label_smoothing")
        check_not_negative(self, "mixup", "cutmix")
        for key in ("mixup_prob", "mixup_switch_prob"):
            check_rate(self, key, closed=True)
        need(
            self.pool == "mean" or not self.fc_norm,
            "fc_norm",
            "needs pool: mean, since the class token is taken after the encoder's final norm; write fc_norm: false",
        )

    @property
    def mixes(self) -> bool:
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def classifier(self) -> ClassifyConfig:
        if type(self) is ClassifyConfig:
            return self
        shared = [item.name for item in fields(ClassifyConfig) if item.name != "name"]
        return ClassifyConfig(**{name: getattr(self, name) for name in shared})

    def check(self, recipe: Recipe) -> None:
        """Check that the batch size is even if images are mixed in pairs."""
        batch = recipe.train.batch_size
        need(
            not self.mixes or batch % 2 == 0,
            "train.batch_size",
            f"{batch} is odd, but method.mixup and cutmix mix images in pairs; write {legal_near(batch, 2)}",
        )

    def weight_shapes(self, encoder: EncoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "head.weight", (self.num_classes, encoder.out_dim)

    def flops(self, encoder: EncoderConfig) -> dict[str, int]:
        width, prefix = encoder.out_dim, encoder.num_prefix_tokens
        return {
            "encoder": encoder.flops(final_norm=not self.fc_norm),
            "pooling": (encoder.num_tokens if self.pool == "mean" else 0) * width + NORM * width * self.fc_norm,
            "head": width * self.num_classes * max(prefix, 1),
        }


@dataclass(frozen=True, kw_only=True)
class ManifoldConfig(ClassifyConfig):
    """Manifold distillation: supervised training that also matches the relations among a teacher's features.

    Loss: (1 - alpha) * cross-entropy + alpha * distillation + beta * (sample + patch + rand), as in
    Hao840/manifold-distillation 1096b82 losses.py; each field names its flag there. The defaults are its published
    command for DeiT-Tiny from CaiT-S24. The layers have no default, since they depend on both networks.
    """

    #: fields that matter during training only
    training_only: ClassVar[tuple[str, ...]] = (
        *ClassifyConfig.training_only,
        *("teacher", "teacher_encoder", "student_layers", "teacher_layers", "w_sample", "w_patch", "w_rand", "beta"),
        *("samples", "max_patch_num", "distillation", "alpha", "tau", "cache"),
    )

    name: str = "manifold"
    teacher: PathText = ""  # checkpoint of a classifier, trained here or converted (--teacher-path)
    teacher_encoder: EncoderConfig = field(default_factory=ViTConfig)  # the encoder in that file (--teacher-model)
    student_layers: tuple[int, ...] = ()  # blocks, counted from 0 over all encoder stages, before the norm (--s-id)
    teacher_layers: tuple[int, ...] = ()  # for each of them the matching block of the teacher (--t-id)
    w_sample: float = 0.1  # weight of relations between the images of a pass, at each token (--w-sample)
    w_patch: float = 4.0  # weight of relations between the tokens of an image (--w-patch)
    w_rand: float = 0.2  # weight of relations between tokens drawn from all images of a pass (--w-rand)
    beta: float = 1.0  # weight of all three relations together (--distillation-beta)
    samples: int = 192  # tokens drawn for each pair of layers; all if there are fewer (--K)
    max_patch_num: int = 0  # larger maps are merged to at most this many tokens; 0: no merging
    # loss of the logits (--distillation-type). soft: KL divergence from the teacher's at temperature tau, times tau**2;
    # hard: cross-entropy with the teacher's top class; none: cross-entropy with the labels only (in the reference, none
    # also turns the relations off, as method classify does)
    distillation: Literal["soft", "hard", "none"] = "soft"
    alpha: float = 1.0  # weight of soft or hard; 1 ignores the labels (--distillation-alpha)
    tau: float = 1.0  # temperature of soft (--distillation-tau)
    # folder of stored teacher outputs, for images without augmentation; empty: the teacher runs in every step
    cache: PathText = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "samples", "tau")
        check_not_negative(self, "w_sample", "w_patch", "w_rand", "beta", "max_patch_num")
        check_rate(self, "alpha", closed=True)
        students, teachers = len(self.student_layers), len(self.teacher_layers)
        need(
            students == teachers,
            "teacher_layers",
            f"has {teachers} blocks, student_layers has {students}; write as many",
        )

    @property
    def relates(self) -> bool:
        """Whether relations are part of the loss."""
        return self.beta > 0 and (self.w_sample > 0 or self.w_patch > 0 or self.w_rand > 0)

    @property
    def teacher_network(self) -> Teacher:
        """The teacher; before its file is read, pooling and head are the usual ones of its encoder."""
        pool: Literal["mean", "cls"] = "cls" if self.teacher_encoder.num_prefix_tokens else "mean"
        classifier = ClassifyConfig(num_classes=self.num_classes, pool=pool, fc_norm=False)
        return Teacher(file=self.teacher, key="method.teacher", encoder=self.teacher_encoder, classifier=classifier)

    def without_cache(self) -> Self:
        return replace(self, cache="")

    def check(self, recipe: Recipe) -> None:
        """Check that teacher and student see the same images, and that the blocks of a pair have equal maps."""
        super().check(recipe)
        student, teacher = recipe.encoder, self.teacher_encoder
        need(
            bool(self.student_layers) or not self.relates,
            "method.student_layers",
            "is empty; write for example student_layers: [0, 3] and teacher_layers: [0, 3], or beta: 0 to distil "
            "logits only",
        )
        check_same_images(student, teacher, "method.teacher_encoder")
        for key, encoder in (("student_layers", student), ("teacher_layers", teacher)):
            blocks = len(encoder.block_maps)
            for number in getattr(self, key):
                need(
                    0 <= number < blocks,
                    f"method.{key}",
                    f"{number} is not a block of {encoder.name}, which has {blocks}; write 0 to {blocks - 1}",
                )
        relation_maps(student, self)
        if self.cache:
            check_cache(recipe)


def check_same_images(student: EncoderConfig, teacher: EncoderConfig, teacher_key: str) -> None:
    """Check that the teacher takes the student's images; `teacher_key` is the recipe key of its encoder."""
    for key in ("image_size", "in_chans"):
        student_value, teacher_value = getattr(student, key), getattr(teacher, key)
        need(
            student_value == teacher_value,
            f"{teacher_key}.{key}",
            f"{show_size(teacher_value)}, but the student has {show_size(student_value)} and both see the same images; "
            f"write {list(student_value) if isinstance(student_value, tuple) else student_value}",
        )


def check_cache(recipe: Recipe) -> None:
    """Check that images are the same in every epoch, which stored teacher outputs need."""
    fixed: dict[str, Any] = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "auto_augment": ""}
    fixed |= dict.fromkeys(("hflip", "brightness", "contrast", "color_jitter", "erasing"), 0.0)
    changes = [f"data.{key}: {show_value(value)}" for key, value in fixed.items() if getattr(recipe.data, key) != value]
    if recipe.stages:
        changes.append("no stages")
    if recipe.method.mixes:
        changes += ["method.mixup: 0", "method.cutmix: 0"]
    need(
        not changes,
        "method.cache",
        "needs images without augmentation, the same in every epoch; write "
        + ", ".join(changes)
        + ", or leave method.cache out",
    )


def show_value(value: Any) -> str:
    """Return a value as a recipe would write it."""
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else "''"


# --- relations of a distillation ---------------------------------------------------------------------------------


def relation_maps(
    student: EncoderConfig, method: ManifoldConfig
) -> tuple[tuple[tuple[int, int], tuple[int, int], tuple[int, int]], ...]:
    """For each pair of layers: map of the student's block, of the teacher's block, and of both after merging.

    Raises:
        FieldError: the merged maps differ, or a map cannot be merged.
    """
    maps = []
    teacher = method.teacher_encoder
    for student_block, teacher_block in zip(method.student_layers, method.teacher_layers, strict=True):
        student_map, teacher_map = student.block_maps[student_block], teacher.block_maps[teacher_block]
        merged = merged_map(method, "student", student_block, student_map)
        if merged != merged_map(method, "teacher", teacher_block, teacher_map):
            fitting = [
                number
                for number, size in enumerate(teacher.block_maps)
                if size == student_map or (method.max_patch_num and target_map(size, method.max_patch_num) == merged)
            ]
            remedy = (
                f"teacher blocks {fitting[0]} to {fitting[-1]}"
                if fitting
                else "a block of the student with the teacher's map"
            )
            raise FieldError(
                "method.teacher_layers",
                f"student block {student_block} has {show_size(student_map)} tokens, teacher block {teacher_block} has "
                f"{show_size(teacher_map)}; write {remedy}, or a max_patch_num that merges both to one map",
            )
        maps.append((student_map, teacher_map, merged))
    return tuple(maps)


def target_map(size: tuple[int, int], max_patch_num: int) -> tuple[int, int]:
    """Return the map after merging: the map itself if it is small enough, else the largest square below the limit."""
    if not max_patch_num or math.prod(size) <= max_patch_num:
        return size
    return (math.isqrt(max_patch_num),) * 2


def merged_map(method: ManifoldConfig, network: str, block: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of a block after merging; `network` is student or teacher, for errors."""
    rows, cols = target_map(size, method.max_patch_num)
    need(
        size == (rows, cols) or (size[0] == size[1] and size[0] % rows == 0),
        "method.max_patch_num",
        f"{method.max_patch_num} merges to {rows}x{cols} tokens, which do not tile the {show_size(size)} of {network} "
        f"block {block}; write "
        + (
            ", ".join(str(side**2) for side in range(1, size[0] + 1) if size[0] % side == 0)
            if size[0] == size[1]
            else "0, since only square maps are merged"
        ),
    )
    return rows, cols


# --- presets ----------------------------------------------------------------------------------------------------

SIMMIM = MIMConfig(
    mask_ratio=0.6,
    mask_block=32,
    corrupt="token",
    mask_rounding="ceil_masked",
    origin="simmim",
    target=PixelsConfig(channels_first=True),
    decoder=LinearDecoderConfig(),
    loss="l1",
)
METHODS: dict[str, Any] = {
    "fastmim": MIMConfig(),
    "simmim": SIMMIM,
    "mae": MAEConfig(),
    "classify": ClassifyConfig(),
    "manifold": ManifoldConfig(),
}
TARGETS: dict[str, Any] = {"hog": HOGConfig(), "pixels": PixelsConfig(), "features": FeaturesConfig()}
DECODERS: dict[str, Any] = {"transformer": TransformerDecoderConfig(), "linear": LinearDecoderConfig()}
