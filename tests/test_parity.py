"""The reference numbers below tests/golden: every case passes, and the check can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore.nn.utils import no_init_parameters

from scripts import check_parity as parity
from src.config import ClassifyConfig, EncoderConfig, SwinConfig, SwinV2Config
from src.models import build_classifier
from src.weights.names import PLAIN
from tests.helpers import ROOT, Run
from tests.parity.common import Case, StatedArguments
from tests.parity.networks import case_encoder

pytestmark = pytest.mark.usefixtures("graph_mode")

GOLDEN = ROOT / "tests" / "golden"
CASES: dict[str, Callable[[], Any] | None] = dict(parity.plan(GOLDEN))


def test_the_golden_folder_holds_every_kind_of_case() -> None:
    assert {
        "fastmim_vit_hog_block32_dec1_norm1",
        "fastmim_vit_l2_block16_dec1_norm1",
        "fastmim_ft_vit_gap",
        "fastmim_ft_vit_cls",
        "hog_convention",
        "timm_current_cait",
        "full_size/timm054_cait_s24_224",
        "mixup",
        "randaugment_ops",
        "augmentation/randaugment",
        "augmentation/random_erasing",
        "train10_fastmim_vit",
        "schedules/fastmim",
        "optimizer_groups/fastmim_tiny_finetune_vit",
        "optimizer_groups/fastmim_tiny_pretrain_vit",
    } <= set(CASES)


@pytest.mark.compiles
@pytest.mark.parametrize("name", CASES)
def test_a_reference_case(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    compare = CASES[name]
    assert compare is not None, "not covered"
    passed = parity.check(name, compare)
    assert passed, capsys.readouterr().out


def perturbed(tmp_path: Path, name: str, array: str) -> Path:
    """A copy of a case in which one stored array is off by 1e-2 of its largest value."""
    shutil.copytree(GOLDEN / name, tmp_path / name)
    path = tmp_path / name / "data.npz"
    data = dict(np.load(path))
    data[array] = (data[array] + 1e-2 * np.abs(data[array]).max()).astype(data[array].dtype)
    np.savez(path, **data)
    return tmp_path


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("timm_deit_distilled", "logits"),
        ("hog_convention", "hog_"),
        ("mixup", "mixed"),
        ("mixup", "soft10"),
        ("randaugment_ops", "output"),
    ],
)
def test_a_wrong_number_fails(name: str, array: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = np.load(GOLDEN / name / "data.npz").files
    key = next(item for item in stored if item.startswith(array))
    ((found, compare),) = parity.plan(perturbed(tmp_path, name, key))
    assert found == name and compare is not None
    assert not parity.check(name, compare)
    assert capsys.readouterr().out.startswith(f"FAIL {name} {key}")


def test_a_case_that_cannot_run_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN / "fastmim_ft_vit_gap", tmp_path / "fastmim_ft_vit_gap")
    (tmp_path / "fastmim_ft_vit_gap" / "weights.safetensors").unlink()
    ((name, compare),) = parity.plan(tmp_path)
    assert not parity.check(name, compare)
    assert capsys.readouterr().out.startswith(f"FAIL {name} ")


def test_a_case_nothing_compares_is_said_to_be_uncovered(tmp_path: Path) -> None:
    (tmp_path / "new_kind").mkdir()
    (tmp_path / "new_kind" / "case.json").write_text("{}")
    assert list(parity.plan(tmp_path)) == [("new_kind", None)]


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A JSON file after a change of what it holds."""
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def other_arrays(folder: Path, rename: Callable[[str], str]) -> None:
    data = dict(np.load(folder / "data.npz"))
    np.savez(folder / "data.npz", **{rename(name): value for name, value in data.items()})


def outcome(tmp_path: Path) -> bool | None:
    ((name, compare),) = parity.plan(tmp_path)
    assert compare is not None, name
    return parity.check(name, compare)


#: arguments of a case that its weights and arrays tell as well
TOLD = {
    "fastmim_ft_vit_gap": ("img_size", "patch_size", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "num_classes"),
    "fastmim_ft_swin": ("img_size", "window_size", "depths", "num_heads", "embed_dim", "num_classes"),
    "fastmim_vit_l2_block16_dec1_norm1": ("img_size", "depth", "block_size", "decoder_depth", "mim_loss"),
    "fastmim_swin_hog_block64_dec1_norm1": ("window_size", "depths", "num_heads", "block_size", "decoder_embed_dim"),
    "simmim_vit_ape_rpb": ("DATA.IMG_SIZE", "MODEL.TYPE", "MODEL.VIT.USE_APE", "MODEL.VIT.USE_RPB", "MODEL.VIT.DEPTH"),
    "swinv2_cls": ("MODEL.SWINV2.WINDOW_SIZE", "MODEL.SWINV2.DEPTHS", "MODEL.SWINV2.APE", "MODEL.NUM_CLASSES"),
    "timm_deit_distilled": ("img_size", "distilled", "depth", "num_classes"),
    "mixup": ("label_smoothing", "num_classes"),
}


#: the cases among them that compile fast
RUN = ("timm_deit_distilled", "mixup")


@pytest.mark.parametrize("name", [name for name in TOLD if name != "mixup"])
def test_the_encoder_of_a_case_follows_from_its_shapes(name: str) -> None:
    case = Case(GOLDEN / name)
    weights = case.tensors("weights")

    def guess() -> EncoderConfig:
        raise AssertionError(f"{name}: the shapes are not enough")

    stated = case_encoder(case, guess, weights, case.arguments)
    rest = StatedArguments({key: value for key, value in case.arguments.items() if key not in TOLD[name]})
    assert case_encoder(case, guess, weights, rest) == stated


@pytest.mark.compiles
@pytest.mark.parametrize("name", RUN)
def test_a_case_of_another_name_whose_arrays_tell_its_sizes_passes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = max((prefix for prefix in parity.CASES if name.startswith(prefix)), key=len)
    folder = tmp_path / f"{kind}0_anew"
    shutil.copytree(GOLDEN / name, folder)

    def change(info: dict[str, Any]) -> None:
        for key in TOLD[name]:
            info["arguments"].pop(key, None)
        info.pop("call", None)

    rewritten(folder / "case.json", change)
    passed = outcome(tmp_path)
    assert passed, capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("pos_sincos", lambda name: f"table_{sum(map(ord, name))}_{len(name)}"),
        ("remap_simmim_tables", lambda name: f"x{name.replace('_to_', 'o')}"),
        ("pos_embed_fastmim", lambda name: name.replace("_to_", "and")),
    ],
)
def test_sizes_come_from_shapes_not_from_names_of_arrays(
    name: str, rename: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    other_arrays(tmp_path / name, rename)
    rewritten(tmp_path / name / "case.json", lambda info: (info.pop("pairs", None), info.pop("tables", None)))
    passed = outcome(tmp_path)
    assert passed, capsys.readouterr().out


@pytest.mark.compiles
@pytest.mark.parametrize(("name", "arrays"), [("simmim_vit_ape_rpb", ("latent", "reconstruction"))])
def test_an_array_between_image_and_loss_may_be_left_out(
    name: str, arrays: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    data = dict(np.load(tmp_path / name / "data.npz"))
    np.savez(tmp_path / name / "data.npz", **{key: value for key, value in data.items() if key not in arrays})
    assert outcome(tmp_path), capsys.readouterr().out


def json_copy(tmp_path: Path, name: str, other: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A file of the folder under another name, changed."""
    path = tmp_path / name.split("/")[0] / f"{other}.json"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / f"{name}.json", path)
    rewritten(path, change)
    return path


def with_positions(info: dict[str, Any], arguments: bool) -> None:
    """A Swin of another window, of which nothing but its list says that it has an absolute position table."""
    if not arguments:
        info.pop("arguments")
    else:
        info["arguments"].pop("MODEL.SWIN.APE")
    info["model"] = "unknown"
    info["state_dict"].insert(0, ["absolute_pos_embed", [1, 48 * 48, 128], "trainable"])
    info["total"] += 48 * 48 * 128


@pytest.mark.parametrize("arguments", [True, False])
def test_a_full_size_network_is_known_by_its_list(
    arguments: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "full_size/simmim_finetune_swin_base_w6_192"
    path = json_copy(tmp_path, name, "simmim_x_swin_tiny_w8_256", lambda info: with_positions(info, arguments))
    assert outcome(tmp_path), capsys.readouterr().out

    rewritten(path, lambda info: info["state_dict"][0].__setitem__(1, [1, 47 * 47, 128]))
    assert not outcome(tmp_path)


@pytest.mark.parametrize(
    "name", ["fastmim_pretrain_vit_base_hog", "simmim_finetune_vit_base_224", "timm054_cait_s24_224"]
)
def test_full_size_networks_of_other_names_and_without_arguments_pass(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(info: dict[str, Any]) -> None:
        info.update(model="x", arguments=None, num_heads=None, source="")

    json_copy(tmp_path, f"full_size/{name}", f"{name.split('_')[0]}_x", change)
    assert outcome(tmp_path), capsys.readouterr().out


@pytest.mark.parametrize("kind", [SwinConfig, SwinV2Config])
def test_a_full_size_network_needs_no_arguments_for_what_its_shapes_do_not_hang_on(
    kind: type[SwinConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without buffers no shape tells the image, and none of Swin V2 the window."""
    encoder = kind(in_chans=1, embed_dim=24, depths=(1, 3, 1), num_heads=(3, 6, 12), window_size=5, patch_norm=False)
    with no_init_parameters():
        network = build_classifier(encoder, ClassifyConfig(num_classes=37, pool="mean", fc_norm=False))
    rows = [[PLAIN.theirs(p.name)[0][0], list(p.shape), "trainable"] for p in network.get_parameters()]
    (tmp_path / "full_size").mkdir()
    (tmp_path / "full_size" / "swin_x.json").write_text(json.dumps({"state_dict": rows}))
    assert outcome(tmp_path), capsys.readouterr().out


def test_arguments_that_contradict_the_list_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "full_size/simmim_finetune_swin_base_w6_192"
    json_copy(tmp_path, name, "simmim_x", lambda info: info["arguments"].update({"MODEL.SWIN.WINDOW_SIZE": 5}))
    assert outcome(tmp_path) is False
    assert capsys.readouterr().out.startswith("FAIL full_size/simmim_x shape ")


@pytest.mark.parametrize(
    "name", ["fastmim_tiny_finetune_swin", "fastmim_tiny_pretrain_vit", "simmim_tiny_ft_vit", "simmim_tiny_pre_swin"]
)
def test_parameter_groups_of_other_names_and_without_arguments_pass(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = json_copy(
        tmp_path, f"optimizer_groups/{name}", f"{name.split('_')[0]}_x", lambda info: info.pop("arguments")
    )
    assert outcome(tmp_path), capsys.readouterr().out

    rewritten(path, lambda info: info["params"][-1].__setitem__(2, 0.02))
    assert outcome(tmp_path) is False


@pytest.mark.compiles
def test_distillation_finds_the_weights_it_shares_under_other_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "kd_full_a", tmp_path / "kd_full_b"
    for folder in (first, second):
        shutil.copytree(GOLDEN / "kd_full_soft_tau3", folder)
    for kind in ("student", "teacher"):
        (second / f"{kind}.safetensors").unlink()
    (name, compare) = list(parity.plan(tmp_path))[1]
    assert name == "kd_full_b" and compare is not None
    assert parity.check(name, compare), capsys.readouterr().out

    shutil.rmtree(first)
    assert outcome(tmp_path) is None
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not covered kd_full_b: ") and "student and teacher" in last


def test_what_nothing_tells_is_not_covered_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(GOLDEN / "fastmim_ft_vit_gap", tmp_path / "fastmim_ft_vit_x")
    rewritten(tmp_path / "fastmim_ft_vit_x" / "case.json", lambda info: info["arguments"].pop("num_heads"))
    assert outcome(tmp_path) is None
    assert capsys.readouterr().out == "not covered fastmim_ft_vit_x: its arguments do not state num_heads\n"


@pytest.mark.compiles
def test_masks_of_unknown_sizes_are_not_covered_and_counted(run_entry: Run, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "masks", tmp_path / "masks_x")
    other_arrays(tmp_path / "masks_x", lambda name: f"a{sum(map(ord, name))}")
    done = run_entry("scripts/check_parity.py", tmp_path)
    first, last = done.stdout.splitlines()
    assert first.startswith("not covered masks_x: the sizes of a")
    assert last == "parity: 0 passed, 0 failed, 1 not covered"
    assert done.returncode == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "data.npz").unlink(),
        lambda folder: cut(folder / "data.npz"),
        lambda folder: cut(folder / "weights.safetensors"),
        lambda folder: (folder / "case.json").write_text("no json"),
        lambda folder: (folder / "case.json").write_text("[]"),
        lambda folder: (folder / "case.json").unlink(),
        lambda folder: [file.unlink() for file in folder.iterdir()],
    ],
    ids=["no data", "cut data", "cut weights", "no json", "a list", "no case.json", "empty"],
)
def test_a_broken_case_is_one_line_of_failure(
    damage: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(GOLDEN / "fastmim_ft_vit_gap", tmp_path / "fastmim_ft_vit_gap")
    damage(tmp_path / "fastmim_ft_vit_gap")
    assert outcome(tmp_path) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL fastmim_ft_vit_gap ")


@pytest.mark.parametrize("name", ["full_size/simmim_x", "optimizer_groups/simmim_x", "schedules/simmim"])
@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_broken_json_file_is_one_line_of_failure(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{name}.json"
    path.parent.mkdir()
    path.write_text(text)
    assert outcome(tmp_path) is False
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"FAIL {name} ")


def test_a_case_without_arrays_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "case.json").write_text("{}")
    assert outcome(tmp_path) is False
    assert capsys.readouterr().out == "FAIL masks ValueError: it has nothing to compare\n"


@pytest.mark.compiles
def test_a_missing_folder_is_one_line_and_exit_code_2(run_entry: Run, tmp_path: Path) -> None:
    done = run_entry("scripts/check_parity.py", tmp_path / "gone")
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path / 'gone'} is not a folder of reference cases"


@pytest.mark.compiles
def test_an_empty_folder_does_not_pass(run_entry: Run, tmp_path: Path) -> None:
    done = run_entry("scripts/check_parity.py", tmp_path)
    assert done.returncode == 1
    assert done.stdout.strip() == "parity: 0 passed, 0 failed, 0 not covered"
