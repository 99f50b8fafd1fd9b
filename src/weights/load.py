"""Start a network from the weights of another, and report by name which are copied, resized, fresh or ignored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor
from mindspore.nn.utils import no_init_parameters

from ..config import EncoderConfig
from ..models import build_encoder
from . import WeightsError
from .names import BUFFERS
from .resize import TABLE_RULES, Size, resize_offsets, resize_positions

SHARED = "encoder.rel_pos_bias.relative_position_bias_table"  # of SimMIM's ViT in pre-training
PER_BLOCK = re.compile(r"encoder\.blocks\.\d+\.attn\.relative_position_bias_table")  # in fine-tuning
TABLE = ".relative_position_bias_table"
POSITIONS = ("encoder.pos_embed", "encoder.absolute_pos_embed")
CLASS_OFFSETS = 3  # entries of the class token at the end of a table over the whole grid (BEiT)
#: source -> rule for its relative position tables; supervised Swin networks follow Swin-Transformer utils.py
RULES = {"simmim": "simmim", "fastmim": "fastmim", "mae": "bicubic", "timm": "bicubic", "hf": "bicubic"}
#: encoder keys that change what a network computes with the same parameter shapes
SHAPELESS = ("num_heads", "norm_eps", "merge_norm_eps", "roll_first", "pretrained_window_sizes")


@dataclass(frozen=True)
class Origin:
    """Facts that a checkpoint states about its weights.

    Attributes:
        sources: the `names.SOURCES` that may have trained them; empty if unknown.
        encoder: configuration of the encoder.
        classes: class names; empty if unknown.
        unused: names in the file that our networks do not use.
        encoder_blocks: number of blocks if the file has only the first blocks of the encoder; 0 if it has all.
    """

    sources: tuple[str, ...] = ()
    encoder: Any = None
    classes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    encoder_blocks: int = 0


@dataclass(frozen=True)
class LoadReport:
    """Parameter names by how their values came about."""

    matched: list[str]
    resized: dict[str, str]  # name -> how
    shared: list[str]  # tables of single blocks, started from the shared table of pre-training
    missing: list[str]  # in the network, not in the file: fresh values
    ignored: list[str]  # in the file, not in the network
    notes: list[str] = field(default_factory=list)  # differences that shapes do not show

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched", f"{len(self.resized)} resized"]
        if self.resized:
            parts[-1] += f" ({'; '.join(sorted(set(self.resized.values())))})"
        if self.shared:
            parts.append(f"{len(self.shared)} started from {SHARED}")
        for kind, remark in (("missing", "fresh: "), ("ignored", "")):
            names = getattr(self, kind)
            listed = [name for name in names if not re.fullmatch(BUFFERS, name)]
            shown = ", ".join(listed[:6]) + (", ..." if len(listed) > 6 else "")
            parts.append(f"{len(names)} {kind}" + (f" ({remark}{shown})" if shown else ""))
        return "; ".join(parts + self.notes)


def load_encoder_weights(
    parameters: dict[str, Parameter],
    arrays: dict[str, np.ndarray],
    path: Path,
    origin: Origin | None = None,
    encoder: Any = None,
    classes: Iterable[str] = (),
) -> LoadReport:
    """Copy the encoder's weights (names that start with `encoder.`), and the head if the classes are the same.

    Position tables are resized by the rule of the source that trained them. A table that all blocks share starts the
    table of every block (SimMIM utils.py). These keep their values: decoders, mask tokens, fixed positions of another
    size, the final norm when a FastMIM pre-training becomes a classifier (main_finetune.py renames it), and the blocks
    that pre-training left out (`method.encoder_blocks`) with the norm after them.

    Args:
        parameters: of the network, by name.
        arrays: of the file, by our names.
        path: the file, for messages.
        origin: facts that the file states.
        encoder: configuration of the network's encoder; positions are resized from the file's grid to this one.
        classes: class names of the network.

    Raises:
        WeightsError: an encoder parameter is not in the file, or no rule resizes its array to our shape. Then nothing
            is copied.
    """
    origin = origin or Origin()
    wanted = {name for name in parameters if name.startswith("encoder.")}
    fine_tuned = "head.weight" in parameters and "head.weight" not in arrays
    if fine_tuned and origin.sources == ("fastmim",) and "encoder.cls_token" not in wanted:
        wanted -= {"encoder.norm.weight", "encoder.norm.bias"}
    notes, trained = [], encoder
    total = len(encoder.block_maps) if encoder else 0
    if 0 < origin.encoder_blocks < total:
        trained = encoder.first_blocks(origin.encoder_blocks)
        wanted -= left_out(encoder, trained)
        notes = [f"pre-training had the first {origin.encoder_blocks} of {total} blocks; the others are fresh"]
    wanted -= {name for name in wanted & set(arrays) if keeps_positions(parameters[name], arrays[name])}
    shared = sorted(n for n in wanted - set(arrays) if PER_BLOCK.fullmatch(n)) if SHARED in arrays else []
    available = arrays | {name: arrays[SHARED] for name in shared}
    absent = sorted(wanted - set(available))
    if absent:
        raise WeightsError(
            f"{path}: has no weights for {len(absent)} of {len(wanted)} encoder parameters "
            f"({', '.join(absent[:3])}); is it from another encoder?"
        )
    wanted |= classifier(parameters, arrays, not origin.classes or list(origin.classes) == list(classes))
    resized = copy(parameters, {name: available[name] for name in wanted}, path, origin, encoder)
    used = wanted | ({SHARED} if shared else set())
    return LoadReport(
        sorted(wanted - set(shared) - set(resized)),
        resized,
        shared,
        sorted(set(parameters) - wanted),
        sorted((set(arrays) - used) | set(origin.unused)),
        notes + differences(origin.encoder, trained),
    )


def left_out(encoder: EncoderConfig, first: EncoderConfig) -> set[str]:
    """Names of the parameters that an encoder has after its first blocks: merging, later blocks, the final norm."""
    with no_init_parameters():  # names only
        whole, part = build_encoder(encoder), build_encoder(first, final_norm=False)
    names = [{name for name, _ in cell.parameters_and_names()} for cell in (whole, part)]
    return {f"encoder.{name}" for name in names[0] - names[1]}


def copy(
    parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], path: Path, origin: Origin, encoder: Any
) -> dict[str, str]:
    """Set parameters to the arrays, resized where shapes differ.

    Returns:
        Name -> how it was resized.

    Raises:
        WeightsError: no rule resizes an array. Then no parameter is set.
    """
    values, resized = {}, {}
    for name in sorted(arrays):
        values[name], how = resize_value(name, arrays[name], tuple(parameters[name].shape), path, origin, encoder)
        if how:
            resized[name] = how
    for name, value in values.items():
        parameters[name].set_data(Tensor(value))
    return resized


def carry_over(
    parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], origin: Origin, encoder: Any
) -> LoadReport:
    """Copy all weights to the same network at another resolution, between two stages of a recipe.

    Fixed sine-cosine positions are not copied; the new network computes them for its size.

    Args:
        parameters, encoder: of the new network.
        arrays, origin: of the previous stage.

    Raises:
        WeightsError: no rule resizes an array.
    """
    learned = [name for name, parameter in parameters.items() if parameter.requires_grad]
    resized = copy(parameters, {name: arrays[name] for name in learned}, Path("stage"), origin, encoder)
    fresh = sorted(set(parameters) - set(learned))
    return LoadReport([name for name in learned if name not in resized], resized, [], fresh, [])


def keeps_positions(parameter: Parameter, value: np.ndarray) -> bool:
    """Whether a parameter is a fixed position table of another size, which the network has computed already."""
    return not parameter.requires_grad and tuple(parameter.shape) != value.shape


def classifier(parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], same_classes: bool) -> set[str]:
    """Names of the norm after pooling, and of the heads if the classes are the same; only those of equal shape."""
    parts = ("fc_norm.", "head.", "head_dist.") if same_classes else ("fc_norm.",)
    names = {name for name in parameters if name.startswith(parts) and name in arrays}
    return {name for name in names if tuple(parameters[name].shape) == arrays[name].shape}


def resize_value(
    name: str, value: np.ndarray, shape: tuple[int, ...], path: Path, origin: Origin, encoder: Any
) -> tuple[np.ndarray, str]:
    """The value of a parameter in our shape, and how it was resized (empty if it was not)."""
    if value.shape == shape:
        return value, ""
    mismatch = WeightsError(f"{path}: {name} has shape {list(value.shape)}, this recipe needs {list(shape)}")
    if len(value.shape) != len(shape) or value.shape[-1] != shape[-1]:
        raise mismatch
    if name in POSITIONS:
        old, new = grid(value.shape[1], origin.encoder), grid(shape[1], encoder)
        if old is None or new is None or value.shape[1] - math.prod(old) != shape[1] - math.prod(new):
            raise mismatch
        return resize_positions(value, old, new), "positions: bicubic"
    if not name.endswith(TABLE):
        raise mismatch
    old, new = table_size(name, value.shape[0], origin.encoder), table_size(name, shape[0], encoder)
    if old is None or new is None:
        raise mismatch
    rule = rule_of(name, old, new, path, origin)
    return resize_offsets(value, old, new, TABLE_RULES[rule]), f"relative positions: rule {rule}"


def rule_of(name: str, old: Size, new: Size, path: Path, origin: Origin) -> str:
    """The rule of the source that trained a table.

    Raises:
        WeightsError: the source is unknown, or the possible sources have different rules.
    """
    rules = sorted({RULES[name] for name in origin.sources})
    if len(rules) == 1:
        return rules[0]
    flags = " or ".join(f"--source {name}" for name in (origin.sources or ("simmim", "fastmim", "timm")))
    raise WeightsError(
        f"{path}: {name} is for {old[0]}x{old[1]} tokens, this recipe needs {new[0]}x{new[1]}; the rule to resize it "
        f"depends on who trained it, which the file does not state; convert it with {flags}"
    )


def grid(length: int, encoder: Any) -> Size | None:
    """Height and width of an encoder's patch grid if a table of `length` positions fits it, else None.

    Up to two positions may be those of prefix tokens.
    """
    if encoder is None:
        return None
    height, width = patches(encoder)
    return (height, width) if 0 <= length - height * width <= 2 else None


def patches(encoder: Any) -> Size:
    """Height and width of an encoder's patch grid."""
    return encoder.image_size[0] // encoder.patch_size, encoder.image_size[1] // encoder.patch_size


def table_size(name: str, entries: int, encoder: Any) -> Size | None:
    """Height and width, in tokens, of the window or patch grid whose offsets a table has; None if they do not fit."""
    whole = name == SHARED or PER_BLOCK.fullmatch(name) is not None
    if whole and encoder is not None:
        height, width = patches(encoder)
        if (2 * height - 1) * (2 * width - 1) + CLASS_OFFSETS == entries:
            return height, width
    offsets = entries - CLASS_OFFSETS * whole
    side = math.isqrt(max(offsets, 0))
    return ((side + 1) // 2,) * 2 if side**2 == offsets and side % 2 else None


def differences(old: Any, new: Any) -> list[str]:
    """Lines on how two encoders with equal parameter shapes differ."""
    if old is None or new is None:
        return []
    notes = []
    for key in SHAPELESS:
        before, now = getattr(old, key, None), getattr(new, key, None)
        if before != now:
            notes.append(f"encoder.{key} was {before}, is {now}")
    windows = getattr(old, "window_size", None), getattr(new, "window_size", None)
    if hasattr(new, "pretrained_window_sizes") and windows[0] != windows[1]:
        notes.append(f"encoder.window_size was {windows[0]}, is {windows[1]}")
    return notes
