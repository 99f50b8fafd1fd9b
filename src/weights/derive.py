"""Derive the network of a set of weights from their names and shapes; the user gives what these leave open."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import numpy as np

from ..config import (
    ENCODERS,
    METHODS,
    CaiTConfig,
    ClassifyConfig,
    EncoderConfig,
    HOGConfig,
    LinearDecoderConfig,
    MAEConfig,
    MaskedConfig,
    MIMConfig,
    PixelsConfig,
    SwinConfig,
    SwinV2Config,
    TransformerDecoderConfig,
    ViTConfig,
)
from ..config.checks import LARGEST_SIZE, shown
from ..models.swin import WindowLayout
from . import WeightsError

AnyMasked = TypeVar("AnyMasked", bound=MaskedConfig)
Shapes = Mapping[str, tuple[int, ...]]
Buffers = Mapping[str, np.ndarray]
#: network name in the arguments of a training script -> width, blocks, heads. FastMIM's ViT-B has 6 heads in
#: pre-training and 12 in fine-tuning (mim_vit_pretrain.py, models_vit.py)
FACTORIES = {
    "mim_vit_base": (768, 12, 6),
    **dict.fromkeys(("vit_base_patch16", "mae_vit_base_patch16", "deit_base_patch16_224"), (768, 12, 12)),
    **dict.fromkeys(("vit_large_patch16", "mae_vit_large_patch16"), (1024, 24, 16)),
    **dict.fromkeys(("vit_huge_patch14", "mae_vit_huge_patch14"), (1280, 32, 16)),
    **dict.fromkeys(("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"), (192, 12, 3)),
    **dict.fromkeys(("deit_small_patch16_224", "deit_small_distilled_patch16_224"), (384, 12, 6)),
    "deit_base_distilled_patch16_224": (768, 12, 12),
}


@dataclass(frozen=True)
class Hints:
    """What is known besides names and shapes; None means unknown.

    Sources: the command line, then a configuration in the file or next to it.
    """

    num_heads: int | None = None  # of a ViT, whose shapes do not give it
    image_size: tuple[int, int] | None = None  # pixels
    norm_eps: float | None = None
    layer_scale: float | None = None
    window_size: int | None = None
    pretrained_window_sizes: tuple[int, ...] | None = None
    roll_first: bool | None = None  # as in SwinConfig
    mask_ratio: float | None = None
    mask_block: int | None = None
    target: str = ""  # hog or l2, FastMIM's names
    decoder_heads: int | None = None  # of MAE's decoder
    normalize: bool | None = None  # whether the target is normalised
    mean: tuple[float, ...] | None = None  # of the image channels
    std: tuple[float, ...] | None = None
    eval_crop: float | None = None  # share of the short side that evaluation crops
    pool: str = ""  # of a classifier, timm's names: avg, token
    factory: str = ""  # name of the network in a training script
    preset: str = ""  # --encoder

    def over(self, other: Hints) -> Hints:
        """These hints, completed by those of `other`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(other, **{name: value for name, value in values.items() if value not in (None, "")})


class HintError(WeightsError):
    """A value of a configuration that is not what its key says."""


def value_of(config: Any, key: str, kinds: tuple[type, ...], meaning: str) -> Any:
    """The value of a key of a configuration; None if it has none."""
    value = config.get(key) if isinstance(config, Mapping) else None
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
        return value
    text = shown(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"
    raise HintError(f"{key} is {text}, not {meaning}")


def mapping(config: Any, key: str) -> Mapping[str, Any]:
    return value_of(config, key, (dict,), "a mapping") or {}


def whole(config: Any, key: str) -> int | None:
    number: int | None = value_of(config, key, (int,), "a whole number")
    if number is not None and not 0 <= number <= LARGEST_SIZE:
        raise HintError(f"{key} is {number}, not a size of a network")
    return number


def number(config: Any, key: str) -> float | None:
    value = value_of(config, key, (int, float), "a number")
    if value is not None and not abs(value) < 1e30:  # nor NaN
        raise HintError(f"{key} is {shown(value)}, not a number of a network")
    return value


def numbers(config: Any, key: str) -> tuple[float, ...] | None:
    values = values_of(config, key, "a list of numbers")
    return None if values is None else tuple(number({key: value}, key) or 0.0 for value in values)


def wholes(config: Any, key: str) -> tuple[int, ...] | None:
    values = values_of(config, key, "a list of whole numbers")
    return None if values is None else tuple(whole({key: value}, key) or 0 for value in values)


def values_of(config: Any, key: str, kind: str) -> Sequence[Any] | None:
    values: Sequence[Any] | None = value_of(config, key, (list, tuple), kind)
    if values is not None and len(values) > 1000:
        raise HintError(f"{key} has {len(values)} numbers")
    return values


def flag(config: Any, key: str) -> bool | None:
    value = config.get(key) if isinstance(config, Mapping) else None
    return bool(value) if isinstance(value, int) else None


def word(config: Any, key: str) -> str:
    value = config.get(key) if isinstance(config, Mapping) else None
    return value if isinstance(value, str) else ""


def side_or_pair(config: Any, key: str) -> tuple[int, int] | None:
    """Height and width from one number or two; None if there are none."""
    if isinstance(config, Mapping) and isinstance(config.get(key), list | tuple):
        sizes = wholes(config, key) or ()
        if len(sizes) == 2 and all(sizes):
            return pair(sizes)
        raise HintError(f"{key} is not one size or two")
    side = whole(config, key)
    return pair(side) if side else None


def pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def hints_of_json(config: Mapping[str, Any]) -> Hints:
    """Hints from the config.json of Hugging Face or timm."""
    if "pretrained_cfg" in config:
        images = mapping(config, "pretrained_cfg")
        size, mean, std = wholes(images, "input_size"), numbers(images, "mean"), numbers(images, "std")
        normalised = bool(mean and std)
        return Hints(
            image_size=side_or_pair({"input_size": size[1:]}, "input_size") if size else None,
            mean=mean if normalised else None,
            std=std if normalised else None,
            eval_crop=number(images, "crop_pct"),
            pool=word(config, "global_pool"),
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise WeightsError(f"hidden_act is {str(config['hidden_act'])[:99]}; only gelu is supported")
    heads = config.get("num_attention_heads")
    return Hints(
        num_heads=whole(config, "num_attention_heads") if isinstance(heads, int) else None,
        image_size=side_or_pair(config, "image_size"),
        norm_eps=number(config, "layer_norm_eps"),
        window_size=whole(config, "window_size"),
        pretrained_window_sizes=wholes(config, "pretrained_window_sizes") or None,
        mask_ratio=number(config, "mask_ratio"),
        decoder_heads=whole(config, "decoder_num_attention_heads"),
        normalize=flag(config, "norm_pix_loss"),
    )


def hints_of_tree(config: Mapping[str, Any]) -> Hints:
    """Hints from the configuration tree that SimMIM and Swin-Transformer store in a checkpoint (config.py)."""
    data, model = mapping(config, "DATA"), mapping(config, "MODEL")
    network = mapping(model, word(model, "TYPE").upper())
    target = mapping(mapping(model, "SIMMIM"), "NORM_TARGET")
    return Hints(
        num_heads=whole(network, "NUM_HEADS") if isinstance(network.get("NUM_HEADS"), int) else None,
        image_size=side_or_pair(data, "IMG_SIZE"),
        layer_scale=number(network, "INIT_VALUES"),
        window_size=whole(network, "WINDOW_SIZE"),
        pretrained_window_sizes=wholes(network, "PRETRAINED_WINDOW_SIZES") or None,
        mask_ratio=number(data, "MASK_RATIO"),
        mask_block=whole(data, "MASK_PATCH_SIZE"),
        normalize=flag(target, "ENABLE"),
    )


def hints_of_arguments(arguments: Mapping[str, Any]) -> Hints:
    """Hints from the command-line arguments that FastMIM, MAE and DeiT store in a checkpoint."""
    size = arguments.get("input_size")
    return Hints(
        image_size=side_or_pair(arguments, "input_size") if isinstance(size, int) else None,
        mask_ratio=number(arguments, "mask_ratio"),
        mask_block=whole(arguments, "block_size"),
        target=word(arguments, "mim_loss").lower(),
        normalize=flag(arguments, "norm_pix_loss"),
        factory=word(arguments, "model"),
    )


# --- encoders ---------------------------------------------------------------------------------------------------


def derive_encoder(shapes: Shapes, buffers: Buffers, hints: Hints) -> EncoderConfig:
    """The configuration of the encoder.

    Args:
        shapes: shapes of all parameters, by our names.
        buffers: shift masks and coordinate tables by the file's names; image and window sizes follow from them.
        hints: what else is known.

    Raises:
        WeightsError: shapes and hints leave something open; the message names the flag to write.
    """
    if "encoder.patch_embed.proj.weight" not in shapes:
        raise WeightsError("has no patch embedding, so it holds no encoder")
    if any(name.startswith("encoder.layers.") for name in shapes):
        encoder: EncoderConfig = derive_swin(shapes, buffers, hints)
    elif any(name.startswith("encoder.blocks_token_only.") for name in shapes):
        encoder = derive_cait(shapes, hints)
    else:
        encoder = derive_vit(shapes, hints)
    if hints.preset:
        check_preset(encoder, hints.preset)
    return encoder


def check_preset(encoder: EncoderConfig, name: str) -> None:
    preset = ENCODERS[name]
    for key in ("patch_size", "embed_dim", "depth", "depths", "num_heads"):
        wanted, actual = getattr(preset, key, None), getattr(encoder, key, None)
        if wanted != actual:
            raise WeightsError(f"is not {name}: {key} is {actual}; --encoder {name} has {wanted}")


def count(shapes: Shapes, template: str) -> int:
    """Number of values that `#` takes in the names that fit a template."""
    expression = re.compile(re.escape(template).replace(r"\#", r"(\d{1,9})"))
    total = 1 + max((int(m.group(1)) for name in shapes if (m := expression.match(name))), default=-1)
    if total > len(shapes):
        raise WeightsError(f"numbers {template} up to {total - 1}, but has {len(shapes)} tensors")
    return total


def ratio(*shapes: tuple[int, ...]) -> float:
    """MLP ratio such that int(input width * ratio) is the width of each MLP."""
    least = max(hidden / dim for hidden, dim in shapes)
    if all(int(dim * least) == hidden for hidden, dim in shapes):
        return least
    return (least + min((hidden + 1) / dim for hidden, dim in shapes)) / 2


def derive_vit(shapes: Shapes, hints: Hints) -> ViTConfig:
    dim, chans, patch, _ = shapes["encoder.patch_embed.proj.weight"]
    depth = count(shapes, "encoder.blocks.#.")
    prefix_tokens = int("encoder.cls_token" in shapes) + int("encoder.dist_token" in shapes)
    attention = "encoder.blocks.0.attn"
    shared_table = "encoder.rel_pos_bias.relative_position_bias_table"
    block_table = f"{attention}.relative_position_bias_table"
    table = shapes.get(shared_table) or shapes.get(block_table)
    positions = shapes.get("encoder.pos_embed")
    grid = patch_grid(table, positions, prefix_tokens, patch, hints)
    relative: Literal["none", "shared", "block"] = (
        "shared" if shared_table in shapes else "block" if block_table in shapes else "none"
    )
    return ViTConfig(
        image_size=(grid[0] * patch, grid[1] * patch),
        in_chans=chans,
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=table[1] if table else vit_heads(dim, depth, hints),
        mlp_ratio=ratio(shapes["encoder.blocks.0.mlp.fc1.weight"]),
        class_token=prefix_tokens > 0,
        distilled=prefix_tokens > 1,
        position="learned" if positions else "none",
        relative_position=relative,
        layer_scale=(hints.layer_scale or 0.1) if "encoder.blocks.0.gamma_1" in shapes else 0.0,
        norm_eps=hints.norm_eps or 1e-6,
        init="scaled" if table else "xavier",
        qkv_bias=bool({f"{attention}.q_bias", f"{attention}.qkv.bias"} & set(shapes)),
        k_bias=f"{attention}.q_bias" not in shapes,
    )


def derive_cait(shapes: Shapes, hints: Hints) -> CaiTConfig:
    dim, chans, patch, _ = shapes["encoder.patch_embed.proj.weight"]
    grid = patch_grid(None, shapes["encoder.pos_embed"], 0, patch, hints)
    return CaiTConfig(
        image_size=(grid[0] * patch, grid[1] * patch),
        in_chans=chans,
        patch_size=patch,
        embed_dim=dim,
        depth=count(shapes, "encoder.blocks.#."),
        depth_token_only=count(shapes, "encoder.blocks_token_only.#."),
        num_heads=shapes["encoder.blocks.0.attn.proj_l.weight"][0],
        mlp_ratio=ratio(shapes["encoder.blocks.0.mlp.fc1.weight"]),
        mlp_ratio_token_only=ratio(shapes["encoder.blocks_token_only.0.mlp.fc1.weight"]),
        qkv_bias="encoder.blocks.0.attn.qkv.bias" in shapes,
        layer_scale=hints.layer_scale or CaiTConfig.layer_scale,
        norm_eps=hints.norm_eps or CaiTConfig.norm_eps,
    )


def vit_heads(dim: int, depth: int, hints: Hints) -> int:
    """Attention heads of a ViT; they do not follow from shapes."""
    if hints.num_heads:
        return hints.num_heads
    if hints.preset:
        preset = ENCODERS[hints.preset]
        if preset.embed_dim != dim:
            raise WeightsError(f"is not {hints.preset}: embed_dim is {dim}; --encoder has {preset.embed_dim}")
        return preset.block_groups()[0].heads
    width, blocks, heads = FACTORIES.get(hints.factory, (0, 0, 0))
    if (width, blocks) == (dim, depth):
        return heads
    raise WeightsError(
        f"the shapes do not give the attention heads of this ViT (width {dim}, {depth} blocks); write --num-heads N or "
        "--encoder PRESET (vit_base has 12 heads; FastMIM's ViT-B pre-trains with 6 and fine-tunes with 12)"
    )


def patch_grid(
    table: tuple[int, ...] | None, positions: tuple[int, ...] | None, prefix_tokens: int, patch: int, hints: Hints
) -> tuple[int, int]:
    """Patches along height and width: those of the hinted image size if the tables fit it, else a square.

    Args:
        table: shape of the relative position table, if there is one.
        positions: shape of the position table, if there is one.
        prefix_tokens: number of prefix tokens in the position table.
        patch: pixels per side of a patch.
        hints: what else is known.
    """
    if hints.image_size:
        height, width = (side // patch for side in hints.image_size)
        tokens, offsets = height * width + prefix_tokens, (2 * height - 1) * (2 * width - 1) + 3
        if (positions is None or positions[1] == tokens) and (table is None or table[0] == offsets):
            return height, width
    if positions is not None:
        patches = positions[1] - prefix_tokens
        side = math.isqrt(patches)
        if side**2 == patches:
            return side, side
        if hints.image_size:
            raise WeightsError(
                f"has {patches} positions, the image size needs {height} x {width}; register tokens and position "
                "tables without the class token are not supported"
            )
        raise WeightsError(f"has {patches} positions, which make no square; write --image-size HEIGHTxWIDTH")
    if table is not None:
        side = (math.isqrt(table[0] - 3) + 1) // 2
        if (2 * side - 1) ** 2 + 3 == table[0]:
            return side, side
    raise WeightsError("the shapes do not give the image size; write --image-size PIXELS")


def derive_swin(shapes: Shapes, buffers: Buffers, hints: Hints) -> SwinConfig:
    dim, chans, patch, _ = shapes["encoder.patch_embed.proj.weight"]
    stages = range(count(shapes, "encoder.layers.#."))
    attentions = [f"encoder.layers.{stage}.blocks.0.attn" for stage in stages]
    is_v2 = f"{attentions[0]}.logit_scale" in shapes
    if is_v2:
        heads = [shapes[f"{name}.logit_scale"][0] for name in attentions]
        coordinates = [coordinates_windows(buffers, stage) for stage in stages]
        windows = [window for window, _ in coordinates]
    else:
        tables = [shapes[f"{name}.relative_position_bias_table"] for name in attentions]
        heads = [table[1] for table in tables]
        windows = [(math.isqrt(table[0]) + 1) // 2 for table in tables]
    window = hints.window_size if not all(windows) else max(windows)
    if not window:
        raise WeightsError("the shapes do not give the window size; write --window-size TOKENS")
    values: dict[str, Any] = {
        "image_size": swin_image_size(shapes, buffers, patch, windows, window, hints),
        "in_chans": chans,
        "patch_size": patch,
        "embed_dim": dim,
        "depths": tuple(count(shapes, f"encoder.layers.{stage}.blocks.#.") for stage in stages),
        "num_heads": tuple(heads),
        "window_size": window,
        "mlp_ratio": ratio(*(shapes[f"encoder.layers.{stage}.blocks.0.mlp.fc1.weight"] for stage in stages)),
        "qkv_bias": bool({f"{attentions[0]}.q_bias", f"{attentions[0]}.qkv.bias"} & set(shapes)),
        "patch_norm": "encoder.patch_embed.norm.weight" in shapes,
        "absolute_position": "encoder.absolute_pos_embed" in shapes,
        "norm_eps": hints.norm_eps or 1e-5,
        "merge_norm_eps": 1e-5 if hints.norm_eps not in (None, 1e-5) else 0.0,  # only Hugging Face's files hint it
    }
    as_v1 = SwinConfig(**values)
    if hints.roll_first:
        values["roll_first"] = rolling_matters(as_v1)
    if not is_v2:
        return SwinConfig(**values)
    if any(side % 2 for size in as_v1.stage_maps[:-1] for side in size):
        raise WeightsError("Swin V2 implementations differ in the windows of maps with odd sides; not converted")
    every = next((n + 1 for n in range(max(values["depths"])) for name in shapes if f".blocks.{n}.norm3." in name), 0)
    before = hints.pretrained_window_sizes or tuple(pretrained for _, pretrained in coordinates)
    return SwinV2Config(**values, main_norm_every=every, pretrained_window_sizes=before + (0,) * (4 - len(before)))


def coordinates_windows(buffers: Buffers, stage: int) -> tuple[int, int]:
    """Window of a stage, and its window in pre-training if that differs, from Swin V2's coordinate table.

    The table is (1, 2w-1, 2w-1, 2). Its largest entry is log2(8 (w-1) / (p-1) + 1) / log2(8) for the window p of
    pre-training. Zeros if the file has no table.
    """
    name = next((n for n in buffers if n.endswith(f"layers.{stage}.blocks.0.attn.relative_coords_table")), "")
    if not name or buffers[name].size <= 2:
        return int(bool(name)), 0
    window = (buffers[name].shape[1] + 1) // 2
    before = round(8 * (window - 1) / (2 ** (3 * float(buffers[name].max())) - 1)) + 1
    return window, before if before != window else 0


def swin_image_size(
    shapes: Shapes, buffers: Buffers, patch: int, windows: list[int], window: int, hints: Hints
) -> tuple[int, int]:
    """Image size of a Swin: hinted, or derived from the position table, a window capped by its map, or a shift mask."""
    if hints.image_size:
        return hints.image_size
    sides = [size * patch * 2**stage for stage, size in enumerate(windows) if 0 < size < window]
    if "encoder.absolute_pos_embed" in shapes:
        sides.append(root(shapes["encoder.absolute_pos_embed"][1]) * patch)
    for name, buffer in buffers.items():
        match = re.search(r"layers\.(\d+)\.blocks\.\d+\.attn_mask$", name)
        if match and buffer.ndim == 3:  # (windows, tokens, tokens)
            sides.append(root(buffer.shape[0] * buffer.shape[1]) * patch * 2 ** int(match.group(1)))
    if not sides or not all(sides):
        raise WeightsError(
            f"the shapes do not give the image size of this network (window {window}); write --image-size PIXELS"
        )
    return sides[0], sides[0]


def root(count: int) -> int:
    """Side of a square of `count` tokens; 0 if they make no square."""
    side = math.isqrt(count)
    return side if side**2 == count else 0


def rolling_matters(encoder: SwinConfig) -> bool:
    """Whether some map is padded to whole windows: only then does it matter that timm's current code rolls first.

    Raises:
        WeightsError: a map exceeds the window along one axis only. timm's current code caps windows and drops shifts
            per axis; networks here treat both axes together.
    """
    maps = set(encoder.block_maps)
    for height, width in maps:
        if min(height, width) <= encoder.window_size < max(height, width):
            raise WeightsError(
                f"a map of {height}x{width} tokens exceeds the window {encoder.window_size} along one axis only; "
                "timm's current code shifts windows along that axis, networks here do not"
            )
    return any(WindowLayout(size, encoder.window_size, shifted=True).padded for size in maps)


# --- methods ----------------------------------------------------------------------------------------------------


def derive_method(shapes: Shapes, encoder: EncoderConfig, hints: Hints) -> ClassifyConfig | MaskedConfig | None:
    """The method of the weights: a classifier, a masked image model, or None if our methods do not fit."""
    if "head.weight" in shapes:
        fc_norm = "fc_norm.weight" in shapes
        pool_mean = fc_norm or hints.pool == "avg" or not encoder.num_prefix_tokens
        pool: Literal["mean", "cls"] = "mean" if pool_mean else "cls"
        return ClassifyConfig(num_classes=shapes["head.weight"][0], pool=pool, fc_norm=fc_norm)
    if not {"mask_token", "decoder.pred.weight"} <= set(shapes):
        return None
    out = shapes["decoder.pred.weight"][0]
    if "decoder.pos_embed" in shapes:
        return derive_autoencoder(shapes, encoder, hints)
    if "decoder.norm.weight" not in shapes:
        target = PixelsConfig(normalize="local" if hints.normalize else "none", channels_first=True)
        return with_legal_mask(replace(METHODS["simmim"], name="simmim", target=target), encoder, hints)
    decoder = derive_decoder(shapes, 0)
    hog = out == HOGConfig().bins * encoder.in_chans * (encoder.stride // HOGConfig().cell) ** 2
    hint_applies = hints.target == ("hog" if hog else "l2")  # else the arguments belong to another network
    normalize = hints.normalize is not False or not hint_applies
    goal = HOGConfig(normalize=normalize) if hog else PixelsConfig(normalize="patch" if normalize else "none")
    return with_legal_mask(replace(METHODS["fastmim"], target=goal, decoder=decoder), encoder, hints)


def derive_decoder(shapes: Shapes, num_heads: int) -> TransformerDecoderConfig:
    """Configuration of a transformer decoder; `num_heads` as there."""
    width, depth = shapes["decoder.norm.weight"][0], count(shapes, "decoder.blocks.#.")
    if not depth:
        return TransformerDecoderConfig(width=width, depth=0)
    return TransformerDecoderConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=ratio(shapes["decoder.blocks.0.mlp.fc1.weight"]),
        qkv_bias="decoder.blocks.0.attn.qkv.bias" in shapes,
    )


def derive_autoencoder(shapes: Shapes, encoder: EncoderConfig, hints: Hints) -> MAEConfig | None:
    """MAE with its decoder. Decoder heads are those of the hints, else 32 channels wide as in all MAE networks."""
    if "decoder.embed.weight" not in shapes or "decoder.blocks.0.norm1.weight" not in shapes:
        return None
    if shapes["decoder.pos_embed"][1] != encoder.output_length:
        raise WeightsError("has a decoder with another number of positions than its encoder has tokens")
    target = PixelsConfig(normalize="none" if hints.normalize is False else "patch")
    block = hints.mask_block or encoder.stride
    method = MAEConfig(mask_block=block, target=target, decoder=derive_decoder(shapes, hints.decoder_heads or 0))
    return with_legal_mask(method, encoder, hints)


def placeholder(encoder: EncoderConfig) -> MIMConfig:
    """A method for the recipe of a bare encoder, since a recipe needs one; the file holds no weights of it."""
    method = MIMConfig(target=PixelsConfig(normalize="patch"), decoder=LinearDecoderConfig())
    return with_legal_mask(method, encoder, Hints())


def with_legal_mask(method: AnyMasked, encoder: EncoderConfig, hints: Hints) -> AnyMasked:
    """The method with a mask block that fits the image: the hinted one, its default, or one token."""
    legal = method.legal_blocks(encoder)
    if not legal:
        raise WeightsError(f"image {encoder.image_size[0]}x{encoder.image_size[1]} is too small for any mask block")
    preferred = (hints.mask_block, method.mask_block, encoder.stride)
    block = next((block for block in preferred if block in legal), legal[0])
    return replace(method, mask_block=block, mask_ratio=hints.mask_ratio or method.mask_ratio)


def fixed_positions(encoder: EncoderConfig, table: np.ndarray | None, reference: Any) -> EncoderConfig:
    """The encoder with `position: sincos` if its table is the sine-cosine one that `reference` computes."""
    keys = {item.name for item in fields(encoder)}
    if "position" not in keys or table is None or encoder.num_prefix_tokens > 1 or encoder.embed_dim % 4:
        return encoder
    same = np.abs(table - reference(encoder.embed_dim, encoder.patch_grid, encoder.num_prefix_tokens > 0)).max() < 1e-5
    return replace(encoder, position="sincos") if same else encoder  # type: ignore[call-arg] # of a ViT
