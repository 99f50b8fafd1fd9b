"""Networks of the reference data, from parameter shapes and arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from src.config import EncoderConfig, SwinConfig, SwinV2Config
from src.weights import WeightsError
from src.weights.derive import Hints, derive_encoder, pair
from src.weights.names import Naming, recognise
from tests.parity.common import Case, StatedArguments, UnknownError


def naming_of(names: list[str]) -> Naming:
    try:
        return recognise(names).naming
    except WeightsError as reason:
        raise UnknownError(f"{reason}") from None


def is_buffer(naming: Naming, row: tuple[Any, ...]) -> bool:
    return row[2].startswith("buffer") or re.fullmatch(naming.unused, row[0]) is not None


def buffer_like(name: str, shape: list[int]) -> np.ndarray:
    """A buffer of known shape; Swin V2's coordinate table is that of a window that did not change."""
    return np.broadcast_to(math.log2(9) / 3 if name.endswith("relative_coords_table") else 0.0, shape)


def encoder_of(
    shapes: dict[str, tuple[int, ...]], buffers: dict[str, np.ndarray], arguments: dict[str, Any], heads: int | None = 1
) -> EncoderConfig:
    """The encoder with these parameter shapes.

    If only shapes are compared, an unknown window is 8 tokens, and an unknown image size is a multiple of the window,
    since no shape depends on them then.

    Args:
        shapes: of the parameters, by our names.
        buffers: by their names.
        arguments: of the reference.
        heads: for a ViT whose heads are unknown; None if values are compared, not only shapes.
    """
    free = heads is not None
    heads = next((value for value in stated_values(arguments, "num_heads") if isinstance(value, int)), heads)
    size = next(iter(stated_values(arguments, "image_size")), None)
    hints = Hints(num_heads=heads, image_size=pair(size) if size else None)
    window = next(iter(stated_values(arguments, "window_size")), None)
    try:
        return derive_encoder(shapes, buffers, replace(hints, window_size=window))
    except WeightsError as reason:
        table = shapes.get("encoder.layers.0.blocks.0.attn.relative_position_bias_table")
        square = not any(name in shapes for name in ("encoder.pos_embed", "encoder.absolute_pos_embed"))
        if free and "--window-size" in str(reason):
            return encoder_of(shapes, buffers, {**arguments, "window_size": 8}, heads)
        if not free or size or not square or "image size" not in str(reason):
            raise UnknownError(without_remedy(reason)) from None
        patch = shapes["encoder.patch_embed.proj.weight"][-1]
        stages = len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")})
        window = (math.isqrt(table[0]) + 1) // 2 if table else window or 14
        side = patch * window * 2 ** max(stages - 1, 0)
        return derive_encoder(shapes, buffers, replace(hints, window_size=window, image_size=(side, side)))


def without_remedy(reason: Exception) -> str:
    """The message of an error without the command-line flag to write."""
    return str(reason).split("; write ")[0]


#: encoder key -> its names in FastMIM, timm and SimMIM
FIELDS: dict[str, tuple[str, ...]] = {
    "image_size": ("img_size", "DATA.IMG_SIZE"),
    "in_chans": ("in_chans", "IN_CHANS"),
    "patch_size": ("patch_size", "PATCH_SIZE"),
    "embed_dim": ("embed_dim", "EMBED_DIM"),
    "depth": ("depth", "DEPTH"),
    "depths": ("depths", "DEPTHS"),
    "num_heads": ("num_heads", "NUM_HEADS"),
    "window_size": ("window_size", "WINDOW_SIZE"),
    "mlp_ratio": ("mlp_ratio", "MLP_RATIO"),
    "qkv_bias": ("qkv_bias", "QKV_BIAS"),
    "absolute_position": ("ape", "APE"),
    "patch_norm": ("patch_norm", "PATCH_NORM"),
}


def stated_values(arguments: dict[str, Any], key: str) -> list[Any]:
    """Values of an encoder key in the arguments, under all its names."""
    kind = str(arguments.get("MODEL.TYPE", "")).upper()
    names = [name for word in FIELDS[key] for name in (word, f"MODEL.{kind}.{word}")]
    return [arguments[name] for name in names if arguments.get(name) is not None]


def stated_encoder(encoder: EncoderConfig, arguments: dict[str, Any]) -> EncoderConfig:
    """The encoder with the values of the arguments, so that a contradiction to the shapes shows.

    FastMIM's pre-training has `decoder_depth`; for its Swin, patch_size, mlp_ratio and qkv_bias are the decoder's.
    """
    decoder = "decoder_depth" in arguments and isinstance(encoder, SwinConfig)
    changes: dict[str, Any] = {}
    for key in FIELDS:
        if not hasattr(encoder, key) or (decoder and key in ("patch_size", "mlp_ratio", "qkv_bias")):
            continue
        for value in stated_values(arguments, key):
            changes[key] = tuple(value) if isinstance(value, list) else value
    windows = arguments.get("MODEL.SWINV2.PRETRAINED_WINDOW_SIZES")
    if windows and isinstance(encoder, SwinV2Config):
        changes["pretrained_window_sizes"] = tuple(windows)
    if "image_size" in changes:
        changes["image_size"] = pair(changes["image_size"])
    return replace(encoder, **changes)


def case_encoder(
    case: Case, otherwise: Callable[[], EncoderConfig], weights: dict[str, np.ndarray], arguments: dict[str, Any]
) -> EncoderConfig:
    """The encoder of a case with weights, from their shapes and from arguments.

    Args:
        case: the case; its images give size and channels.
        otherwise: builds the encoder from arguments only, if the shapes are not enough.
        weights: by the reference's names.
        arguments: of the reference.
    """
    naming = naming_of(list(weights))
    our_names = {name: naming.ours(name) for name in weights}
    shapes = {ours[0]: weights[name].shape for name, ours in our_names.items() if ours is not None}
    buffers = {name: weights[name] for name, ours in our_names.items() if ours is None}
    image = case.data.get("image")
    stated = StatedArguments(arguments)
    if image is not None:
        stated |= {"img_size": list(image.shape[-2:]), "in_chans": image.shape[1]}
    try:
        encoder = stated_encoder(encoder_of(shapes, buffers, stated, None), stated)
    except UnknownError:
        return otherwise()
    text = str(arguments.get("norm_layer", ""))
    return replace(encoder, norm_eps=float(text.split("eps=")[1].rstrip(")"))) if "eps=" in text else encoder
