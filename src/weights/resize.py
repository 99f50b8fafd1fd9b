"""Resize position tables by the rules of the reference implementations; NumPy arrays.

A relative position table is (entries, heads): (2*height-1) * (2*width-1) offsets, row offset first, then the entries of
a class token if there are any. A position table is (1, prefix tokens + height*width, dim). Entries of class and other
prefix tokens are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Size = tuple[int, int]
A = -0.75  # parameter of PyTorch's bicubic kernel


@dataclass(frozen=True)
class Progression:
    """Place the old offsets at 0, 1, 1 + q, 1 + q + q^2, ... so that they span the new ones, then fit a spline (BEiT).

    Args:
        low, high: search interval of the ratio q. If q lies outside, the old offsets span less or more than the new
            ones; new offsets beyond the old ones take the border value.
    """

    low: float
    high: float

    def ratio(self, old: int, new: int) -> float:
        """q for which `old` steps reach the distance `new`, by bisection to 1e-6."""
        low, high, middle = self.low, self.high, 0.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            if sum(middle**step for step in range(old)) > new:
                high = middle
            else:
                low = middle
        return middle

    def offsets(self, old: int, new: int) -> np.ndarray:
        """Positions of the 2*old + 1 old offsets on the scale of the new ones, -new ... new."""
        q = self.ratio(old, new)
        right = np.cumsum([q**step for step in range(old)])
        return np.concatenate([-right[::-1], [0.0], right])

    def __call__(self, values: np.ndarray, size: Size) -> np.ndarray:
        """(height, width) -> size. Along an axis: cubic from 4 offsets on, linear for 3 or 2, constant for one."""
        from scipy.interpolate import RectBivariateSpline  # takes a fifth of a second

        old_offsets = [self.offsets(old // 2, new // 2) for old, new in zip(values.shape, size, strict=True)]
        new_offsets = [np.arange(-(new // 2), new // 2 + 1, dtype=np.float64) for new in size]
        for axis in (0, 1):
            if values.shape[axis] == 1:  # no spline through one point
                values = values.repeat(2, axis)
                old_offsets[axis] = np.array([-1.0, 1.0])
        degree = [3 if len(line) > 3 else 1 for line in old_offsets]
        spline = RectBivariateSpline(*old_offsets, values, kx=degree[0], ky=degree[1], s=0)
        return spline(*new_offsets)


def bicubic(values: np.ndarray, size: Size) -> np.ndarray:
    """(height, width) -> size, as torch.nn.functional.interpolate(mode="bicubic", align_corners=False)."""
    return kernel(values.shape[0], size[0]) @ values @ kernel(values.shape[1], size[1]).T


def kernel(old: int, new: int) -> np.ndarray:
    """Weights (new, old) of bicubic interpolation along one axis; positions beyond the border repeat its value."""
    centre = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(centre - first - tap)
        near = ((A + 2) * distance - (A + 3)) * distance**2 + 1
        far = ((A * distance - 5 * A) * distance + 8 * A) * distance - 4 * A
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(distance <= 1, near, far))
    return weights


#: (height, width) -> another size
Rule = Callable[[np.ndarray, Size], np.ndarray]
#: name -> rule for relative position tables. simmim: SimMIM utils.py; fastmim: FastMIM util/pos_embed.py (remap mode
#: simmim, the default); bicubic: Swin-Transformer utils.py and FastMIM's remap mode interpolate
TABLE_RULES: dict[str, Rule] = {
    "simmim": Progression(1.01, 1.5),
    "fastmim": Progression(0.5, 2.0),
    "bicubic": bicubic,
}


def resize_offsets(table: np.ndarray, old: Size, new: Size, rule: Rule) -> np.ndarray:
    """A relative position table (entries, heads) of grid `old`, resized to grid `new`; entries after it are copied."""
    sides = [(2 * height - 1, 2 * width - 1) for height, width in (old, new)]
    maps, rest = np.split(table.astype(np.float64), [sides[0][0] * sides[0][1]])
    resized = [rule(column.reshape(sides[0]), sides[1]).reshape(-1) for column in maps.T]
    return np.concatenate([np.stack(resized, axis=1), rest]).astype(np.float32)


def resize_positions(table: np.ndarray, old: Size, new: Size) -> np.ndarray:
    """A position table (1, prefix tokens + height*width, dim) of grid `old`, resized to `new` with `bicubic`.

    As in MAE and FastMIM (pos_embed.py).
    """
    prefix_tokens = table.shape[1] - old[0] * old[1]
    dim = table.shape[2]
    maps = table[0, prefix_tokens:].astype(np.float64).reshape(old[0], old[1] * dim)
    down = (kernel(old[0], new[0]) @ maps).reshape(new[0], old[1], dim)
    resized = np.einsum("nc,rcd->rnd", kernel(old[1], new[1]), down).reshape(1, new[0] * new[1], dim)
    return np.concatenate([table[:, :prefix_tokens], resized.astype(np.float32)], axis=1)
