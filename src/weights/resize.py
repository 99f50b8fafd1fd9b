"""Position tables at another size: the rules of the reference implementations, on NumPy arrays.

Tables over relative positions are (entries, heads) with (2*rows-1) * (2*cols-1) entries, row offsets first, and
tables over places are (1, prefix + rows*cols, dim). Only offsets and places are resized; the entries of class tokens
(last in the former, first in the latter) are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import RectBivariateSpline

Size = tuple[int, int]
A = -0.75  # of PyTorch's bicubic kernel


@dataclass(frozen=True)
class Progression:
    """Old offsets are put at 0, 1, 1 + q, 1 + q + q^2, ... so that they span the new ones, then splined (BEiT).

    Args:
        low, high: where the ratio q is searched; outside, the old offsets span less or more than the new ones, and new
            offsets beyond the old take the border's value.
    """

    low: float
    high: float

    def ratio(self, old: int, new: int) -> float:
        """q for which `old` steps reach the distance `new`, by halving the interval until it is below 1e-6."""
        low, high, middle = self.low, self.high, 0.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            if sum(middle**step for step in range(old)) > new:
                high = middle
            else:
                low = middle
        return middle

    def offsets(self, old: int, new: int) -> np.ndarray:
        """Where the 2*old + 1 old offsets stand among the new -new ... new."""
        q = self.ratio(old, new)
        right = np.cumsum([q**step for step in range(old)])
        return np.concatenate([-right[::-1], [0.0], right])

    def __call__(self, values: np.ndarray, size: Size) -> np.ndarray:
        """(rows, cols) -> size; cubic where a side has more than three offsets, else linear, a single one constant."""
        places = [self.offsets(old // 2, new // 2) for old, new in zip(values.shape, size, strict=True)]
        wanted = [np.arange(-(new // 2), new // 2 + 1, dtype=np.float64) for new in size]
        for axis in (0, 1):
            if values.shape[axis] == 1:  # no spline through one point
                values, places[axis] = values.repeat(2, axis), np.array([-1.0, 1.0])
        degree = [3 if len(line) > 3 else 1 for line in places]
        spline = RectBivariateSpline(*places, values, kx=degree[0], ky=degree[1], s=0)
        return spline(*wanted)


def bicubic(values: np.ndarray, size: Size) -> np.ndarray:
    """(rows, cols) -> size as torch.nn.functional.interpolate(mode="bicubic", align_corners=False) does it."""
    return kernel(values.shape[0], size[0]) @ values @ kernel(values.shape[1], size[1]).T


def kernel(old: int, new: int) -> np.ndarray:
    """Weights (new, old) of bicubic interpolation along one axis; places beyond the border repeat it."""
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(centre - first - tap)
        near = ((A + 2) * distance - (A + 3)) * distance**2 + 1
        far = ((A * distance - 5 * A) * distance + 8 * A) * distance - 4 * A
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(distance <= 1, near, far))
    return weights


#: one (rows, cols) map -> another size
Rule = Callable[[np.ndarray, Size], np.ndarray]
#: rule of relative position tables by the code that trained them. SimMIM utils.py; FastMIM util/pos_embed.py (remap
#: mode simmim, the default); Swin-Transformer utils.py and FastMIM's remap mode interpolate
TABLE_RULES: dict[str, Rule] = {
    "simmim": Progression(1.01, 1.5),
    "fastmim": Progression(0.5, 2.0),
    "bicubic": bicubic,
}


def resize_offsets(table: np.ndarray, old: Size, new: Size, rule: Rule) -> np.ndarray:
    """A table (entries, heads) over the offsets of grid `old`, for grid `new`; further entries at its end are kept."""
    sides = [(2 * rows - 1, 2 * cols - 1) for rows, cols in (old, new)]
    maps, rest = np.split(table.astype(np.float64), [sides[0][0] * sides[0][1]])
    resized = [rule(column.reshape(sides[0]), sides[1]).reshape(-1) for column in maps.T]
    return np.concatenate([np.stack(resized, axis=1), rest]).astype(np.float32)


def resize_places(table: np.ndarray, old: Size, new: Size) -> np.ndarray:
    """Positions (1, prefix + rows*cols, dim) of grid `old` for grid `new`, bicubic (MAE and FastMIM pos_embed.py)."""
    prefix = table.shape[1] - old[0] * old[1]
    dim = table.shape[2]
    maps = table[0, prefix:].astype(np.float64).reshape(old[0], old[1] * dim)
    rows = (kernel(old[0], new[0]) @ maps).reshape(new[0], old[1], dim)
    resized = np.einsum("nc,rcd->rnd", kernel(old[1], new[1]), rows).reshape(1, new[0] * new[1], dim)
    return np.concatenate([table[:, :prefix], resized.astype(np.float32)], axis=1)
