"""This project's side of the step-time benchmark: one line on stdout per line on stdin.

    python benchmarks/ours.py --case fastmim_vit_base
    printf 'step\nstep\nquit\n' | python benchmarks/ours.py --case manifold_deit_tiny --batch 64 [key=value ...]

Builds the recipe of the case and runs the engine's training step on random images. Prints `ready <seconds from process
start to the end of the first step>`, then `time <seconds>` for each line `step`, and `peak <bytes>` for `quit`.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import argparse
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from mindspore import Tensor

from src.config import Recipe
from src.config.files import load_recipe
from src.engine import device
from src.engine.optim import build_optimizer
from src.engine.step import TrainStep
from src.methods import build_method

ROOT = Path(__file__).resolve().parents[1]
#: case -> recipe, and overrides that make its network equal to the peer's
CASES = {
    "fastmim_vit_base": ("config/fastmim/vit_base_128_800e_pretrain.yaml", ["encoder.num_heads=12"]),
    "fastmim_swin_base": ("config/fastmim/swin_base_128_400e_pretrain.yaml", []),
    "simmim_swin_base": ("config/simmim/swin_base_192_100e_pretrain.yaml", []),
    "simmim_vit_base": ("config/simmim/vit_base_224_800e_pretrain.yaml", []),
    # without a peer; the teacher has random weights
    "manifold_deit_tiny": ("config/manifold_kd/deit_tiny_from_cait_s24.yaml", []),
}


class Stepper:
    """The training step of a recipe on new random images."""

    def __init__(self, recipe: Recipe, batch: int):
        device.set_up("CPU", recipe.seed, recipe.train)
        method = build_method(recipe)
        self.optimizer = build_optimizer(method, recipe.train)
        self.step = TrainStep(method, self.optimizer, recipe.train.clip_norm)
        self.step.set_train(True)
        self.rng = np.random.default_rng(0)
        self.shape = (batch, recipe.encoder.in_chans, *recipe.encoder.image_size)
        self.columns, self.classes = method.columns, getattr(method, "num_classes", 1)
        self.done = 0

    def run(self) -> float:
        """Run one step; returns its seconds."""
        columns = {"image": Tensor(self.rng.standard_normal(self.shape, np.float32))}
        columns["label"] = Tensor(self.rng.integers(self.classes, size=self.shape[0]).astype(np.int32))
        start = time.perf_counter()
        self.done += 1
        values = self.optimizer.step_values(lambda scale: 1.5e-4 * scale, self.done)
        loss = float(self.step(values, *[columns[name] for name in self.columns])[0])
        elapsed = time.perf_counter() - start
        if not np.isfinite(loss):
            raise ValueError(f"the loss is {loss}")
        return elapsed


def peak_memory() -> int:
    """Return the peak resident bytes of this process (ru_maxrss of a child process starts at its parent's peak)."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="this project's side of the step-time benchmark")
    parser.add_argument("--case", required=True, choices=sorted(CASES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further changes to the recipe")
    args = parser.parse_args()
    path, overrides = CASES[args.case]
    stepper = Stepper(load_recipe(ROOT / path, [*overrides, *args.overrides]), args.batch)
    stepper.run()
    print(f"ready {time.perf_counter() - START:.3f}", flush=True)
    for line in sys.stdin:
        if line.strip() == "quit":
            print(f"peak {peak_memory()}", flush=True)
            break
        print(f"time {stepper.run():.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
