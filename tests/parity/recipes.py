"""Schedules, parameter groups, and names and shapes of full-size networks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from mindspore.nn.utils import no_init_parameters

from src.config import (
    METHODS,
    CaiTConfig,
    ClassifyConfig,
    EncoderConfig,
    MAEConfig,
    MIMConfig,
    PixelsConfig,
    SwinConfig,
    SwinV2Config,
    TrainConfig,
    TransformerDecoderConfig,
    ViTConfig,
)
from src.engine.optim import parameter_groups
from src.engine.schedule import learning_rate, position
from src.methods import Classify, MaskedAutoencoder, MaskedImageModel
from src.models import build_classifier, build_encoder
from src.tasks.networks import BareEncoder
from src.weights.derive import Hints, derive_method
from src.weights.names import BUFFERS
from tests.parity.common import TOKENS, Findings, StatedArguments, UnknownError, read_json, rename_with
from tests.parity.networks import buffer_like, encoder_of, is_buffer, naming_of, stated_encoder

#: (encoder, fine-tuning) -> tokens and tables with weight decay in SimMIM (no_weight_decay of its four networks)
SIMMIM_DECAYED: dict[tuple[str, bool], tuple[str, ...]] = {
    ("swin", False): TOKENS[2:],
    ("swin", True): (),
    ("vit", False): TOKENS[1:],
    ("vit", True): TOKENS[1:],
}


def fastmim_schedule(path: Path) -> Findings:
    for name, case in read_json(path)["cases"].items():
        kind: Any = "step" if case.get("decay_epoch") else "cosine"
        train = TrainConfig(
            epochs=case["epochs"],
            warmup_epochs=case["warmup_epochs"],
            min_lr=case["min_lr"],
            schedule=kind,
            decay_epochs=case.get("decay_epoch") or 1,
        )
        worst = 0.0
        per_epoch = case["steps_per_epoch"]
        for number, theirs in enumerate(case["lr_used"]):
            here = position(number // per_epoch, number % per_epoch, per_epoch, case.get("accum_iter", 1))
            ours = [learning_rate(train, case["lr"], here, scale) for scale in case.get("layer_scales", [1.0])]
            worst = max(worst, float(np.max(np.abs(np.subtract(ours, theirs)) / np.maximum(np.abs(theirs), 1e-30))))
        yield name, worst, 1e-9


def simmim_schedule(path: Path) -> Findings:
    for name, case in read_json(path)["cases"].items():
        changed = {key.split(".")[-1]: value for key, value in case.get("overrides", {}).items()}
        train = TrainConfig(
            rule="timm",
            schedule=known_schedule(case["scheduler"]),
            epochs=case["epochs"],
            warmup_epochs=case["warmup_epochs"],
            base_lr=case["base_lr"],
            lr_batch=0,
            warmup_lr=case["warmup_lr"],
            min_lr=case["min_lr"],
            milestones=tuple(case.get("multisteps", ())),
            gamma=changed.get("DECAY_RATE", 0.1) if case["scheduler"] == "step" else case.get("gamma", 0.1),
            decay_epochs=changed.get("DECAY_EPOCHS", 30),
        )
        updates, worst = case["n_iter_per_epoch"], 0.0
        for number, theirs in enumerate(case["lr_used"]):
            ours = [
                learning_rate(train, train.base_lr, number / updates, s, updates)
                for s in case.get("layer_scales", [1.0])
            ]
            worst = max(worst, float(np.max(np.abs(np.subtract(ours, theirs)) / np.maximum(np.abs(theirs), 1e-30))))
        yield name, worst, 1e-9


def known_schedule(name: str) -> Any:
    known = get_args(get_type_hints(TrainConfig)["schedule"])
    if name not in known:
        raise UnknownError(f"schedule {name} is not supported")
    return name


def manifold_schedule(path: Path) -> Findings:
    """timm's scheduler, stepped after each epoch with the number of that epoch."""
    for name, case in read_json(path)["cases"].items():
        args = StatedArguments(case["args"])
        if args.get("lr_noise") is not None:
            raise UnknownError("its rates have noise")
        epochs = len(case["lr_used_per_epoch"])
        train = TrainConfig(
            rule="timm",
            per_epoch=True,
            schedule=known_schedule(args["sched"]),
            epochs=args["epochs"],
            warmup_epochs=args["warmup_epochs"],
            base_lr=args["lr"],
            lr_batch=0,
            warmup_lr=args["warmup_lr"],
            min_lr=args["min_lr"],
            decay_epochs=args["decay_epochs"] if args["sched"] == "step" else 1,
            gamma=args["decay_rate"] if args["sched"] == "step" else 0.1,
        )
        for updates, update in ((1, 0), (2, 1), (9, 8)):  # the rate does not depend on the updates per epoch
            positions = [position(epoch, update, updates, 1) for epoch in range(epochs)]
            ours = [learning_rate(train, train.base_lr, epoch, 1.0, updates) for epoch in positions]
            yield name, float(np.abs(np.array(ours) / case["lr_used_per_epoch"] - 1).max()), 1e-9


@dataclass(frozen=True)
class ReferenceNetwork:
    """Our network for one of the reference data.

    Attributes:
        method: our network.
        rename: function from their names to ours.
        decayed: as `train.decayed`.
    """

    method: Any
    rename: Callable[[str], str]
    decayed: tuple[str, ...]


#: starts of file names in optimizer_groups/: the source whose rule for weight decay they follow
GROUP_SOURCES = ("fastmim", "simmim", "manifold_kd")


def reference_network(info: dict[str, Any]) -> ReferenceNetwork:
    """The network of a file in full_size/, from its arguments and its list of shapes."""
    arguments = StatedArguments(info.get("arguments") or {})
    rows = [(*row, "")[:3] for row in info["state_dict"]]
    naming = naming_of([row[0] for row in rows])
    rename = rename_with(naming)
    parameters = [row for row in rows if not is_buffer(naming, row)]
    shapes = {rename(name): tuple(shape) for name, shape, _ in parameters}
    buffers = {name: buffer_like(name, shape) for name, shape, kind in rows if is_buffer(naming, (name, shape, kind))}
    heads = info["num_heads"] if isinstance(info.get("num_heads"), int) else 1  # no shape depends on a ViT's heads
    encoder = stated_encoder(encoder_of(shapes, buffers, arguments, heads), arguments)
    frozen = {rename(name) for name, _, kind in parameters if kind == "frozen"}
    if isinstance(encoder, ViTConfig) and "encoder.pos_embed" in frozen:
        encoder = replace(encoder, position="sincos")
    config = derive_method(shapes, encoder, Hints(target=str(arguments.get("mim_loss", "")).lower()))
    classes = arguments.get("num_classes", arguments.get("MODEL.NUM_CLASSES"))
    if isinstance(config, ClassifyConfig) and classes:
        config = replace(config, num_classes=classes)
    return ReferenceNetwork(network_of(encoder, config), rename, ())


def network_of(encoder: EncoderConfig, config: Any) -> Any:
    if config is None:
        return BareEncoder(build_encoder(encoder))
    if isinstance(config, ClassifyConfig):
        return Classify(build_classifier(encoder, config), 0.1)
    kind = MaskedAutoencoder if isinstance(config, MAEConfig) else MaskedImageModel
    return kind(build_encoder(encoder), config, encoder.image_size)


# --- parameter groups -------------------------------------------------------------------------------------------


def grouped_network(names: list[str], source: str) -> ReferenceNetwork:
    """A small network with these parameters; parameter groups depend on names and numbers of axes, not on sizes."""
    naming = naming_of(names)
    rename = rename_with(naming)
    ours = {rename(name) for name in names}
    encoder = small_encoder(ours)
    hierarchical = isinstance(encoder, SwinConfig)
    fine_tune = "mask_token" not in ours
    if source == "simmim":
        decayed = SIMMIM_DECAYED["swin" if hierarchical else "vit", fine_tune]
    else:  # timm's add_weight_decay ignores no_weight_decay_keywords, so it decays Swin's bias tables
        decayed = TOKENS if source == "fastmim" and not fine_tune else TOKENS[2:]
    config: Any = METHODS["simmim"]
    if fine_tune:
        if "head.weight" not in ours:
            raise UnknownError("its parameters have neither a head nor a mask token")
        fc_norm = "fc_norm.weight" in ours
        config = ClassifyConfig(num_classes=2, pool="mean" if hierarchical or fc_norm else "cls", fc_norm=fc_norm)
    elif any(name.startswith("decoder.norm.") for name in ours):
        bias = not has_part(ours, r"decoder\.blocks\.0\.") or has_part(ours, r"decoder\.blocks\.0\.attn\.qkv\.bias")
        depth = numbers(ours, r"decoder\.blocks\.(\d+)\.")
        width = 32 if depth else last_width(encoder)
        decoder = TransformerDecoderConfig(width=width, depth=depth, qkv_bias=bias)
        config = MIMConfig(target=PixelsConfig(), decoder=decoder)
    if not fine_tune:
        config = replace(config, mask_block=encoder.stride)
    return ReferenceNetwork(network_of(encoder, config), rename, decayed)


def last_width(encoder: EncoderConfig) -> int:
    return encoder.embed_dim * (2 ** (len(encoder.depths) - 1) if isinstance(encoder, SwinConfig) else 1)


def has_part(names: set[str], pattern: str) -> bool:
    return any(re.search(pattern, name) for name in names)


def numbers(names: set[str], pattern: str) -> int:
    """Number of values of the number that a pattern captures."""
    return 1 + max((int(m.group(1)) for name in names if (m := re.match(pattern, name))), default=-1)


def small_encoder(names: set[str]) -> EncoderConfig:
    """An encoder of few channels with these parameter names."""
    bias = has_part(names, r"^encoder\..*attn\.(q_bias|qkv\.bias)")
    if has_part(names, r"^encoder\.layers\."):
        num_stages = numbers(names, r"encoder\.layers\.(\d+)\.")
        depths = tuple(numbers(names, rf"encoder\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(num_stages))
        side = 8 * 2 ** (num_stages - 1)
        values: dict[str, Any] = {
            "image_size": (side, side),
            "embed_dim": 8,
            "depths": depths,
            "num_heads": (1,) * num_stages,
            "window_size": 2,
            "qkv_bias": bias,
            "patch_norm": "encoder.patch_embed.norm.weight" in names,
            "absolute_position": "encoder.absolute_pos_embed" in names,
        }
        if not has_part(names, r"attn\.logit_scale$"):
            return SwinConfig(**values)
        every = numbers(names, r"encoder\.layers\.\d+\.blocks\.(\d+)\.norm3\.")
        return SwinV2Config(**values, main_norm_every=every, pretrained_window_sizes=(0,) * max(num_stages, 4))
    depth = numbers(names, r"encoder\.blocks\.(\d+)\.")
    common: dict[str, Any] = {
        "image_size": (32, 32),
        "patch_size": 8,
        "embed_dim": 8,
        "depth": depth,
        "num_heads": 2,
        "qkv_bias": bias,
    }
    if has_part(names, r"^encoder\.blocks_token_only\."):
        return CaiTConfig(**common, depth_token_only=numbers(names, r"encoder\.blocks_token_only\.(\d+)\."))
    shared = "encoder.rel_pos_bias.relative_position_bias_table" in names
    per_block = "encoder.blocks.0.attn.relative_position_bias_table" in names
    return ViTConfig(
        **common,
        k_bias=not has_part(names, r"^encoder\..*attn\.q_bias"),
        class_token="encoder.cls_token" in names,
        distilled="encoder.dist_token" in names,
        position="learned" if "encoder.pos_embed" in names else "none",
        relative_position="shared" if shared else "block" if per_block else "none",
        layer_scale=0.1 if "encoder.blocks.0.gamma_1" in names else 0.0,
    )


def optimizer_groups(path: Path) -> Findings:
    """Weight decay, layer and rate factor of each parameter; and that groups contain the same parameters."""
    info = read_json(path)
    names = [dict(zip(info["params_columns"], row, strict=True))["name"] for row in info["params"]]
    source = next(source for source in GROUP_SOURCES if path.stem.startswith(source))
    with no_init_parameters():
        reference = grouped_network(names, source)
    train = TrainConfig(
        weight_decay=info["weight_decay"], layer_decay=info.get("layer_decay") or 1.0, decayed=reference.decayed
    )
    layer_of = reference.method.layer_of  # without layer decay our groups do not separate layers
    yield from group_findings(info, parameter_groups(reference.method, train), reference.rename, layer_of)


def full_size(path: Path) -> Findings:
    """Names, shapes, order and count of a full-size network's parameters; nothing is compiled."""
    info = read_json(path)
    with no_init_parameters():  # names and shapes only
        reference = reference_network(info)
    yield from full_size_findings(info, reference.method, reference.rename)


def full_size_findings(info: dict[str, Any], method: Any, rename: Callable[[str], str]) -> Findings:
    """Compare a network with the parameter list of a reference; tests/test_recipes.py does that for recipes."""
    ours = {p.name: p for p in method.get_parameters() if not p.name.endswith(".draws")}
    rows = [(*row, "")[:3] for row in info["state_dict"]]
    rows = [row for row in rows if not row[2].startswith("buffer") and not re.fullmatch(BUFFERS, row[0])]
    names = [rename(row[0]) for row in rows]
    for name, (theirs, shape, kind) in zip(names, rows, strict=True):
        same_size = name in ours and math.prod(ours[name].shape) == math.prod(shape)
        same = same_size and (list(ours[name].shape) == list(shape) or theirs == "decoder.0.weight")
        yield f"shape {theirs}", 0.0 if same else float("inf"), 0.0
        if kind:
            yield f"trained {theirs}", float(ours[name].requires_grad != (kind == "trainable")), 0.0
    extra = sorted(set(ours) - set(names))
    yield f"parameters without a reference: {extra[:3]}", float(bool(extra)), 0.0
    if "total" in info:
        yield "parameters", abs(sum(p.size for p in ours.values()) - info["total"]), 0.0
    # only encoder and decoder have the references' order; mask token, fc_norm and head differ among references, and
    # current timm lists merging before the next blocks
    parts = ("encoder.", "decoder.")
    moved = "downsample moved" in info.get("note", "")
    orders = [
        [name for name in some if name.startswith(parts) and not (moved and ".downsample." in name)]
        for some in (ours, names)
    ]
    yield "order", float(orders[0] != orders[1]), 0.0


def group_findings(
    info: dict[str, Any], groups: list[Any], rename: Callable[[str], str], layer_of: Callable[[str], int]
) -> Findings:
    ours = {p.name: (number, group) for number, group in enumerate(groups) for p in group.parameters}
    columns = info["params_columns"]
    pairing: dict[int, int] = {}
    for row in info["params"]:
        theirs = dict(zip(columns, row, strict=True))
        number, group = ours.pop(rename(theirs["name"]))
        yield f"weight_decay {theirs['name']}", abs(group.weight_decay - theirs["weight_decay"]), 0.0
        if "lr_scale" in theirs:
            yield f"lr_scale {theirs['name']}", abs(group.lr_scale / theirs["lr_scale"] - 1), 1e-9
            yield f"layer_id {theirs['name']}", abs(layer_of(rename(theirs["name"])) - theirs["layer_id"]), 0.0
        same = pairing.setdefault(theirs["group"], number) == number
        yield f"group {theirs['name']}", 0.0 if same else float("inf"), 0.0
    yield f"parameters in no reference group: {sorted(ours)[:3]}", float("inf") if ours else 0.0, 0.0
