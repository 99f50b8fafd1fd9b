"""This project's side of the benchmark: one line on stdout per line on stdin (see serve.py).

    python benchmarks/ours.py --case fastmim_vit_base
    printf 'step\nstep\nquit\n' | python benchmarks/ours.py --case manifold_deit_tiny --batch 64 [key=value ...]

Builds the recipe of the case and runs the engine's training step on random images, or calls a classifier of
`load_model`.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("GLOG_v", "3")

import numpy as np
from cases import INFERENCE, TRAINING, recipe_of  # adds the project to sys.path
from mindspore import Tensor
from serve import Times, resident, serve, timed

from src import load_model
from src.config import Recipe, TrainConfig
from src.engine import device
from src.engine.compile_cache import compile_graph
from src.engine.optim import build_optimizer
from src.engine.step import TrainStep
from src.methods import build_method


class Stepper:
    """The training step of a recipe on new random images."""

    def __init__(self, recipe: Recipe, batch: int):
        device.set_up("CPU", recipe.seed, recipe.train)
        method = build_method(recipe)
        self.optimizer = build_optimizer(method, recipe.train)
        self.step = TrainStep(method, self.optimizer, recipe.train.clip_norm)
        self.step.set_train(True)
        self.parameters = sum(parameter.size for parameter in self.optimizer.weights)
        self.rng = np.random.default_rng(0)
        self.shape = (batch, recipe.encoder.in_chans, *recipe.encoder.image_size)
        self.columns, self.classes = method.columns, getattr(method, "num_classes", 1)
        self.draws, self.done = method.draws(), 0

    def run(self) -> Times:
        """Run one step; returns its seconds."""
        columns = {"image": Tensor(self.rng.standard_normal(self.shape, np.float32))}
        columns["label"] = Tensor(self.rng.integers(self.classes, size=self.shape[0]).astype(np.int32))
        return timed(lambda: self.update([columns[name] for name in self.columns]))

    def update(self, batch: list[Tensor]) -> float:
        self.done += 1
        values = self.optimizer.step_values(lambda scale: 1.5e-4 * scale, self.done)
        compile_graph(self.step, values, *batch)  # does nothing after the first step
        loss = float(self.step(values, *batch)[0])
        self.draws.advance(self.shape[0])
        return loss


class Classifier:
    """A classifier with initial weights on new random images."""

    def __init__(self, name: str, batch: int):
        device.set_up("CPU", 0, TrainConfig())
        self.network = load_model(name, image_size=224)
        self.parameters = sum(parameter.size for parameter in self.network.get_parameters())
        self.rng = np.random.default_rng(0)
        self.shape = (batch, 3, 224, 224)

    def run(self) -> Times:
        """Classify a batch; returns its seconds."""
        image = Tensor(self.rng.standard_normal(self.shape, np.float32))
        return timed(lambda: float(self.network(image).asnumpy().sum()))


def main() -> int:
    imported = resident()
    parser = argparse.ArgumentParser(description="this project's side of the benchmark")
    parser.add_argument("--case", required=True, choices=sorted([*TRAINING, *INFERENCE]))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further changes to the recipe")
    args = parser.parse_args()
    if args.case in INFERENCE:
        runner = Classifier(INFERENCE[args.case], args.batch)
    else:
        runner = Stepper(recipe_of(args.case, args.overrides), args.batch)
    serve(runner.run, runner.parameters, imported)
    return 0


if __name__ == "__main__":
    sys.exit(main())
