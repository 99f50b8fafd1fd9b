"""Weights from one network to another: resizing, loading with a report, and conversion both ways."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import types
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from src.config import (
    ENCODERS,
    CaiTConfig,
    ClassifyConfig,
    MIMConfig,
    SwinConfig,
    SwinV2Config,
    TransformerDecoderConfig,
    ViTConfig,
)
from src.config.files import parse_recipe
from src.engine import checkpoint
from src.methods import MaskedImageModel
from src.models import build_classifier, build_encoder
from src.models.swin_v2 import log_coordinates
from src.weights import WeightsError
from src.weights.derive import Hints, derive_encoder, derive_method
from src.weights.foreign import offset_index, open_foreign, to_ours, to_theirs, write_foreign
from src.weights.load import Origin, load_encoder_weights
from src.weights.names import SOURCES, naming_for, recognise
from src.weights.resize import TABLE_RULES, Progression, bicubic, resize_offsets, resize_positions
from src.weights.torch_file import StoredTensor, stored_tensor
from tests.helpers import ROOT, MakeFolder, Run, numbers, snapshot
from tests.torch_files import save_legacy, save_zip, torch_names

__all__ = ["torch_names"]
SCRIPT = ROOT / "scripts" / "convert_weights.py"

# --- resizing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", TABLE_RULES)
@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((7, 7), (6, 6)), ((2, 3), (4, 6)), ((1, 1), (3, 3))])
def test_a_constant_table_stays_constant_and_class_entries_stay(
    rule: str, old: tuple[int, int], new: tuple[int, int]
) -> None:
    count, wanted = ((2 * rows - 1) * (2 * cols - 1) for rows, cols in (old, new))
    table = np.concatenate([np.full((count, 2), 3.0), [[7.0, 8.0]]]).astype(np.float32)
    resized = resize_offsets(table, old, new, TABLE_RULES[rule])
    assert resized.shape == (wanted + 1, 2) and resized.dtype == np.float32
    np.testing.assert_allclose(resized[:-1], 3.0, rtol=1e-6)
    np.testing.assert_array_equal(resized[-1], [7, 8])


def test_rows_and_columns_are_not_exchanged() -> None:
    rows = np.repeat(np.arange(-2.0, 3.0)[:, None], 7, axis=1)  # offsets of 3 rows and 4 columns
    for rule in TABLE_RULES.values():
        resized = rule(rows, (9, 7))
        assert resized.shape == (9, 7)
        np.testing.assert_allclose(resized - resized[:, :1], 0, atol=1e-6)
        assert (np.diff(resized[:, 0]) >= 0).all() and resized[-1, 0] > resized[0, 0] + 3
    places = np.arange(6, dtype=np.float32).reshape(1, 6, 1) // 3  # 2 rows, 3 columns: the row's number
    resized = resize_positions(np.concatenate([np.full((1, 1, 1), 9, np.float32), places], axis=1), (2, 3), (4, 3))
    assert resized[0, 0, 0] == 9
    np.testing.assert_allclose(resized[0, 1:, 0].reshape(4, 3), resized[0, 1::3, 0][:, None].repeat(3, 1), atol=1e-6)


def test_offsets_reach_the_border_of_the_new_window() -> None:
    progression = Progression(1.01, 1.5)
    assert progression.offsets(5, 6)[-1] == pytest.approx(6, abs=1e-4)
    assert progression.offsets(3, 6)[-1] == pytest.approx(1 + 1.5 + 2.25, abs=1e-4)  # the search saturates
    np.testing.assert_allclose(progression.offsets(5, 6), -progression.offsets(5, 6)[::-1])


def test_bicubic_keeps_its_size() -> None:
    values = numbers(0, 5, 6)
    np.testing.assert_allclose(bicubic(values, (5, 6)), values, atol=1e-6)


# --- loading ----------------------------------------------------------------------------------------------------


def parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, Parameter]:
    return {name: Parameter(Tensor(np.zeros(shape, np.float32)), name=name) for name, shape in shapes.items()}


TABLE = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
FILE = Path("f.ckpt")


def test_the_rule_is_that_of_whoever_trained_the_table() -> None:
    table = numbers(0, 49, 2)
    for sources, rule in {("simmim",): "simmim", ("fastmim",): "fastmim", ("timm", "hf"): "bicubic"}.items():
        weights = parameters({TABLE: (169, 2)})
        report = load_encoder_weights(weights, {TABLE: table}, FILE, Origin(sources))
        expected = resize_offsets(table, (4, 4), (7, 7), TABLE_RULES[rule])
        np.testing.assert_array_equal(weights[TABLE].asnumpy(), expected)
        assert str(report) == f"0 matched; 1 resized (relative positions: rule {rule}); 0 missing; 0 ignored"


@pytest.mark.parametrize("sources", [(), ("simmim", "timm")])
def test_an_open_rule_is_asked_for_and_nothing_is_copied(sources: tuple[str, ...]) -> None:
    weights = parameters({TABLE: (169, 2), "encoder.a": (1,)})
    with pytest.raises(WeightsError) as caught:
        load_encoder_weights(
            weights, {TABLE: numbers(0, 49, 2), "encoder.a": np.ones(1, np.float32)}, FILE, Origin(sources)
        )
    text = str(caught.value)
    assert text.startswith(f"f.ckpt: {TABLE} is for 4x4 tokens, this recipe needs 7x7") and "--source simmim" in text
    assert not weights["encoder.a"].asnumpy().any()
    # of the right size it is taken, whoever trained it
    weights = parameters({TABLE: (49, 2)})
    assert load_encoder_weights(weights, {TABLE: numbers(0, 49, 2)}, FILE, Origin(sources)).matched == [TABLE]


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        (TABLE, (49, 2), (169, 3)),  # other heads
        (TABLE, (48, 2), (169, 2)),  # no window
        ("encoder.pos_embed", (1, 17, 8), (1, 17, 12)),
        ("encoder.pos_embed", (1, 17, 8), (1, 64, 8)),  # a class token more
        ("encoder.patch_embed.proj.weight", (8, 3, 16, 16), (8, 3, 8, 8)),
    ],
)
def test_shapes_that_no_rule_covers_are_refused(name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
    weights = parameters({name: ours})
    with pytest.raises(WeightsError) as caught:
        load_encoder_weights(weights, {name: numbers(0, *theirs)}, FILE, Origin(("simmim",)))
    assert str(caught.value) == f"f.ckpt: {name} has shape {list(theirs)}, this recipe needs {list(ours)}"


def test_one_shared_table_starts_those_of_a_larger_grid() -> None:
    """SimMIM's ViT, fine-tuned at another size: spread over the blocks, resized, class entries kept."""
    shared = "encoder.rel_pos_bias.relative_position_bias_table"
    names = [f"encoder.blocks.{block}.attn.relative_position_bias_table" for block in (0, 1)]
    table = numbers(0, 11 * 11 + 3, 2)
    weights = parameters(dict.fromkeys(names, (15 * 15 + 3, 2)))
    report = load_encoder_weights(weights, {shared: table}, FILE, Origin(("simmim",)))
    assert (report.matched, report.shared, sorted(report.resized)) == ([], names, names)
    for name in names:
        np.testing.assert_array_equal(weights[name].asnumpy()[-3:], table[-3:])
        expected = resize_offsets(table, (6, 6), (8, 8), TABLE_RULES["simmim"])
        np.testing.assert_array_equal(weights[name].asnumpy(), expected)


def test_grids_that_are_not_square_come_from_the_recipes() -> None:
    old = ViTConfig(image_size=(32, 64), patch_size=16, embed_dim=8, depth=1, num_heads=2)
    new = replace(old, image_size=(64, 96))
    table = numbers(0, 1, 1 + 2 * 4, 8)
    weights = parameters({"encoder.pos_embed": (1, 1 + 4 * 6, 8)})
    load_encoder_weights(weights, {"encoder.pos_embed": table}, FILE, Origin(("mae",), old), new)
    np.testing.assert_array_equal(weights["encoder.pos_embed"].asnumpy(), resize_positions(table, (2, 4), (4, 6)))
    with pytest.raises(WeightsError, match="has shape"):  # without them 8 places are nothing
        load_encoder_weights(weights, {"encoder.pos_embed": table}, FILE, Origin(("mae",)))


def test_fixed_positions_of_another_size_are_the_networks_own() -> None:
    weights = parameters({"encoder.pos_embed": (1, 17, 8), "encoder.a": (1,)})
    weights["encoder.pos_embed"].requires_grad = False
    arrays = {"encoder.pos_embed": numbers(0, 1, 5, 8), "encoder.a": np.ones(1, np.float32)}
    report = load_encoder_weights(weights, arrays, FILE)
    assert (report.matched, report.missing) == (["encoder.a"], ["encoder.pos_embed"])
    arrays["encoder.pos_embed"] = numbers(0, 1, 17, 8)  # of the same size they are the file's
    assert load_encoder_weights(weights, arrays, FILE).missing == []


HEADS = {"encoder.a": (2,), "fc_norm.weight": (2,), "head.weight": (5, 2), "head.bias": (5,)}


@pytest.mark.parametrize(
    ("theirs", "names", "copied"),
    [
        (5, (), True),  # a converted file knows no names
        (5, ("a", "b", "c", "d", "e"), True),
        (5, ("a", "b", "c", "d", "f"), False),
        (4, (), False),
    ],
)
def test_a_classifier_is_taken_for_the_same_classes_only(theirs: int, names: tuple[str, ...], copied: bool) -> None:
    arrays = {"encoder.a": np.ones(2), "fc_norm.weight": np.ones(2)}
    arrays |= {"head.weight": np.ones((theirs, 2)), "head.bias": np.ones(theirs)}
    weights = parameters(HEADS)
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    report = load_encoder_weights(weights, arrays, FILE, Origin((), None, names), None, list("abcde"))
    assert bool(weights["head.weight"].asnumpy().any()) == copied
    assert report.missing == ([] if copied else ["head.bias", "head.weight"])
    assert "fresh: head.bias, head.weight" in str(report) or copied
    assert weights["fc_norm.weight"].asnumpy().all()


def test_fastmim_starts_the_final_norm_of_a_classifier_afresh() -> None:
    """main_finetune.py: the fine-tuning networks call theirs fc_norm, and no weight of that name is in the file."""
    shapes = {"encoder.a": (2,), "encoder.norm.weight": (2,), "encoder.norm.bias": (2,)}
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for sources, head, norm in ((("fastmim",), True, 0), (("simmim",), True, 1), (("fastmim",), False, 1)):
        weights = parameters(shapes | ({"head.weight": (3, 2)} if head else {}))
        report = load_encoder_weights(weights, arrays, FILE, Origin(sources))
        assert weights["encoder.norm.weight"].asnumpy().tolist() == [norm, norm]
        assert ("encoder.norm.weight" in report.missing) == (norm == 0)
    # a ViT that pools its class token has no other norm, and keeps the name
    weights = parameters(shapes | {"head.weight": (3, 2), "encoder.cls_token": (2,)})
    load_encoder_weights(weights, arrays | {"encoder.cls_token": np.ones(2, np.float32)}, FILE, Origin(("fastmim",)))
    assert weights["encoder.norm.weight"].asnumpy().all()
    # from a classifier it is taken
    weights = parameters(shapes | {"head.weight": (3, 2)})
    load_encoder_weights(weights, arrays | {"head.weight": np.zeros((3, 2), np.float32)}, FILE, Origin(("fastmim",)))
    assert weights["encoder.norm.weight"].asnumpy().all()


def test_what_equal_shapes_hide_is_said() -> None:
    """FastMIM's ViT-B pre-trains with 6 heads and fine-tunes with 12."""
    new = ENCODERS["vit_base"]
    report = load_encoder_weights(parameters({}), {}, FILE, Origin(("fastmim",), replace(new, num_heads=6)), new)
    assert report.notes == ["encoder.num_heads was 6, is 12"] and str(report).endswith(report.notes[0])


def test_buffers_are_counted_and_not_listed() -> None:
    aside = ("layers.0.blocks.1.attn_mask", "layers.0.blocks.0.attn.relative_position_index", "pooler.weight")
    report = load_encoder_weights(parameters({}), {}, FILE, Origin((), None, (), aside))
    assert str(report) == "0 matched; 0 resized; 0 missing; 3 ignored (pooler.weight)"


# --- names ------------------------------------------------------------------------------------------------------

SMALL_VIT = ViTConfig(image_size=(32, 32), patch_size=16, embed_dim=16, depth=2, num_heads=2, position="learned")
SMALL_SWIN = SwinConfig(image_size=(32, 32), embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4)
SMALL_CAIT = CaiTConfig(image_size=(32, 32), embed_dim=12, depth=2, num_heads=3)


def random_weights(network: Any) -> dict[str, np.ndarray]:
    shapes = {p.name: tuple(p.shape) for p in network.get_parameters() if not p.name.endswith(".draws")}
    return {name: numbers(number, *shape) for number, (name, shape) in enumerate(shapes.items())}


def classifier_weights(encoder: Any) -> dict[str, np.ndarray]:
    pool = "mean" if isinstance(encoder, SwinConfig) else "cls"
    return random_weights(build_classifier(encoder, ClassifyConfig(num_classes=3, pool=pool, fc_norm=False)))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("encoder", [SMALL_VIT, SMALL_SWIN], ids=["blocks", "stages"])
def test_every_naming_is_recognised_and_read_back(source: str, encoder: Any, tmp_path: Path) -> None:
    weights = classifier_weights(encoder)
    tensors, key = to_theirs(weights, {}, None, source)
    write_foreign(tmp_path / "f.pth", tensors, key)
    assert len(set(tensors)) == len(tensors)
    found = open_foreign(tmp_path / "f.pth")
    done = to_ours(found, "", Hints(num_heads=2, image_size=(32, 32)))
    assert set(done.weights) == set(weights)
    for name, value in weights.items():
        assert done.weights[name].tobytes() == value.tobytes(), name
    wanted = replace(encoder, name="vit" if encoder is SMALL_VIT else "swin")
    assert replace(done.encoder, init=wanted.init) == wanted
    assert isinstance(done.method, ClassifyConfig) and done.method.num_classes == 3


@pytest.mark.parametrize(("said", "pool"), [("token", "cls"), ("avg", "mean"), ("", "cls")])
def test_timms_config_tells_what_a_head_stands_on(said: str, pool: str, tmp_path: Path) -> None:
    tensors, key = to_theirs(classifier_weights(SMALL_VIT), {}, None, "timm")
    write_foreign(tmp_path / "model.safetensors", tensors, key)
    (tmp_path / "config.json").write_text(json.dumps({"global_pool": said, "pretrained_cfg": {}}))
    done = to_ours(open_foreign(tmp_path / "model.safetensors"), "", Hints(num_heads=2))
    assert done.method == ClassifyConfig(num_classes=3, pool=pool, fc_norm=False)


def test_timm_moves_merging_to_the_next_stage() -> None:
    tensors, _ = to_theirs(classifier_weights(SMALL_SWIN), {}, None, "timm")
    assert "layers.1.downsample.norm.weight" in tensors and "layers.0.downsample.norm.weight" not in tensors
    assert "head.fc.weight" in tensors
    tensors, _ = to_theirs(classifier_weights(SMALL_SWIN), {}, None, "simmim")
    assert "layers.0.downsample.norm.weight" in tensors and "head.weight" in tensors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_chans": 1, "patch_size": 8, "depth": 1, "depth_token_only": 3, "qkv_bias": False},
        {"mlp_ratio": 2.0, "mlp_ratio_token_only": 3.0, "image_size": (32, 64)},
    ],
    ids=["default", "1 channel, patch 8, no qkv bias", "MLPs of other widths, wide"],
)
def test_class_attention_is_recognised_and_derived(changes: dict[str, Any], tmp_path: Path) -> None:
    """Everything but the initial layer scale is in names and shapes; no head count is asked for."""
    encoder = replace(SMALL_CAIT, **changes)
    weights = classifier_weights(encoder)
    tensors, key = to_theirs(weights, {}, None, "timm")
    assert key == "" and {"blocks.0.gamma_1", "blocks_token_only.0.attn.q.weight", "head.bias"} <= set(tensors)
    write_foreign(tmp_path / "f.pth", tensors, key)
    done = to_ours(open_foreign(tmp_path / "f.pth"), "", Hints(image_size=changes.get("image_size")))
    assert done.sources == ("timm",) and done.encoder == encoder and not done.unused
    assert done.method == ClassifyConfig(num_classes=3, pool="cls", fc_norm=False)
    assert {name: value.tobytes() for name, value in done.weights.items()} == {
        name: value.tobytes() for name, value in weights.items()
    }
    with pytest.raises(WeightsError, match=r"has no name there"):
        to_theirs(weights, {}, None, "hf")
    with pytest.raises(WeightsError, match=r"its names are those of timm, not of mae"):
        to_ours(open_foreign(tmp_path / "f.pth"), "mae")


def test_positions_without_a_class_entry_are_resized_whole() -> None:
    old, new = (replace(SMALL_CAIT, image_size=(side, 64)) for side in (32, 96))
    table = numbers(0, 1, 2 * 4, 12)
    weights = parameters({"encoder.pos_embed": (1, 6 * 4, 12), "encoder.cls_token": (1, 1, 12)})
    arrays = {"encoder.pos_embed": table, "encoder.cls_token": np.ones((1, 1, 12), np.float32)}
    report = load_encoder_weights(weights, arrays, FILE, Origin(("timm",), old), new)
    assert report.resized == {"encoder.pos_embed": "positions: bicubic"} and report.matched == ["encoder.cls_token"]
    expected = np.stack([bicubic(table[0, :, c].reshape(2, 4), (6, 4)).reshape(-1) for c in range(12)], axis=1)
    np.testing.assert_allclose(weights["encoder.pos_embed"].asnumpy()[0], expected, atol=1e-6)


def test_query_key_and_value_are_one_matrix() -> None:
    weights = classifier_weights(SMALL_VIT)
    tensors, key = to_theirs(weights, {}, None, "hf")
    attention = "vit.encoder.layer.1.attention.attention"
    for third, name in enumerate(("query", "key", "value")):
        rows = slice(16 * third, 16 * (third + 1))
        expected = weights["encoder.blocks.1.attn.qkv.weight"][rows]
        np.testing.assert_array_equal(tensors[f"{attention}.{name}.weight"].read(), expected)
    assert key == "" and "classifier.bias" in tensors


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["features.0.weight"], r"its names .*features\.0\.weight.*known: SimMIM"),
        (["embeddings.patch_embeddings.projection.weight", "encoder.layers.0.x"], r"bare Swin encoder of Hugging Face"),
    ],
)
def test_unknown_names_are_one_line(names: list[str], text: str) -> None:
    with pytest.raises(WeightsError, match=text):
        recognise(names)


def test_a_name_without_a_counterpart_is_refused() -> None:
    weights = classifier_weights(SMALL_VIT) | {"fc_norm.weight": np.ones(16, np.float32)}
    with pytest.raises(WeightsError, match=r"fc_norm\.weight has no name there"):
        to_theirs(weights, {}, None, "hf")
    with pytest.raises(WeightsError, match=r"odd\.weight has no place"):
        naming_for("hf", {"encoder.blocks.0.x": 0}).ours("odd.weight")


def test_a_table_is_read_through_the_files_own_index(tmp_path: Path, torch_names: types.ModuleType) -> None:
    """A moving average over whole numbers rounds them: FastMIM's model_ema reads other entries than its model."""
    state = plain_state(SMALL_SWIN)
    table, index = (f"layers.0.blocks.0.attn.relative_position_{kind}" for kind in ("bias_table", "index"))
    usual = offset_index(4)
    assert usual[0, 15] == 0 and usual[15, 0] == 48 and usual[0, 1] == 3 * 7 + 2
    state[index] = np.where(usual > 20, usual - 1, usual)
    save_zip(tmp_path / "in.pth", state, torch_names)
    done = to_ours(open_foreign(tmp_path / "in.pth"))
    ours = done.weights[f"encoder.{table}"]
    np.testing.assert_array_equal(ours[usual], state[table][state[index]])
    assert any("1 position tables" in remark for remark in done.remarks)
    back, _ = to_theirs(done.weights, done.unused, done.note, "")
    assert back[table].read().tobytes() == state[table].tobytes()
    state[index] = np.arange(256).reshape(16, 16) % 49  # not a function of the offset
    save_zip(tmp_path / "in.pth", state, torch_names)
    with pytest.raises(WeightsError, match=r"relative_position_index reads the position table"):
        to_ours(open_foreign(tmp_path / "in.pth"))


# --- what the file does not say ---------------------------------------------------------------------------------


def test_heads_that_no_shape_tells_are_asked_for() -> None:
    shapes = {name: value.shape for name, value in classifier_weights(SMALL_VIT).items()}
    with pytest.raises(WeightsError, match=r"write --num-heads N or --encoder PRESET"):
        derive_encoder(shapes, {}, Hints())
    assert derive_encoder(shapes, {}, Hints(num_heads=4)).num_heads == 4
    with pytest.raises(WeightsError, match=r"is not vit_base: embed_dim is 16"):
        derive_encoder(shapes, {}, Hints(preset="vit_base"))
    # a training script's name of the network counts only for the network it is the name of
    with pytest.raises(WeightsError, match="num-heads"):
        derive_encoder(shapes, {}, Hints(factory="mim_vit_base"))


@pytest.mark.parametrize(("factory", "heads"), [("mim_vit_base", 6), ("vit_base_patch16", 12)])
def test_fastmim_vit_b_has_the_heads_of_its_script(factory: str, heads: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {"encoder.patch_embed.proj.weight": (768, 3, 16, 16)}
    shapes |= {f"encoder.blocks.{n}.mlp.fc1.weight": (3072, 768) for n in range(12)}
    shapes |= {"encoder.cls_token": (1, 1, 768), "encoder.pos_embed": (1, 65, 768)}
    assert derive_encoder(shapes, {}, Hints(factory=factory)).num_heads == heads


def test_the_image_size_of_stages_comes_from_masks_or_is_asked_for() -> None:
    shapes = {name: value.shape for name, value in classifier_weights(SMALL_SWIN).items()}
    with pytest.raises(WeightsError, match="--image-size"):
        derive_encoder(shapes, {}, Hints())
    mask = {"layers.0.blocks.1.attn_mask": np.zeros((4, 16, 16))}
    assert derive_encoder(shapes, mask, Hints()).image_size == (32, 32)
    assert derive_encoder(shapes, {}, Hints(image_size=(64, 96))).image_size == (64, 96)


def test_a_mask_of_another_shape_than_a_square_is_no_guess() -> None:
    shapes = {name: value.shape for name, value in classifier_weights(SMALL_SWIN).items()}
    mask = {"layers.0.blocks.1.attn_mask": np.zeros((8, 16, 16))}  # 8 x 16 tokens
    with pytest.raises(WeightsError, match="--image-size"):
        derive_encoder(shapes, mask, Hints())


def test_mlps_of_a_ratio_that_is_not_whole() -> None:
    """int(8 * 3.2) = 25 and int(16 * 3.2) = 51, but 25 / 8, of the first stage alone, makes that 50."""
    config = replace(SMALL_SWIN, mlp_ratio=3.2)
    shapes = {name: value.shape for name, value in classifier_weights(config).items()}
    found = derive_encoder(shapes, {}, Hints(image_size=(32, 32)))
    assert isinstance(found, SwinConfig)
    for stage in (0, 1):
        dim = 8 * 2**stage
        assert int(dim * found.mlp_ratio) == shapes[f"encoder.layers.{stage}.blocks.0.mlp.fc1.weight"][0]


def test_timm_rolls_before_it_pads_and_caps_windows_axis_by_axis(tmp_path: Path) -> None:
    tensors, key = to_theirs(classifier_weights(SMALL_SWIN), {}, None, "timm")
    write_foreign(tmp_path / "f.pth", tensors, key)
    assert to_ours(open_foreign(tmp_path / "f.pth"), "", Hints(image_size=(40, 40))).encoder.roll_first
    with pytest.raises(WeightsError, match=r"map of 4x12 tokens .* window 4"):
        to_ours(open_foreign(tmp_path / "f.pth"), "", Hints(image_size=(32, 96)))
    tensors, key = to_theirs(classifier_weights(SMALL_SWIN), {}, None, "simmim")
    write_foreign(tmp_path / "g.pth", tensors, key)
    assert not to_ours(open_foreign(tmp_path / "g.pth"), "", Hints(image_size=(40, 40))).encoder.roll_first


def test_hugging_face_leaves_two_epsilons_alone_and_may_have_another_activation(tmp_path: Path) -> None:
    tensors, key = to_theirs(classifier_weights(SMALL_SWIN), {}, None, "hf")
    write_foreign(tmp_path / "model.safetensors", tensors, key)
    config = {"image_size": 32, "layer_norm_eps": 1e-3, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = to_ours(open_foreign(tmp_path / "model.safetensors")).encoder
    assert (encoder.norm_eps, encoder.merge_norm_eps) == (1e-3, 1e-5)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(WeightsError, match=r"config\.json: hidden_act is relu"):
        open_foreign(tmp_path / "model.safetensors")


@pytest.mark.parametrize("image", [None, (48, 48)])
def test_positions_that_fit_no_image_are_named(image: tuple[int, int] | None) -> None:
    shapes = {name: value.shape for name, value in classifier_weights(SMALL_VIT).items()}
    shapes["encoder.pos_embed"] = (1, 9, 16)  # class token, four patches, four registers
    text = r"3 x 3.*register tokens" if image else r"write --image-size"
    with pytest.raises(WeightsError, match=text):
        derive_encoder(shapes, {}, Hints(num_heads=2, image_size=image))


@pytest.mark.parametrize("beside", [{}, {"rng": np.arange(4)}], ids=["alone", "beside another tensor"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_the_network_is_found_below_its_key_and_prefixes(
    beside: dict[str, Any], prefix: str, tmp_path: Path, torch_names: types.ModuleType
) -> None:
    state = {prefix + name: value for name, value in plain_state(SMALL_VIT).items()}
    save_zip(tmp_path / "f.pth", {"model": state, **beside}, torch_names)
    found = open_foreign(tmp_path / "f.pth")
    assert (found.key, found.prefix) == ("model", prefix)
    assert set(found.tensors) == set(plain_state(SMALL_VIT))


def test_names_of_a_file_cannot_break_the_line(convert: Any, tmp_path: Path, torch_names: types.ModuleType) -> None:
    save_zip(tmp_path / "in.pth", plain_state(SMALL_VIT) | {"a\n\x1b[31mb": numbers(0, 2)}, torch_names)
    code, _, err = convert(tmp_path / "in.pth", tmp_path / "o.ckpt", "--num-heads", "2")
    assert code == 2 and len(err.splitlines()) == 1 and "a\\n\\x1b[31mb" in err


def test_a_decoder_tells_its_ratio_and_biases() -> None:
    encoder = replace(SMALL_VIT, position="sincos")
    decoder = TransformerDecoderConfig(width=48, depth=2, mlp_ratio=2.5, qkv_bias=False)
    method = MaskedImageModel(build_encoder(encoder), MIMConfig(decoder=decoder), encoder.image_size)
    shapes = {name: value.shape for name, value in random_weights(method).items()}
    found = derive_method(shapes, encoder, Hints())
    assert isinstance(found, MIMConfig) and found.decoder == decoder


def test_swin_v2_tells_its_windows_by_its_coordinates() -> None:
    config = SwinV2Config(image_size=(64, 64), embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=8)
    shapes = {name: value.shape for name, value in classifier_weights(config).items()}
    for pretrained in ((6, 0, 0, 0), (0, 0, 0, 0), (12, 6, 0, 0)):
        buffers = {
            f"layers.{stage}.blocks.0.attn.relative_coords_table": log_coordinates(8, before).reshape(1, 15, 15, 2)
            for stage, before in enumerate(pretrained[:2])
        }
        found = derive_encoder(shapes, buffers, Hints(image_size=(64, 64)))
        assert isinstance(found, SwinV2Config)
        assert (found.window_size, found.pretrained_window_sizes) == (8, pretrained)
    with pytest.raises(WeightsError, match="--window-size"):
        derive_encoder(shapes, {}, Hints(image_size=(64, 64)))
    with pytest.raises(WeightsError, match="odd sides"):
        derive_encoder(shapes, {}, Hints(image_size=(60, 64), window_size=8))


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run scripts/convert_weights.py in this process: arguments -> exit code, output, errors."""
    spec = importlib.util.spec_from_file_location("convert_weights", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        capsys.readouterr()
        code = module.main()
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def plain_state(encoder: Any) -> dict[str, np.ndarray]:
    """A classifier in the names of timm 0.5.4, with the buffers such files have."""
    tensors, _ = to_theirs(classifier_weights(encoder), {}, None, "simmim")
    state = OrderedDict((name, tensor.read()) for name, tensor in tensors.items())
    if isinstance(encoder, SwinConfig):
        state["layers.0.blocks.1.attn_mask"] = numbers(7, 4, 16, 16)
        state["layers.0.blocks.0.attn.relative_position_index"] = offset_index(4)
    return state


CONTAINERS = {
    "bare": (save_zip, lambda s: s, ""),
    "model": (save_zip, lambda s: {"model": s, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1)}, ""),
    "legacy": (save_legacy, lambda s: {"state_dict": s, "epoch": 3}, ""),
    "prefix": (save_zip, lambda s: {"model": OrderedDict((f"module.{n}", v) for n, v in s.items())}, ""),
    "half": (save_zip, lambda s: {"model": {n: halved(v) for n, v in s.items()}}, ""),
    "ema": (save_legacy, lambda s: {"model": {"a": np.ones(2, np.float32)}, "model_ema": s}, "model_ema"),
    "safetensors": (None, lambda s: s, ""),
}


def halved(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16) if values.dtype == np.float32 else values


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_comes_back_bit_by_bit(
    kind: str, convert: Any, tmp_path: Path, torch_names: types.ModuleType
) -> None:
    save, wrap, key = CONTAINERS[kind]
    source = tmp_path / "in.pth"
    if save is None:
        source = tmp_path / "in.safetensors"
        write_foreign(source, {n: stored_tensor(v) for n, v in plain_state(SMALL_SWIN).items()}, "")
    else:
        save(source, wrap(plain_state(SMALL_SWIN)), torch_names)
    flags = ["--key", key] if key else []
    code, out, err = convert(source, tmp_path / "ours.ckpt", *flags)
    assert (code, err) == (0, ""), err
    assert "names of simmim or timm" in out and "2 unused" in out and "  image_size: [32, 32]" in out
    for suffix in ("pth", "safetensors"):
        back = tmp_path / f"back.{suffix}"
        code, out, err = convert(tmp_path / "ours.ckpt", back, "--to", "torch")
        assert (code, err) == (0, ""), err
        before, after = open_foreign(source, key), open_foreign(back)
        assert [after.prefix + name for name in after.tensors] == [before.prefix + name for name in before.tensors]
        assert after.key == (before.key if suffix == "pth" else "") or kind == "ema"
        for name, tensor in before.tensors.items():
            other = after.tensors[name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert other.read().tobytes() == tensor.read().tobytes(), name


def test_class_attention_comes_back_bit_by_bit(convert: Any, tmp_path: Path, torch_names: types.ModuleType) -> None:
    """As the authors publish it: {"model": names with "module.", ...}; the config beside it is timm's."""
    state = plain_state(SMALL_CAIT)
    wrapped = {"model": OrderedDict((f"module.{name}", value) for name, value in state.items()), "epoch": 3}
    save_zip(tmp_path / "in.pth", wrapped, torch_names)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"crop_pct": 1.0}}))
    code, out, err = convert(tmp_path / "in.pth", tmp_path / "o.ckpt")
    assert (code, err) == (0, "") and "names of timm" in out and "0 unused" in out
    recipe = parse_recipe(checkpoint.load(tmp_path / "o.ckpt").meta["recipe"], "o.ckpt")
    assert recipe.encoder == SMALL_CAIT and recipe.data.eval_crop == 1.0
    code, _, err = convert(tmp_path / "o.ckpt", tmp_path / "b.pth", "--to", "torch")
    assert (code, err) == (0, "")
    before, after = open_foreign(tmp_path / "in.pth"), open_foreign(tmp_path / "b.pth")
    assert (after.key, after.prefix, list(after.tensors)) == (before.key, before.prefix, list(before.tensors))
    for name, tensor in before.tensors.items():
        assert after.tensors[name].read().tobytes() == tensor.read().tobytes(), name
    del wrapped["model"]["module.blocks.0.attn.proj_l.weight"]
    save_zip(tmp_path / "cut.pth", wrapped, torch_names)
    code, _, err = convert(tmp_path / "cut.pth", tmp_path / "c.ckpt")
    assert code == 2 and len(err.splitlines()) == 1 and "cut.pth: its tensors" in err
    flags = ["--encoder", "cait_s24"]
    code, _, err = convert(tmp_path / "in.pth", tmp_path / "c.ckpt", *flags)
    assert code == 2 and "is not cait_s24: embed_dim is 12" in err


def test_a_converted_checkpoint_is_one_of_ours(convert: Any, tmp_path: Path, torch_names: types.ModuleType) -> None:
    save_zip(tmp_path / "in.pth", {"model": plain_state(SMALL_VIT)}, torch_names)
    code, _, err = convert(tmp_path / "in.pth", tmp_path / "o.ckpt", "--num-heads", "2", "data.mean=[0.5,0.5,0.5]")
    assert code == 0, err
    found = checkpoint.load(tmp_path / "o.ckpt")
    recipe = parse_recipe(found.meta["recipe"], "o.ckpt")
    assert recipe.encoder == replace(SMALL_VIT, name="vit") and recipe.data.mean == (0.5, 0.5, 0.5)
    assert isinstance(recipe.method, ClassifyConfig) and recipe.method.pool == "cls"
    assert found.meta["origins"] == ["timm", "simmim", "fastmim", "mae"]
    np.testing.assert_array_equal(found.weights["head.weight"], plain_state(SMALL_VIT)["head.weight"])


def test_a_pretraining_checkpoint_brings_its_method(
    convert: Any, tmp_path: Path, torch_names: types.ModuleType
) -> None:
    tree = {"DATA": {"IMG_SIZE": 64, "MASK_PATCH_SIZE": 16, "MASK_RATIO": 0.5}, "MODEL": {"TYPE": "swin"}}
    config = sys.modules["yacs.config"].CfgNode(tree)  # type: ignore[attr-defined]
    weights = random_weights(build_encoder(replace(SMALL_SWIN, image_size=(64, 64))))
    state = OrderedDict((f"encoder.{name}", value) for name, value in weights.items())
    state |= {"encoder.mask_token": numbers(1, 1, 1, 8), "decoder.0.weight": numbers(2, 192, 16, 1, 1)}
    state |= {"decoder.0.bias": numbers(3, 192)}
    save_zip(tmp_path / "in.pth", {"model": state, "config": config}, torch_names)
    code, out, err = convert(tmp_path / "in.pth", tmp_path / "o.ckpt")
    assert code == 0, err
    recipe = parse_recipe(checkpoint.load(tmp_path / "o.ckpt").meta["recipe"], "o.ckpt")
    method = recipe.method
    assert isinstance(method, MIMConfig) and method.name == "simmim" and "names of simmim" in out
    assert (method.mask_block, method.mask_ratio, recipe.encoder.image_size) == (16, 0.5, (64, 64))
    # and back in its own names
    code, _, err = convert(tmp_path / "o.ckpt", tmp_path / "b.pth", "--to", "torch", "--source", "simmim")
    assert code == 0, err
    back = open_foreign(tmp_path / "b.pth").tensors
    assert {name: tensor.shape for name, tensor in back.items()} == {name: value.shape for name, value in state.items()}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["in.pth", "o.ckpt"], "write --num-heads"),
        (["in.pth", "o.ckpt", "--num-heads", "5"], "5 does not divide embed_dim 16"),
        (["in.pth", "o.ckpt", "--num-heads", "2", "--image-size", "32x"], "neither PIXELS nor HEIGHTxWIDTH"),
        (["in.pth", "o.ckpt", "--num-heads", "2", "--source", "hf"], "timm or simmim or fastmim or mae, not of hf"),
        (["in.pth", "o.ckpt", "--key", "ema"], "has no table 'ema'"),
        (["in.pth", "o.pth", "--num-heads", "2"], "writes .ckpt files"),
        (["in.pth", "gone/o.ckpt", "--num-heads", "2"], "its folder does not exist"),
        (["in.pth", f"{'o' * 300}.ckpt", "--num-heads", "2"], "cannot be written ("),
        (["in.pth", f"{'o' * 300}/o.ckpt", "--num-heads", "2"], "its folder does not exist"),
        (["in.pth", "o.ckpt", "--image-size", "9" * 5000], "neither PIXELS nor HEIGHTxWIDTH"),
        (["gone.pth", "o.ckpt"], "gone.pth"),
        (["odd.pth", "o.ckpt"], "not a PyTorch checkpoint"),
        (["in.pth", "o.ckpt", "--num-heads", "2", "encoder.depht=3"], "did you mean depth?"),
        (["in.pth", "o.ckpt", "--num-heads", "2", "method.num_classes=4"], "head.weight has shape [3, 16]"),
        (["in.pth", "in.ckpt", "--num-heads", "2"], "already exists"),
        (["odd.pth", "o.pth", "--to", "torch"], "not a .ckpt file"),
    ],
)
def test_a_conversion_that_cannot_be_done_is_one_line(
    arguments: list[str], text: str, convert: Any, tmp_path: Path, torch_names: types.ModuleType
) -> None:
    save_zip(tmp_path / "in.pth", {"model": plain_state(SMALL_VIT)}, torch_names)
    (tmp_path / "odd.pth").write_text("hello")
    (tmp_path / "in.ckpt").touch()
    before = sorted(tmp_path.iterdir())
    paths = [tmp_path / value for value in arguments[:2]]
    code, out, err = convert(*paths, *arguments[2:])
    lines = err.strip().splitlines()
    assert (code, out, len(lines)) == (2, "", 1) and text in lines[0], err
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


def test_a_tensor_with_another_shape_is_named(convert: Any, tmp_path: Path, torch_names: types.ModuleType) -> None:
    state = plain_state(SMALL_SWIN)
    state["layers.0.blocks.1.mlp.fc2.weight"] = numbers(0, 8, 31)
    save_zip(tmp_path / "in.pth", state, torch_names)
    code, _, err = convert(tmp_path / "in.pth", tmp_path / "o.ckpt")
    assert code == 2 and "encoder.layers.0.blocks.1.mlp.fc2.weight has shape [8, 31]" in err
    del state["layers.0.blocks.1.mlp.fc2.weight"]
    save_zip(tmp_path / "in.pth", state, torch_names)
    code, _, err = convert(tmp_path / "in.pth", tmp_path / "o.ckpt")
    assert code == 2 and "lacks 1 parameters of its network (encoder.layers.0.blocks.1.mlp.fc2.weight)" in err


@pytest.mark.parametrize(
    "change", [{"patch_embed.proj.weight": np.ones((16, 4), np.float32)}, {"blocks.0.mlp.fc1.weight": None}]
)
def test_tensors_that_are_no_network_are_one_line(
    change: dict[str, Any], convert: Any, tmp_path: Path, torch_names: types.ModuleType
) -> None:
    state = {name: value for name, value in (plain_state(SMALL_VIT) | change).items() if value is not None}
    save_zip(tmp_path / "in.pth", state, torch_names)
    code, _, err = convert(tmp_path / "in.pth", tmp_path / "o.ckpt", "--num-heads", "2")
    assert code == 2 and "in.pth: its tensors" in err and len(err.splitlines()) == 1


def test_names_for_a_run_of_ours_are_asked_for(convert: Any, tmp_path: Path) -> None:
    weights = {name: Tensor(value) for name, value in classifier_weights(SMALL_VIT).items()}
    meta = {"recipe": "", "origins": ["simmim", "timm"]}
    checkpoint.save(tmp_path / "o.ckpt", weights, {}, meta)
    code, _, err = convert(tmp_path / "o.ckpt", tmp_path / "b.pth", "--to", "torch")
    assert code == 2 and "write --source" in err
    code, _, err = convert(tmp_path / "o.ckpt", tmp_path / "b.pth", "--to", "torch", "--source", "timm")
    assert code == 0 and isinstance(open_foreign(tmp_path / "b.pth").tensors["head.weight"], StoredTensor), err


def test_weights_do_not_move_the_network_they_do_not_fit(tmp_path: Path) -> None:
    """A refused load leaves every parameter as it was."""
    encoder = build_classifier(SMALL_SWIN, ClassifyConfig(num_classes=3, fc_norm=False))
    weights = checkpoint.weights_of(encoder)
    before = snapshot(weights.values())
    arrays = classifier_weights(SMALL_SWIN)
    arrays.pop("encoder.layers.1.blocks.0.norm2.bias")
    with pytest.raises(WeightsError, match=r"no weights for 1 of \d+ encoder parameters"):
        load_encoder_weights(weights, arrays, FILE, Origin(("simmim",)))
    for name, value in weights.items():
        np.testing.assert_array_equal(value.asnumpy(), before[name])


# --- the whole way ----------------------------------------------------------------------------------------------


@pytest.mark.compiles
def test_a_converted_encoder_is_fine_tuned_at_another_size_and_a_converted_classifier_evaluated(
    convert: Any,
    tmp_path: Path,
    torch_names: types.ModuleType,
    image_folder_factory: MakeFolder,
    run_entry: Run,
) -> None:
    data = image_folder_factory(tmp_path / "data")
    weights = random_weights(build_encoder(SMALL_SWIN))
    state = OrderedDict((f"encoder.{name}", value * 0.1) for name, value in weights.items())
    state["encoder.mask_token"] = numbers(1, 1, 1, 8)
    save_zip(tmp_path / "in.pth", {"model": state}, torch_names)
    code, out, err = convert(tmp_path / "in.pth", tmp_path / "o.ckpt", "--image-size", "32")
    assert code == 0 and "a bare encoder" in out, err
    (tmp_path / "f.yaml").write_text(
        "encoder: {name: swin, image_size: 48, embed_dim: 8, depths: [2, 1], num_heads: [1, 2], window_size: 6}\n"
        "method: {name: classify, num_classes: 3, fc_norm: false}\n"
        f"data: {{root: {data}, workers: 0}}\n"
        f"train: {{epochs: 1, batch_size: 8, base_lr: 0.001, lr_batch: 0}}\ndevice: CPU\noutput: {tmp_path / 'run'}\n"
    )
    done = run_entry("train.py", "--config", tmp_path / "f.yaml", "--init-from", tmp_path / "o.ckpt")
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "run" / "train.log").read_text()
    assert "3 resized (relative positions: rule simmim); 2 missing (fresh: head.bias, head.weight); 1 ignored" in log
    # what it gives knows whose rule its tables follow, and goes out and in again
    assert checkpoint.load(tmp_path / "run" / "last.ckpt").meta["origins"] == ["simmim"]
    code, _, err = convert(tmp_path / "run" / "last.ckpt", tmp_path / "b.pth", "--to", "torch")
    assert code == 0, err
    flags = ["--image-size", "48", f"data.root={data}", "train.batch_size=8"]
    code, _, err = convert(tmp_path / "b.pth", tmp_path / "again.ckpt", *flags)
    assert code == 0, err
    scores = [run_entry("eval.py", "--ckpt", tmp_path / name) for name in ("run/last.ckpt", "again.ckpt")]
    shown = [json.loads(done.stdout.splitlines()[-1]) for done in scores]
    assert {shown[0][key] == shown[1][key] for key in ("top1", "count", "loss")} == {True}
