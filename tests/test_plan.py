"""What a recipe costs: operations against published tables, and `train.py --plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from src.config import (
    ENCODERS,
    METHODS,
    ClassifyConfig,
    MIMConfig,
    Recipe,
    SwinConfig,
    TransformerDecoderConfig,
)
from src.config.files import load_recipe
from src.data.sources import DataError
from src.tasks.plan import PlanError, as_table, make_plan
from tests.helpers import ROOT, MakeFolder, Run, assert_one_line_error

#: mmpretrain's tables: recipe, what differs, operations. Pre-training networks are counted at 224 pixels (18.83 and
#: 55.85 G are no figures of 192 pixels: those are 11.30 and 28.15), the encoder alone; classifiers without their head.
PUBLISHED = [
    ("swin_base_192_100e_pretrain", ["encoder.image_size=224"], 18_832_161_792),
    ("swin_base_192_800e_pretrain", ["encoder.image_size=224"], 18_832_161_792),
    ("swin_large_192_800e_pretrain", ["encoder.image_size=224"], 55_849_130_496),
    ("swin_base_192_100e_finetune", [], 11_303_976_960),
    ("swin_base_224_100e_finetune", [], 15_466_852_352),
    ("swin_base_224_800e_finetune", [], 15_466_852_352),
    ("swin_large_224_800e_finetune", [], 38_853_083_136),
]


@pytest.mark.parametrize(("name", "overrides", "operations"), PUBLISHED)
def test_operations_equal_the_published_tables(name: str, overrides: list[str], operations: int) -> None:
    recipe = load_recipe(ROOT / f"config/mmpretrain/{name}.yaml", overrides)
    found = recipe.method.flops(recipe.encoder)
    assert found["encoder"] + found.get("pooling", 0) == operations


def test_operations_of_vit() -> None:
    """17.58 G of ViT-B/16 at 224 pixels (mmpretrain configs/maskfeat/README.md), 15.4 G of Swin-B (its authors)."""
    assert ENCODERS["vit_base"].flops() == pytest.approx(17.58e9, rel=5e-4)
    assert ENCODERS["swin_base"].flops() == pytest.approx(15.4e9, rel=1e-2)


def test_operations_of_a_decoder_by_hand() -> None:
    """A block of width 64 on 4 tokens and a class token, from width 48 to 9 bins of 3 channels and 4 cells."""
    encoder = ENCODERS["vit"].__class__(image_size=(32, 32), embed_dim=48, depth=1, num_heads=2)
    method = MIMConfig(decoder=TransformerDecoderConfig(width=64, depth=1))
    block = 5 * (4 * 64 * 64 + 2 * 5 * 64 + 2 * 64 * 256 + 2 * 5 * 64)
    assert method.flops(encoder)["decoder"] == 5 * 48 * 64 + block + 5 * 5 * 64 + 5 * 64 * 108
    assert METHODS["simmim"].flops(encoder)["decoder"] == 4 * 48 * 16 * 16 * 3
    head = ClassifyConfig(num_classes=10).flops(encoder)
    assert head["head"] == 480 and head["pooling"] == 4 * 48 + 5 * 48
    assert head["encoder"] == encoder.flops() - 5 * 5 * 48  # fc_norm takes the final norm's place


def test_main_norms_of_huge_models_are_counted() -> None:
    plain, normed = (
        ENCODERS["swinv2_tiny"].__class__(depths=(2, 6), num_heads=(3, 6), main_norm_every=n) for n in (0, 3)
    )
    assert normed.flops() - plain.flops() == 2 * 5 * 32 * 32 * 192


def test_saved_values_by_hand() -> None:
    """Padding makes more scores, not more rows: windows of 4 on a map of 6 x 6 are padded to 8 x 8."""
    config = SwinConfig(image_size=(24, 24), embed_dim=8, depths=(2,), num_heads=(2,), window_size=4)
    block = 36 * (9 * 8 + 2 * 32) + 2 * 64 * 16 * 2
    assert METHODS["simmim"].saved_values(config) == 3 * 24 * 24 + 2 * block


# --- the plan ---------------------------------------------------------------------------------------------------

TINY = """
encoder: {name: vit, image_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}
method: {name: fastmim, mask_block: 16, decoder: {width: 32, depth: 1}}
data: {root: DATA, val: ""}
train: {epochs: 3, batch_size: 4, accumulate: 2, base_lr: 1e-3, lr_batch: 16}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("DATA", str(tmp_path / "data")))
    return path


def test_a_plan_counts_the_data_folder(tiny: Path, image_folder_factory: MakeFolder) -> None:
    image_folder_factory(tiny.parent / "data", classes=3, train=16)
    plan = make_plan(load_recipe(tiny), devices=2)
    assert plan["images"] == 48 and plan["images_from"] == str(tiny.parent / "data" / "train")
    assert plan["effective_batch"] == 16 and plan["learning_rate"] == 1e-3
    assert (plan["steps_per_epoch"], plan["steps"]) == (3, 9)  # 6 passes of 2 x 4 images are 3 updates
    assert plan["masked"] == {"blocks": 4, "masked_blocks": 3, "masked_tokens": 12} and plan["tokens"] == 16
    positions = 17 * 32
    assert plan["parameters"]["total"] - plan["parameters"]["trained"] == positions
    saved = load_recipe(tiny).method.saved_values(load_recipe(tiny).encoder)
    assert plan["memory"] == 16 * plan["parameters"]["trained"] + 4 * positions + 4 * 4 * saved
    assert plan["measured"] is None and "not measured" in as_table(plan)


def test_the_number_of_images_on_the_command_line_wins(tiny: Path, image_folder_factory: MakeFolder) -> None:
    image_folder_factory(tiny.parent / "data", classes=3, train=16)
    plan = make_plan(load_recipe(tiny), images=800)
    assert (plan["images"], plan["images_from"], plan["steps_per_epoch"]) == (800, "--images", 100)


def test_imagenet_is_known_without_its_folder() -> None:
    plan = make_plan(
        load_recipe(ROOT / "config/fastmim/vit_base_128_800e_pretrain.yaml", ["data.root=/nowhere/ImageNet"]), 8
    )
    assert plan["images"] == 1_281_167 and plan["images_from"].startswith("ImageNet-1K")
    share = load_recipe(ROOT / "config/fastmim/vit_base_224_finetune.yaml", ["data.labels_per_class=13"])
    assert make_plan(share)["images"] == 13_000


def test_small_blocks_hide_parts_of_tokens() -> None:
    recipe = Recipe(encoder=ENCODERS["swin_demo"], method=MIMConfig(mask_block=8))
    assert make_plan(recipe, images=64)["masked"] == {"blocks": 64, "masked_blocks": 48, "masked_tokens": 16}


def test_a_plan_without_its_images_says_the_rest(tiny: Path) -> None:
    """RingMo's Aircas is not public: sizes, operations and memory do not depend on it."""
    plan, whole = make_plan(load_recipe(tiny)), make_plan(load_recipe(tiny), images=800)
    unknown = ("images", "images_from", "steps_per_epoch", "steps")
    assert [plan[key] for key in ("images", "steps_per_epoch", "steps")] == [None] * 3
    assert {key for key in plan if plan[key] != whole[key]} == set(unknown)
    rows = dict(line.split("  ", 1) for line in as_table(plan).splitlines())
    gone = f"there is no folder {tiny.parent / 'data' / 'train'}; set data.root, or write --images N"
    assert rows["images"].strip() == f"? ({gone})" and rows["steps"].strip() == "? = ? x 3 epochs"


def test_a_plan_without_a_whole_step_is_refused(tiny: Path) -> None:
    with pytest.raises(PlanError) as raised:
        make_plan(load_recipe(tiny), 8, 63)
    words = "train.batch_size: 64 images per update (train.batch_size 4 x 2 passes x 8 devices)"
    assert words in str(raised.value)


def test_an_empty_data_folder_is_no_reason_to_guess(tiny: Path) -> None:
    (tiny.parent / "data" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="no image"):
        make_plan(load_recipe(tiny))


# --- train.py ---------------------------------------------------------------------------------------------------


@pytest.mark.compiles
def test_the_command_prints_json_and_measures_and_writes_nothing(
    tiny: Path, image_folder_factory: MakeFolder, run_entry: Run
) -> None:
    image_folder_factory(tiny.parent / "data", classes=3, train=16)
    before = sorted(tiny.parent.rglob("*"))
    output = tiny.parent / "run"
    done = run_entry("train.py", "--config", tiny, "--plan", "--measure", "--json", f"output={output}", "device=CPU")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    found = plan["measured"]
    assert found["device"] == "CPU" and found["first_step_seconds"] > found["step_seconds"] > 0
    assert found["images_per_second"] == pytest.approx(4 / found["step_seconds"])
    assert found["training_seconds"] == pytest.approx(found["step_seconds"] * 2 * plan["steps"])
    assert found["peak_memory"] > plan["memory"]
    assert sorted(tiny.parent.rglob("*")) == before
    table = as_table(plan)
    assert f"kernels          {found['kernels']}" in table and found["kernels"]
    assert "measured" in table and f"{plan['parameters']['trained']:,} trained" in table


@pytest.mark.compiles
def test_the_command_prints_a_table(run_entry: Run, tmp_path: Path) -> None:
    config = "config/simmim/swin_base_192_100e_pretrain.yaml"
    done = run_entry("train.py", "--config", config, "--plan", "--devices", "16", f"data.root={tmp_path}/imagenet")
    assert done.returncode == 0 and not done.stderr, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert rows["parameters"].strip().startswith("89,874,104 trained, 89,874,104 in all")
    assert rows["masked"].strip() == "22 of 36 blocks, 22 of 36 tokens"
    assert rows["FLOPs per image"].strip().startswith("11.42 G multiply-adds forward (encoder 11.304, decoder 0.113)")
    assert rows["effective batch"].strip() == "2048 = 128 x 1 pass x 16 devices"
    assert rows["learning rate"].strip() == "0.0008 = 0.0002 x 2048 / 512"
    assert rows["steps"].strip() == "62,500 = 625 x 100 epochs"


def test_a_plan_counts_the_teacher_and_repeated_images() -> None:
    """46.9 M parameters of CaiT-S24 (timm), 9.4 G of it and 1.3 of DeiT-Tiny (arXiv 2103.17239, 2012.12877)."""
    recipe = load_recipe(ROOT / "config/manifold_kd/deit_tiny_from_cait_s24.yaml", ["data.root=gone/imagenet"])
    plan = make_plan(recipe, devices=8)
    assert plan["teacher"]["parameters"] == 46_916_200
    assert plan["teacher"]["flops"] == pytest.approx(9.4e9, rel=0.01)
    assert plan["flops"]["total"] == pytest.approx(1.3e9, rel=0.05)
    assert plan["steps_per_epoch"] == 1_281_024 // 512
    rows = dict(line.split("  ", 1) for line in as_table(plan).splitlines())
    assert rows["teacher"].strip().startswith("cait_s24, 46,916,200 parameters, 9.35 G multiply-adds")
    alone = make_plan(replace(recipe, method=recipe.method.classifier), devices=8)
    assert plan["memory"] - alone["memory"] == 4 * 46_916_200 and alone["teacher"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "--devices", "0"], ["--devices: '0' is not a whole number above 0"]),
        (["--plan", "--images", "many"], ["--images: 'many' is not a whole number above 0"]),
        (["--devices", "8"], ["--devices needs --plan"]),
        (["--json"], ["--json needs --plan"]),
        (["--plan", "--resume", "auto"], ["leave --resume out"]),
        (["--plan", "train.epoch=3"], ["train.epoch: unknown key", "did you mean epochs?"]),
    ],
    ids=["devices", "images", "devices without plan", "json without plan", "resume", "recipe"],
)
def test_errors_are_one_line(tiny: Path, run_entry: Run, arguments: list[str], words: list[str]) -> None:
    assert_one_line_error(run_entry("train.py", "--config", tiny, *arguments), *words)
