"""Progressive resolution: what goes over a border, and runs resumed on either side of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from src.config import FieldError, Recipe, StageConfig, SwinConfig, TrainConfig, ViTConfig, at_stage
from src.config.files import ConfigError, dump_recipe, load_recipe, parse_recipe
from src.engine import checkpoint
from src.tasks.train import train
from tests.helpers import MakeFolder

pytestmark = pytest.mark.usefixtures("graph_mode")

RECIPE = """
encoder:
  {{name: swin, image_size: 32, embed_dim: 32, depths: [2], num_heads: [2], window_size: 2, drop_path: 0.2}}
method: {{name: fastmim, mask_block: 8, target: {{cell: 4}}, decoder: {{width: 32, depth: 1}}}}
data: {{root: {root}, workers: 0}}
train: {{epochs: 3, batch_size: 8, base_lr: 1e-3, lr_batch: 8, warmup_epochs: 1, log_every: 1, eval_every: 0}}
stages:
  - {{epochs: 1, image_size: 32, window_size: 2}}
  - {{epochs: 2, image_size: 48, window_size: 3, batch_size: 4, accumulate: 2}}
device: CPU
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, image_folder_factory: MakeFolder) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    path = folder / "grow.yaml"
    path.write_text(RECIPE.format(root=image_folder_factory(folder / "data", train=8)), encoding="utf-8")
    return path


#: the stages of the recipe in one pass per update, which compiles one graph less
ONE_PASS = (
    "stages=[{epochs: 1, image_size: 32, window_size: 2}, {epochs: 2, image_size: 48, window_size: 3, batch_size: 4}]"
)


def run(recipe: Path, output: Path, resume: str = "", stop_after: int = 0) -> dict[str, np.ndarray]:
    """All arrays at the end of a run."""
    train(load_recipe(recipe, [ONE_PASS, f"output={output}"]), resume, stop_after)
    found = checkpoint.load(output / "last.ckpt")
    return {**found.weights, **{f"state {name}": value for name, value in found.state.items()}}


@pytest.mark.compiles
def test_a_run_stopped_at_a_border_and_after_it_ends_like_one_that_never_stopped(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    straight = run(recipe, tmp_path / "straight")
    log = capsys.readouterr().out
    assert "stage 2 of 2" in log and "48x48 pixels" in log
    assert "2 resized (relative positions: rule fastmim)" in log  # one table per block
    assert straight["encoder.layers.0.blocks.1.attn.relative_position_bias_table"].shape == (25, 2)
    stopped = tmp_path / "stopped"
    assert run(recipe, stopped, stop_after=1)[table].shape == (9, 2)
    assert run(recipe, stopped, "auto", stop_after=2)[table].shape == (25, 2)
    assert "stopped after epoch 2 of 3; --resume auto continues" in capsys.readouterr().out
    resumed = run(recipe, stopped, "auto")
    assert resumed.keys() == straight.keys()
    for name, value in straight.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_the_rate_follows_the_batch_of_the_stage(recipe: Path) -> None:
    whole = load_recipe(recipe)
    first, second = (at_stage(whole, number) for number in (0, 1))
    assert (first.train.batch_size, first.train.accumulate) == (8, 1)
    assert (second.train.batch_size, second.train.accumulate) == (4, 2)
    assert first.encoder.image_size == (32, 32) and second.encoder.image_size == (48, 48)
    assert second.train.epochs == 3 and second.stages == ()
    assert whole.stage_ends() == [1, 3]
    assert parse_recipe(dump_recipe(whole), "text") == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.epochs=4", "train.epochs: 4, but the stages have 3; write 3"),
        (
            "stages=[{epochs: 3, image_size: 34}]",
            "stages.0: image_size: 34 is not a multiple of patch_size 4; write 32",
        ),
        ("stages=[{image_size: 32}]", "stages.0.epochs: 0 is not above 0"),
        ("stages=[{epochs: 3, size: 32}]", "stages.0.size: unknown key of StageConfig"),
        ("stages=[{epochs: 3, image_size: 48, window_size: -1}]", "stages.0.window_size: -1 is negative"),
        ("stages=3", "stages: must be a list of mappings of keys, not 3"),
    ],
)
def test_stages_that_cannot_be_are_named(recipe: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, [change])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_without_windows_has_none_in_its_stages() -> None:
    stages = (StageConfig(epochs=2, image_size=(32, 32), window_size=4),)
    with pytest.raises(FieldError, match="vit has no windows"):
        Recipe(encoder=ViTConfig(image_size=(32, 32)), stages=stages, train=TrainConfig(epochs=2))
    Recipe(encoder=SwinConfig(image_size=(32, 32)), stages=stages, train=TrainConfig(epochs=2))
