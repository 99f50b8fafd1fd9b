"""The reference numbers below tests/golden: every case passes, and the check can fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import check_parity as parity
from tests.helpers import ROOT, Run

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


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("fastmim_ft_vit_gap", "logits"),
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


def test_a_missing_folder_is_one_line_and_exit_code_2(run_entry: Run, tmp_path: Path) -> None:
    done = run_entry("scripts/check_parity.py", tmp_path / "gone")
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path / 'gone'} is not a folder of reference cases"


def test_an_empty_folder_does_not_pass(run_entry: Run, tmp_path: Path) -> None:
    done = run_entry("scripts/check_parity.py", tmp_path)
    assert done.returncode == 1
    assert done.stdout.strip() == "parity: 0 passed, 0 failed, 0 not covered"
