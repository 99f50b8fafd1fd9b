"""What a run is: every dataclass of a recipe, its presets and the checks that join its fields.

A recipe is one YAML file with five parts: encoder, method, data, train and a few top-level keys. The classes here
are frozen and know nothing of MindSpore or of files; `src.recipe` reads and writes them. `python -m src.config FILE
[key=value ...]` prints the resolved recipe.

Where a field takes one of several classes (encoder, method, target, decoder) the YAML names a preset, and the other
keys change single fields of it: `encoder: {name: vit_base, image_size: 128}`. `encoder: vit_base` is short for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

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


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
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
    class_token: bool = True
    position: Literal["learned", "sincos"] = "sincos"  # sincos is fixed, its class-token row is zero
    norm_eps: float = 1e-6
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0 at the first

    def __post_init__(self) -> None:
        check_positive(self, "in_chans", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps")
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
        if self.position == "sincos":
            _need(
                self.embed_dim % 4 == 0,
                "embed_dim",
                f"{self.embed_dim} is not a multiple of 4, which position: sincos needs; "
                f"write {legal_near(self.embed_dim, 4)}",
            )
        check_rate(self, "drop_path")

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


EncoderConfig = ViTConfig

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


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    """The pixels of the normalised input image."""

    name: str = "pixels"
    normalize: Literal["none", "patch"] = "none"  # patch: mean and variance of each token's pixels (MAE)


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


# --- methods ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MIMConfig:
    """Masked image modelling: hide blocks of the image, predict a target there."""

    name: str = "fastmim"
    mask_ratio: float = 0.75
    mask_block: int = 16  # pixels per side of one masked block
    target: HOGConfig | PixelsConfig = field(default_factory=HOGConfig)
    decoder: TransformerDecoderConfig = field(default_factory=TransformerDecoderConfig)

    def __post_init__(self) -> None:
        check_positive(self, "mask_block")
        _need(0 < self.mask_ratio < 1, "mask_ratio", f"{self.mask_ratio} is not between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Supervised training of encoder, pooling and a linear head."""

    name: str = "classify"
    num_classes: int = 1000
    pool: Literal["mean", "cls"] = "mean"
    fc_norm: bool = True  # norm after pooling in place of the encoder's final norm (FastMIM, SimMIM and MAE ViT)
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "num_classes")
        check_rate(self, "label_smoothing")
        _need(
            self.pool == "mean" or not self.fc_norm,
            "fc_norm",
            "goes with pool: mean; the class token is taken after the encoder's own norm, write fc_norm: false",
        )


MethodConfig = MIMConfig | ClassifyConfig

# --- data and training ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Image folders: root/train/<class>/... and root/val/<class>/..., or images directly below train."""

    root: str = "data/imagenet"
    train: str = "train"
    val: str = "val"  # empty: no evaluation
    labels_per_class: int = 0  # use so many training images of each class; 0 is all
    mean: tuple[float, ...] = IMAGENET_MEAN  # of pixels scaled to 0..1, one number per channel
    std: tuple[float, ...] = IMAGENET_STD
    crop_scale: tuple[float, float] = (0.2, 1.0)  # area of the random resized crop, as a share of the image
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height of the crop
    hflip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    eval_crop: float = 0.875  # evaluation: resize the short side to image_size / eval_crop, cut the centre
    workers: int = 4  # threads of each input operation

    def __post_init__(self) -> None:
        check_positive(self, "workers", "eval_crop")
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, key)
            _need(0 < low <= high, key, f"[{low}, {high}] is not an increasing range above 0")
        _need(self.crop_scale[1] <= 1, "crop_scale", f"{self.crop_scale[1]} is above 1, the whole image")
        _need(self.eval_crop <= 1, "eval_crop", f"{self.eval_crop} is above 1, the whole image")
        _need(self.labels_per_class >= 0, "labels_per_class", "is negative; 0 takes all")
        for key in ("hflip", "brightness", "contrast"):
            check_rate(self, key, closed=True)
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
    schedule: Literal["cosine", "step"] = "cosine"  # after the warm-up
    min_lr: float = 0.0  # at the end of the cosine; not scaled with the batch
    decay_epochs: int = 30  # step: every so many epochs ...
    gamma: float = 0.1  # ... times this
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05  # not for biases and other 1-D parameters
    decay_tokens: bool = False  # decay position tables, class and mask tokens too (FastMIM's pre-training does)
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
        check_not_negative(self, "lr_batch", "min_lr", "warmup_epochs", "weight_decay", "clip_norm")
        check_not_negative(self, "eval_every", "gallery_every", "knn")
        for beta in self.betas:
            _need(0 <= beta < 1, "betas", f"{beta} is not in [0, 1)")
        _need(self.layer_decay <= 1, "layer_decay", f"{self.layer_decay} is above 1, which means no decay")
        _need(
            self.warmup_epochs < self.epochs,
            "warmup_epochs",
            f"{self.warmup_epochs:g} leaves nothing of {self.epochs} epochs; write less than {self.epochs}",
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run does."""

    encoder: EncoderConfig = field(default_factory=ViTConfig)
    method: MethodConfig = field(default_factory=MIMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
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
            check_mim(self.encoder, self.method)


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
    if method.decoder.depth == 0:
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
}
METHODS: dict[str, Any] = {"fastmim": MIMConfig(), "classify": ClassifyConfig()}
TARGETS: dict[str, Any] = {"hog": HOGConfig(), "pixels": PixelsConfig()}
DECODERS: dict[str, Any] = {"transformer": TransformerDecoderConfig()}

#: field name -> preset name -> the dataclass with its defaults
PRESETS = {"encoder": ENCODERS, "method": METHODS, "target": TARGETS, "decoder": DECODERS}


if __name__ == "__main__":
    from .recipe import main

    raise SystemExit(main())
