"""Compare this code with numbers of the reference implementations.

    python scripts/check_parity.py DIR [CASE ...]

DIR holds one folder per case (`case.json`, `data.npz`, `weights.safetensors`, `grads.safetensors`, ...) and the JSON
files of `schedules/` and `optimizer_groups/`. Prints `PASS <case> <worst error>`, `FAIL <case> <array> <error>` or
`not covered <case>` for each, then the counts; exit code 1 if any failed. Everything runs in graph mode. Errors are
max|a-b| / max|b| per array, with the tolerances of the case.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOG_v", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.dataset import vision
from mindspore.dataset.vision import Inter
from mindspore.nn.utils import no_init_parameters
from PIL import Image
from safetensors.numpy import load_file

from src.config import (
    ENCODERS,
    METHODS,
    CaiTConfig,
    ClassifyConfig,
    DataConfig,
    EncoderConfig,
    HOGConfig,
    ManifoldConfig,
    MIMConfig,
    PixelsConfig,
    SwinConfig,
    SwinV2Config,
    TrainConfig,
    TransformerDecoderConfig,
    ViTConfig,
    parse_auto_augment,
    relation_maps,
)
from src.data import augment
from src.data.loader import Loader
from src.engine.checkpoint import weights_of
from src.engine.optim import build_optimizer, parameter_groups
from src.engine.schedule import learning_rate, position
from src.engine.step import TrainStep
from src.methods import Classify, ManifoldDistiller, MaskedImageModel
from src.methods.classify import soft_cross_entropy
from src.methods.manifold import Relations, merge
from src.methods.masking import BlockMask, masked_count
from src.methods.mixing import cut_box, mix, soft_targets
from src.methods.targets import HOG, Pixels
from src.models import build_classifier, build_encoder
from src.models.layers import sincos_position
from src.weights import foreign
from src.weights.derive import Hints
from src.weights.load import Origin, load_encoder
from src.weights.names import (
    BUFFERS,
    FASTMIM_BLOCKS,
    FASTMIM_POOLED,
    FASTMIM_STAGES,
    PLAIN,
    SIMMIM,
    Naming,
    naming_for,
    recognise,
)
from src.weights.resize import TABLE_RULES, Progression, resize_offsets, resize_places
from src.zoo import BareEncoder

#: FastMIM's pre-training decays them: timm 0.3.2 add_weight_decay has no list of names to spare there
TOKENS = ("cls_token", "mask_token", "relative_position_bias_table")
#: what SimMIM decays all the same, by encoder and fine-tuning (no_weight_decay of its four networks)
SIMMIM_DECAYED: dict[tuple[str, bool], tuple[str, ...]] = {
    ("swin", False): TOKENS[2:],
    ("swin", True): (),
    ("vit", False): TOKENS[1:],
    ("vit", True): TOKENS[1:],
}


def rename_with(naming: Naming) -> Callable[[str], str]:
    """Our name of each of theirs, where every name has a place."""

    def rename(name: str) -> str:
        place = naming.ours(name)
        assert place is not None, name
        return place[0]

    return rename


from_simmim, from_plain, from_fastmim_pooled = rename_with(SIMMIM), rename_with(PLAIN), rename_with(FASTMIM_POOLED)


def from_fastmim(name: str) -> str:
    """Of either of FastMIM's pre-training networks."""
    return rename_with(FASTMIM_STAGES if name.startswith("encoder.") else FASTMIM_BLOCKS)(name)


#: array name, error, tolerance
Finding = tuple[str, float, float]
Findings = Iterator[Finding]


class Case:
    """One folder of reference numbers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.info = json.loads((folder / "case.json").read_text())
        self.arguments = self.info.get("arguments", {})
        tolerance = self.info.get("tolerance", {})
        tolerance = tolerance if isinstance(tolerance, dict) else {}
        self.forward = tolerance.get("float32_forward_rel", 1e-4)
        self.gradient = tolerance.get("float32_grad_rel", 1e-3)
        data = folder / "data.npz"
        self.data = dict(np.load(data)) if data.exists() else {}

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        return load_file(str(self.folder / f"{name}.safetensors"))

    @property
    def batch(self) -> int:
        return self.data["image"].shape[0]


class Call(nn.Cell):
    """A bound method of a Cell as a graph of its own."""

    def __init__(self, cell: nn.Cell, function: Callable[..., Any]):
        super().__init__(auto_prefix=False)
        self.cell, self.function = cell, function

    def construct(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class GivenNoise(nn.Cell):
    """A masked image model whose mask comes from stored noise: (image, noise) -> loss, parts, prediction, target."""

    def __init__(self, method: MaskedImageModel):
        super().__init__(auto_prefix=False)
        self.method = method

    def construct(self, image: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return self.method.run(image, self.method.mask.from_noise(noise))


class Gradients(nn.Cell):
    """Loss, other outputs and parameter gradients of a Cell that returns the loss first."""

    def __init__(self, cell: nn.Cell, weights: ms.ParameterTuple):
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.value_and_grad = ops.value_and_grad(cell, None, weights, has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Any, Any]:
        return self.value_and_grad(*inputs)


def error(ours: Any, theirs: np.ndarray) -> float:
    """max|a-b| / max|b|, infinite for another shape or values that are not finite."""
    ours = ours.asnumpy() if isinstance(ours, Tensor) else np.asarray(ours)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    if not ours.size:
        return 0.0
    return float(np.abs(ours.astype(np.float64) - theirs).max() / max(np.abs(theirs).max(), 1e-12))


def load_weights(cell: nn.Cell, weights: dict[str, np.ndarray], rename: Callable[[str], str]) -> None:
    """Copy reference weights into our network; every name must find its place."""
    ours = {p.name: p for p in cell.get_parameters()}
    left = {name for name in ours if not name.endswith(".draws")}
    for name, value in weights.items():
        target = ours[rename(name)]
        target.set_data(Tensor(value.reshape(target.shape)))
        left.discard(target.name)
    if left:
        raise KeyError(f"no reference weight for {sorted(left)}")


def gradient_findings(
    case: Case, names: list[str], grads: tuple[Tensor, ...], rename: Callable[[str], str]
) -> Findings:
    """Every reference gradient against ours; key biases, whose gradient is zero, on the scale of the whole bias."""
    by_name = dict(zip(names, grads, strict=True))
    reference = case.tensors("grads")
    missing = set(names) - {rename(name) for name in reference}
    if missing:
        yield f"gradients without reference: {sorted(missing)[:3]}", float("inf"), case.gradient
    for name, theirs in reference.items():
        yield (
            f"grad {name}",
            error(by_name[rename(name)].asnumpy().reshape(theirs.shape), theirs),
            case.gradient,
        )


# --- what each kind of case compares ----------------------------------------------------------------------------


def hog(case: Case) -> Findings:
    image = case.data["image"]
    kinds = case.info.get("sample_kinds", ["exact"] * len(image))
    for name, theirs in case.data.items():
        if not name.startswith("hog_norm"):
            continue
        normalize, window = (int(part.strip("hognrmw")) for part in name.split("_")[1:])
        config = HOGConfig(
            bins=case.arguments["nbins"],
            cell=case.arguments["pool"],
            normalize=bool(normalize),
            gaussian_window=window,
        )
        target = HOG(config, config.cell, image.shape[1])
        ours = Call(target, target.histograms)(Tensor(image)).asnumpy()
        for sample, kind in enumerate(kinds):
            yield from hog_sample(case, f"{name}[{sample}]", kind, sample, ours[sample], theirs[sample])


def hog_sample(case: Case, name: str, kind: str, sample: int, ours: np.ndarray, theirs: np.ndarray) -> Findings:
    """Samples whose bins hang on rounding are compared where the case says that they can be."""
    chans = case.data["image"].shape[1]
    if kind == "flat_generic":  # zero or a unit vector in bin 0, as rounding has it
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
        width=arguments.get("decoder_embed_dim", 256), depth=arguments.get("decoder_depth", 4)
    )
    block = arguments.get("block_size", stride)
    return MIMConfig(mask_ratio=mask_ratio, mask_block=block, target=target, decoder=decoder)


def vit_config(arguments: dict[str, Any], image: np.ndarray | None = None, **changes: Any) -> ViTConfig:
    side = arguments.get("img_size", 224)
    size = image.shape[-2:] if image is not None else (side, side) if isinstance(side, int) else tuple(side)
    taken = {key: arguments[key] for key in ("patch_size", "embed_dim", "depth", "num_heads") if key in arguments}
    return ViTConfig(
        image_size=size,
        in_chans=image.shape[1] if image is not None else arguments.get("in_chans", 3),
        mlp_ratio=float(arguments.get("mlp_ratio", 4.0)),
        qkv_bias=arguments.get("qkv_bias", True),
        norm_eps=norm_eps(arguments),
        **taken,
        **changes,
    )


def norm_eps(arguments: dict[str, Any]) -> float:
    """The epsilon in a norm_layer argument such as LayerNorm(eps=1e-6), which is FastMIM's for ViT."""
    text = str(arguments.get("norm_layer", ""))
    return float(text.split("eps=")[1].rstrip(")")) if "eps=" in text else 1e-6


def swin_config(arguments: dict[str, Any], image: np.ndarray | None = None, **changes: Any) -> SwinConfig:
    """FastMIM's arguments; its pre-training class calls the output stride `patch_size`."""
    keys = ("embed_dim", "window_size", "qkv_bias")
    return SwinConfig(
        image_size=image.shape[-2:] if image is not None else (arguments["img_size"],) * 2,
        in_chans=image.shape[1] if image is not None else arguments.get("in_chans", 3),
        depths=tuple(arguments["depths"]),
        num_heads=tuple(arguments["num_heads"]),
        **{key: arguments[key] for key in keys if key in arguments},
        **changes,
    )


def fastmim_swin_model(case: Case, image: np.ndarray) -> MaskedImageModel:
    encoder = swin_config(case.arguments, image)
    config = fastmim_config(case.arguments, case.info["call"]["mask_ratio"], encoder.stride)
    method = MaskedImageModel(build_encoder(encoder), config, encoder.image_size)
    load_weights(method, trained(case.tensors("weights")), from_fastmim)
    return method


def trained(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reference weights without the buffers that our networks make themselves."""
    buffers = ("relative_position_index", "attn_mask", "relative_coords_table")
    return {name: value for name, value in weights.items() if not name.endswith(buffers)}


def fastmim_vit_model(case: Case, image: np.ndarray) -> MaskedImageModel:
    encoder = vit_config(case.arguments, image, position="sincos")
    config = fastmim_config(case.arguments, case.info["call"]["mask_ratio"], encoder.stride)
    method = MaskedImageModel(build_encoder(encoder), config, encoder.image_size)
    table = sincos_position(encoder.embed_dim, method.grid, encoder.class_token)
    weights = case.tensors("weights")
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
    mask = Call(method, method.mask.from_noise)(noise)
    hidden = np.kron(
        mask.asnumpy(), np.ones((1, *[s // m for s, m in zip(image.shape[2:], mask.shape[1:], strict=True)]))
    )
    yield "mask", float((hidden[:, None] != data["mask"]).mean()), 0.0
    latent = Call(method, method.encode)(image, mask)
    yield "latent", error(latent, data["latent"]), case.forward
    if "hog_target_tokens" in data:
        yield "hog_target_tokens", error(target, data["hog_target_tokens"]), case.forward
    if "l2_target" in data:
        theirs = data["l2_target"].reshape(*data["l2_target"].shape[:2], -1).transpose(0, 2, 1)
        yield "l2_target", error(target, theirs), case.forward
    yield "pred", error(prediction, data["pred"]), case.forward
    yield "loss", error(loss, data["loss"]), case.forward
    yield from gradient_findings(case, [w.name for w in weights], grads, from_fastmim)


def simmim_encoder(arguments: dict[str, Any]) -> EncoderConfig:
    """SimMIM's configuration keys (config.py)."""
    kind = arguments["MODEL.TYPE"]
    own = {key.split(".")[-1]: value for key, value in arguments.items() if key.startswith(f"MODEL.{kind.upper()}.")}
    side = arguments.get("DATA.IMG_SIZE", 224)
    common = {
        "image_size": (side, side),
        "in_chans": own.get("IN_CHANS", 3),
        "patch_size": own["PATCH_SIZE"],
        "embed_dim": own["EMBED_DIM"],
        "mlp_ratio": float(own.get("MLP_RATIO", 4.0)),
        "qkv_bias": own.get("QKV_BIAS", True),
    }
    if kind == "vit":
        bias = "shared" if own["USE_SHARED_RPB"] else "block" if own["USE_RPB"] else "none"
        return ViTConfig(
            **common,
            depth=own["DEPTH"],
            num_heads=own["NUM_HEADS"],
            k_bias=False,
            position="learned" if own["USE_APE"] else "none",
            relative_position=bias,
            layer_scale=own["INIT_VALUES"],
        )
    common |= {
        "depths": tuple(own["DEPTHS"]),
        "num_heads": tuple(own["NUM_HEADS"]),
        "window_size": own["WINDOW_SIZE"],
        "absolute_position": own.get("APE", False),
        "patch_norm": own.get("PATCH_NORM", True),
    }
    if kind == "swin":
        return SwinConfig(**common)
    return SwinV2Config(**common, pretrained_window_sizes=tuple(own["PRETRAINED_WINDOW_SIZES"]))


def simmim_model(case: Case, image: np.ndarray) -> MaskedImageModel:
    encoder = simmim_encoder(case.arguments)
    target = PixelsConfig(channels_first=True)
    if case.arguments.get("MODEL.SIMMIM.NORM_TARGET.ENABLE"):
        target = replace(target, normalize="local", window=case.arguments["MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE"])
    config = replace(METHODS["simmim"], target=target)
    method = MaskedImageModel(build_encoder(encoder), config, encoder.image_size)
    load_weights(method, trained(case.tensors("weights")), from_simmim)
    return method


class GivenMask(nn.Cell):
    """A masked image model with a stored mask: (image, mask) -> loss, parts, prediction, target."""

    def __init__(self, method: MaskedImageModel):
        super().__init__(auto_prefix=False)
        self.method = method

    def construct(self, image: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return self.method.run(image, mask)


def as_map(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(B, N, C) -> (B, C, rows, cols)."""
    return tokens.transpose(0, 2, 1).reshape(len(tokens), -1, *grid)


def simmim(case: Case) -> Findings:
    data = case.data
    method = simmim_model(case, data["image"])
    image, mask = Tensor(data["image"]), Tensor(data["mask"].astype(np.float32))
    weights = ms.ParameterTuple(method.trainable_params())
    (loss, _, prediction, _), grads = Gradients(GivenMask(method), weights)(image, mask)
    latent = Call(method, method.encode)(image, mask).asnumpy()[:, method.encoder.num_prefix_tokens :]
    yield "latent", error(as_map(latent, method.grid), data["latent"]), case.forward
    plain = Pixels(PixelsConfig(channels_first=True), method.encoder.stride, image.shape[1])
    restored = plain.to_image(prediction.asnumpy(), data["image"])
    yield "reconstruction", error(restored[: len(data["reconstruction"])], data["reconstruction"]), case.forward
    if "norm_target" in data:
        normalized = Call(method, method.target.local)(image).asnumpy()
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


def simmim_ft(case: Case) -> Findings:
    encoder = simmim_encoder(case.arguments)
    fc_norm = bool(case.arguments.get("MODEL.VIT.USE_MEAN_POOLING")) and case.arguments["MODEL.TYPE"] == "vit"
    pool = "cls" if case.arguments["MODEL.TYPE"] == "vit" and not fc_norm else "mean"
    classes = case.arguments["MODEL.NUM_CLASSES"]
    if case.arguments["MODEL.TYPE"] == "swinv2":
        yield from coordinate_tables(case, build_encoder(encoder))
    yield from classifier(case, encoder, classes, pool, fc_norm, from_plain)


def train10_simmim(case: Case) -> Findings:
    method = simmim_model(case, case.data["image"])
    schedule = case.info["schedule"]
    settings = {
        "rule": "timm",
        "schedule": schedule["name"],
        "base_lr": schedule["base_lr"],
        "lr_batch": 0,
        "warmup_lr": schedule["warmup_lr"],
        "milestones": tuple(schedule["multisteps"]),
        "gamma": schedule["gamma"],
        "decayed": SIMMIM_DECAYED[case.arguments["MODEL.TYPE"], False],
    }
    yield from train10(case, method, GivenMask(method), ("image", "mask"), from_simmim, settings)


def masks(case: Case) -> Findings:
    """Masked tokens of each image, and that whole blocks are masked."""
    for name, theirs in case.data.items():
        side, block, patch, ratio = (float(part) for part in name.split("_")[1:])
        cut, span = int(side // block), int(block // patch)
        count = masked_count(cut**2, ratio, ceil=True)
        mask = BlockMask((cut, cut), ratio, ceil=True)
        ours = Call(mask, mask.construct)(len(theirs)).asnumpy().repeat(span, 1).repeat(span, 2)
        yield f"{name} count", float(np.abs(theirs.sum((1, 2)) - count * span**2).max()), 0.0
        yield f"{name} our count", float(np.abs(ours.sum((1, 2)) - theirs.sum((1, 2))).max()), 0.0
        whole = theirs.reshape(len(theirs), cut, span, cut, span)
        yield f"{name} blocks", float((whole != whole[:, :, :1, :, :1]).mean()), 0.0


def pos_sincos(case: Case) -> Findings:
    """Arrays pos_<dim>_<grid>_<cls or nocls>, float32 or float64."""
    for name, theirs in case.data.items():
        dim, side, kind = name.split("_")[1:4]
        ours = sincos_position(int(dim), (int(side), int(side)), kind == "cls")[0]
        yield name, error(ours, theirs.reshape(ours.shape)), 1e-6


def fastmim_ft_swin(case: Case) -> Findings:
    encoder = swin_config(case.arguments, case.data["image"], absolute_position=case.arguments.get("ape", False))
    yield from classifier(case, encoder, case.arguments["num_classes"], "mean", False, from_fastmim_pooled)


def train10_fastmim_swin(case: Case) -> Findings:
    method = fastmim_swin_model(case, case.data["image"])
    yield from train10(case, method, GivenNoise(method), ("image", "noise"), from_fastmim, FASTMIM_TRAIN)


def fastmim_ft_vit(case: Case) -> Findings:
    arguments = case.arguments
    pool = "mean" if arguments["global_pool"] else "cls"
    encoder = vit_config(arguments, case.data["image"], position="learned")
    yield from classifier(case, encoder, arguments["num_classes"], pool, pool == "mean", from_plain)


def classifier(
    case: Case, encoder: EncoderConfig, classes: int, pool: Any, fc_norm: bool, rename: Callable[[str], str]
) -> Findings:
    data = case.data
    config = ClassifyConfig(num_classes=classes, pool=pool, fc_norm=fc_norm)
    method = Classify(build_classifier(encoder, config), config.label_smoothing)
    load_weights(method, trained(case.tensors("weights")), rename)
    image, label = Tensor(data["image"]), Tensor(data["label"].astype(np.int32))
    weights = ms.ParameterTuple(method.trainable_params())
    (loss, _), grads = Gradients(method, weights)(image, label)
    yield "features", error(Call(method, method.classifier.features)(image), data["features"]), case.forward
    yield "logits", error(Call(method, method.classifier)(image), data["logits"]), case.forward
    yield "loss", error(loss, data["loss"]), case.forward
    yield from gradient_findings(case, [w.name for w in weights], grads, rename)


def train10_fastmim_vit(case: Case) -> Findings:
    method = fastmim_vit_model(case, case.data["image"])
    yield from train10(case, method, GivenNoise(method), ("image", "noise"), from_fastmim, FASTMIM_TRAIN)


class FirstTwo(nn.Cell):
    """Loss and one more output of a Cell, as a Method returns them."""

    def __init__(self, cell: nn.Cell):
        super().__init__(auto_prefix=False)
        self.cell = cell

    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.cell(*inputs)
        return outputs[0], outputs[1]


#: FastMIM's schedule and what it decays
FASTMIM_TRAIN: dict[str, Any] = {"decayed": TOKENS}


def train10(
    case: Case,
    method: Any,
    network: nn.Cell,
    inputs: tuple[str, str],
    rename: Callable[[str], str],
    settings: dict[str, Any],
) -> Findings:
    """Ten steps with the engine's optimiser and step: losses, gradient norms, rates, final weights."""
    data, schedule, tolerance = case.data, case.info["schedule"], case.info["tolerance"]
    optimizer_info = case.info["optimizer"]
    train = TrainConfig(
        epochs=schedule["epochs"],
        warmup_epochs=schedule["warmup_epochs"],
        min_lr=schedule["min_lr"],
        betas=tuple(optimizer_info["betas"]),
        eps=optimizer_info["eps"],
        weight_decay=optimizer_info["weight_decay"],
        clip_norm=optimizer_info.get("clip_grad") or 0.0,
        **settings,
    )
    optimizer = build_optimizer(method, train)
    step = TrainStep(FirstTwo(network), optimizer, train.clip_norm)
    losses, norms, rates = [], [], []
    per_epoch = schedule["steps_per_epoch"]
    peak = schedule["lr"] if "lr" in schedule else schedule["base_lr"]
    for number in range(len(data["loss"])):
        here = position(number // per_epoch, number % per_epoch, per_epoch, 1)

        def rate_of(scale: float, here: float = here) -> float:
            return learning_rate(train, peak, here, scale, per_epoch)

        rates.append(rate_of(1.0))
        values = optimizer.step_values(rate_of, number + 1)
        loss, _, norm = step(values, Tensor(data[inputs[0]]), Tensor(data[inputs[1]][number]))
        losses.append(float(loss))
        norms.append(float(norm))
    yield "lr", error(np.array(rates), data["lr"]), 1e-9
    yield "loss", float(np.abs(np.array(losses) / data["loss"] - 1).max()), tolerance["loss_rel"]
    yield "grad_norm", error(np.array(norms), data["grad_norm"]), case.gradient
    ours = {p.name: p.asnumpy() for p in method.get_parameters()}
    for name, theirs in trained(case.tensors("weights_final")).items():
        difference = np.abs(ours[rename(name)].reshape(theirs.shape) - theirs)
        if name.endswith("qkv.bias"):  # the key third has no gradient: Adam turns rounding noise into steps there
            third = len(theirs) // 3
            difference[third : 2 * third] = 0
        yield f"final {name}", float(difference.max()), tolerance["final_weight_abs"]


def fastmim_schedule(path: Path) -> Findings:
    for name, case in json.loads(path.read_text())["cases"].items():
        kind = "step" if case["decay_epoch"] else "cosine"
        train = TrainConfig(
            epochs=case["epochs"],
            warmup_epochs=case["warmup_epochs"],
            min_lr=case["min_lr"],
            schedule=kind,
            decay_epochs=case["decay_epoch"] or 1,
        )
        worst = 0.0
        per_epoch = case["steps_per_epoch"]
        for number, theirs in enumerate(case["lr_used"]):
            here = position(number // per_epoch, number % per_epoch, per_epoch, case["accum_iter"])
            ours = [learning_rate(train, case["lr"], here, scale) for scale in case["layer_scales"]]
            worst = max(worst, float(np.max(np.abs(np.subtract(ours, theirs)) / np.maximum(np.abs(theirs), 1e-30))))
        yield name, worst, 1e-9


def simmim_schedule(path: Path) -> Findings:
    for name, case in json.loads(path.read_text())["cases"].items():
        train = TrainConfig(
            rule="timm",
            schedule=case["scheduler"],
            epochs=case["epochs"],
            warmup_epochs=case["warmup_epochs"],
            base_lr=case["base_lr"],
            lr_batch=0,
            warmup_lr=case["warmup_lr"],
            min_lr=case["min_lr"],
            milestones=tuple(case["multisteps"]),
            gamma=case["gamma"],
            decay_epochs=case["overrides"].get("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 30),
        )
        updates, worst = case["n_iter_per_epoch"], 0.0
        for number, theirs in enumerate(case["lr_used"]):
            ours = [learning_rate(train, train.base_lr, number / updates, s, updates) for s in case["layer_scales"]]
            worst = max(worst, float(np.max(np.abs(np.subtract(ours, theirs)) / np.maximum(np.abs(theirs), 1e-30))))
        yield name, worst, 1e-9


def manifold_schedule(path: Path) -> Findings:
    """timm's scheduler, asked after each epoch with that epoch's number."""
    for name, case in json.loads(path.read_text())["cases"].items():
        args = case["args"]
        train = TrainConfig(
            rule="timm",
            per_epoch=True,
            schedule=args["sched"],
            epochs=args["epochs"],
            warmup_epochs=args["warmup_epochs"],
            base_lr=args["lr"],
            lr_batch=0,
            warmup_lr=args["warmup_lr"],
            min_lr=args["min_lr"],
            decay_epochs=args["decay_epochs"],
            gamma=args["decay_rate"],
        )
        updates = 7
        for place in (0, updates - 1):  # of an epoch: the first and the last update have the same rate
            here = [position(epoch, place, updates, 1) for epoch in range(train.epochs)]
            ours = [learning_rate(train, train.base_lr, epoch, 1.0, updates) for epoch in here]
            yield name, float(np.abs(np.array(ours) / case["lr_used_per_epoch"] - 1).max()), 1e-9


@dataclass(frozen=True)
class Reference:
    """A full-size or tiny network named by the reference data: ours, the name table, and what training decays."""

    method: Any
    rename: Callable[[str], str]
    decayed: tuple[str, ...]


def reference_network(info: dict[str, Any]) -> Reference:
    """Build what a file of full_size/ or optimizer_groups/ describes, from its name and arguments."""
    name, arguments = info["model"], info.get("arguments") or {}
    if "timm" in info.get("source", "") or info.get("source", "").startswith("huggingface/"):
        rows = [row[0] for row in info["state_dict"]]
        return timm_network(name, arguments["num_classes"], rename_with(recognise(rows).naming))
    if name.startswith("manifold_kd_"):
        names = recognise([row[0] for row in info["params"]]).naming
        return timm_network(name.removeprefix("manifold_kd_"), 1000, rename_with(names))
    fine_tune = "finetune" in name or "_ft_" in name or name.startswith("ft_")
    kind = "swin" if "swin" in name else "vit"
    if name.startswith("fastmim"):
        encoder = fastmim_encoder(name, kind, arguments, fine_tune)
        if not fine_tune:
            mask = fastmim_config(arguments, 0.75, encoder.stride)
            method: Any = MaskedImageModel(build_encoder(encoder), mask, encoder.image_size)
            return Reference(method, from_fastmim, TOKENS)
        pool = "cls" if kind == "vit" and not arguments.get("global_pool") else "mean"
        fc_norm = kind == "vit" and pool == "mean"
        config = ClassifyConfig(num_classes=arguments["num_classes"], pool=pool, fc_norm=fc_norm)
        rename = from_fastmim_pooled if kind == "swin" else from_plain
        return Reference(Classify(build_classifier(encoder, config), 0.1), rename, TOKENS[2:])
    encoder = simmim_encoder(arguments) if arguments else simmim_preset(name, kind, fine_tune)
    decayed = SIMMIM_DECAYED[kind, fine_tune]
    if not fine_tune:
        method = MaskedImageModel(build_encoder(encoder), METHODS["simmim"], encoder.image_size)
        return Reference(method, from_simmim, decayed)
    config = ClassifyConfig(num_classes=arguments.get("MODEL.NUM_CLASSES", 1000), fc_norm=kind == "vit")
    return Reference(Classify(build_classifier(encoder, config), 0.1), from_plain, decayed)


def timm_network(name: str, classes: int, rename: Callable[[str], str]) -> Reference:
    """timm's factories, such as deit_tiny_patch16_224, cait_s24_224 and swin_tiny_patch4_window7_224."""
    kind, size = name.split("_")[:2]
    preset = ENCODERS[f"{'vit' if kind == 'deit' else kind}_{size}"]
    side = next(int(word) for word in reversed(name.split("_")) if word.isdigit())
    encoder = replace(preset, image_size=(side, side), **({"position": "learned"} if kind in ("vit", "deit") else {}))
    config = ClassifyConfig(num_classes=classes, pool="mean" if kind == "swin" else "cls", fc_norm=False)
    return Reference(Classify(build_classifier(encoder, config), 0.1), rename, ())


def fastmim_encoder(name: str, kind: str, arguments: dict[str, Any], fine_tune: bool) -> EncoderConfig:
    """FastMIM's factories: the size is in the name, arguments override."""
    size = next((word for word in name.split("_") if word in ("base", "large", "small")), "")
    preset = ENCODERS[f"{kind}_{size}"] if size else ENCODERS[kind]
    side = arguments.get("img_size", 224)
    changes: dict[str, Any] = {"image_size": (side, side)}
    for key in ("embed_dim", "depth", "num_heads", "depths", "window_size"):
        if key in arguments and hasattr(preset, key):
            value = arguments[key]
            changes[key] = tuple(value) if isinstance(value, list) else value
    if kind == "vit":
        return replace(preset, position="learned" if fine_tune else "sincos", **changes)
    window = next((int(word[1:]) for word in name.split("_") if word[0] == "w" and word[1:].isdigit()), None)
    changes.setdefault("window_size", window or preset.window_size)
    return replace(preset, absolute_position=arguments.get("ape", False), **changes)


def simmim_preset(name: str, kind: str, fine_tune: bool) -> EncoderConfig:
    """SimMIM's published networks by name, as in simmim_finetune_swin_base_w7_224."""
    words = name.split("_")
    side = next(int(word) for word in words if word in ("192", "224"))
    preset = ENCODERS[f"{kind}_{words[words.index(kind) + 1]}"]
    if kind == "vit":
        relative = "block" if fine_tune else "shared"
        changes = {"k_bias": False, "position": "none", "relative_position": relative, "layer_scale": 0.1}
        return replace(preset, image_size=(side, side), **changes)
    window = next(int(word[1:]) for word in words if word[0] == "w" and word[1:].isdigit())
    return replace(preset, image_size=(side, side), window_size=window)


def optimizer_groups(path: Path) -> Findings:
    """Every parameter's weight decay, layer and rate factor; parameters of one group stay together."""
    info = json.loads(path.read_text())
    with no_init_parameters():
        reference = reference_network({**info, "model": path.stem})
    train = TrainConfig(
        weight_decay=info["weight_decay"], layer_decay=info.get("layer_decay") or 1.0, decayed=reference.decayed
    )
    yield from group_findings(info, parameter_groups(reference.method, train), reference.rename)


def full_size(path: Path) -> Findings:
    """Names, shapes, order and count of a full-size network's parameters; nothing is compiled."""
    info = json.loads(path.read_text())
    with no_init_parameters():  # names and shapes only
        reference = reference_network(info)
    yield from full_size_findings(info, reference.method, reference.rename)


def full_size_findings(info: dict[str, Any], method: Any, rename: Callable[[str], str]) -> Findings:
    """A network against the list of a reference's parameters; recipes are held to it too (tests/test_recipes.py)."""
    ours = {p.name: p for p in method.get_parameters() if not p.name.endswith(".draws")}
    rows = [row for row in info["state_dict"] if not row[2].startswith("buffer")]
    names = [rename(row[0]) for row in rows]
    for name, (theirs, shape, kind) in zip(names, rows, strict=True):
        found = name in ours and math.prod(ours[name].shape) == math.prod(shape)
        same = found and (list(ours[name].shape) == shape or theirs == "decoder.0.weight")
        yield f"shape {theirs}", 0.0 if same else float("inf"), 0.0
        yield f"trained {theirs}", float(ours[name].requires_grad != (kind == "trainable")), 0.0
    yield "parameters", abs(sum(p.size for p in ours.values()) - info["total"]), 0.0
    # the references put mask token, fc_norm and head in different places; the networks keep their order
    # (and merging, which current timm puts before the blocks that follow it)
    parts = ("encoder.", "decoder.")
    moved = "downsample moved" in info.get("note", "")
    orders = [
        [name for name in some if name.startswith(parts) and not (moved and ".downsample." in name)]
        for some in (ours, names)
    ]
    yield "order", float(orders[0] != orders[1]), 0.0


# --- weights: transfer, resizing, conversion --------------------------------------------------------------------


def absolute(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")


def remap_tables(case: Case) -> Findings:
    """Arrays <pair>_src and <pair>_dst (SimMIM) or <pair>_simmim and <pair>_interpolate (FastMIM's two modes)."""
    rules = {"dst": "simmim", "simmim": "fastmim", "interpolate": "bicubic"}
    limit = case.info["tolerance"]["abs"]
    for name, theirs in case.data.items():
        pair, _, kind = name.rpartition("_")
        if kind == "src":
            continue
        old, new = (int("".join(c for c in side if c.isdigit())) for side in pair.split("_to_"))
        rule = TABLE_RULES[rules[kind]]
        ours = case.data[f"{pair}_src"]
        yield name, absolute(resize_offsets(ours, (old, old), (new, new), rule) if old != new else ours, theirs), limit
        places = case.info["pairs"][pair].get("source_positions")
        if places and isinstance(rule, Progression):
            yield f"{name} offsets", absolute(rule.offsets(old - 1, new - 1), np.array(places)), limit


def pos_embed(case: Case) -> Findings:
    """Arrays grid<a>_to_<b>_src and _dst, and sincos_<dim>_<side> with a row for the class token."""
    for name, theirs in case.data.items():
        if name.startswith("sincos"):
            dim, side = map(int, name.split("_")[1:])
            yield name, absolute(sincos_position(dim, (side, side), True)[0], theirs), case.info["tolerance"]["abs"]
        elif name.endswith("_dst"):
            old, new = (int(side) for side in name[4:-4].split("_to_"))
            ours = case.data[name.replace("_dst", "_src")]
            ours = resize_places(ours, (old, old), (new, new)) if old != new else ours
            yield name, absolute(ours, theirs), case.info["tolerance"]["abs"]


def remap(case: Case) -> Findings:
    """A pre-trained checkpoint into a classifier: what is taken, what is resized, and what stays fresh."""
    source = "simmim" if "simmim" in case.folder.name else "fastmim"
    before, after = case.info["pretrain_arguments"], case.info["finetune_arguments"]
    side = before["DATA.IMG_SIZE" if source == "simmim" else "img_size"]
    heads = before.get("num_heads")
    hints = Hints(image_size=(side, side), num_heads=heads if isinstance(heads, int) else None)
    done = foreign.to_ours(foreign.open_foreign(case.folder / "input.safetensors"), source, hints)
    if source == "simmim":
        encoder, fc_norm, classes = simmim_encoder(after), after["MODEL.TYPE"] == "vit", after["MODEL.NUM_CLASSES"]
    else:
        fc_norm, classes = isinstance(after["num_heads"], int), after["num_classes"]
        encoder = vit_config(after, position="learned") if fc_norm else swin_config(after)
    method = Classify(build_classifier(encoder, ClassifyConfig(num_classes=classes, fc_norm=fc_norm)), 0.0)
    weights = weights_of(method)
    fresh = {name: value.asnumpy().copy() for name, value in weights.items()}
    report = load_encoder(
        weights, done.weights, case.folder, Origin(done.origins, done.encoder, (), tuple(done.kept)), encoder
    )
    rename = rename_with(naming_for(source, weights))
    result = {rename(name): value for name, value in case.tensors("result").items()}
    for name, value in weights.items():
        theirs = result.pop(name, None)
        kind = "kept" if theirs is None else "table" if name in report.resized else "exact"
        tolerance = case.info["tolerance"]["tables_abs"] if kind == "table" else 0.0
        yield f"{kind} {name}", absolute(value.asnumpy(), fresh[name] if theirs is None else theirs), tolerance
    yield f"without a place: {sorted(result)[:3]}", float(bool(result)), 0.0
    missing = {rename(name) for name in case.info["missing_keys"] if not re.fullmatch(BUFFERS, name)}
    yield "names that stay fresh", float(missing != set(report.missing)), 0.0


def converted(case: Case, file: str, source: str = "", key: str = "", **hints: Any) -> Any:
    """A file of a case in our names; what only the user can say comes from the case's arguments."""
    heads = case.arguments.get("num_heads", case.arguments.get("MODEL.VIT.NUM_HEADS"))
    said = Hints(num_heads=heads if isinstance(heads, int) else None, **hints)
    return foreign.to_ours(foreign.open_foreign(case.folder / file, key), source, said)


def and_back(case: Case, file: str, done: Any) -> Findings:
    """To the names of the file and through both containers: the same names, number types, shapes and bits."""
    before = foreign.open_foreign(case.folder / file)
    tensors, key = foreign.to_theirs(done.weights, done.kept, done.note, "")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".pth", ".safetensors"):
            path = Path(folder) / f"back{suffix}"
            foreign.write_foreign(path, tensors, key if suffix == ".pth" else "")
            after = foreign.open_foreign(path)
            same = list(before.tensors) == list(after.tensors) and before.prefix == after.prefix
            for name, tensor in before.tensors.items():
                other = after.tensors.get(name)
                same = same and other is not None and (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
                same = same and other.read().tobytes() == tensor.read().tobytes()
            yield f"{file} and back as {suffix}", float(not same), 0.0


def assembled(done: Any, **changes: Any) -> Any:
    """The derived network with the converted weights, in evaluation mode."""
    if isinstance(done.method, ClassifyConfig):
        network: Any = build_classifier(done.encoder, done.method)
    elif done.method is None:
        network = Bare(build_encoder(done.encoder))
    else:
        method = replace(done.method, **changes)
        network = MaskedImageModel(build_encoder(done.encoder), method, done.encoder.image_size)
    load_weights(network, done.weights, lambda name: name)
    network.set_train(False)
    return network


class Bare(BareEncoder):
    """A bare encoder; also with only some of its patches, as MAE runs it."""

    def visible(self, image: Tensor, index: Tensor) -> Tensor:
        """(B, C, H, W) and patches (B, n) that are seen -> (B, 1 + n, dim)."""
        encoder = self.encoder
        tokens = encoder.embed(image) + encoder.pos_embed[:, 1:]
        batch, count, dim = tokens.shape[0], index.shape[1], tokens.shape[2]
        seen = ops.gather_elements(tokens, 1, ops.tile(index.expand_dims(-1), (1, 1, dim)))
        first = ops.tile(encoder.cls_token + encoder.pos_embed[:, :1], (batch, 1, 1))
        rows = ops.cat((first, seen), axis=1).reshape(batch * (1 + count), dim)
        for number in range(encoder.depth):
            rows = encoder.blocks[number](rows, batch, 1 + count)
        return encoder.norm(rows).reshape(batch, 1 + count, dim)


def container(case: Case) -> Findings:
    """Every file of a checkpoint case: its entries, its way back, and what its network computes."""
    files = [case.info["checkpoint"], *(text.split()[0] for text in case.info.get("other_files", []))]
    source = case.folder.name.split("_")[1]
    for file in files:
        found = foreign.open_foreign(case.folder / file)
        entries = [[name, list(tensor.shape), tensor.dtype] for name, tensor in found.tensors.items()]
        yield f"{file} entries", float(entries != case.info["state_dict_entries"]), 0.0
        if "weights" in case.info:
            stored = case.tensors(Path(case.info["weights"]["file"]).stem)
            for name, theirs in stored.items():
                yield f"{file} {name}", absolute(found.tensors[name].array(), theirs), 0.0
        yield from and_back(case, file, converted(case, file))
    tables = {"": ""} | ({"_ema": "model_ema"} if "logits_ema" in case.data else {})
    for suffix, key in tables.items():
        done = converted(case, files[0], source if key == "" else "", key)
        yield from container_outputs(case, done, suffix)


def container_outputs(case: Case, done: Any, suffix: str) -> Findings:
    data = case.data
    image = Tensor(data["image"])
    if isinstance(done.method, ClassifyConfig):
        yield f"logits{suffix}", error(assembled(done)(image), data[f"logits{suffix}"]), case.forward
        return
    if "noise" in data:  # the tiny network's arguments, which differ from those in its file
        config = fastmim_config(case.arguments, case.info["call"]["mask_ratio"], done.encoder.stride)
        network = assembled(done, mask_ratio=config.mask_ratio, mask_block=config.mask_block, target=config.target)
        loss, _, prediction, _ = GivenNoise(network)(image, Tensor(data["noise"]))
        yield "pred", error(prediction, data["pred"]), case.forward
    else:
        loss = GivenMask(assembled(done))(image, Tensor(data["mask"].astype(np.float32)))[0]
    yield "loss", error(loss, data["loss"]), case.forward


def hugging_face(case: Case) -> Findings:
    """Outputs of a converted model.safetensors with the config.json beside it."""
    file = case.info.get("model_file", {}).get("file", "model.safetensors")
    done = converted(case, file)
    yield from and_back(case, file, done)
    data = case.data
    network, image = assembled(done), Tensor(data["image"])
    if "encoder_all" in data:
        yield "encoder_all", error(network(image), data["encoder_all"]), case.forward
        count = data["encoder"].shape[1] - 1
        index = Tensor(np.argsort(data["noise"], axis=1, kind="stable")[:, :count].astype(np.int32))
        yield "encoder", error(Call(network, network.visible)(image, index), data["encoder"]), case.forward
    elif "mask" in data:
        rows, cols = (side // done.encoder.patch_size for side in done.encoder.image_size)
        mask = Tensor(data["mask"].reshape(-1, rows, cols).astype(np.float32))
        loss, _, prediction, _ = GivenMask(network)(image, mask)
        restored = network.target.to_image(prediction.asnumpy(), data["image"])
        yield "reconstruction", error(restored, data["reconstruction"]), case.forward
        yield "loss", error(loss, data["loss"]), case.forward
    else:
        yield "logits", error(network(image), data["logits"]), case.forward
        yield "last_hidden_state", error(network.encoder(image), data["last_hidden_state"]), case.forward


def timm(case: Case) -> Findings:
    """Outputs of a converted classifier; features are pooled (timm 0.5.4), all tokens, or a map (current)."""
    side = case.arguments["img_size"]
    file = case.info["checkpoint"]["file"]
    done = converted(case, file, image_size=(side, side))
    for name, theirs in case.tensors("weights").items():
        ours = foreign.open_foreign(case.folder / file).tensors[name]
        yield name, absolute(ours.array(), theirs), 0.0
    yield from and_back(case, file, done)
    data = case.data
    network, image = assembled(done), Tensor(data["image"])
    yield "logits", error(network(image), data["logits"]), case.forward
    sequence = network.encoder(image).asnumpy()
    if "features_dist" in data:
        yield "features_cls", error(sequence[:, 0], data["features_cls"]), case.forward
        yield "features_dist", error(sequence[:, 1], data["features_dist"]), case.forward
    elif data["features"].ndim == 2:
        yield "features", error(Call(network, network.features)(image), data["features"]), case.forward
    else:
        theirs = data["features"].reshape(len(sequence), -1, sequence.shape[-1])
        yield "features", error(sequence, theirs), case.forward


def evaluation_transform(case: Case) -> Findings:
    """Resize, centre crop and normalise as `eval.py` does; the same filter on stated boxes (training crops)."""
    data = case.data
    for row in case.info["eval"]:
        size = (row["crop"], row["crop"])
        steps = Loader(None, DataConfig(), size, 3, 1, ("image",), training=False).operations()[0][0][1:]
        image = data[f"image_{row['image']}"]
        for step in steps[:2]:
            image = step(image)
        yield row["array"], float(np.abs(image.astype(int) - data[row["array"]]).max()), 0.0
        if "float_array" in row:
            for step in steps[2:]:
                image = step(image)
            yield row["float_array"], error(image, data[row["float_array"]]), case.info["tolerance"]["float32_rel"]
    for row in case.info["random_resized_crop"]:
        image, size = data[f"image_{row['image']}"], (row["size"], row["size"])
        top, left, height, width = box = row["top_left_height_width"]
        if row["interpolation"] == "bicubic":
            part = np.ascontiguousarray(image[top : top + height, left : left + width])
            image = vision.Resize(size, Inter.PILCUBIC)(part)
        else:
            image = np.asarray(augment.resized_crop(Image.fromarray(image), box, size))
        yield row["array"], float(np.abs(image.astype(int) - data[row["array"]]).max()), 0.0
    for row in case.info["fallback_boxes"]:
        never = augment.ResizedCrop(
            (1, 1), tuple(row["scale"]), tuple(row["ratio"])
        )  # these scales and ratios never fit
        found = never.draw(row["height"], row["width"], np.random.default_rng(0))
        yield f"box of {row['width']}x{row['height']}", float(list(found) != row["top_left_height_width"]), 0.0


def group_findings(info: dict[str, Any], groups: list[Any], rename: Callable[[str], str]) -> Findings:
    ours = {p.name: (number, group) for number, group in enumerate(groups) for p in group.parameters}
    columns = info["params_columns"]
    pairing: dict[int, int] = {}
    for row in info["params"]:
        theirs = dict(zip(columns, row, strict=True))
        number, group = ours.pop(rename(theirs["name"]))
        yield f"weight_decay {theirs['name']}", abs(group.weight_decay - theirs["weight_decay"]), 0.0
        if "lr_scale" in theirs:
            yield f"lr_scale {theirs['name']}", abs(group.lr_scale / theirs["lr_scale"] - 1), 1e-9
            yield f"layer_id {theirs['name']}", abs(group.layer - theirs["layer_id"]), 0.0
        same = pairing.setdefault(theirs["group"], number) == number
        yield f"group {theirs['name']}", 0.0 if same else float("inf"), 0.0
    yield f"parameters in no reference group: {sorted(ours)[:3]}", float("inf") if ours else 0.0, 0.0


# --- augmentation -----------------------------------------------------------------------------------------------


class GivenDraws(nn.Cell):
    """Mixing with stored draws: (image, label, lambda, box, CutMix or not) -> mixed images, soft targets."""

    def __init__(self, classes: int, smoothing: float):
        super().__init__()
        self.classes, self.smoothing = classes, smoothing

    def construct(
        self, image: Tensor, label: Tensor, lam: Tensor, box: Tensor, use_cutmix: Tensor
    ) -> tuple[Tensor, Tensor]:
        return mix(image, soft_targets(label, self.classes, self.smoothing), lam, box, use_cutmix)


class SoftLoss(nn.Cell):
    """Cross-entropy with soft targets and its gradient for the logits; labels are smoothed."""

    def __init__(self, classes: int, smoothing: float):
        super().__init__()
        self.classes, self.smoothing = classes, smoothing
        self.value_and_grad = ops.value_and_grad(soft_cross_entropy, 0)

    def construct(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.value_and_grad(logits, soft_targets(target, self.classes, self.smoothing))


class Box(nn.Cell):
    """The box around a centre: (lambda, (row, column)) -> (4,)."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.size = (height, width)

    def construct(self, lam: Tensor, centre: Tensor) -> Tensor:
        return cut_box(lam, centre, self.size[0], self.size[1])


def mixup(case: Case) -> Findings:
    """Boxes, mixed images and soft targets of stored draws; losses and gradients of stored logits."""
    data, smoothing = case.data, case.arguments["label_smoothing"]
    yield from mixup_boxes(case)
    for classes in np.atleast_1d(case.arguments["num_classes"]).tolist():
        cell, label = GivenDraws(classes, smoothing), Tensor(data[f"label{classes}"].astype(np.int32))
        mixed, soft = [], []
        for number, drawn in enumerate(data["lam_drawn"]):
            box = Tensor(data["box"][number].astype(np.int32))
            use_cutmix = Tensor(bool(data["use_cutmix"][number]))
            outputs = cell(Tensor(data["image"]), label, Tensor(drawn, ms.float32), box, use_cutmix)
            mixed.append(outputs[0].asnumpy())
            soft.append(outputs[1].asnumpy())
        yield f"mixed ({classes} classes)", error(np.stack(mixed), data["mixed"]), case.forward
        yield f"soft{classes}", error(np.stack(soft), data[f"soft{classes}"]), case.forward
        yield from mixup_losses(case, classes, smoothing)


def mixup_losses(case: Case, classes: int, smoothing: float) -> Findings:
    data, cell = case.data, SoftLoss(classes, smoothing)
    label = data[f"label{classes}"].astype(np.int32)
    logits = data.get(f"logits{classes}", np.zeros((0, 0, 0), np.float32))
    for kind in ("soft_ce", "label_smoothing_ce"):
        name = f"{kind}{classes}"
        for number, row in enumerate(logits if name in data else ()):
            target = Tensor(data[f"soft{classes}"][number] if kind == "soft_ce" else label)
            loss, gradient = cell(Tensor(row), target)
            yield f"{name}[{number}]", error(loss, data[name][number]), case.forward
            if f"{name}_grad" in data:
                yield f"{name}_grad[{number}]", error(gradient, data[f"{name}_grad"][number]), case.gradient


def mixup_boxes(case: Case) -> Findings:
    """The box of each CutMix draw: its centre is drawn again from the stored seed, in the stored order."""
    data, arguments = case.data, case.arguments
    if arguments.get("cutmix_minmax"):
        return
    height, width = data["image"].shape[2:]
    both = arguments["mixup_alpha"] > 0 and arguments["cutmix_alpha"] > 0
    for number, seed in enumerate(case.info.get("numpy_seeds", [])):
        if not data["use_cutmix"][number]:
            continue
        rng = np.random.RandomState(seed)
        for _ in range(2 if both else 1):
            rng.rand()
        lam = rng.beta(arguments["cutmix_alpha"], arguments["cutmix_alpha"])
        yield f"lam_drawn[{number}]", abs(lam - data["lam_drawn"][number]), 1e-9
        centre = np.array([rng.randint(0, height), rng.randint(0, width)], np.float32)
        ours = Box(height, width)(Tensor(lam, ms.float32), Tensor(centre)).asnumpy()
        yield f"box[{number}]", float(np.abs(ours - data["box"][number]).max()), 0.0


def randaugment_ops(case: Case) -> Findings:
    """Single operations and recorded sequences on one image, in grey levels, exactly."""
    fill = tuple(case.info["hparams"]["img_mean"])
    for entry in case.info["operations"]:
        argument = argument_of(entry["op"], entry["level"], entry["sign"] or 1)
        wanted = entry["arg"]
        name = f"{entry['op']}[{entry['index']}]"
        same = (argument is None) == (wanted is None)
        yield f"argument {name}", abs((argument or 0) - (wanted or 0)) if same else float("inf"), 1e-9
        resample = getattr(augment.Image.Resampling, entry["interpolation"].upper())
        ours = changed(case.data["image"], [(entry["op"], argument)], fill, resample)
        yield f"output {name}", grey_levels(ours, case.data["output"][entry["index"]]), 0.0
    for entry in case.info["sequences"]:
        ours = changed(case.data["image"], [(step["op"], step["arg"]) for step in entry["applied"]], fill)
        theirs = case.data["sequence_output"][entry["index"]]
        yield f"sequence_output[{entry['index']}]", grey_levels(ours, theirs), 0.0


def argument_of(name: str, level: float, sign: int) -> float | None:
    rule = augment.ARGUMENTS.get(name)
    return rule(level, sign) if rule else None


def changed(
    image: np.ndarray,
    operations: list[tuple[str, float | None]],
    fill: Any,
    resample: augment.Image.Resampling = augment.Image.Resampling.BICUBIC,
) -> np.ndarray:
    picture = augment.Image.fromarray(image)
    for name, argument in operations:
        picture = augment.apply_operation(picture, name, argument, fill, resample)
    return np.asarray(picture)


def grey_levels(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two uint8 images."""
    return float("inf") if ours.shape != theirs.shape else float(np.abs(ours.astype(int) - theirs).max())


def randaugment_rules(path: Path) -> Findings:
    """What a text of timm's syntax means: operations, probabilities, and arguments at levels."""
    info = json.loads(path.read_text())
    config = parse_auto_augment(info["config"])
    names = list(augment.operations_of(config))
    yield "operations", float(names != info["operations"]), 0.0
    yield "num_layers", abs(config.operations - info["num_layers"]), 0.0
    yield "probability_per_op", abs(augment.APPLY - info["probability_per_op"]), 0.0
    yield "magnitude", abs(config.magnitude - info["magnitude"]), 0.0
    yield "magnitude_std", abs(config.std - (info["magnitude_std"] or 0)), 0.0
    yield "level_denominator", abs(augment.LEVELS - info["level_denominator"]), 0.0
    for name, levels in info["argument_at_level"].items():
        for text, theirs in levels.items():
            ours = [argument_of(name, float(text), sign) for sign in (1, -1)]
            if theirs is None:
                yield f"{name} at {text}", 0.0 if ours == [None, None] else float("inf"), 0.0
                continue
            wanted = theirs if len(theirs) == 2 else theirs * 2  # one value: the sign does not matter
            yield f"{name} at {text}", float(np.abs(np.subtract(np.array(ours, float), wanted)).max()), 1e-9


def random_erasing(path: Path) -> Findings:
    """Ranges that are drawn from, and the box of each stated draw."""
    info = json.loads(path.read_text())
    used = augment.RandomErasing(info["used_as"]["probability"], tuple(info["area_fraction"]))
    aspect = [math.exp(-used.log_aspect), math.exp(used.log_aspect)]
    yield "area_fraction of the default", error(DataConfig().erasing_area, np.array(info["area_fraction"])), 1e-9
    yield "aspect_ratio", error(aspect, np.array(info["aspect_ratio"])), 1e-9
    yield "tries", abs(used.tries - info["tries"]), 0.0
    for number, box in enumerate(info["boxes"]):
        size = augment.erased_size(box["height"], box["width"], box["area_fraction"], box["log_aspect"])
        same = (size is not None) == box["accepted"] and (size is None or size == (box["h"], box["w"]))
        yield f"boxes[{number}]", 0.0 if same else float("inf"), 0.0
        if size is not None:
            ours = [(0, side - cut) for side, cut in zip((box["height"], box["width"]), size, strict=True)]
            yield f"boxes[{number}] place", error(ours, np.array([box["top_range"], box["left_range"]])), 0.0


# --- manifold distillation --------------------------------------------------------------------------------------


def manifold_config(arguments: dict[str, Any], **changes: Any) -> ManifoldConfig:
    """The reference's flags, those of mf_loss or of a whole run."""
    keys = {"w_sample": "w_sample", "w_patch": "w_patch", "w_rand": "w_rand", "K": "samples"}
    keys |= {"max_patch_num": "max_patch_num", "distillation_beta": "beta"}
    keys |= {"distillation_alpha": "alpha", "distillation_tau": "tau", "distillation_type": "distillation"}
    for theirs in (("s_id", "layer_ids_s"), ("t_id", "layer_ids_t")):
        keys |= dict.fromkeys(theirs, "student_layers" if theirs[0] == "s_id" else "teacher_layers")
    taken = {ours: arguments[theirs] for theirs, ours in keys.items() if theirs in arguments}
    taken |= {key: tuple(taken[key]) for key in ("student_layers", "teacher_layers")}
    if taken.get("distillation") == "none":  # the reference's then has no relations either
        taken["beta"] = 0.0
    return ManifoldConfig(**taken | changes)


class SumOfRelations(nn.Cell):
    """Sequences of the student's blocks -> sum of the relation losses, and each of them."""

    def __init__(self, relations: Relations, places: tuple[int, ...], teachers: Any, indices: Any):
        super().__init__(auto_prefix=False)
        self.relations, self.places, self.teachers, self.indices = relations, places, teachers, indices

    def construct(self, *students: Tensor) -> tuple[Tensor, ...]:
        chosen = tuple([students[place] for place in self.places])
        sample, patch, rand, _ = self.relations(chosen, self.teachers, self.indices)
        return sample + patch + rand, sample, patch, rand


class WithInputGradients(nn.Cell):
    """Outputs of a Cell that returns the loss first, and the loss's gradient for every input."""

    def __init__(self, cell: nn.Cell, inputs: int):
        super().__init__(auto_prefix=False)
        self.value_and_grad = ops.value_and_grad(cell, tuple(range(inputs)), None, has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Any, Any]:
        return self.value_and_grad(*inputs)


def manifold_losses(case: Case) -> Findings:
    """mf_loss on stored block outputs: losses, those of each pair without weights, gradients, merged tokens."""
    data, config = case.data, manifold_config(case.arguments)
    extra = data["student_0"].shape[1] - data["teacher_0"].shape[1]  # of the first blocks, as there
    pairs = list(zip(config.student_layers, config.teacher_layers, strict=True))
    maps, indices = [], []
    for number, (ours, theirs) in enumerate(pairs):
        own, given = data[f"student_{ours}"].shape[1] - extra, data[f"teacher_{theirs}"].shape[1]
        limit = config.max_patch_num
        merged = math.isqrt(limit) ** 2 if limit and own > limit else own
        maps.append(((own, 1), (given, 1), (merged, 1)))
        indices.append(Tensor(data[f"perm_{number}"][: config.samples].astype(np.int32)))
    blocks = sorted(set(config.student_layers))
    students = [Tensor(data[f"student_{block}"]) for block in blocks]
    teachers = tuple(Tensor(data[f"teacher_{theirs}"]) for _, theirs in pairs)
    places = tuple(blocks.index(ours) for ours, _ in pairs)
    whole = SumOfRelations(Relations(config, tuple(maps)), places, teachers, tuple(indices))
    (_, *losses), grads = WithInputGradients(whole, len(blocks))(*students)
    yield "losses", error(np.array([float(loss) for loss in losses]), data["losses"]), case.forward
    for block, grad in zip(blocks, grads if len(blocks) > 1 else [grads], strict=True):
        yield f"grad_student_{block}", error(grad, data[f"grad_student_{block}"]), case.gradient
    alone = replace(config, w_sample=1.0, w_patch=1.0, w_rand=1.0)
    for number in range(len(pairs)):
        one = Relations(alone, (maps[number],))
        pair = SumOfRelations(one, (places[number],), (teachers[number],), (indices[number],))
        _, sample, patch, rand = (float(value) for value in pair(*students))
        yield f"per_layer[{number}]", error(np.array([patch, sample, rand]), data["per_layer"][number]), case.forward
    if "merged_student" in data:
        first = Tensor(data[f"student_{config.student_layers[0]}"][:, extra:])
        yield "merged_student", error(merge(first, config.max_patch_num), data["merged_student"]), case.forward


def timm_encoder(arguments: dict[str, Any]) -> EncoderConfig:
    """A network of timm 0.5.4 by its class and arguments."""
    kind = arguments.get("cls", "VisionTransformer").lower()
    side = arguments["img_size"]
    if "swin" in kind:
        return swin_config(arguments, patch_size=arguments.get("patch_size", 4))
    if "cait" in kind:
        keys = ("patch_size", "embed_dim", "depth", "depth_token_only", "num_heads", "qkv_bias")
        taken = {key: arguments[key] for key in keys if key in arguments}
        scale = arguments.get("init_scale", arguments.get("init_values", 1e-5))
        ratio = float(arguments.get("mlp_ratio", 4.0))
        return CaiTConfig(image_size=(side, side), layer_scale=scale, mlp_ratio=ratio, **taken)
    return vit_config(arguments, position="learned", distilled=arguments.get("distilled", False))


def timm_classifier(arguments: dict[str, Any], weights: dict[str, np.ndarray]) -> tuple[EncoderConfig, Any, Any]:
    """Encoder, classifier with the reference's weights, and the name of ours for each of theirs."""
    encoder = timm_encoder(arguments)
    pool: Any = "mean" if isinstance(encoder, SwinConfig) else "cls"
    network = build_classifier(encoder, ClassifyConfig(num_classes=arguments["num_classes"], pool=pool, fc_norm=False))
    rename = rename_with(recognise(list(weights)).naming)
    load_weights(network, trained(weights), rename)
    return encoder, network, rename


class GivenTokens(nn.Cell):
    """A distillation whose tokens for relations at random are stored: (image, label) -> loss and parts."""

    def __init__(self, method: ManifoldDistiller, indices: tuple[Tensor, ...]):
        super().__init__(auto_prefix=False)
        self.method, self.indices = method, indices

    def construct(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        image, target = self.method.mixed(image, label)
        return self.method.run(image, target, self.method.ask(image), self.indices)


class Sequences(nn.Cell):
    """Image -> logits, and the sequences after some blocks."""

    def __init__(self, network: Any, blocks: tuple[int, ...]):
        super().__init__(auto_prefix=False)
        self.network, self.blocks = network, blocks

    def construct(self, image: Tensor) -> tuple[Tensor, ...]:
        encoder = self.network.encoder
        sequence, taken = encoder.outputs(encoder.embed(image), self.blocks)
        return (self.network.logits(sequence), *taken)


def manifold(case: Case) -> Findings:
    """DistillationLoss with a student and a teacher: components, gradients, outputs of both networks."""
    data, folder = case.data, case.folder
    if not (folder / "student.safetensors").exists():
        folder = folder.parent / case.info["weights"].split("of case ")[1].split()[0]
    arguments = case.arguments
    encoder, student, rename = timm_classifier(arguments["student"], load_file(str(folder / "student.safetensors")))
    theirs, teacher, _ = timm_classifier(arguments["teacher"], load_file(str(folder / "teacher.safetensors")))
    for name, network in (("student", student), ("teacher", teacher)):
        stored = {"logits", *(key.removeprefix(f"{name}_") for key in data if key.startswith(f"{name}_block_"))}
        blocks = tuple(sorted(int(key.removeprefix("block_")) for key in stored - {"logits"}))
        if f"{name}_logits" in data:
            ours = Sequences(network, blocks)(Tensor(data["image"]))
            for key, found in zip(("logits", *(f"block_{block}" for block in blocks)), ours, strict=True):
                yield f"{name}_{key}", error(found, data[f"{name}_{key}"]), case.forward
    smoothing = arguments.get("smoothing", 0.1) if "LabelSmoothing" in case.info["base_criterion"] else 0.0
    config = manifold_config(
        arguments,
        num_classes=arguments["student"]["num_classes"],
        teacher_encoder=theirs,
        label_smoothing=smoothing,
    )
    method = ManifoldDistiller(student, config, relation_maps(encoder, config), teacher)
    perms = [data[f"perm_{number}"][: config.samples] for number in range(len(config.student_layers))]
    network = GivenTokens(method, tuple(Tensor(perm.astype(np.int32)) for perm in perms))
    label = data["label"] if data["label"].ndim == 2 else data["label"].astype(np.int32)
    weights = ms.ParameterTuple(method.trainable_params())
    (loss, _, *parts), grads = Gradients(network, weights)(Tensor(data["image"]), Tensor(label))
    yield "total", error(loss, data["total"]), case.forward
    expected = np.zeros(5)  # type none gives the base loss alone
    expected[: len(data["components"])] = data["components"]
    for name, ours, part in zip(method.parts[1:], parts, expected, strict=True):
        yield name, abs(float(ours) - part) / max(abs(part), 1e-12) if part else abs(float(ours)), case.forward
    yield from gradient_findings(case, [w.name for w in weights], grads, rename)


def distilled_student(case: Case) -> Findings:
    """A student with two heads: what training sees of them, what evaluation makes of them."""
    data = case.data
    encoder, network, _ = timm_classifier(case.arguments, case.tensors("weights"))
    image, last = Tensor(data["image"]), len(encoder.block_maps) - 1
    first, second = Call(network, network.heads)(network.encoder(image))
    yield "train_cls", error(first, data["train_cls"]), case.forward
    yield "train_dist", error(second, data["train_dist"]), case.forward
    logits, block = Sequences(network, (last,))(image)
    yield "eval_logits", error(logits, data["eval_logits"]), case.forward
    yield "last_block", error(block, data["last_block"]), case.forward


#: prefix of the case name -> comparison; the longest prefix wins
CASES: dict[str, Callable[[Case], Findings]] = {
    "hog_": hog,
    "simmim_": simmim,
    "simmim_ft": simmim_ft,
    "swinv2_simmim": simmim,
    "swinv2_cls": simmim_ft,
    "train10_simmim": train10_simmim,
    "masks": masks,
    "pos_sincos": pos_sincos,
    "mixup": mixup,
    "randaugment_ops": randaugment_ops,
    "fastmim_vit_": fastmim_vit,
    "fastmim_swin_": fastmim_swin,
    "fastmim_ft_vit": fastmim_ft_vit,
    "fastmim_ft_swin": fastmim_ft_swin,
    "train10_fastmim_vit": train10_fastmim_vit,
    "train10_fastmim_swin": train10_fastmim_swin,
    "remap_": remap,
    "remap_simmim_tables": remap_tables,
    "remap_fastmim_tables": remap_tables,
    "pos_embed_": pos_embed,
    "checkpoint_": container,
    "hf_": hugging_face,
    **{f"timm_{current}{kind}": timm for current in ("", "current_") for kind in ("vit", "deit", "cait", "swin")},
    "random_resized_crop_eval": evaluation_transform,
    "kd_mf_": manifold_losses,
    "kd_full_": manifold,
    "kd_distilled_student": distilled_student,
}
#: folder / prefix of the file name -> comparison of one JSON file
FILES: dict[str, Callable[[Path], Findings]] = {
    "schedules/fastmim": fastmim_schedule,
    "schedules/simmim": simmim_schedule,
    "schedules/manifold_kd": manifold_schedule,
    "optimizer_groups/fastmim": optimizer_groups,
    "optimizer_groups/simmim": optimizer_groups,
    "optimizer_groups/manifold_kd": optimizer_groups,
    "full_size/fastmim": full_size,
    "full_size/simmim": full_size,
    **{
        f"full_size/timm{version}_{kind}": full_size
        for version in ("054", "_current")
        for kind in ("cait", "deit", "swin", "vit")
    },
    "augmentation/randaugment": randaugment_rules,
    "augmentation/random_erasing": random_erasing,
}


def plan(folder: Path) -> Iterator[tuple[str, Callable[[], Findings] | None]]:
    """Every case below a folder with what compares it, None if nothing does."""
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        if (path / "case.json").exists():
            yield path.name, compare_with(CASES, path.name, path, wrap=Case)
        else:
            for file in sorted(path.glob("*.json")):
                name = f"{path.name}/{file.stem}"
                yield name, compare_with(FILES, name, file)


def compare_with(table: dict[str, Any], name: str, path: Path, wrap: Callable[[Path], Any] = Path) -> Any:
    prefixes = [prefix for prefix in table if name.startswith(prefix)]
    if not prefixes:
        return None
    compare = table[max(prefixes, key=len)]
    return lambda: compare(wrap(path))


def check(name: str, compare: Callable[[], Findings]) -> bool:
    """Run one case and print its line."""
    worst = 0.0
    try:
        for array, found, tolerance in compare():
            if not found <= tolerance:
                print(f"FAIL {name} {array} {found:.3g}", flush=True)
                return False
            worst = max(worst, found)
    except Exception as reason:  # a case that cannot run has failed; the other cases still run
        print(f"FAIL {name} {type(reason).__name__}: {' '.join(str(reason).split())[:200]}", flush=True)
        return False
    print(f"PASS {name} {worst:.3g}", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="compare with reference numbers")
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", help="only the cases whose name starts with one of these")
    args = parser.parse_args()
    if not args.folder.is_dir():
        print(f"error: {args.folder} is not a folder of reference cases", file=sys.stderr)
        return 2
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    passed = failed = uncovered = 0
    for name, compare in plan(args.folder):
        if args.cases and not name.startswith(tuple(args.cases)):
            continue
        if compare is None:
            uncovered += 1
            print(f"not covered {name}", flush=True)
        elif check(name, compare):
            passed += 1
        else:
            failed += 1
    print(f"parity: {passed} passed, {failed} failed, {uncovered} not covered")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    raise SystemExit(main())
