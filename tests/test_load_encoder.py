"""`load_encoder`: the product of any run as a backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from src import load_encoder, load_model
from src.config import CaiTConfig, MAEConfig, MIMConfig, Recipe, SwinConfig, TransformerDecoderConfig, ViTConfig
from src.config.files import dump_recipe
from src.engine import checkpoint
from src.errors import UserError
from src.methods import build_method
from src.models.graph import AsGraph
from tests.helpers import numbers

pytestmark = pytest.mark.usefixtures("graph_mode")

SMALL = TransformerDecoderConfig(width=32, depth=1)
MIM, MAE = MIMConfig(mask_block=8, decoder=SMALL), MAEConfig(mask_block=8, decoder=SMALL)
SWIN = replace(SwinConfig.tiny(), depths=(1, 1), absolute_position=True)
CASES: dict[str, tuple[Any, Any]] = {
    "vit": (ViTConfig.tiny(), MAE),
    "learned": (replace(ViTConfig.tiny(), position="learned"), replace(MIM, encoder_blocks=1)),
    "cait": (CaiTConfig.tiny(), MIM),
    "swin": (SWIN, MIM),
}
IMAGE = numbers(0, 2, 3, 32, 32)


def saved(kind: str, folder: Path) -> tuple[Path, Any]:
    """A checkpoint of a Method with fresh weights, and the Method."""
    encoder, method = CASES[kind]
    recipe = Recipe(encoder=encoder, method=method)
    ms.set_seed(2)
    network = build_method(recipe)
    meta = {"recipe": dump_recipe(recipe), "classes": [], "epoch": 1, "origins": [method.origin]}
    checkpoint.save(folder / f"{kind}.ckpt", checkpoint.weights_of(network), {}, meta)
    return folder / f"{kind}.ckpt", network.set_train(False)


@pytest.mark.compiles
@pytest.mark.parametrize("kind", CASES)
def test_features_and_maps_are_those_of_the_trained_encoder(kind: str, tmp_path: Path) -> None:
    path, network = saved(kind, tmp_path)
    encoder, image = network.encoder, Tensor(IMAGE)
    pooled = load_encoder(path)
    wanted = AsGraph(encoder, encoder.pooled)(image).asnumpy()
    np.testing.assert_allclose(pooled(image).asnumpy(), wanted, rtol=1e-5, atol=1e-6)
    assert not pooled.training and len(pooled.trainable_params()) > 5
    blocks = 1 if kind == "learned" else 2
    backbone = load_encoder(path, blocks="stages")
    maps = backbone(image)
    sizes = [(16, 8, 8), (32, 4, 4)] if kind == "swin" else [(32, 4, 4)]
    assert [tuple(found.shape[1:]) for found in maps] == sizes
    assert (backbone.channels, backbone.strides) == (tuple(s[0] for s in sizes), tuple(32 // s[1] for s in sizes))
    sequences = AsGraph(encoder, encoder.blocks_of, tuple(range(blocks)))(encoder.embed(image))
    last = sequences[-1].asnumpy()[:, -16:].transpose(0, 2, 1).reshape(maps[-1].shape)
    np.testing.assert_allclose(maps[-1].asnumpy(), last, rtol=1e-5, atol=1e-6)


@pytest.mark.compiles
def test_blocks_come_in_the_order_they_are_asked_for(tmp_path: Path) -> None:
    path, _ = saved("swin", tmp_path)
    both = load_encoder(path, blocks=[-1, 0])(Tensor(IMAGE))
    alone = [load_encoder(path, blocks=block)(Tensor(IMAGE))[0] for block in (1, 0)]
    for one, other in zip(both, alone, strict=True):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["learned", "swin"])
def test_another_image_size_resizes_positions_and_says_so(kind: str, tmp_path: Path) -> None:
    path, _ = saved(kind, tmp_path)
    backbone = load_encoder(path, blocks="stages", image_size=64)
    assert "positions: bicubic" in backbone.report
    (last,) = backbone(Tensor(numbers(0, 1, 3, 64, 64)))[-1:]
    assert last.shape == (1, 32, 8, 8)


def test_an_origin_of_another_name_is_answered_by_the_recipe(tmp_path: Path) -> None:
    path, network = saved("swin", tmp_path)
    meta = {**checkpoint.load(path).meta, "origins": ["my_own_preset"]}
    checkpoint.save(path, checkpoint.weights_of(network), {}, meta)
    assert "rule fastmim" in load_encoder(path, image_size=64, window_size=8).report


@pytest.mark.parametrize("kind", ["vit"])
def test_a_classifier_gives_what_its_head_sees(kind: str, tiny_run: Callable[[str], Path]) -> None:
    path = tiny_run(kind)
    classifier, features = load_model(path), load_encoder(path)(Tensor(IMAGE))
    logits = classifier.head(features).asnumpy()
    np.testing.assert_allclose(logits, classifier(Tensor(IMAGE)).asnumpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.compiles
def test_a_backbone_can_be_trained_on(tmp_path: Path) -> None:
    path, _ = saved("vit", tmp_path)
    backbone = load_encoder(path, blocks="stages").set_train(True)
    weights = ms.ParameterTuple(backbone.trainable_params())

    def total(image: Tensor) -> Tensor:
        return backbone(image)[0].sum()

    grads = ops.GradOperation(get_by_list=True)(AsGraph(backbone, total), weights)
    found = grads(Tensor(IMAGE))
    assert sum(bool(np.abs(grad.asnumpy()).max() > 0) for grad in found) > len(found) / 2


@pytest.mark.compiles
def test_a_named_network_has_fresh_weights() -> None:
    backbone = load_encoder("manifold_kd_deit_tiny", blocks=[2], image_size=32)
    assert backbone.report == "initial weights" and backbone(Tensor(IMAGE))[0].shape == (2, 192, 2, 2)


@pytest.mark.parametrize(
    ("blocks", "options", "words"),
    [
        ((0, 5), {}, "has 2 blocks; write numbers from -2 to 1"),
        ((0, -2), {}, "names a block twice"),
        ([], {}, "write numbers"),
        ("stage", {}, "write numbers"),
        (None, {"imagesize": 64}, "did you mean image_size?"),
        (None, {"image_size": 33}, "is not a multiple of"),
        (None, {"embed_dim": 64}, "has shape"),
    ],
)
def test_what_cannot_be_asked_for(blocks: Any, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path, _ = saved("vit", tmp_path)
    with pytest.raises(UserError) as caught:
        load_encoder(path, blocks, **options)
    assert words in str(caught.value) and str(path) in str(caught.value)
