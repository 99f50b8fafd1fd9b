"""Networks by name and from checkpoints: load_model and the entry point of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

import mindspore_hub_conf
from src import load_model
from src.config.files import ConfigError
from src.engine import checkpoint
from src.tasks.networks import UnknownModelError, create_model, model_names

pytestmark = pytest.mark.usefixtures("graph_mode")

#: parameters of the references (FastMIM models_vit.py and mim_swin_finetune.py, SimMIM's build_model, timm 0.5.4)
SIZES = {
    "fastmim_vit_base": 86_567_656,
    "fastmim_swin_base": 87_768_224,
    "simmim_vit_base": 86_530_984,
    "simmim_swin_base": 87_768_224,
    "simmim_swin_large": 196_794_556,
    "manifold_kd_deit_tiny": 5_717_416,
    "manifold_kd_swin_tiny": 28_288_354,
}
#: parameters that tell the networks apart, with their shapes; None: must not be there
PARTS: dict[str, dict[str, tuple[int, ...] | None]] = {
    "fastmim_vit_base": {
        "encoder.pos_embed": (1, 197, 768),
        "encoder.blocks.0.attn.qkv.bias": (2304,),
        "fc_norm.weight": (768,),
        "encoder.norm.weight": None,
    },
    "fastmim_swin_base": {
        "encoder.layers.0.blocks.1.attn.relative_position_bias_table": (169, 4),
        "encoder.norm.weight": (1024,),
        "fc_norm.weight": None,
    },
    "simmim_vit_base": {
        "encoder.pos_embed": None,
        "encoder.blocks.11.attn.relative_position_bias_table": (732, 12),
        "encoder.blocks.3.gamma_1": (768,),
        "encoder.blocks.3.attn.q_bias": (768,),
        "encoder.blocks.3.attn.qkv.bias": None,
        "fc_norm.weight": (768,),
    },
    "simmim_swin_base": {"encoder.norm.weight": (1024,), "encoder.layers.3.blocks.1.mlp.fc1.weight": (4096, 1024)},
    "simmim_swin_large": {
        "encoder.layers.2.blocks.17.attn.relative_position_bias_table": (729, 24),
        "encoder.layers.3.blocks.0.attn.relative_position_bias_table": (169, 48),
        "head.weight": (1000, 1536),
    },
    "manifold_kd_deit_tiny": {
        "encoder.cls_token": (1, 1, 192),
        "encoder.norm.weight": (192,),
        "fc_norm.weight": None,
        "head.weight": (1000, 192),
    },
    "manifold_kd_swin_tiny": {"encoder.norm.weight": (768,), "encoder.layers.2.blocks.5.norm1.weight": (384,)},
}


def shapes(network: Any) -> dict[str, tuple[int, ...]]:
    return {p.name: tuple(p.shape) for p in network.get_parameters()}


def test_every_model_of_the_papers_has_a_name() -> None:
    assert model_names() == sorted(SIZES) == sorted(PARTS)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_named_network_is_the_references(name: str) -> None:
    with no_init_parameters():
        found = shapes(create_model(name))
    assert sum(int(np.prod(shape)) for shape in found.values()) == SIZES[name]
    for part, shape in PARTS[name].items():
        assert found.get(part) == shape, part


@pytest.mark.parametrize("create", [load_model, mindspore_hub_conf.create_network], ids=["load_model", "hub"])
def test_options_change_a_named_network(create: Any) -> None:
    small = {"image_size": 32, "num_classes": 7, "depth": 2}
    network = create("Manifold_KD_DeiT_Tiny", **small)
    assert not network.training
    image = Tensor(np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32))
    assert network(image).shape == (2, 7)
    assert "encoder.blocks.2.norm1.weight" not in shapes(network)
    assert not [name for name in shapes(network) if name.endswith(checkpoint.DRAWS)]
    assert [n for n in shapes(create("manifold_kd_deit_tiny", drop_path=0.1, **small)) if n.endswith(checkpoint.DRAWS)]


@pytest.mark.parametrize("create", [load_model, mindspore_hub_conf.create_network], ids=["load_model", "hub"])
def test_an_unknown_name_is_answered_with_the_list(create: Any) -> None:
    with pytest.raises((ValueError, NotImplementedError)) as raised:
        create("fastmim_vit_huge")
    assert all(name in str(raised.value) for name in SIZES)


def test_an_unknown_name_is_both_errors_people_catch() -> None:
    assert issubclass(UnknownModelError, ValueError) and issubclass(UnknownModelError, NotImplementedError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_class": 3}, "fastmim_vit_base: num_class: unknown option; did you mean num_classes?"),
        ({"num_classes": "many"}, "fastmim_vit_base: num_classes: must be a whole number, not 'many'"),
        ({"image_size": 100}, "fastmim_vit_base: image_size: 100 is not a multiple of patch_size 16; write 96 or 112"),
    ],
    ids=["unknown", "type", "value"],
)
def test_an_option_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_model("fastmim_vit_base", **options)
    assert words in str(raised.value)


def test_a_checkpoint_gives_its_network(fine_tuned: Path) -> None:
    network = load_model(fine_tuned)
    assert not network.training
    weights = checkpoint.load(fine_tuned).weights
    assert set(shapes(network)) == set(weights)  # nothing of the training state, no draw counters
    for parameter in network.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), weights[parameter.name])
    image = Tensor(np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32))
    assert network(image).shape == (3, 6)


def test_options_that_do_not_fit_a_checkpoint(fine_tuned: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"head\.\w+ has shape \[6.*needs \[5"):
        load_model(str(fine_tuned), num_classes=5)


def test_neither_a_file_nor_a_name() -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"gone\.ckpt: no such checkpoint file"):
        load_model("gone.ckpt")


@pytest.mark.compiles
def test_a_foreign_image_size_runs_eagerly_too() -> None:
    """Users who set no mode get MindSpore's default, which is not graph mode."""
    network = load_model("manifold_kd_deit_tiny", image_size=(32, 48), depth=1, num_classes=3)
    image = Tensor(np.random.default_rng(1).standard_normal((2, 3, 32, 48)).astype(np.float32))
    graph = network(image).asnumpy()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        eager = network(image).asnumpy()
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    np.testing.assert_allclose(eager, graph, rtol=0, atol=1e-5)
