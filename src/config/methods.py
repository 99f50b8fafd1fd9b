"""Methods, with the targets and decoders of masked image modelling, and what they ask of encoders."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
    """A frozen network that training asks.

    Attributes:
        file: a checkpoint; empty if the recipe names none yet.
        key: of the recipe, that names the file.
        encoder: what the file holds.
        classifier: its pooling and head; None where the encoder alone is asked.
    """

    file: str
    key: str
    encoder: EncoderConfig
    classifier: ClassifyConfig | None = None


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What every target's configuration answers."""

    if TYPE_CHECKING:
        name: str

    @property
    def unit(self) -> int:
        """Pixels per side that a mask block must be a multiple of."""
        return 1

    def values(self, stride: int, in_chans: int) -> int:
        """Numbers predicted for a token of `stride` pixels per side."""
        raise NotImplementedError

    def check(self, encoder: EncoderConfig) -> None:
        """That target and encoder go together."""

    @property
    def teacher_network(self) -> Teacher | None:
        """The frozen network whose output is the target."""
        return None


@dataclass(frozen=True, kw_only=True)
class HOGConfig(TargetConfig):
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
    # patch: mean and variance of each token's pixels (MAE); local: of a window around each pixel (SwinV2's SimMIM)
    normalize: Literal["none", "patch", "local"] = "none"
    window: int = 47  # pixels per side, of normalize: local
    channels_first: bool = False  # order inside a token: channel, row, column (SimMIM) or row, column, channel (MAE)

    def __post_init__(self) -> None:
        need(self.window > 0 and self.window % 2 == 1, "window", f"{self.window} is not an odd number above 0")

    def values(self, stride: int, in_chans: int) -> int:
        return in_chans * stride**2


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(TargetConfig):
    """The output of a frozen encoder for the whole image (MaskFeat's and MVP's comparisons of targets)."""

    name: str = "features"
    teacher: PathText = ""  # a checkpoint of any Method: ours, or converted; its encoder is asked
    teacher_encoder: EncoderConfig = field(default_factory=ViTConfig)  # what that file holds
    # of each token: layer, mean 0 and variance 1 over its channels; length, length 1
    normalize: Literal["layer", "length", "none"] = "layer"

    def values(self, stride: int, in_chans: int) -> int:
        return self.teacher_encoder.out_dim

    @property
    def teacher_network(self) -> Teacher:
        return Teacher(file=self.teacher, key="method.target.teacher", encoder=self.teacher_encoder)

    def check(self, encoder: EncoderConfig) -> None:
        check_same_images(encoder, self.teacher_encoder, "method.target.teacher_encoder")
        ours, theirs = encoder.stage_maps[-1], self.teacher_encoder.stage_maps[-1]
        need(
            ours == theirs,
            "method.target.teacher_encoder",
            f"{self.teacher_encoder.name} gives {show_size(theirs)} tokens, {encoder.name} {show_size(ours)}, and each "
            f"token has one target; write a teacher with tokens of {encoder.stride} pixels",
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What every decoder's configuration answers."""

    if TYPE_CHECKING:
        name: str

    def check(self, encoder: EncoderConfig) -> None:
        """That decoder and encoder go together."""

    @property
    def takes_mask_tokens(self) -> bool:
        """Whether mask tokens can join behind the encoder (MAE)."""
        return False

    def check_positions(self) -> None:
        """That the decoder can have positions of its own."""

    def flops(self, encoder: EncoderConfig, values: int, embedded: int = 0) -> int:
        """Multiply-adds of one image from the encoder's output to `values` numbers for each token.

        `embedded`: tokens that come from the encoder, where mask tokens join; 0: all.
        """
        raise NotImplementedError

    def kept_values(self, encoder: EncoderConfig) -> int:
        """Values of one image that the gradient needs, of the blocks alone."""
        return 0


@dataclass(frozen=True, kw_only=True)
class TransformerDecoderConfig(DecoderConfig):
    """Linear, pre-norm transformer blocks with width/32 heads, norm, linear (FastMIM)."""

    name: str = "transformer"
    width: int = 256
    depth: int = 1  # 0: norm and prediction act on the encoder's output, and width must equal the encoder's
    num_heads: int = 0  # of the blocks; 0: width / 32
    mlp_ratio: float = 4.0  # hidden width of the blocks' MLPs over their width
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "width", "mlp_ratio")
        need(self.depth >= 0, "depth", f"{self.depth} is negative; 0 leaves the blocks out")
        need(self.num_heads >= 0, "num_heads", f"{self.num_heads} is negative; 0 takes width / 32")
        need(
            not self.num_heads or self.width % self.num_heads == 0,
            "num_heads",
            f"{self.num_heads} does not divide width {self.width}",
        )
        need(
            self.depth == 0 or self.num_heads > 0 or (self.width >= 32 and self.width % (self.width // 32) == 0),
            "width",
            f"{self.width} is not shared out evenly by heads of at least 32; write {legal_near(self.width, 32)}",
        )

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return self.num_heads or self.width // HEAD_WIDTH

    @property
    def takes_mask_tokens(self) -> bool:
        return True

    def check_positions(self) -> None:
        need(self.depth > 0, "method.decoder.depth", "0 leaves nothing that mask tokens could go through; write 1")
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

    def blocks(self, encoder: EncoderConfig) -> BlockGroup:
        """The blocks, for their cost; prefix tokens take part."""
        length = encoder.output_length
        return BlockGroup(self.depth, length, length, length, self.width, self.heads, self.mlp_ratio)

    def flops(self, encoder: EncoderConfig, values: int, embedded: int = 0) -> int:
        inside = (embedded or encoder.output_length) * encoder.out_dim * self.width if self.depth else 0
        outside = NORM * self.width + self.width * values
        return inside + encoder.output_length * outside + self.blocks(encoder).flops()

    def kept_values(self, encoder: EncoderConfig) -> int:
        return self.blocks(encoder).kept_values()


@dataclass(frozen=True, kw_only=True)
class LinearDecoderConfig(DecoderConfig):
    """One linear layer on the patch tokens (SimMIM's 1x1 convolution before the pixel shuffle)."""

    name: str = "linear"

    def flops(self, encoder: EncoderConfig, values: int, embedded: int = 0) -> int:
        return encoder.num_tokens * encoder.out_dim * values


# --- methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every Method's configuration answers, so that nobody asks which Method it is."""

    if TYPE_CHECKING:
        name: str
    #: whose rules resize the encoder's position tables afterwards, as `weights.names` calls them; supervised networks
    #: follow timm's
    origin = "timm"
    #: of the encoder, the first so many blocks are trained; 0: all
    encoder_blocks = 0
    #: folder that keeps the teacher's answers; empty: it is asked anew
    cache = ""

    @property
    def mixes(self) -> bool:
        """Whether training mixes the images of a batch."""
        return False

    @property
    def classifier(self) -> ClassifyConfig | None:
        """Pooling and head of the network that is trained, whichever Method trains it; None for pre-training."""
        return None

    @property
    def teacher_network(self) -> Teacher | None:
        """The frozen network that training asks."""
        return None

    def without_cache(self) -> Self:
        """The same with a teacher that is asked anew."""
        return self

    def check(self, recipe: Recipe) -> None:
        """That the Method goes with the other parts of its recipe."""

    def flops(self, encoder: EncoderConfig) -> dict[str, int]:
        """Part of the network -> multiply-adds of one image; a teacher's are not among them."""
        raise NotImplementedError

    def kept_values(self, encoder: EncoderConfig) -> int:
        """Values of one image that the gradient needs."""
        return encoder.kept_values()

    def masked(self, encoder: EncoderConfig) -> dict[str, int] | None:
        """Mask blocks of an image, hidden ones, and output tokens that are hidden at least in part; None: no mask."""
        return None


def masked_count(blocks: int, ratio: float, rounding: str) -> int:
    """Hidden blocks of `blocks`, in double precision: at 100 blocks and 0.9 the two roundings give 91 and 90.

    Args:
        rounding: floor_visible hides all but int(blocks * (1 - ratio)) (FastMIM, MAE), ceil_masked hides
            ceil(blocks * ratio) (SimMIM).
    """
    return math.ceil(blocks * ratio) if rounding == "ceil_masked" else blocks - int(blocks * (1 - ratio))


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(MethodConfig):
    """Hide blocks of the image, predict a target there."""

    encoder_blocks: int = 0  # of the encoder, the first of them are trained; 0: all (FastMIM's finding ii)
    mask_ratio: float = 0.75
    mask_block: int = 16  # pixels per side of one masked block
    mask_rounding: Literal["floor_visible", "ceil_masked"] = "floor_visible"  # how many blocks that is: `masked_count`
    target: TargetConfig = field(default_factory=HOGConfig)
    decoder: DecoderConfig = field(default_factory=TransformerDecoderConfig)
    loss: Literal["l2", "l1"] = "l2"

    def __post_init__(self) -> None:
        check_positive(self, "mask_block")
        check_not_negative(self, "encoder_blocks")
        need(0 < self.mask_ratio < 1, "mask_ratio", f"{self.mask_ratio} is not between 0 and 1")

    @property
    def hides_tokens(self) -> bool:
        """Whether a mask block must be whole patches of the encoder."""
        return True

    @property
    def teacher_network(self) -> Teacher | None:
        return self.target.teacher_network

    def legal_blocks(self, encoder: EncoderConfig) -> list[int]:
        """Mask blocks that tile the image, tile or are tiled by a token, and hold whole units of the target."""
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
        """Mask blocks, tokens and units of the target tile each other."""
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
        """Hidden blocks of an image."""
        return masked_count(math.prod(self.mask_grid(image_size)), self.mask_ratio, self.mask_rounding)

    def masked(self, encoder: EncoderConfig) -> dict[str, int]:
        """Where several blocks make one token the number of tokens is the largest possible."""
        hidden, tokens = self.hidden_blocks(encoder.image_size), encoder.num_tokens
        blocks, per_side = math.prod(self.mask_grid(encoder.image_size)), self.mask_block // encoder.stride
        masked_tokens = hidden * per_side**2 if per_side else min(hidden, tokens)
        return {"blocks": blocks, "masked_blocks": hidden, "masked_tokens": masked_tokens}

    def flops(self, encoder: EncoderConfig) -> dict[str, int]:
        return {
            "encoder": encoder.flops(),
            "decoder": self.decoder.flops(encoder, self.target.values(encoder.stride, encoder.in_chans)),
        }

    def kept_values(self, encoder: EncoderConfig) -> int:
        return encoder.kept_values() + self.decoder.kept_values(encoder)


@dataclass(frozen=True, kw_only=True)
class MIMConfig(MaskedConfig):
    """Masked image modelling on all tokens: the mask token takes the place of what is hidden (SimMIM, FastMIM)."""

    name: str = "fastmim"
    corrupt: Literal["pixel", "token"] = "pixel"  # what the mask token replaces: pixels, or tokens of the embedding
    origin: Literal["fastmim", "simmim"] = "fastmim"  # whose rule resizes the encoder's position tables afterwards

    @property
    def hides_tokens(self) -> bool:
        return self.corrupt == "token"


@dataclass(frozen=True, kw_only=True)
class MAEConfig(MaskedConfig):
    """Masked autoencoder: the encoder sees the visible tokens alone, the decoder mask tokens besides (2111.06377)."""

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
            f"{self.name} runs the encoder on the visible tokens alone, which {encoder.name} cannot: windows and "
            "tables of relative positions need all; write fastmim or simmim, or another encoder, such as vit_base",
        )
        need(
            self.decoder.takes_mask_tokens,
            "method.decoder.name",
            f"{self.decoder.name} has no blocks for mask tokens; write transformer",
        )
        self.decoder.check_positions()

    def visible_tokens(self, encoder: EncoderConfig) -> int:
        """Patch tokens of an image that the encoder sees."""
        return encoder.num_tokens - self.masked(encoder)["masked_tokens"]

    def flops(self, encoder: EncoderConfig) -> dict[str, int]:
        visible, values = self.visible_tokens(encoder), self.target.values(encoder.stride, encoder.in_chans)
        return {
            "encoder": encoder.flops(visible=visible),
            "decoder": self.decoder.flops(encoder, values, embedded=visible + encoder.num_prefix_tokens),
        }

    def kept_values(self, encoder: EncoderConfig) -> int:
        return encoder.kept_values(self.visible_tokens(encoder)) + self.decoder.kept_values(encoder)


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(MethodConfig):
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
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def classifier(self) -> ClassifyConfig:
        if type(self) is ClassifyConfig:
            return self
        shared = [item.name for item in fields(ClassifyConfig) if item.name != "name"]
        return ClassifyConfig(**{name: getattr(self, name) for name in shared})

    def check(self, recipe: Recipe) -> None:
        """Images are mixed in pairs."""
        batch = recipe.train.batch_size
        need(
            not self.mixes or batch % 2 == 0,
            "train.batch_size",
            f"{batch} is odd, and method.mixup and cutmix pair the images; write {legal_near(batch, 2)}",
        )

    def flops(self, encoder: EncoderConfig) -> dict[str, int]:
        width, prefix = encoder.out_dim, encoder.num_prefix_tokens
        return {
            "encoder": encoder.flops(final_norm=not self.fc_norm),
            "pooling": (encoder.num_tokens if self.pool == "mean" else 0) * width + NORM * width * self.fc_norm,
            "head": width * self.num_classes * max(prefix, 1),
        }


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
    teacher: PathText = ""  # checkpoint of a classifier: ours, or converted (--teacher-path)
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
    # folder that keeps the teacher's answers to images without augmentation; empty: it is asked anew
    cache: PathText = ""

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
    def teacher_network(self) -> Teacher:
        """Where no file says it, the teacher has the pooling and the head of its own training."""
        pool: Literal["mean", "cls"] = "cls" if self.teacher_encoder.num_prefix_tokens else "mean"
        classifier = ClassifyConfig(num_classes=self.num_classes, pool=pool, fc_norm=False)
        return Teacher(file=self.teacher, key="method.teacher", encoder=self.teacher_encoder, classifier=classifier)

    def without_cache(self) -> Self:
        return replace(self, cache="")

    def check(self, recipe: Recipe) -> None:
        """Teacher and student see the same images, and the blocks of a pair have the same map."""
        super().check(recipe)
        student, teacher = recipe.encoder, self.teacher_encoder
        need(
            bool(self.student_layers) or not self.relates,
            "method.student_layers",
            "names no block; write for example student_layers: [0, 3] and teacher_layers: [0, 3], or beta: 0 for "
            "logits alone",
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
    """A teacher sees the images of its student; `teacher_key` is where the recipe says what it is."""
    for key in ("image_size", "in_chans"):
        ours, theirs = getattr(student, key), getattr(teacher, key)
        need(
            ours == theirs,
            f"{teacher_key}.{key}",
            f"{show_size(theirs)}, but the student has {show_size(ours)} and both see the same images; "
            f"write {list(ours) if isinstance(ours, tuple) else ours}",
        )


def check_cache(recipe: Recipe) -> None:
    """Kept answers need images that are the same in every epoch."""
    still: dict[str, Any] = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "auto_augment": ""}
    still |= dict.fromkeys(("hflip", "brightness", "contrast", "color_jitter", "erasing"), 0.0)
    moving = [f"data.{key}: {show_value(rest)}" for key, rest in still.items() if getattr(recipe.data, key) != rest]
    if recipe.stages:
        moving.append("no stages")
    if recipe.method.mixes:
        moving += ["method.mixup: 0", "method.cutmix: 0"]
    need(
        not moving,
        "method.cache",
        "keeps the teacher's answers to images that never change; write "
        + ", ".join(moving)
        + ", or leave method.cache out",
    )


def show_value(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else "''"


# --- relations of a distillation ---------------------------------------------------------------------------------


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
