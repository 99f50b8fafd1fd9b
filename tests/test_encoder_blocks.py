"""Pre-training of an encoder's first blocks alone (`method.encoder_blocks`), and what a whole encoder takes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

from src.config import ENCODERS, CaiTConfig, EncoderConfig, MIMConfig, Recipe, SwinConfig, ViTConfig
from src.config.files import load_recipe
from src.engine import checkpoint
from src.models import build_encoder
from src.models.graph import AsGraph
from src.tasks.train import origin_of, train
from src.weights import WeightsError
from src.weights.load import Origin, load_encoder_weights
from tests.helpers import MakeFolder, Run, assert_one_line_error, numbers

pytestmark = pytest.mark.usefixtures("graph_mode")

VIT = ViTConfig(image_size=(32, 32), patch_size=8, embed_dim=32, depth=3, num_heads=2, drop_path=0.3)
SWIN = SwinConfig(
    image_size=(32, 32), embed_dim=16, depths=(2, 2, 1), num_heads=(2, 4, 8), window_size=4, drop_path=0.3
)


def test_stages_left_empty_go_and_with_them_their_stride() -> None:
    base = ENCODERS["swin_base"]
    part = base.first_blocks(22)
    assert part == replace(base, depths=(2, 2, 18), num_heads=(4, 8, 16))
    assert base.first_blocks(22).stride == 16 and base.first_blocks(23).stride == 32
    assert base.first_blocks(3).depths == (2, 1)
    assert base.first_blocks(24) is base
    assert ENCODERS["vit_base"].first_blocks(8).depth == 8


CAIT = CaiTConfig(image_size=(32, 32), patch_size=8, embed_dim=32, depth=3, num_heads=2, drop_path=0.3)


@pytest.mark.parametrize("config", [VIT, SWIN, CAIT])
def test_the_blocks_that_stay_keep_their_rates(config: EncoderConfig) -> None:
    whole, part = (build_encoder(each).drop_path for each in (config, config.first_blocks(2)))
    np.testing.assert_allclose(part.keep_prob.asnumpy(), whole.keep_prob.asnumpy()[:2], rtol=1e-6)


@pytest.mark.compiles
@pytest.mark.parametrize(("config", "blocks"), [(VIT, 2), (SWIN, 4), (SWIN, 3)])
def test_a_whole_encoder_takes_the_first_blocks_and_says_what_is_fresh(config: EncoderConfig, blocks: int) -> None:
    part, whole = build_encoder(config.first_blocks(blocks), final_norm=False), build_encoder(config)
    for cell in (part, whole):
        cell.set_train(False)
        cell.update_parameters_name("encoder.")
    arrays = {p.name: numbers(number, *p.shape) for number, p in enumerate(part.get_parameters()) if p.requires_grad}
    for p in part.get_parameters():
        if p.requires_grad:
            p.set_data(Tensor(arrays[p.name]))
    # the norm behind the last block that was trained is not the norm behind the last block
    arrays |= {f"encoder.norm.{name}": numbers(0, part.out_dim) for name in ("weight", "bias")}
    parameters = {p.name: p for p in whole.get_parameters() if p.requires_grad}
    origin = Origin(("fastmim",), config.first_blocks(blocks), (), (), blocks)
    report = load_encoder_weights(parameters, arrays, Path("f.ckpt"), origin, config)
    total = 3 if config is VIT else 5
    assert [note.split(";")[0] for note in report.notes] == [f"pre-training had the first {blocks} of {total} blocks"]
    assert {"encoder.norm.weight", "encoder.norm.bias"} < set(report.missing)
    assert len(report.matched) + len(report.missing) == len(parameters)
    image = Tensor(numbers(9, 2, 3, 32, 32))
    expected = part(image).asnumpy()
    found = AsGraph(whole, whole.blocks_of, (blocks - 1,))(whole.embed(image))[0].asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_name_missing_below_the_cut_is_refused() -> None:
    whole = build_encoder(VIT)
    whole.update_parameters_name("encoder.")
    parameters = {p.name: p for p in whole.get_parameters() if p.requires_grad}
    arrays = {name: p.asnumpy() for name, p in parameters.items() if name != "encoder.blocks.1.norm1.weight"}
    origin = Origin(("fastmim",), VIT.first_blocks(2), (), (), 2)
    with pytest.raises(WeightsError, match=r"1 of \d+ encoder parameters \(encoder.blocks.1.norm1.weight\)"):
        load_encoder_weights(parameters, arrays, Path("f.ckpt"), origin, VIT)


RECIPE = """
encoder: {{name: swin, image_size: 32, embed_dim: 16, depths: [1, 1], num_heads: [2, 4], window_size: 4}}
data: {{root: {root}, workers: 0}}
train: {{epochs: 1, batch_size: 8, base_lr: 1e-3, lr_batch: 0, eval_every: 0}}
device: CPU
"""


@pytest.mark.compiles
def test_fine_tuning_starts_from_a_pre_training_of_the_first_stage(
    tmp_path: Path, image_folder_factory: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    text = RECIPE.format(root=image_folder_factory(tmp_path / "data"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text + "method: {name: fastmim, encoder_blocks: 1, mask_block: 8, target: {cell: 4}}\n")
    train(load_recipe(recipe, [f"output={tmp_path / 'pre'}"]))
    found = checkpoint.load(tmp_path / "pre/last.ckpt")
    assert not any(name.startswith(("encoder.layers.1", "encoder.layers.0.downsample")) for name in found.weights)
    assert found.weights["decoder.pred.weight"].shape[0] == 3 * 9  # a token has one cell: the stride is 4
    assert origin_of(found).encoder.depths == (1,)
    capsys.readouterr()
    recipe.write_text(text + "method: {name: classify, num_classes: 3, fc_norm: false}\n")
    changes = [f"output={tmp_path / 'tuned'}", f"init_from={tmp_path / 'pre/last.ckpt'}", "train.base_lr=1e-9"]
    train(load_recipe(recipe, changes))
    assert "pre-training had the first 1 of 2 blocks" in capsys.readouterr().out
    tuned: dict[str, np.ndarray] = checkpoint.load(tmp_path / "tuned/last.ckpt").weights
    name = "encoder.layers.0.blocks.0.attn.qkv.weight"
    np.testing.assert_allclose(tuned[name], found.weights[name], atol=1e-6)
    assert np.allclose(tuned["encoder.norm.weight"], 1, atol=1e-6)


def test_more_blocks_than_there_are_end_in_one_line(run_entry: Run) -> None:
    done = run_entry("train.py", "--config", "config/demo/vit_fastmim_pretrain.yaml", "method.encoder_blocks=5")
    assert_one_line_error(done, "method.encoder_blocks: 5, but vit_demo has 4; write 4 or less")


def test_masks_follow_the_stride_of_the_last_stage_that_stays() -> None:
    method = MIMConfig(mask_block=8, encoder_blocks=22)
    recipe = Recipe(encoder=ENCODERS["swin_base"], method=method)
    assert recipe.trained_encoder.stride == 16
