"""Encoders: their sizes, their cost, and the named presets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .checks import (
    MOST_VALUES,
    check_blocks,
    check_multiples,
    check_not_negative,
    check_positive,
    check_rate,
    check_sizes,
    legal_near,
    need,
)
from .cost import NORM, BlockGroup

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Interface of every encoder configuration, so that no other code depends on the kind of encoder."""

    if TYPE_CHECKING:  # fields of every encoder; each class sets its defaults
        name: str
        image_size: tuple[int, int]
        in_chans: int
        patch_size: int
        embed_dim: int
        norm_eps: float
        drop_path: float

    @property
    def stride(self) -> int:
        """Pixels per side of one output token."""
        raise NotImplementedError

    @property
    def out_dim(self) -> int:
        """Width of one output token."""
        raise NotImplementedError

    @property
    def stage_maps(self) -> list[tuple[int, int]]:
        """Rows and columns of patch tokens in each encoder stage."""
        raise NotImplementedError

    @property
    def stage_depths(self) -> tuple[int, ...]:
        """Blocks of each encoder stage, without class-attention blocks."""
        raise NotImplementedError

    @property
    def block_maps(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of patch tokens after each block, without class-attention blocks."""
        stages = zip(self.stage_maps, self.stage_depths, strict=True)
        return tuple(size for size, depth in stages for _ in range(depth))

    @property
    def block_dims(self) -> tuple[int, ...]:
        """Width of the tokens after each block; it doubles from one encoder stage to the next."""
        depths = enumerate(self.stage_depths)
        return tuple(self.embed_dim << stage for stage, depth in depths for _ in range(depth))

    @property
    def num_prefix_tokens(self) -> int:
        """Prefix tokens, which precede the patch tokens of the output: class and distillation token."""
        return 0

    @property
    def drops_tokens(self) -> bool:
        """Whether the blocks can run on a subset of the patch tokens (MAE)."""
        return False

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Output tokens of one image, without the prefix tokens."""
        rows, cols = self.stage_maps[-1]
        return rows * cols

    @property
    def output_length(self) -> int:
        """Output tokens of one image, with prefix tokens."""
        return self.num_tokens + self.num_prefix_tokens

    def first_blocks(self, blocks: int) -> Self:
        """Return this encoder with its first blocks only; they keep their drop-path rates. 0 keeps all blocks."""
        total = sum(self.stage_depths)
        need(blocks <= total, "method.encoder_blocks", f"{blocks}, but {self.name} has {total}; write {total} or less")
        return self._cut(blocks) if 0 < blocks < total else self

    def _cut(self, blocks: int) -> Self:
        raise NotImplementedError

    def at_size(self, image_size: tuple[int, int], window_size: int = 0) -> Self:
        """Return this encoder for another image size and window size (tokens per side); 0 keeps the window size."""
        need(not window_size, "window_size", f"{self.name} has no windows; leave window_size out")
        return replace(self, image_size=image_size)

    def block_groups(self, visible: int = 0) -> list[BlockGroup]:
        """Return the blocks for cost estimates; `visible`: patch tokens that go through them, 0 for all."""
        raise NotImplementedError

    def flops(self, final_norm: bool = True, visible: int = 0) -> int:
        """Return the multiply-adds from image to tokens; `visible` as in `block_groups`."""
        pixels = self.image_size[0] * self.image_size[1] * self.in_chans
        length = (visible or self.num_tokens) + self.num_prefix_tokens
        total = pixels * self.embed_dim + sum(group.flops() for group in self.block_groups(visible))
        return total + NORM * length * self.out_dim * final_norm

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights that decide how large the network is: of embedding, tables, and each block.

        A file can be compared with them before a network is built.
        """
        yield "patch_embed.proj.weight", (self.embed_dim, self.in_chans, self.patch_size, self.patch_size)

    def saved_values(self, visible: int = 0) -> int:
        """Return how many values of one image the backward pass needs: the image and the activations of all blocks.

        Embedding, merging and class-attention blocks are small and not counted.
        """
        pixels = self.in_chans * self.image_size[0] * self.image_size[1]
        return pixels + sum(group.saved_values() for group in self.block_groups(visible))

    @classmethod
    def tiny(cls) -> Self:
        """Return a small encoder for tests: 32 pixels, 4 x 4 output tokens of 8 pixels."""
        raise NotImplementedError

    def check_image(self) -> None:
        """Check that the image divides into whole patches, not more than memory holds."""
        check_multiples("image_size", self.image_size, self.patch_size, f"patch_size {self.patch_size}")
        need(self.in_chans <= MOST_VALUES, "in_chans", f"{self.in_chans} is too large; write at most {MOST_VALUES}")
        rows, cols = self.patch_grid
        need(
            rows * cols <= self._most_patches,
            "image_size",
            f"{self.image_size[0]}x{self.image_size[1]} has {rows * cols} patches of {self.patch_size} pixels, more "
            f"than the {self._most_patches} that {self.name} can have; write a smaller image or a larger patch_size",
        )

    #: patches of an image for which the constants of a network still fit in memory
    _most_patches = 2**16


@dataclass(frozen=True, kw_only=True)
class OneScale(EncoderConfig):
    """Encoders with one token per patch from the first block to the last."""

    if TYPE_CHECKING:
        depth: int
        num_heads: int

    def check_parts(self) -> None:
        """Check that the image divides into whole patches and the width into heads."""
        check_sizes(self)
        check_blocks(self.depth, "depth")
        self.check_image()
        need(
            self.embed_dim % self.num_heads == 0,
            "num_heads",
            f"{self.num_heads} does not divide embed_dim {self.embed_dim}",
        )

    @property
    def stride(self) -> int:
        return self.patch_size

    @property
    def out_dim(self) -> int:
        return self.embed_dim

    @property
    def stage_maps(self) -> list[tuple[int, int]]:
        return [self.patch_grid]

    @property
    def stage_depths(self) -> tuple[int, ...]:
        return (self.depth,)


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
    distilled: bool = False  # a distillation token after the class token, with a second head (DeiT)
    position: Literal["learned", "sincos", "none"] = "sincos"  # sincos is fixed, zero for the class token
    relative_position: Literal["none", "shared", "block"] = "none"  # bias table: one for all blocks, or one per block
    layer_scale: float = 0.0  # initial value of the layer scale of both branches; 0: no layer scale
    norm_eps: float = 1e-6
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0 at the first
    # initial weights. xavier: MAE, FastMIM; trunc_normal: standard deviation 0.02 (timm); scaled: trunc_normal, with
    # both output projections of block i divided by sqrt(2 * (i + 1)) (BEiT, SimMIM)
    init: Literal["xavier", "trunc_normal", "scaled"] = "xavier"

    def __post_init__(self) -> None:
        check_positive(self, "in_chans", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps")
        self.check_parts()
        if self.position == "sincos":
            need(
                self.embed_dim % 4 == 0,
                "embed_dim",
                f"{self.embed_dim} is not a multiple of 4, which position: sincos needs; "
                f"write {legal_near(self.embed_dim, 4)}",
            )
        if self.distilled:
            need(
                self.class_token and self.position != "sincos" and self.relative_position == "none",
                "distilled",
                "needs class_token: true, position: learned and relative_position: none",
            )
        check_rate(self, "drop_path")
        check_not_negative(self, "layer_scale")

    @property
    def num_prefix_tokens(self) -> int:
        return self.class_token + self.distilled

    @property
    def drops_tokens(self) -> bool:
        return self.relative_position == "none"

    def _cut(self, blocks: int) -> Self:
        return replace(self, depth=blocks, drop_path=self.drop_path * (blocks - 1) / (self.depth - 1))

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from super().weight_shapes()
        rows, cols = self.patch_grid
        if self.position != "none":
            yield "pos_embed", (1, self.output_length, self.embed_dim)
        table = (2 * rows - 1) * (2 * cols - 1) + 3, self.num_heads
        if self.relative_position == "shared":
            yield "rel_pos_bias.relative_position_bias_table", table
        for number in range(self.depth):
            yield f"blocks.{number}.mlp.fc1.weight", (int(self.embed_dim * self.mlp_ratio), self.embed_dim)
            if self.relative_position == "block":
                yield f"blocks.{number}.attn.relative_position_bias_table", table

    def block_groups(self, visible: int = 0) -> list[BlockGroup]:
        length = (visible or self.num_tokens) + self.num_prefix_tokens
        return [BlockGroup(self.depth, length, length, length, self.embed_dim, self.num_heads, self.mlp_ratio)]

    @classmethod
    def tiny(cls) -> Self:
        return cls(image_size=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2, drop_path=0.2)


@dataclass(frozen=True, kw_only=True)
class CaiTConfig(OneScale):
    """CaiT; field names follow timm (models/cait.py)."""

    name: str = "cait"
    image_size: tuple[int, int] = (224, 224)  # height, width in pixels; one number means a square
    in_chans: int = 3
    patch_size: int = 16
    embed_dim: int = 384
    depth: int = 24  # blocks with talking heads, on the patch tokens alone
    depth_token_only: int = 2  # class-attention blocks after them
    num_heads: int = 8
    mlp_ratio: float = 4.0
    mlp_ratio_token_only: float = 4.0
    qkv_bias: bool = True
    layer_scale: float = 1e-5  # initial value of the layer scale of both branches (timm's init_values)
    norm_eps: float = 1e-6
    drop_path: float = 0.0  # rate of every patch block; class-attention blocks have none

    def __post_init__(self) -> None:
        check_positive(self, "in_chans", "patch_size", "embed_dim", "depth", "depth_token_only", "num_heads")
        check_positive(self, "mlp_ratio", "mlp_ratio_token_only", "layer_scale", "norm_eps")
        check_blocks(self.depth_token_only, "depth_token_only")
        self.check_parts()
        check_rate(self, "drop_path")

    @property
    def num_prefix_tokens(self) -> int:
        """The class token, which is added after the patch blocks."""
        return 1

    @property
    def drops_tokens(self) -> bool:
        return True

    def _cut(self, blocks: int) -> Self:
        return replace(self, depth=blocks)  # every block has the same drop-path rate

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from super().weight_shapes()
        yield "pos_embed", (1, self.num_tokens, self.embed_dim)
        for number in range(self.depth):
            yield f"blocks.{number}.mlp.fc1.weight", (int(self.embed_dim * self.mlp_ratio), self.embed_dim)
            yield f"blocks.{number}.attn.proj_l.weight", (self.num_heads, self.num_heads)
        hidden = int(self.embed_dim * self.mlp_ratio_token_only)
        for number in range(self.depth_token_only):
            yield f"blocks_token_only.{number}.mlp.fc1.weight", (hidden, self.embed_dim)

    def block_groups(self, visible: int = 0) -> list[BlockGroup]:
        tokens, sizes = visible or self.num_tokens, (self.embed_dim, self.num_heads, self.mlp_ratio)
        return [BlockGroup(self.depth, tokens, tokens, tokens, *sizes, talking=True)]

    def flops(self, final_norm: bool = True, visible: int = 0) -> int:
        """Add the class-attention blocks, where only the class token attends, to itself and the patch tokens."""
        length, dim = (visible or self.num_tokens) + 1, self.embed_dim
        attention = 2 * length * dim**2 + 2 * dim**2 + 2 * length * dim  # k and v; q and projection; scores and mixing
        mlp = 2 * dim * int(dim * self.mlp_ratio_token_only)
        per_block = attention + mlp + NORM * (length + 1) * dim
        return super().flops(final_norm, visible) + self.depth_token_only * per_block

    @classmethod
    def tiny(cls) -> Self:
        sizes: dict[str, Any] = {"image_size": (32, 32), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        return cls(**sizes, depth_token_only=1, layer_scale=0.5, drop_path=0.2)


def window_side(size: tuple[int, int], window: int, cap: bool = True) -> int:
    """Return the tokens per side of the windows on a map; a smaller map caps them (swin_transformer.py)."""
    return min(size) if cap and min(size) <= window else window


@dataclass(frozen=True, kw_only=True)
class SwinConfig(EncoderConfig):
    """Swin Transformer; field names follow the original code."""

    name: str = "swin"
    image_size: tuple[int, int] = (224, 224)  # height, width in pixels; one number means a square
    in_chans: int = 3
    patch_size: int = 4
    embed_dim: int = 96  # of the first encoder stage; doubles from one to the next
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7  # tokens per side; a smaller map caps it, a map that is not a multiple is padded
    cap_window: bool = True  # false: small maps are padded to a whole window too (mmpretrain's pad_small_map)
    roll_first: bool = False  # true: roll the map, then pad it (timm since 0.9); false: pad first (all others)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    patch_norm: bool = True  # norm after the patch embedding
    absolute_position: bool = False  # a learned table added to the patch embedding (ape)
    norm_eps: float = 1e-5
    merge_norm_eps: float = 0.0  # of patch embedding and merging; 0: norm_eps (Hugging Face always uses 1e-5)
    drop_path: float = 0.0  # rate of the last block; grows linearly from 0 at the first
    init: Literal["xavier", "trunc_normal"] = "trunc_normal"  # xavier: FastMIM; trunc_normal: deviation 0.02 (Swin)

    def __post_init__(self) -> None:
        check_positive(self, "in_chans", "patch_size", "embed_dim", "window_size", "mlp_ratio", "norm_eps")
        check_sizes(self)
        need(
            0 < len(self.depths) <= self._most_stages,
            "depths",
            f"has {len(self.depths)} encoder stages; write 1 to {self._most_stages}",
        )
        check_blocks(sum(self.depths), "depths")
        need(
            len(self.depths) == len(self.num_heads),
            "num_heads",
            f"has {len(self.num_heads)} values, depths has {len(self.depths)}; write one per encoder stage",
        )
        for stage, heads in enumerate(self.num_heads):
            need(self.depths[stage] > 0, "depths", f"encoder stage {stage} has {self.depths[stage]} blocks")
            need(
                heads > 0 and self.embed_dim * 2**stage % heads == 0,
                "num_heads",
                f"{heads} does not divide {self.embed_dim * 2**stage}, the width of encoder stage {stage}",
            )
        self.check_image()
        self.check_windows()
        check_not_negative(self, "merge_norm_eps")
        check_rate(self, "drop_path")

    _most_stages = 10
    _most_patches = 2**18
    _largest_window = 128  # tokens per side
    _largest_mask = 2**27  # numbers: patches x tokens of a window

    def check_windows(self) -> None:
        """Check that the constants of windows fit in memory."""
        window = window_side(self.patch_grid, self.window_size, self.cap_window)
        rows, cols = (-(-side // window) * window for side in self.patch_grid)
        most = min(self._largest_window, math.isqrt(self._largest_mask // (rows * cols)))
        need(
            window <= most,
            "window_size",
            f"{window} is too large for {rows}x{cols} patches; write at most {most}",
        )

    @property
    def stride(self) -> int:
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def out_dim(self) -> int:
        return self.embed_dim * 2 ** (len(self.depths) - 1)

    @property
    def between_eps(self) -> float:
        """Epsilon of the norms of patch embedding and merging."""
        return self.merge_norm_eps or self.norm_eps

    @property
    def stage_maps(self) -> list[tuple[int, int]]:
        """Rows and columns of tokens in each encoder stage; merging pads an odd side."""
        rows, cols = self.patch_grid
        return [(-(-rows // 2**stage), -(-cols // 2**stage)) for stage in range(len(self.depths))]

    @property
    def stage_depths(self) -> tuple[int, ...]:
        return self.depths

    def _cut(self, blocks: int) -> Self:
        remaining = itertools.accumulate(self.depths, lambda rest, depth: rest - depth, initial=blocks)
        depths = tuple(min(depth, rest) for depth, rest in zip(self.depths, remaining, strict=False) if rest > 0)
        rate = self.drop_path * (blocks - 1) / (sum(self.depths) - 1)
        return replace(self, depths=depths, num_heads=self.num_heads[: len(depths)], drop_path=rate)

    def at_size(self, image_size: tuple[int, int], window_size: int = 0) -> Self:
        return replace(self, image_size=image_size, window_size=window_size or self.window_size)

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from super().weight_shapes()
        if self.absolute_position:
            yield "absolute_pos_embed", (1, math.prod(self.patch_grid), self.embed_dim)
        for stage, depth in enumerate(self.depths):
            dim, heads = self.embed_dim << stage, self.num_heads[stage]
            window = window_side(self.stage_maps[stage], self.window_size, self.cap_window)
            for number in range(depth):
                block = f"layers.{stage}.blocks.{number}"
                yield f"{block}.mlp.fc1.weight", (int(dim * self.mlp_ratio), dim)
                yield f"{block}.attn.{self._heads_in}", self._heads_shape(window, heads)

    _heads_in = "relative_position_bias_table"

    @staticmethod
    def _heads_shape(window: int, heads: int) -> tuple[int, ...]:
        return (2 * window - 1) ** 2, heads

    def block_groups(self, visible: int = 0) -> list[BlockGroup]:
        groups = []
        for stage, (rows, cols) in enumerate(self.stage_maps):
            window = window_side((rows, cols), self.window_size, self.cap_window)
            padded = -(-rows // window) * -(-cols // window) * window**2
            sizes = self.embed_dim << stage, self.num_heads[stage], self.mlp_ratio
            groups.append(BlockGroup(self.depths[stage], rows * cols, padded, window**2, *sizes))
        return groups

    #: width of the norm in a merging, as a multiple of the input width
    _merging_norm = 4

    def flops(self, final_norm: bool = True, visible: int = 0) -> int:
        """Add the norm of the patch embedding and the mergings: a norm, and a linear layer from 4 C to 2 C."""
        groups = self.block_groups()
        total = super().flops(final_norm) + NORM * groups[0].tokens * self.embed_dim * self.patch_norm
        for group, following in itertools.pairwise(groups):
            total += following.tokens * (8 * group.dim**2 + NORM * group.dim * self._merging_norm)
        return total

    @classmethod
    def tiny(cls) -> Self:
        sizes: dict[str, Any] = {"image_size": (32, 32), "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
        return cls(**sizes, window_size=4, drop_path=0.2)


@dataclass(frozen=True, kw_only=True)
class SwinV2Config(SwinConfig):
    """Swin Transformer V2: norms after the branches, cosine attention, log-spaced continuous position bias."""

    name: str = "swinv2"
    image_size: tuple[int, int] = (256, 256)
    window_size: int = 8
    # per encoder stage: the window size of pre-training, which scales the coordinates; 0: window_size
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)
    main_norm_every: int = 0  # blocks of an encoder stage between norms on the main branch; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "main_norm_every")
        need(
            len(self.pretrained_window_sizes) >= len(self.depths),
            "pretrained_window_sizes",
            f"has {len(self.pretrained_window_sizes)} values for {len(self.depths)} encoder stages; write one for each",
        )

    _merging_norm = 2  # the norm follows the linear layer
    _heads_in = "logit_scale"

    @staticmethod
    def _heads_shape(window: int, heads: int) -> tuple[int, ...]:
        return heads, 1, 1

    def flops(self, final_norm: bool = True, visible: int = 0) -> int:
        """Add the norms on the main branch."""
        total = super().flops(final_norm)
        if self.main_norm_every:
            for group in self.block_groups():
                total += group.depth // self.main_norm_every * NORM * group.tokens * group.dim
        return total


ENCODERS: dict[str, Any] = {
    "vit": ViTConfig(),
    "vit_demo": ViTConfig(image_size=(64, 64), patch_size=8, embed_dim=96, depth=4, num_heads=3),
    "vit_tiny": ViTConfig(embed_dim=192, num_heads=3),
    "vit_small": ViTConfig(embed_dim=384, num_heads=6),
    "vit_base": ViTConfig(),
    "vit_large": ViTConfig(embed_dim=1024, depth=24, num_heads=16),
    # SimMIM's ViT-B for pre-training; fine-tuning uses relative_position: block
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
    # 655 M and 1.06 B parameters, as published; code and number of heads are not published. Heads have 32 channels as
    # in all other sizes (mmpretrain guesses 8 to 64 for huge). The norms on the main branch follow the paper
    # (2111.09883).
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
