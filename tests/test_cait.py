"""CaiT: the encoder contract, class token, initial weights, sizes, and a tiny one from training to export.

Its numbers are compared with timm's in tests/golden (`timm_current_cait`), its names in `full_size`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters

from src import load_model
from src.config import ENCODERS, METHODS, CaiTConfig, ClassifyConfig, MIMConfig, Recipe
from src.engine import checkpoint
from src.methods import MaskedImageModel
from src.models import build_classifier, build_encoder
from src.models.graph import AsGraph
from src.tasks.evaluate import evaluate_checkpoint
from src.tasks.export import export_checkpoint
from src.tasks.plan import make_plan
from src.tasks.predict import predict
from tests.helpers import Contract, numbers

pytestmark = pytest.mark.usefixtures("graph_mode")


def small(**changes: Any) -> CaiTConfig:
    sizes = {"image_size": (32, 48), "embed_dim": 32, "depth": 3, "num_heads": 2, "layer_scale": 0.5}
    return CaiTConfig(**(sizes | changes))


@pytest.mark.compiles
@pytest.mark.parametrize(
    "config",
    [small(), small(in_chans=1, image_size=(48, 16), qkv_bias=False, depth_token_only=1, mlp_ratio_token_only=1.0)],
    ids=["default", "1 channel, tall, no qkv bias, 1 class-attention block"],
)
def test_the_encoder_contract(config: CaiTConfig) -> None:
    ms.set_seed(0)
    encoder = build_encoder(config)
    image = Tensor(numbers(0, 2, config.in_chans, *config.image_size))
    tokens, encoded, whole, (first, last) = (
        [each.asnumpy() for each in part] if isinstance(part, tuple) else part.asnumpy()
        for part in Contract(encoder, (0, 2))(image)
    )
    down, across = encoder.grid(config.image_size)
    assert (down, across) == (config.image_size[0] // 16, config.image_size[1] // 16)
    assert encoder.num_prefix_tokens == 1 and (encoder.stride, encoder.patch_size) == (16, 16)
    assert tokens.shape == first.shape == last.shape == (2, down * across, encoder.out_dim)  # no class token yet
    assert encoded.shape == (2, 1 + down * across, encoder.out_dim)
    np.testing.assert_array_equal(whole, encoded)
    assert not np.allclose(first, last)
    # the final norm is all that separates the last patch block from the patches of the output
    normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + config.norm_eps)
    np.testing.assert_allclose(encoded[:, 1:], normed, atol=1e-4)
    # the class token changes nothing but itself
    encoder.cls_token.set_data(Tensor(numbers(1, 1, 1, encoder.out_dim)))
    moved = AsGraph(encoder, encoder.encode)(Tensor(tokens)).asnumpy()
    np.testing.assert_array_equal(moved[:, 1:], encoded[:, 1:])
    assert np.abs(moved[:, 0] - encoded[:, 0]).min(axis=1).max() > 0


def test_layers_are_those_of_timms_group_matcher() -> None:
    encoder = build_encoder(small(depth=4))
    layers = {p.name: encoder.layer_of(p.name) for p in encoder.get_parameters()}
    assert layers["cls_token"] == layers["pos_embed"] == layers["patch_embed.proj.bias"] == 0
    assert layers["blocks.0.attn.proj_l.weight"] == 1 and layers["blocks.3.gamma_2"] == 4
    assert layers["blocks_token_only.0.attn.k.weight"] == 3 and layers["blocks_token_only.1.norm2.bias"] == 4
    assert layers["norm.weight"] == 4 and encoder.num_layers == 6  # the head alone is on top
    assert encoder.no_weight_decay() == {"cls_token", "pos_embed"}
    flat = build_encoder(small(depth=1, depth_token_only=3))
    assert {flat.layer_of(f"blocks_token_only.{block}.gamma_1") for block in range(3)} == {1}


def test_initial_weights_are_timms() -> None:
    ms.set_seed(0)
    weights = {p.name: p.asnumpy() for p in build_encoder(small(embed_dim=128, layer_scale=1e-5)).get_parameters()}
    for name in ("blocks.1.attn.qkv", "blocks.2.mlp.fc2", "blocks_token_only.1.attn.v", "blocks_token_only.0.mlp.fc1"):
        assert weights[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.05)
        assert not weights[f"{name}.bias"].any()
    assert weights["pos_embed"].shape == (1, 6, 128) and weights["pos_embed"].std() == pytest.approx(0.02, rel=0.1)
    scales = {float(value) for name in weights if "gamma" in name for value in weights[name]}
    assert scales == {float(np.float32(1e-5))}


def test_every_patch_block_is_skipped_at_the_same_rate() -> None:
    """timm's Cait gives all of them drop_path_rate, and the class-attention blocks none."""
    keep = build_encoder(small(drop_path=0.3)).drop_path.keep_prob.asnumpy()
    np.testing.assert_array_equal(keep, np.full((3, 2, 1), np.float32(0.7)))
    assert build_encoder(small()).drop_path is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": (224, 230)}, "230 is not a multiple of patch_size 16; write 224 or 240"),
        ({"num_heads": 5}, "5 does not divide embed_dim 32"),
        ({"depth_token_only": 0}, "0 is not above 0"),
        ({"layer_scale": 0.0}, "0.0 is not above 0"),
        ({"drop_path": 1.0}, "1.0 is not a rate from 0 to 1"),
    ],
)
def test_sizes_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as raised:
        small(**changes)
    assert words in str(raised.value)


# --- masked image modelling -------------------------------------------------------------------------------------


class LossGradients(nn.Cell):
    """Gradients of a masked image model's loss for a given mask."""

    def __init__(self, method: MaskedImageModel, weights: ms.ParameterTuple):
        super().__init__(auto_prefix=False)
        self.gradients = ops.value_and_grad(method.run, None, weights, has_aux=True)

    def construct(self, image: Tensor, mask: Tensor) -> Any:
        return self.gradients(image, mask)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["simmim", "fastmim"])
def test_masked_image_modelling_trains_all_that_the_decoder_sees(name: str) -> None:
    """SimMIM's decoder drops the class token, so its blocks have no gradient; FastMIM's attends to it."""
    ms.set_seed(0)
    config = small(patch_size=8, image_size=(16, 16), embed_dim=16, depth=1, depth_token_only=1, drop_path=0.5)
    method = replace(METHODS[name], mask_block=8)
    if name == "fastmim":
        method = replace(method, decoder=replace(method.decoder, width=32))
    Recipe(encoder=config, method=method)  # fits together
    network = MaskedImageModel(build_encoder(config), method, config.image_size)
    network.set_train(True)
    weights = ms.ParameterTuple(network.trainable_params())
    mask = Tensor(np.array([[[1, 0], [0, 1]]] * 8, np.float32))
    (loss, *_), grads = LossGradients(network, weights)(Tensor(numbers(0, 8, 3, 16, 16)), mask)
    assert np.isfinite(float(loss))
    flat = ("proj_l.bias", "attn.k.bias")  # the softmax does not see them: zero but for rounding
    names = [weight.name for weight in weights]
    still = {n for n, grad in zip(names, grads, strict=True) if not grad.asnumpy().any() and not n.endswith(flat)}
    of_class_token = {n for n in names if ("token_only" in n or n == "encoder.cls_token") and not n.endswith(flat)}
    assert still == (of_class_token if name == "simmim" else set())


# --- what it costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "flops", "millions"),
    [
        ("cait_xxs24", 224, 2.5, 12.0),
        ("cait_s24", 224, 9.4, 46.9),
        ("cait_xs24", 384, 19.3, 27),
        ("cait_s24", 384, 32.2, 47),
        ("cait_s36", 384, 48.0, 68),
        ("cait_m36", 384, 173.3, 271),
        ("cait_m48", 448, 329.6, 356),
    ],
)
def test_networks_are_as_large_as_published(name: str, side: int, flops: float, millions: float) -> None:
    """Multiply-adds and parameters with the head (facebookresearch/deit README_cait.md; the paper for XXS24)."""
    encoder = replace(ENCODERS[name], image_size=(side, side))
    head = ClassifyConfig(pool="cls", fc_norm=False)
    assert sum(head.flops(encoder).values()) / 1e9 == pytest.approx(flops, rel=0.015)
    with no_init_parameters():  # names and shapes only
        network = build_classifier(encoder, head)
    digits = 1 if isinstance(millions, float) else None
    assert round(sum(prod(p.shape) for p in network.get_parameters()) / 1e6, digits) == millions


def test_operations_by_hand() -> None:
    """4 patches of 48 channels and 2 heads, then a class token: one block of each kind."""
    config = small(image_size=(32, 32), embed_dim=48, depth=1, depth_token_only=1, mlp_ratio_token_only=2.0)
    block = 4 * (4 * 48 * 48 + 2 * 4 * 48 + 2 * 4 * 2 * 2 + 2 * 48 * 192 + 2 * 5 * 48)
    last = 2 * 5 * 48 * 48 + 2 * 48 * 48 + 2 * 5 * 48 + 2 * 48 * 96 + 5 * (5 + 1) * 48
    assert config.flops() == 32 * 32 * 3 * 48 + block + last + 5 * 5 * 48
    head = ClassifyConfig(num_classes=10, pool="cls", fc_norm=False).flops(config)
    assert (head["head"], head["pooling"]) == (480, 0)
    assert METHODS["simmim"].saved_values(config) == 3 * 32 * 32 + 4 * (9 * 48 + 2 * 192) + 4 * 4 * 4 * 2


def test_a_plan_of_masked_image_modelling() -> None:
    plan = make_plan(Recipe(encoder=ENCODERS["cait_xxs24"], method=MIMConfig()), images=1000)
    assert plan["tokens"] == 196 and plan["masked"]["masked_tokens"] == 147
    assert plan["parameters"]["encoder"] == 11_956_264 - 193_000  # without the head


# --- from training to export ------------------------------------------------------------------------------------


def test_a_trained_classifier_is_evaluated_predicts_and_is_exported(
    tiny_run: Callable[[str], Path], tiny_data: Path, tmp_path: Path
) -> None:
    trained = tiny_run("cait")
    found = checkpoint.load(trained)
    result = evaluate_checkpoint(str(trained), "", [])
    assert result["count"] == 24 and result["top1_correct"] > 8  # of 6 classes: better than chance
    assert {key: result[key] for key in found.meta["metrics"]} == found.meta["metrics"]
    done = export_checkpoint(str(trained), "mindir", str(tmp_path / "net.mindir"), 0, [])
    assert done.batches == (1, 4) and done.difference < 1e-4
    images = numbers(0, 3, 3, 32, 32)
    expected = load_model(trained)(Tensor(images)).asnumpy()
    network = nn.GraphCell(ms.load(str(done.path)))
    np.testing.assert_allclose(network(Tensor(images)).asnumpy(), expected, atol=1e-5)
    assert json.loads((tmp_path / "net.json").read_text(encoding="utf-8"))["input"] == ["batch", 3, 32, 32]
    shown = list(predict(str(trained), [str(tiny_data / "val")], 1, []))
    right = sum(row.classes[0][0] == row.path.parent.name for row in shown)
    assert len(shown) == 24 and right == result["top1_correct"]
