"""Start a network from the weights of another: what fits, what is new, what is left, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor


class WeightsError(ValueError):
    """Weights that do not fit; one line for the user."""


@dataclass(frozen=True)
class LoadReport:
    """Names by what happened to them."""

    matched: list[str]
    missing: list[str]  # ours, not in the file: fresh
    ignored: list[str]  # in the file, no place in the network

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched"]
        for kind in ("missing", "ignored"):
            names = getattr(self, kind)
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            parts.append(f"{len(names)} {kind}" + (f" ({shown})" if names else ""))
        return "; ".join(parts)


def load_encoder(parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], source: Path) -> LoadReport:
    """Copy the encoder's weights (names below `encoder.`); heads, decoders and tokens stay as they are.

    Raises:
        WeightsError: an encoder parameter is not in the file, or has another shape there. Nothing is copied then.
    """
    wanted = {name for name in parameters if name.startswith("encoder.")}
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
    return LoadReport(sorted(wanted), sorted(set(parameters) - wanted), sorted(set(arrays) - wanted))
