"""The training step copies no weight; MindSpore adds a TensorMove of each if the forward graph assigns a parameter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

RECIPE = """
encoder: {name: vit, image_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, drop_path: 0.2}
method: {name: classify, num_classes: 6, pool: mean, fc_norm: true, mixup: 0.8}
"""
#: two updates of two passes, which compile the graphs of `Accumulate` and `TrainStep`
TWO_UPDATES = """
import sys
import numpy as np
from mindspore import Tensor
from src.config.files import parse_recipe, override
from src.engine import device
from src.engine.optim import build_optimizer
from src.engine.step import Accumulate, TrainStep
from src.methods import build_method

recipe = override(parse_recipe(sys.argv[1], "test"), [f"train.kernels={sys.argv[2]}"], "test")
device.set_up("CPU", 0, recipe.train)
method = build_method(recipe)
optimizer = build_optimizer(method, recipe.train)
step = TrainStep(method, optimizer, 1.0, 2)
accumulate = Accumulate(step)
step.set_train(True)
image = np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)
batch = Tensor(image), Tensor(np.arange(4, dtype=np.int32))
before = [weight.asnumpy().copy() for weight in optimizer.weights]
for number in (1, 2):
    accumulate(*batch)
    step(optimizer.step_values(lambda scale: 1e-3 * scale, number), *batch)
print(sum((old != new.asnumpy()).any() for old, new in zip(before, optimizer.weights)), len(before))
"""


@pytest.mark.compiles
@pytest.mark.parametrize("kernels", ["auto", "builtin"])
def test_a_step_copies_no_weight(tmp_path: Path, kernels: str) -> None:
    """The graphs that MindSpore runs have no TensorMove, and the updates arrive in the weights."""
    variables = {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(tmp_path), "GLOG_v": "4"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_UPDATES, RECIPE, kernels],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    moved, weights = map(int, done.stdout.split()[-2:])
    assert moved == weights
    graphs = sorted(tmp_path.rglob("trace_code_graph*"))
    assert len(graphs) == 2
    for graph in graphs:
        text = graph.read_text()
        assert "MatMul" in text or "Custom" in text
        assert "TensorMove" not in text
