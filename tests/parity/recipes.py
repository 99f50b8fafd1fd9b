"""Schedules, parameter groups, and names and shapes of full-size networks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mindspore.nn.utils import no_init_parameters

from src.config import ENCODERS, METHODS, ClassifyConfig, EncoderConfig, TrainConfig
from src.engine.optim import parameter_groups
from src.engine.schedule import learning_rate, position
from src.methods import Classify, MaskedImageModel
from src.models import build_classifier, build_encoder
from src.weights.names import recognise
from tests.parity.common import (
    TOKENS,
    Findings,
    from_fastmim,
    from_fastmim_pooled,
    from_plain,
    from_simmim,
    rename_with,
)
from tests.parity.pretraining import classifier_config, fastmim_config, simmim_encoder

#: what SimMIM decays all the same, by encoder and fine-tuning (no_weight_decay of its four networks)
SIMMIM_DECAYED: dict[tuple[str, bool], tuple[str, ...]] = {
    ("swin", False): TOKENS[2:],
    ("swin", True): (),
    ("vit", False): TOKENS[1:],
    ("vit", True): TOKENS[1:],
}


def fastmim_schedule(path: Path) -> Findings:
    for name, case in json.loads(path.read_text())["cases"].items():
        kind: Any = "step" if case["decay_epoch"] else "cosine"
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
        changed = {key.split(".")[-1]: value for key, value in case["overrides"].items()}
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
            gamma=changed.get("DECAY_RATE", 0.1) if case["scheduler"] == "step" else case["gamma"],
            decay_epochs=changed.get("DECAY_EPOCHS", 30),
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
        config = classifier_config(arguments["num_classes"], kind == "vit", bool(arguments.get("global_pool")))
        rename = from_fastmim_pooled if kind == "swin" else from_plain
        return Reference(Classify(build_classifier(encoder, config), 0.1), rename, TOKENS[2:])
    encoder = simmim_encoder(arguments) if arguments else simmim_preset(name, kind, fine_tune)
    decayed = SIMMIM_DECAYED[kind, fine_tune]
    if not fine_tune:
        method = MaskedImageModel(build_encoder(encoder), METHODS["simmim"], encoder.image_size)
        return Reference(method, from_simmim, decayed)
    means = arguments.get("MODEL.VIT.USE_MEAN_POOLING", True)
    config = classifier_config(arguments.get("MODEL.NUM_CLASSES", 1000), kind == "vit", means)
    return Reference(Classify(build_classifier(encoder, config), 0.1), from_plain, decayed)


def timm_network(name: str, classes: int, rename: Callable[[str], str]) -> Reference:
    """timm's factories, such as deit_tiny_patch16_224, cait_s24_224 and swin_tiny_patch4_window7_224."""
    kind, size = name.split("_")[:2]
    preset = ENCODERS[f"{'vit' if kind == 'deit' else kind}_{size}"]
    side = next(int(word) for word in reversed(name.split("_")) if word.isdigit())
    changes: dict[str, Any] = {"image_size": (side, side)}
    if kind in ("vit", "deit"):
        changes |= {"position": "learned", "distilled": "_distilled_" in name}
    for key, word in (("patch_size", "patch"), ("window_size", "window")):
        found = re.search(rf"_{word}(\d+)", name)
        if found and hasattr(preset, key):
            changes[key] = int(found.group(1))
    encoder = replace(preset, **changes)
    config = ClassifyConfig(num_classes=classes, pool="mean" if kind == "swin" else "cls", fc_norm=False)
    # timm's add_weight_decay asks for no keywords: it decays Swin's bias tables
    return Reference(Classify(build_classifier(encoder, config), 0.1), rename, TOKENS[2:])


def fastmim_encoder(name: str, kind: str, arguments: dict[str, Any], fine_tune: bool) -> EncoderConfig:
    """FastMIM's factories: the size is in the name, arguments override."""
    size = next((word for word in name.split("_") if word in ("base", "large", "small")), "")
    preset = ENCODERS[f"{kind}_{size}"] if size else ENCODERS[kind]
    side = arguments.get("img_size", 224)
    changes: dict[str, Any] = {"image_size": (side, side)}
    keys = ("patch_size", "qkv_bias", "mlp_ratio") if kind == "vit" or fine_tune else ()  # else of the decoder
    for key in ("embed_dim", "depth", "num_heads", "depths", "window_size", *keys):
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
    layer_of = reference.method.layer_of  # without a decay our groups do not tell layers apart
    yield from group_findings(info, parameter_groups(reference.method, train), reference.rename, layer_of)


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
