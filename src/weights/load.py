"""Start a network from the weights of another: what fits, what is new, what is left, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

SHARED = "encoder.rel_pos_bias.relative_position_bias_table"  # SimMIM's ViT while it pre-trains
OWN = re.compile(r"encoder\.blocks\.\d+\.attn\.relative_position_bias_table")  # while it is fine-tuned


class WeightsError(ValueError):
    """Weights that do not fit; one line for the user."""


@dataclass(frozen=True)
class LoadReport:
    """Names by what happened to them."""

    matched: list[str]
    shared: list[str]  # tables of single blocks, each started from the one table that pre-training's blocks share
    missing: list[str]  # ours, not in the file: fresh
    ignored: list[str]  # in the file, no place in the network

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched"]
        if self.shared:
            parts.append(f"{len(self.shared)} started from {SHARED}")
        for kind in ("missing", "ignored"):
            names = getattr(self, kind)
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            parts.append(f"{len(names)} {kind}" + (f" ({shown})" if names else ""))
        return "; ".join(parts)


def load_encoder(parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], source: Path) -> LoadReport:
    """Copy the encoder's weights (names below `encoder.`); heads, decoders and tokens stay as they are.

    A relative position table that all blocks shared starts the table of every block (SimMIM utils.py).

    Raises:
        WeightsError: an encoder parameter is not in the file, or has another shape there. Nothing is copied then.
    """
    wanted = {name for name in parameters if name.startswith("encoder.")}
    used = set(wanted)
    shared = sorted(n for n in wanted - set(arrays) if OWN.fullmatch(n)) if SHARED in arrays else []
    if shared:
        arrays = arrays | {name: arrays[SHARED] for name in shared}
        used.add(SHARED)
    absent = sorted(wanted - set(arrays))
    if absent:
        raise WeightsError(
            f"{source}: has no weights for {len(absent)} of {len(wanted)} encoder parameters "
            f"({', '.join(absent[:3])}); is it from another encoder?"
        )
    for name in sorted(wanted):
        ours, theirs = list(parameters[name].shape), list(arrays[name].shape)
        if ours != theirs:
            raise WeightsError(f"{source}: {name} has shape {theirs}, this recipe needs {ours}")
    for name in wanted:
        parameters[name].set_data(Tensor(arrays[name]))
    return LoadReport(
        sorted(wanted - set(shared)), shared, sorted(set(parameters) - wanted), sorted(set(arrays) - used - set(shared))
    )
