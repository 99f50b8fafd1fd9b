"""HOG, masks and masked image models of FastMIM and SimMIM."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from src.config import (
    METHODS,
    ClassifyConfig,
    EncoderConfig,
    HOGConfig,
    MIMConfig,
    PixelsConfig,
    SwinConfig,
    SwinV2Config,
    TransformerDecoderConfig,
    ViTConfig,
    masked_count,
)
from src.methods import MaskedImageModel
from src.methods.masking import BlockMask
from src.methods.targets import HOG, Pixels
from src.models import build_encoder
from src.models.graph import AsGraph
from src.models.layers import sincos_position
from src.weights.derive import pair
from tests.parity.common import (
    Case,
    Findings,
    Gradients,
    StatedArguments,
    UnknownError,
    as_map,
    error,
    from_fastmim,
    from_simmim,
    gradient_findings,
    load_weights,
)
from tests.parity.networks import case_encoder


class GivenNoise(nn.Cell):
    """A masked image model with a mask from stored noise: (image, noise) -> loss, sums, prediction, target."""

    def __init__(self, method: MaskedImageModel):
        super().__init__(auto_prefix=False)
        self.method = method

    def construct(self, image: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return self.method.run(image, self.method.mask.from_noise(noise))


def hog(case: Case) -> Findings:
    image = case.data["image"]
    kinds = case.info.get("sample_kinds", ["exact"] * len(image))
    for name, theirs in case.data.items():
        if not name.startswith("hog") or theirs.ndim != 4:
            continue
        normalize, window = hog_options(case, name)
        config = HOGConfig(
            bins=case.arguments.get("nbins", theirs.shape[1] // image.shape[1]),
            cell=case.arguments.get("pool", image.shape[-1] // theirs.shape[-1]),
            normalize=normalize,
            gaussian_window=window,
        )
        target = HOG(config, config.cell, image.shape[1])
        ours = AsGraph(target, target.histograms)(Tensor(image)).asnumpy()
        for sample, kind in enumerate(kinds):
            yield from hog_sample(case, f"{name}[{sample}]", kind, sample, ours[sample], theirs[sample])


def hog_options(case: Case, name: str) -> tuple[bool, int]:
    """Normalisation and Gaussian window, from an array name hog_norm<0 or 1>_gw<pixels> or from the arguments."""
    match = re.fullmatch(r"hog_norm(\d)_gw(\d+)", name)
    if match:
        return match.group(1) != "0", int(match.group(2))
    normalize, window = (case.arguments.get(key) for key in ("norm_pix_loss", "gaussian_window"))
    if not isinstance(normalize, bool):
        raise UnknownError(f"whether {name} is normalised is unknown")
    return normalize, window if isinstance(window, int) else 0


def hog_sample(case: Case, name: str, kind: str, sample: int, ours: np.ndarray, theirs: np.ndarray) -> Findings:
    """Compare a sample; where bins depend on rounding, only the parts that do not."""
    chans = case.data["image"].shape[1]
    if kind == "flat_generic":  # zero or a unit vector in bin 0, depending on rounding
        bins = np.abs(ours.reshape(chans, -1, *ours.shape[1:]))
        yield name, float(bins[:, 1:].max()), case.forward
    elif kind == "photo_raw":
        clear = case.data["ambiguous_fraction"][sample] < 1e-3
        clear = np.repeat(clear, ours.shape[0] // chans, axis=0)
        yield name, error(np.where(clear, ours, 0), np.where(clear, theirs, 0)), 2e-3
    else:
        yield name, error(ours, theirs), case.forward


def fastmim_config(arguments: dict[str, Any], mask_ratio: float, stride: int) -> MIMConfig:
    normalize = bool(arguments.get("norm_pix_loss", False))
    if arguments.get("mim_loss", "HOG").lower() == "hog":
        target: HOGConfig | PixelsConfig = HOGConfig(normalize=normalize)
    else:
        target = PixelsConfig(normalize="patch" if normalize else "none")
    decoder = TransformerDecoderConfig(
        width=arguments.get("decoder_embed_dim", 256),
        depth=arguments.get("decoder_depth", 4),
        mlp_ratio=float(arguments.get("mlp_ratio", 4.0)),
        qkv_bias=arguments.get("qkv_bias", "depths" not in arguments),
    )
    block = arguments.get("block_size", stride)
    return MIMConfig(mask_ratio=mask_ratio, mask_block=block, target=target, decoder=decoder)


def vit_config(arguments: dict[str, Any], image: np.ndarray | None = None, **changes: Any) -> ViTConfig:
    arguments = StatedArguments(arguments)
    size = pair(image.shape[-2:] if image is not None else arguments["img_size"])
    arguments["num_heads"]  # required: heads change the numbers, but no shape
    values = {key: arguments[key] for key in ("patch_size", "embed_dim", "depth", "num_heads") if key in arguments}
    return ViTConfig(
        image_size=size,
        in_chans=image.shape[1] if image is not None else arguments.get("in_chans", 3),
        mlp_ratio=float(arguments.get("mlp_ratio", 4.0)),
        qkv_bias=arguments.get("qkv_bias", True),
        norm_eps=norm_eps(arguments),
        **values,
        **changes,
    )


def norm_eps(arguments: dict[str, Any]) -> float:
    """The epsilon in a norm_layer argument such as LayerNorm(eps=1e-6); by default 1e-6, as FastMIM's ViT."""
    text = str(arguments.get("norm_layer", ""))
    return float(text.split("eps=")[1].rstrip(")")) if "eps=" in text else 1e-6


def swin_config(arguments: dict[str, Any], image: np.ndarray | None = None, **changes: Any) -> SwinConfig:
    """Configuration from FastMIM's arguments; `patch_size` of its pre-training class is the output stride."""
    arguments = StatedArguments(arguments)
    pretraining = "decoder_depth" in arguments  # its qkv_bias, mlp_ratio and patch_size are the decoder's
    keys = ("embed_dim", "window_size", *(() if pretraining else ("qkv_bias", "mlp_ratio", "patch_size")), "patch_norm")
    size = pair(image.shape[-2:] if image is not None else arguments["img_size"])
    return SwinConfig(
        image_size=size,
        in_chans=image.shape[1] if image is not None else arguments.get("in_chans", 3),
        depths=tuple(arguments["depths"]),
        num_heads=tuple(arguments["num_heads"]),
        **{key: arguments[key] for key in keys if key in arguments},
        **changes,
    )


def fastmim_swin_model(case: Case, image: np.ndarray) -> MaskedImageModel:
    weights, ape = case.tensors("weights"), case.arguments.get("ape", False)
    encoder = case_encoder(
        case, lambda: swin_config(case.arguments, image, absolute_position=ape), weights, case.arguments
    )
    config = fastmim_config(fastmim_arguments(case, weights, encoder.stride), mask_ratio(case), encoder.stride)
    method = MaskedImageModel(build_encoder(encoder), config, encoder.image_size)
    load_weights(method, without_buffers(weights), from_fastmim)
    return method


def fastmim_arguments(case: Case, weights: dict[str, np.ndarray], stride: int) -> dict[str, Any]:
    """Arguments of a masked image model, completed from its weights and noise."""
    width, out = weights["decoder_pred.weight"].shape[1], weights["decoder_pred.weight"].shape[0]
    image, noise = case.data["image"], case.data["noise"]
    histograms = HOGConfig.bins * image.shape[1] * (stride // HOGConfig.cell) ** 2
    derived: dict[str, Any] = {
        "decoder_embed_dim": width,
        "decoder_depth": len({name.split(".")[1] for name in weights if name.startswith("decoder_blocks.")}),
        "mim_loss": "HOG" if out == histograms else "l2",
        "block_size": round(math.sqrt(image.shape[2] * image.shape[3] / noise.shape[-1])),
    }
    if derived["decoder_depth"]:
        derived["mlp_ratio"] = weights["decoder_blocks.0.mlp.fc1.weight"].shape[0] / width
        derived["qkv_bias"] = "decoder_blocks.0.attn.qkv.bias" in weights
    return derived | case.arguments


def mask_ratio(case: Case) -> float:
    """The stated mask ratio, or one that masks as many blocks as the stored mask."""
    stated = (case.info.get("call") or {}).get("mask_ratio", case.arguments.get("mask_ratio"))
    if stated is not None:
        return float(stated)
    if "mask" not in case.data:
        raise UnknownError("its mask ratio is unknown")
    blocks = case.data["noise"].shape[-1]
    masked = round(float(case.data["mask"][0].mean()) * blocks)
    return (masked - 0.5) / blocks


def without_buffers(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reference weights without the buffers that our networks compute."""
    buffers = ("relative_position_index", "attn_mask", "relative_coords_table")
    return {name: value for name, value in weights.items() if not name.endswith(buffers)}


def fastmim_vit_model(case: Case, image: np.ndarray) -> MaskedImageModel:
    weights = case.tensors("weights")
    encoder = case_encoder(case, lambda: vit_config(case.arguments, image), weights, case.arguments)
    assert isinstance(encoder, ViTConfig)
    encoder = replace(encoder, position="sincos")
    config = fastmim_config(fastmim_arguments(case, weights, encoder.stride), mask_ratio(case), encoder.stride)
    method = MaskedImageModel(build_encoder(encoder), config, encoder.image_size)
    table = sincos_position(encoder.embed_dim, method.grid, encoder.class_token)
    if error(table, weights["pos_embed"]) > 1e-6:
        raise ValueError("our sine-cosine table differs from the reference's")
    load_weights(method, weights, from_fastmim)
    return method


def fastmim_vit(case: Case) -> Findings:
    yield from fastmim(case, fastmim_vit_model(case, case.data["image"]))


def fastmim_swin(case: Case) -> Findings:
    yield from fastmim(case, fastmim_swin_model(case, case.data["image"]))


def fastmim(case: Case, method: MaskedImageModel) -> Findings:
    data = case.data
    image, noise = Tensor(data["image"]), Tensor(data["noise"])
    weights = ms.ParameterTuple(method.trainable_params())
    (loss, _, prediction, target), grads = Gradients(GivenNoise(method), weights)(image, noise)
    mask = AsGraph(method, method.mask.from_noise)(noise)
    hidden = np.kron(
        mask.asnumpy(), np.ones((1, *[s // m for s, m in zip(image.shape[2:], mask.shape[1:], strict=True)]))
    )
    if "mask" in data:
        yield "mask", float((hidden[:, None] != data["mask"]).mean()), 0.0
    latent = AsGraph(method, method.encode)(image, mask)
    if "latent" in data:
        yield "latent", error(latent, data["latent"]), case.forward
    if "hog_target_tokens" in data:
        yield "hog_target_tokens", error(target, data["hog_target_tokens"]), case.forward
    if "l2_target" in data:
        theirs = data["l2_target"].reshape(*data["l2_target"].shape[:2], -1).transpose(0, 2, 1)
        yield "l2_target", error(target, theirs), case.forward
    if "pred" in data:
        yield "pred", error(prediction, data["pred"]), case.forward
    yield "loss", error(loss, data["loss"]), case.forward
    yield from gradient_findings(case, [w.name for w in weights], grads, from_fastmim)


def classifier_config(classes: int, vit: bool, pool_mean: bool) -> ClassifyConfig:
    """SimMIM's and FastMIM's classifiers: class token, or mean and norm for a ViT; mean for a Swin."""
    pool: Any = "cls" if vit and not pool_mean else "mean"
    return ClassifyConfig(num_classes=classes, pool=pool, fc_norm=vit and pool_mean)


def simmim_encoder(arguments: dict[str, Any]) -> EncoderConfig:
    """SimMIM's configuration keys (config.py)."""
    arguments = StatedArguments(arguments)
    kind = arguments["MODEL.TYPE"]
    network = StatedArguments(
        {key.split(".")[-1]: value for key, value in arguments.items() if key.startswith(f"MODEL.{kind.upper()}.")}
    )
    side = arguments["DATA.IMG_SIZE"]
    common = {
        "image_size": (side, side),
        "in_chans": network.get("IN_CHANS", 3),
        "patch_size": network["PATCH_SIZE"],
        "embed_dim": network["EMBED_DIM"],
        "mlp_ratio": float(network.get("MLP_RATIO", 4.0)),
        "qkv_bias": network.get("QKV_BIAS", True),
    }
    if kind == "vit":
        bias: Any = "shared" if network["USE_SHARED_RPB"] else "block" if network["USE_RPB"] else "none"
        return ViTConfig(
            **common,
            depth=network["DEPTH"],
            num_heads=network["NUM_HEADS"],
            k_bias=False,
            position="learned" if network["USE_APE"] else "none",
            relative_position=bias,
            layer_scale=network["INIT_VALUES"] or 0.0,
        )
    common |= {
        "depths": tuple(network["DEPTHS"]),
        "num_heads": tuple(network["NUM_HEADS"]),
        "window_size": network["WINDOW_SIZE"],
        "absolute_position": network.get("APE", False),
        "patch_norm": network.get("PATCH_NORM", True),
    }
    if kind == "swin":
        return SwinConfig(**common)
    return SwinV2Config(**common, pretrained_window_sizes=tuple(network["PRETRAINED_WINDOW_SIZES"]))


def simmim_model(case: Case, image: np.ndarray) -> MaskedImageModel:
    weights = case.tensors("weights")
    encoder = case_encoder(case, lambda: simmim_encoder(case.arguments), weights, case.arguments)
    target = PixelsConfig(channels_first=True)
    if case.arguments.get("MODEL.SIMMIM.NORM_TARGET.ENABLE", "norm_target" in case.data):
        window = case.arguments.get("MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE", PixelsConfig.window)
        target = replace(target, normalize="local", window=window)
    config = replace(METHODS["simmim"], target=target)
    method = MaskedImageModel(build_encoder(encoder), config, encoder.image_size)
    load_weights(method, without_buffers(weights), from_simmim)
    return method


class GivenMask(nn.Cell):
    """A masked image model with a stored mask: (image, mask) -> loss, sums, prediction, target."""

    def __init__(self, method: MaskedImageModel):
        super().__init__(auto_prefix=False)
        self.method = method

    def construct(self, image: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return self.method.run(image, mask)


def simmim(case: Case) -> Findings:
    data = case.data
    method = simmim_model(case, data["image"])
    image, mask = Tensor(data["image"]), Tensor(data["mask"].astype(np.float32))
    weights = ms.ParameterTuple(method.trainable_params())
    (loss, _, prediction, _), grads = Gradients(GivenMask(method), weights)(image, mask)
    latent = AsGraph(method, method.encode)(image, mask).asnumpy()[:, method.encoder.num_prefix_tokens :]
    if "latent" in data:
        yield "latent", error(as_map(latent, method.grid), data["latent"]), case.forward
    plain = Pixels(PixelsConfig(channels_first=True), method.encoder.stride, image.shape[1])
    restored = plain.to_image(prediction.asnumpy(), data["image"])
    if "reconstruction" in data:
        yield "reconstruction", error(restored[: len(data["reconstruction"])], data["reconstruction"]), case.forward
    if "norm_target" in data:
        normalized = AsGraph(method, method.target.local)(image).asnumpy()
        yield "norm_target", error(normalized[:1, :1], data["norm_target"]), case.forward
    yield from coordinate_tables(case, method.encoder)
    yield "loss", error(loss, data["loss"]), case.forward
    yield from gradient_findings(case, [w.name for w in weights], grads, from_simmim)


def coordinate_tables(case: Case, encoder: Any) -> Findings:
    """Swin V2's log-spaced coordinates of each stage."""
    for stage, layer in enumerate(getattr(encoder, "layers", [])):
        name = f"coords_table_{stage}"
        if name in case.data:
            ours = layer.blocks[0].attn.coordinates.asnumpy().reshape(case.data[name].shape)
            yield name, error(ours, case.data[name]), 1e-6


def masks(case: Case) -> Findings:
    """Number of masked tokens of each image, and that whole blocks are masked."""
    for name, theirs in case.data.items():
        side, block, patch, ratio = mask_sizes(case, name)
        blocks, span = int(side // block), int(block // patch)
        count = masked_count(blocks**2, ratio, "ceil_masked")
        mask = BlockMask((blocks, blocks), count)
        ours = AsGraph(mask, mask.construct)(len(theirs)).asnumpy().repeat(span, 1).repeat(span, 2)
        yield f"{name} count", float(np.abs(theirs.sum((1, 2)) - count * span**2).max()), 0.0
        yield f"{name} our count", float(np.abs(ours.sum((1, 2)) - theirs.sum((1, 2))).max()), 0.0
        whole = theirs.reshape(len(theirs), blocks, span, blocks, span)
        yield f"{name} blocks", float((whole != whole[:, :, :1, :, :1]).mean()), 0.0


def mask_sizes(case: Case, name: str) -> tuple[float, ...]:
    """Side of image, mask block and patch, and mask ratio; from `generators` or an array name mask_<side>_... ."""
    keys = ("input_size", "mask_patch_size", "model_patch_size", "mask_ratio")
    stated = case.info.get("generators", {}).get(name, {})
    if set(keys) <= set(stated):
        return tuple(float(stated[key]) for key in keys)
    match = re.fullmatch(r"mask_(\d+)_(\d+)_(\d+)_([\d.]+)", name)
    if not match:
        raise UnknownError(f"the sizes of {name} are unknown")
    return tuple(float(part) for part in match.groups())


def pos_sincos(case: Case) -> Findings:
    """Tables (positions, dim) in float32 or float64; their number is no square if they have a class token."""
    for name, theirs in case.data.items():
        side = math.isqrt(theirs.shape[-2])
        token = side**2 != theirs.shape[-2]
        ours = sincos_position(theirs.shape[-1], (side, side), token)[0]
        yield name, error(ours, theirs.reshape(theirs.shape[-2:])), 1e-6
