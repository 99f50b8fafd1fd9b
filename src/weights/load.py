"""Start a network from the weights of another: what fits, what is resized, what is new, what is left, by name."""

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
from .resize import TABLE_RULES, Size, resize_offsets, resize_places

SHARED = "encoder.rel_pos_bias.relative_position_bias_table"  # SimMIM's ViT while it pre-trains
OWN = re.compile(r"encoder\.blocks\.\d+\.attn\.relative_position_bias_table")  # while it is fine-tuned
TABLE = ".relative_position_bias_table"
PLACES = ("encoder.pos_embed", "encoder.absolute_pos_embed")
CLASS_OFFSETS = 3  # entries of the class token at the end of a table over the whole grid (BEiT)
#: whose weights -> rule of their relative position tables; supervised Swin networks follow Swin-Transformer utils.py
RULES = {"simmim": "simmim", "fastmim": "fastmim", "mae": "bicubic", "timm": "bicubic", "hf": "bicubic"}
#: fields of an encoder that change what equal shapes mean
MEANING = ("num_heads", "norm_eps", "merge_norm_eps", "roll_first", "pretrained_window_sizes")


@dataclass(frozen=True)
class Origin:
    """What a file says about its weights.

    Attributes:
        sources: who trained them, as `names.SOURCES` names it; several where that cannot be told, none if unknown.
        encoder: its configuration.
        classes: class names, empty if unknown.
        aside: further names in the file, which no network of ours has.
        encoder_blocks: if the encoder is the first blocks of a larger one, their number; 0: it is whole.
    """

    sources: tuple[str, ...] = ()
    encoder: Any = None
    classes: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    encoder_blocks: int = 0


@dataclass(frozen=True)
class LoadReport:
    """Names by what happened to them."""

    matched: list[str]
    resized: dict[str, str]  # name -> how
    shared: list[str]  # tables of single blocks, each started from the one table that pre-training's blocks share
    missing: list[str]  # ours, not taken from the file: fresh
    ignored: list[str]  # in the file, no place in the network
    notes: list[str] = field(default_factory=list)  # what equal shapes hide

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


def load_encoder(
    parameters: dict[str, Parameter],
    arrays: dict[str, np.ndarray],
    source: Path,
    origin: Origin | None = None,
    encoder: Any = None,
    classes: Iterable[str] = (),
) -> LoadReport:
    """Copy the encoder's weights (names below `encoder.`), and a classifier of the same classes.

    Tables of positions are resized by the rule of whoever trained them, and one table that all blocks shared starts
    that of every block (SimMIM utils.py). Decoders, mask tokens and fixed positions of another size stay as they are.
    So does the final norm when a FastMIM pre-training becomes a classifier (main_finetune.py has another name for it),
    and so do the blocks that pre-training left out (`method.encoder_blocks`), with the norm behind them.

    Args:
        parameters: of the network.
        arrays: of the file, in our names.
        source: the file, for messages.
        origin: what the file says about them.
        encoder: configuration of the network's encoder; positions are resized between the grids of both.
        classes: names of the network's classes.

    Raises:
        WeightsError: an encoder parameter is not in the file, or has a shape there that no rule turns into ours.
            Nothing is copied then.
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
        notes = [f"pre-training had the first {origin.encoder_blocks} of {total} blocks, the rest is fresh"]
    wanted -= {name for name in wanted & set(arrays) if own_positions(parameters[name], arrays[name])}
    shared = sorted(n for n in wanted - set(arrays) if OWN.fullmatch(n)) if SHARED in arrays else []
    found = arrays | {name: arrays[SHARED] for name in shared}
    absent = sorted(wanted - set(found))
    if absent:
        raise WeightsError(
            f"{source}: has no weights for {len(absent)} of {len(wanted)} encoder parameters "
            f"({', '.join(absent[:3])}); is it from another encoder?"
        )
    wanted |= classifier(parameters, arrays, not origin.classes or list(origin.classes) == list(classes))
    resized = copy(parameters, {name: found[name] for name in wanted}, source, origin, encoder)
    used = wanted | ({SHARED} if shared else set())
    return LoadReport(
        sorted(wanted - set(shared) - set(resized)),
        resized,
        shared,
        sorted(set(parameters) - wanted),
        sorted((set(arrays) - used) | set(origin.aside)),
        notes + differences(origin.encoder, trained),
    )


def left_out(encoder: EncoderConfig, first: EncoderConfig) -> set[str]:
    """Names of what an encoder has behind its first blocks: later blocks and what leads to them, the final norm."""
    with no_init_parameters():  # names only
        whole, part = build_encoder(encoder), build_encoder(first, final_norm=False)
    names = [{name for name, _ in cell.parameters_and_names()} for cell in (whole, part)]
    return {f"encoder.{name}" for name in names[0] - names[1]}


def copy(
    parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], source: Path, origin: Origin, encoder: Any
) -> dict[str, str]:
    """Set parameters to the arrays' values in their own shapes, all of them or none; what was resized, and how.

    Raises:
        WeightsError: a shape differs for which there is no rule.
    """
    values, resized = {}, {}
    for name in sorted(arrays):
        values[name], how = fitted(name, arrays[name], tuple(parameters[name].shape), source, origin, encoder)
        if how:
            resized[name] = how
    for name, value in values.items():
        parameters[name].set_data(Tensor(value))
    return resized


def carry_over(
    parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], origin: Origin, encoder: Any
) -> LoadReport:
    """All weights of a network to the same network at another resolution (a border between stages).

    Fixed sine-cosine positions are not weights: the new network has its own.

    Args:
        parameters, encoder: of the new network.
        arrays, origin: of the one before.

    Raises:
        WeightsError: a shape changes for which there is no rule.
    """
    learned = [name for name, parameter in parameters.items() if parameter.requires_grad]
    resized = copy(parameters, {name: arrays[name] for name in learned}, Path("stage"), origin, encoder)
    fresh = sorted(set(parameters) - set(learned))
    return LoadReport([name for name in learned if name not in resized], resized, [], fresh, [])


def own_positions(parameter: Parameter, value: np.ndarray) -> bool:
    """Whether a network keeps its fixed table, which it computed for its own size."""
    return not parameter.requires_grad and tuple(parameter.shape) != value.shape


def classifier(parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], same_classes: bool) -> set[str]:
    """Names of the pooled norm, and of the heads if the file's have as many classes, and the same as far as known."""
    parts = ("fc_norm.", "head.", "head_dist.") if same_classes else ("fc_norm.",)
    names = {name for name in parameters if name.startswith(parts) and name in arrays}
    return {name for name in names if tuple(parameters[name].shape) == arrays[name].shape}


def fitted(
    name: str, value: np.ndarray, shape: tuple[int, ...], source: Path, origin: Origin, encoder: Any
) -> tuple[np.ndarray, str]:
    """A parameter's value in our shape, and how it was resized (empty if it was not)."""
    if value.shape == shape:
        return value, ""
    refused = WeightsError(f"{source}: {name} has shape {list(value.shape)}, this recipe needs {list(shape)}")
    if len(value.shape) != len(shape) or value.shape[-1] != shape[-1]:
        raise refused
    if name in PLACES:
        old, new = grid(value.shape[1], origin.encoder), grid(shape[1], encoder)
        if old is None or new is None or value.shape[1] - math.prod(old) != shape[1] - math.prod(new):
            raise refused
        return resize_places(value, old, new), "positions: bicubic"
    if not name.endswith(TABLE):
        raise refused
    sizes = table_sizes(name, value.shape[0], origin.encoder), table_sizes(name, shape[0], encoder)
    if sizes[0] is None or sizes[1] is None:
        raise refused
    rule = rule_of(name, sizes[0], sizes[1], source, origin)
    return resize_offsets(value, sizes[0], sizes[1], TABLE_RULES[rule]), f"relative positions: rule {rule}"


def rule_of(name: str, old: Size, new: Size, source: Path, origin: Origin) -> str:
    """The rule of whoever trained a table; asked for if the file leaves it open and the rules differ."""
    rules = sorted({RULES[who] for who in origin.sources})
    if len(rules) == 1:
        return rules[0]
    flags = " or ".join(f"--source {who}" for who in (origin.sources or ("simmim", "fastmim", "timm")))
    raise WeightsError(
        f"{source}: {name} is for {old[0]}x{old[1]} tokens, this recipe needs {new[0]}x{new[1]}, and the file does not "
        f"say who trained it, whose rule resizes it; convert it with {flags}"
    )


def grid(length: int, encoder: Any) -> Size | None:
    """Rows and columns of an encoder's patches, if a table of `length` places (up to two of class tokens) is its."""
    if encoder is None:
        return None
    rows, cols = patches(encoder)
    return (rows, cols) if 0 <= length - rows * cols <= 2 else None


def patches(encoder: Any) -> Size:
    """Rows and columns of an encoder's patches."""
    return encoder.image_size[0] // encoder.patch_size, encoder.image_size[1] // encoder.patch_size


def table_sizes(name: str, entries: int, encoder: Any) -> Size | None:
    """Rows and columns of tokens that a table's offsets are between: a window's, or the whole grid's."""
    whole = name == SHARED or OWN.fullmatch(name) is not None
    if whole and encoder is not None:
        rows, cols = patches(encoder)
        if (2 * rows - 1) * (2 * cols - 1) + CLASS_OFFSETS == entries:
            return rows, cols
    offsets = entries - CLASS_OFFSETS * whole
    side = math.isqrt(max(offsets, 0))
    return ((side + 1) // 2,) * 2 if side**2 == offsets and side % 2 else None


def differences(old: Any, new: Any) -> list[str]:
    """What two encoders of equal shapes do differently, and windows without a table that change."""
    if old is None or new is None:
        return []
    notes = []
    for key in MEANING:
        before, now = getattr(old, key, None), getattr(new, key, None)
        if before != now:
            notes.append(f"encoder.{key} was {before}, is {now}")
    windows = getattr(old, "window_size", None), getattr(new, "window_size", None)
    if hasattr(new, "pretrained_window_sizes") and windows[0] != windows[1]:
        notes.append(f"encoder.window_size was {windows[0]}, is {windows[1]}")
    return notes
