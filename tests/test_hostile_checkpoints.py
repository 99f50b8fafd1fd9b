"""Checkpoints of this project that are hostile: one line at once, in bounded memory, before a network is built."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore.nn.utils import no_init_parameters

from src.config import (
    CaiTConfig,
    ClassifyConfig,
    EncoderConfig,
    LinearDecoderConfig,
    MAEConfig,
    MethodConfig,
    MIMConfig,
    PixelsConfig,
    Recipe,
    SwinConfig,
    SwinV2Config,
    TransformerDecoderConfig,
    ViTConfig,
)
from src.config.files import dump_recipe, override
from src.data.sources import plain_files
from src.engine import checkpoint
from src.engine.checkpoint import CheckpointError
from src.methods import build_method
from src.tasks.images import loader
from tests.limited import answers

pytestmark = pytest.mark.usefixtures("graph_mode")

# --- files ------------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    content = b""
    while number > 127:
        content += bytes([number & 127 | 128])
        number >>= 7
    return content + bytes([number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def value(name: str, kind: str, shape: list[int], content: bytes) -> bytes:
    dims = b"".join(b"\x08" + varint(side) for side in shape)
    return field(1, field(1, name.encode()) + field(2, dims + field(2, kind.encode()) + field(3, content)))


def text(name: str, content: str) -> bytes:
    return value(name, "str", [], content.encode("utf-32-le"))


META: dict[str, Any] = {
    **{"names": [], "recipe": "seed: 1\n", "method": "fastmim", "epoch": 3, "step": 30, "best": 0.5, "classes": []},
    **{"metrics": {"loss": 1.0}},
}


def file_of(*values: bytes, **changes: Any) -> bytes:
    """A checkpoint of values and a meta with changes."""
    content = b"".join(values) + text("meta", json.dumps(META | changes))
    return content + checksum(content)


def checksum(content: bytes) -> bytes:
    return b"crc_num" + zlib.crc32(content).to_bytes(10, "big")


EIGHT = value("a", "Float32", [2], b"\0" * 8)
NUMBERS = value("meta", "Float32", [2], b"\0" * 8)
DAMAGED = "damaged or not a MindSpore checkpoint"
#: content, words of the error
FILES = {
    "more shape than numbers": (file_of(value("a", "Float32", [4], b"\0" * 8)), DAMAGED),
    "more numbers than shape": (file_of(value("a", "Float32", [1], b"\0" * 8)), DAMAGED),
    "a shape of four gigabytes": (file_of(value("a", "Float32", [2**30], b"\0" * 8)), DAMAGED),
    "a shape beyond all numbers": (file_of(value("a", "Float32", [2**62, 4], b"\0" * 8)), DAMAGED),
    "a negative shape": (file_of(value("a", "Float32", [-2], b"\0" * 8)), DAMAGED),
    "two negative sides": (file_of(value("a", "Float32", [-2, -1], b"\0" * 8)), DAMAGED),
    "many axes": (file_of(value("a", "Float32", [1] * 1000, b"\0" * 4)), DAMAGED),
    "a side of nothing": (file_of(value("a", "Float32", [0, 2**59], b"")), "read"),  # neither number nor memory
    "an unknown number type": (file_of(value("a", "Foo", [2], b"\0" * 8)), DAMAGED),
    "a name twice": (file_of(EIGHT, value("b", "Float32", [2], b"\0" * 8), EIGHT), DAMAGED),
    "a long name": (file_of(value("a" * 5000, "Float32", [2], b"\0" * 8)), DAMAGED),
    "a name that is no text": (file_of(EIGHT.replace(b"\x0a\x01a", b"\x0a\x01\xff")), DAMAGED),
    "a text that is none": (file_of(value("a", "str", [], b"\xff" * 8)), DAMAGED),
    "a million values": (file_of(*[field(1, b"")] * 1_000_000), DAMAGED),
    "a million fields of a value": (file_of(field(1, b"\x20\x01" * 1_000_000)), DAMAGED),
    "a field of another kind": (file_of(b"\x0d\0\0\0\0"), DAMAGED),
    "a number where bytes belong": (file_of(b"\x08\x01"), DAMAGED),
    "a length beyond the end": (EIGHT + b"\x0a\xff\xff\x7f" + checksum(EIGHT + b"\x0a\xff\xff\x7f"), DAMAGED),
    "a number without end": (b"\xff" * 20 + checksum(b"\xff" * 20), DAMAGED),
    "a map": (file_of(field(1, field(1, b"a") + field(3, b""))), DAMAGED),
    "only a checksum": (checksum(b""), "without the recipe"),
    "nothing": (b"", DAMAGED),
    "a meta of numbers": (NUMBERS + checksum(NUMBERS), "without the recipe"),
    "a meta that is a list": (b"".join([m := text("meta", "[1]"), checksum(m)]), "without the recipe"),
    "a deep meta": (b"".join([m := text("meta", "[" * 200_000), checksum(m)]), "without the recipe"),
    "a meta of digits": (b"".join([m := text("meta", "9" * 5000), checksum(m)]), "without the recipe"),
    "a long meta": (b"".join([m := text("meta", " " * 9_000_000), checksum(m)]), DAMAGED),
    "whole numbers as weights": (file_of(value("a", "Int32", [2], b"\0" * 8), names=["a"]), "a has int32 numbers"),
    "a text as weights": (file_of(text("a", "x"), names=["a"]), "truncated, 1 of 1 arrays are missing"),
}
#: key of the meta, values that it cannot have
WRONG = {
    "names": [5, None, {}, "a", [1], [["a"]]],
    "recipe": [5, None, [], {}],
    "method": [5, None, []],
    "classes": [5, None, "abc", {"a": 1}, [1], [None]],
    "epoch": ["1", None, -1, 1.5, True, [], 2**60],
    "step": ["1", None, -1, 1.5, True, [], 2**60],
    "best": ["1", True, [], 2**60],
    "metrics": [5, None, [], {"loss": "x"}, {"loss": [1]}],
    "origins": [5, None, "simmim", [1]],
    "ranks": ["1", -1, [1]],
    "teacher": [5, []],
    "versions": [5, {"mindspore": 2}],
    "torch": [
        *(5, [], {}, {"key": "", "prefix": ""}, {"key": 1, "prefix": "", "entries": []}),
        *({"key": "", "prefix": "", "entries": [entry]} for entry in (5, [], ["a", "b"], ["a", "b", 5], ["a", 1, []])),
        *({"key": "", "prefix": "", "entries": [["a", "float32", shape]]} for shape in (["x"], [-1], [1.5], [1] * 99)),
    ],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    for kind, (content, _) in FILES.items():
        (folder / f"{kind}.ckpt").write_bytes(content)
    return answers("src.engine.checkpoint:load", sorted(folder.iterdir()), mebibytes=400)


@pytest.mark.compiles
@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_file_is_one_line(kind: str, files: dict[str, str]) -> None:
    answer, words = files[f"{kind}.ckpt"], FILES[kind][1]
    assert words in answer and "\n" not in answer


@pytest.mark.parametrize(("key", "wrong"), [(key, wrong) for key, values in WRONG.items() for wrong in values])
def test_a_fact_of_another_type_is_one_line(key: str, wrong: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(file_of(**{key: wrong}))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert str(caught.value).startswith(f"{path}: damaged: {key} in its meta is ")


def test_facts_that_a_file_does_not_state_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    content = EIGHT + text("meta", json.dumps({"names": ["a"], "recipe": "seed: 1\n"}))
    path.write_bytes(content + checksum(content))
    loaded = checkpoint.load(path)
    assert loaded.meta["classes"] == [] and loaded.meta["epoch"] == 0 and loaded.meta["best"] is None
    assert loaded.weights["a"].shape == (2,)


def test_parts_of_an_array_are_joined(tmp_path: Path) -> None:
    """MindSpore cuts arrays above 512 MB."""
    path = tmp_path / "a.ckpt"
    numbers = np.arange(6, dtype=np.float32)
    parts = [value("a", "Float32", [2, 3], part.tobytes()) for part in np.split(numbers, 3)]
    path.write_bytes(file_of(*parts, names=["a"]))
    np.testing.assert_array_equal(checkpoint.load(path).weights["a"], numbers.reshape(2, 3))


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "x" * 300 + ".ckpt"])
def test_a_name_that_no_file_has(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        checkpoint.load(Path(name))


def test_a_file_larger_than_memory_is_not_read(tmp_path: Path) -> None:
    """It has a hole, so it takes no place on the disk."""
    path = tmp_path / "a.ckpt"
    with path.open("wb") as file:
        file.write(EIGHT)
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="needs more memory than there is"):
        checkpoint.load(path)


def test_a_large_batch_of_a_recipe_is_not_larger_than_the_images(tmp_path: Path) -> None:
    source = plain_files([tmp_path / f"{number}.png" for number in range(300)])
    for batch, expected in ((64, 64), (300, 300), (1_000_000, 300)):
        recipe = override(VIT, [f"train.batch_size={batch}"], "x")
        assert loader(recipe, source, ("image",), training=False).batch_size == expected
    recipe = override(VIT, ["train.batch_size=270"], "x")
    assert loader(recipe, source.subset(np.arange(280)), ("image",), training=True).batch_size == 270


# --- networks ---------------------------------------------------------------------------------------------------

ENCODERS: dict[str, EncoderConfig] = {
    "vit": ViTConfig.tiny(),
    "vit, tokens": replace(ViTConfig.tiny(), distilled=True, position="learned", mlp_ratio=1.7),
    "vit, shared table": replace(ViTConfig.tiny(), relative_position="shared", position="none", image_size=(32, 64)),
    "vit, tables": replace(ViTConfig.tiny(), relative_position="block", class_token=False, depth=3),
    "cait": replace(CaiTConfig.tiny(), depth_token_only=3),
    "swin": replace(SwinConfig.tiny(), image_size=(32, 64)),
    "swin, positions": replace(SwinConfig.tiny(), absolute_position=True, window_size=3, cap_window=False),
    "swin v2": replace(SwinV2Config.tiny(), mlp_ratio=2.5),
}
METHODS: dict[str, MethodConfig] = {
    "classify": ClassifyConfig(num_classes=7, fc_norm=False),
    "transformer": MIMConfig(
        mask_block=8, target=PixelsConfig(), decoder=TransformerDecoderConfig(width=32, depth=2, mlp_ratio=1.3)
    ),
    "linear": MIMConfig(mask_block=8, target=PixelsConfig(), decoder=LinearDecoderConfig(), encoder_blocks=1),
    "mae": MAEConfig(mask_block=8, decoder=TransformerDecoderConfig(width=32, depth=1)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_shapes_that_are_compared_are_those_of_the_network(encoder: str, method: str) -> None:
    if method == "mae" and not ENCODERS[encoder].drops_tokens:
        return
    recipe = Recipe(encoder=ENCODERS[encoder], method=METHODS[method])
    expected = dict(recipe.encoder_shapes()) | dict(recipe.method.weight_shapes(recipe.trained_encoder))
    with no_init_parameters():
        weights = checkpoint.weights_of(build_method(recipe))
    assert expected == {name: tuple(weights[name].shape) for name in expected if name in weights}
    blocks = {name.rpartition(".mlp.")[0] for name in weights if ".mlp." in name}
    assert blocks == {name.rpartition(".mlp.")[0] for name in expected if ".mlp." in name}


#: recipe of a checkpoint, and what is said of another in its place
VIT = Recipe(encoder=ViTConfig.tiny(), method=ClassifyConfig(num_classes=6))
SWIN = Recipe(encoder=SwinV2Config.tiny(), method=ClassifyConfig(num_classes=6, fc_norm=False))
RECIPES: dict[str, tuple[Recipe, str]] = {
    "encoder.depth=200000": (VIT, "encoder.depth: 200000 blocks are more than any network has"),
    "encoder.depth=1000": (VIT, "has no encoder.blocks.2.mlp.fc1.weight"),
    "encoder.embed_dim=100000": (VIT, "has shape [32, 3, 8, 8], this recipe needs [100000, 3, 8, 8]"),
    "encoder.mlp_ratio=1.0e+15": (VIT, "encoder.blocks.0.mlp.fc1.weight has shape [128, 32], this recipe needs ["),
    "encoder.image_size=2048": (VIT, "encoder.pos_embed has shape [1, 17, 32], this recipe needs [1, 65537, 32]"),
    "encoder.image_size=80000": (VIT, "encoder.image_size: 80000x80000 has"),
    "encoder.patch_size=1": (VIT, "encoder.patch_embed.proj.weight has shape"),
    "encoder.relative_position=block": (VIT, "has no encoder.blocks.0.attn.relative_position_bias_table"),
    "method.num_classes=1000000": (VIT, "head.weight has shape [6, 32], this recipe needs [1000000, 32]"),
    "encoder.num_heads=[1000000,2]": (SWIN, "encoder.num_heads: 1000000 does not divide"),
    "encoder.depths=[2,900]": (SWIN, "has no encoder.layers.1.blocks.2.mlp.fc1.weight"),
    "encoder.depths=[2,2,2000]": (SWIN, "encoder.depths: 2004 blocks are more than any network has"),
    "encoder.image_size=100000": (SWIN, "encoder.image_size: 100000x100000 has"),
    "encoder.window_size=1000 encoder.cap_window=false": (SWIN, "encoder.window_size: 1000 is too large"),
}


def write_checkpoint(path: Path, recipe: Recipe, text_of_recipe: str, **meta: Any) -> None:
    """A checkpoint of a network of one recipe that says it is of another."""
    weights = checkpoint.weights_of(build_method(recipe))
    facts = {"recipe": text_of_recipe, "method": "classify", "classes": [], "epoch": 1, "step": 1, **meta}
    checkpoint.save(path, weights, {}, facts)


def changed(recipe: Recipe, changes: str) -> str:
    """The text of a recipe with changes, which need not be valid."""
    import yaml

    tree = yaml.safe_load(dump_recipe(recipe))
    for change in changes.split():
        key, _, content = change.partition("=")
        section, name = key.split(".")
        tree[section][name] = yaml.safe_load(content)
    return yaml.safe_dump(tree)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("recipes")
    for number, (changes, (recipe, _)) in enumerate(RECIPES.items()):
        write_checkpoint(folder / f"{number}.ckpt", recipe, changed(recipe, changes))
    names = sorted(folder.iterdir())
    return {call: answers(f"src.tasks.networks:{call}", names) for call in ("load_model", "load_encoder")}


@pytest.mark.compiles
@pytest.mark.parametrize("call", ["load_model", "load_encoder"])
@pytest.mark.parametrize("changes", RECIPES)
def test_a_recipe_of_another_network_is_one_line(changes: str, call: str, recipes: dict[str, dict[str, str]]) -> None:
    number = list(RECIPES).index(changes)
    answer = recipes[call][f"{number}.ckpt"]
    assert f"{number}.ckpt: " in answer and RECIPES[changes][1] in answer and "\n" not in answer


def test_as_many_classes_as_the_head_has(tmp_path: Path) -> None:
    from src.tasks.networks import load_model

    for names in (["a"], ["a"] * 7):
        write_checkpoint(tmp_path / "a.ckpt", VIT, dump_recipe(VIT), classes=names)
        with pytest.raises(CheckpointError, match=r"a\.ckpt: names \d class(es)?, but method\.num_classes"):
            load_model(tmp_path / "a.ckpt")
    write_checkpoint(tmp_path / "a.ckpt", VIT, dump_recipe(VIT), classes=["a"] * 6)
    load_model(tmp_path / "a.ckpt")


def test_another_size_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """Options of a user, too: this network would take 400 GB."""
    from src.tasks.networks import load_model

    write_checkpoint(tmp_path / "a.ckpt", VIT, dump_recipe(VIT))
    with pytest.raises(CheckpointError, match=r"this recipe needs \[100000, 3, 8, 8\]"):
        load_model(tmp_path / "a.ckpt", embed_dim=100_000)
    assert override(VIT, ["encoder.embed_dim=64"], "x").encoder.embed_dim == 64
