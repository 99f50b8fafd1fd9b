"""Every recipe below config/ loads, says how it is run and what to expect, and builds what it describes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from mindspore.nn.utils import no_init_parameters

from src.config.files import dump_recipe, load_recipe, parse_recipe
from src.engine.optim import parameter_groups
from src.engine.schedule import peak_rate
from src.methods import build_method
from src.tasks.plan import IMAGENET, make_plan
from tests.helpers import ROOT
from tests.parity.recipes import full_size_findings, reference_network
from tests.test_parity import GOLDEN

pytestmark = pytest.mark.usefixtures("graph_mode")

#: recipes; folders that start with _ hold bases, which their children cover, and experiments are no recipes
RECIPES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "config").rglob("*.yaml")
    if not any(part.startswith("_") or part == "experiments" for part in path.relative_to(ROOT).parts)
)


def header(path: Path) -> list[str]:
    """The comment lines a file opens with."""
    lines = []
    for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return lines


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_the_header_says_how_to_run_it_and_what_to_expect(path: Path) -> None:
    text = "\n".join(header(path))
    for word in ("Run:", "Expect:", "Cost:"):
        assert word in text, f"{path}: no {word} in its header"
    assert f"--config {path}" in text, f"{path}: its Run: line names another file"


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_the_recipe_survives_printing(path: Path) -> None:
    recipe = load_recipe(ROOT / path)
    assert parse_recipe(dump_recipe(recipe), str(path)) == recipe


@pytest.mark.compiles
@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_the_recipe_builds(path: Path) -> None:
    recipe = load_recipe(ROOT / path)
    with no_init_parameters():  # names and shapes only
        method = build_method(recipe)
    names = [p.name for p in method.get_parameters()]
    assert len(set(names)) == len(names), f"{path}: two parameters share a name"
    assert any(name.startswith("encoder.") for name in names)
    grouped = [p.name for group in parameter_groups(method, recipe.train) for p in group.parameters]
    assert sorted(grouped) == sorted(p.name for p in method.trainable_params())
    assert peak_rate(recipe.train) > 0
    batches = 100_000 // recipe.train.batch_size  # every published recipe trains on far more images
    assert recipe.train.epochs * batches > 0


def test_no_two_recipes_write_into_one_folder() -> None:
    outputs = [load_recipe(ROOT / path).output for path in RECIPES]
    assert len(set(outputs)) == len(outputs)


@dataclass(frozen=True)
class Row:
    """What is published of a recipe, worked out by hand from its source.

    batch, rate: of an update, over all devices.
    steps: of the whole training.
    masks: mask blocks of an image and how many are hidden; None for fine-tuning.
    like: the reference's list of parameters in tests/golden/full_size, empty if there is none.
    parameters: in all, where the list is not the network's own.
    images: of the data set.
    """

    batch: int
    rate: float
    steps: int
    masks: tuple[int, int] | None = None
    like: str = ""
    parameters: int = 0
    images: int = IMAGENET


#: 1,281,167 images are 312 updates of 4096, 625 of 2048, 1251 of 1024
PUBLISHED = {
    "fastmim/vit_base_128_800e_pretrain": Row(4096, 2.4e-3, 800 * 312, (64, 48), "fastmim_pretrain_vit_base_hog"),
    "fastmim/swin_base_128_400e_pretrain": Row(2048, 1.2e-3, 400 * 625, (16, 12), "fastmim_pretrain_swin_base_hog"),
    "fastmim/vit_base_224_finetune": Row(1024, 2.4e-3, 125_100, None, "fastmim_finetune_vit_base"),
    "fastmim/swin_base_224_finetune": Row(1024, 4e-3, 125_100, None, "fastmim_finetune_swin_base_w7_224"),
    # encoder 85,798,656, decoder 26,109,184 (fixed positions of both are among them)
    "mae/vit_base_224_1600e_pretrain": Row(4096, 2.4e-3, 1600 * 312, (196, 147), parameters=111_907_840),
    "mae/vit_base_224_finetune": Row(1024, 2e-3, 125_100, None, "fastmim_finetune_vit_base"),
    "simmim/vit_base_224_800e_pretrain": Row(2048, 4e-4, 500_000, (49, 30), "simmim_pretrain_vit_base_224"),
    "simmim/vit_base_224_800e_finetune": Row(2048, 5e-3, 62_500, None, "simmim_finetune_vit_base_224"),
    "simmim/swin_base_192_100e_pretrain": Row(2048, 8e-4, 62_500, (36, 22), "simmim_pretrain_swin_base_w6_192"),
    "simmim/swin_base_192_800e_pretrain": Row(2048, 4e-4, 500_000, (36, 22), "simmim_pretrain_swin_base_w6_192"),
    "simmim/swin_large_192_800e_pretrain": Row(2048, 4e-4, 500_000, (36, 22), "simmim_pretrain_swin_large_w12_192"),
    "simmim/swin_base_192_100e_finetune": Row(2048, 5e-3, 62_500, None, "simmim_finetune_swin_base_w6_192"),
    "simmim/swin_base_224_100e_finetune": Row(2048, 5e-3, 62_500, None, "simmim_finetune_swin_base_w7_224"),
    "simmim/swin_base_224_800e_finetune": Row(2048, 5e-3, 62_500, None, "simmim_finetune_swin_base_w7_224"),
    "simmim/swin_large_224_800e_finetune": Row(2048, 5e-3, 62_500, None, "simmim_finetune_swin_large_w14_224"),
    "simmim/swinv2_base_192_800e_pretrain": Row(2048, 4e-4, 500_000, (36, 22)),
    "simmim/swinv2_base_224_800e_finetune": Row(2048, 5e-3, 62_500),
    "simmim/swinv2_huge_192_800e_pretrain": Row(2048, 4e-4, 500_000, (36, 22)),
    "simmim/swinv2_huge_224_finetune": Row(2048, 5e-3, 62_500),
    "simmim/swinv2_huge_512_finetune": Row(2048, 5e-3, 62_500),
    "mmpretrain/swin_base_192_100e_pretrain": Row(2048, 8e-4, 62_500, (36, 22), "simmim_pretrain_swin_base_w6_192"),
    "mmpretrain/swin_base_192_800e_pretrain": Row(2048, 4e-4, 500_000, (36, 22), "simmim_pretrain_swin_base_w6_192"),
    "mmpretrain/swin_large_192_800e_pretrain": Row(2048, 4e-4, 500_000, (36, 22), parameters=199_920_372),
    "mmpretrain/swin_base_192_100e_finetune": Row(2048, 5e-3, 62_500, None, "simmim_finetune_swin_base_w6_192"),
    "mmpretrain/swin_base_224_100e_finetune": Row(2048, 5e-3, 62_500, None, "simmim_finetune_swin_base_w7_224"),
    "mmpretrain/swin_base_224_800e_finetune": Row(2048, 5e-3, 62_500, None, "simmim_finetune_swin_base_w7_224"),
    "mmpretrain/swin_large_224_800e_finetune": Row(2048, 5e-3, 62_500, parameters=196_848_316),
    # checkpoint names tell 976 updates per epoch; 45 classes are 955 rows of the head less
    "ringmo/vit_base_224_200e_pretrain": Row(
        512, 1e-4, 200 * 976, (49, 30), "simmim_pretrain_vit_base_224", images=500_000
    ),
    "ringmo/swin_base_192_200e_pretrain": Row(
        512, 2e-4, 200 * 976, (36, 22), "simmim_pretrain_swin_base_w6_192", images=500_000
    ),
    "ringmo/swin_base_192_100e_pretrain": Row(2048, 8e-4, 62_500, (36, 22), "simmim_pretrain_swin_base_w6_192"),
    "ringmo/vit_base_224_200e_finetune": Row(128, 3.125e-4, 200 * 49, parameters=86_530_984 - 955 * 769, images=6_300),
    "ringmo/swin_base_224_200e_finetune": Row(
        128, 3.125e-4, 200 * 49, parameters=87_768_224 - 955 * 1025, images=6_300
    ),
    "ringmo/swin_base_224_100e_finetune": Row(2048, 5e-3, 62_500, None, "simmim_finetune_swin_base_w7_224"),
    # repeated augmentation makes 1,281,024 images of an epoch: 2502 updates of 512, as without it
    "manifold_kd/deit_tiny_from_cait_s24": Row(512, 5e-4, 300 * 2502, None, "timm054_deit_tiny_patch16_224"),
    "manifold_kd/swin_tiny_from_swin_small": Row(512, 5e-4, 300 * 2502, None, "timm054_swin_tiny_patch4_window7_224"),
}
#: the progressive recipes are our own: no schedule is published
PUBLISHED_PATHS = [path for path in RECIPES if path.parts[1] != "demo" and "progressive" not in path.stem]


def row_of(path: Path) -> Row:
    return PUBLISHED[str(path.relative_to("config").with_suffix(""))]


def test_every_recipe_with_published_figures_is_held_to_them() -> None:
    assert sorted(PUBLISHED) == [str(path.relative_to("config").with_suffix("")) for path in PUBLISHED_PATHS]


@pytest.mark.compiles
@pytest.mark.parametrize("path", PUBLISHED_PATHS, ids=str)
def test_the_plan_is_what_is_published(path: Path) -> None:
    """With the number of devices that the recipe's header gives."""
    row, recipe = row_of(path), load_recipe(ROOT / path)
    stated = re.search(r"(\d+) devices x (\d+) images", "\n".join(header(path)))
    assert stated is not None, f"{path}: its Cost: line does not say N devices x M images"
    assert int(stated[2]) == recipe.train.batch_size
    plan = make_plan(recipe, int(stated[1]), row.images)
    assert plan["effective_batch"] == row.batch
    assert plan["learning_rate"] == pytest.approx(row.rate, rel=1e-12)
    assert plan["steps"] == row.steps
    masked = plan["masked"]
    assert (masked and (masked["blocks"], masked["masked_blocks"])) == row.masks
    total = json.loads((GOLDEN / "full_size" / f"{row.like}.json").read_text())["total"] if row.like else row.parameters
    if total:
        assert plan["parameters"]["total"] == total
    else:  # Swin-Transformer MODELHUB.md gives whole millions of the backbone
        million = {"swinv2_base": 87, "swinv2_huge": 655}[recipe.encoder.name]
        assert round(plan["parameters"]["encoder"] / 1e6) == million


@pytest.mark.parametrize("path", [p for p in PUBLISHED_PATHS if row_of(p).like], ids=str)
def test_the_recipe_builds_the_references_network(path: Path) -> None:
    """Names, shapes and order of all parameters, and what the names do not show: attention heads."""
    info, recipe = json.loads((GOLDEN / "full_size" / f"{row_of(path).like}.json").read_text()), load_recipe(path)
    with no_init_parameters():
        rename = reference_network(info).rename
        method = build_method(recipe)
    for name, error, tolerance in full_size_findings(info, method, rename):
        assert error <= tolerance, f"{path}: {name}"
    heads = info.get("num_heads") or info["arguments"].get("MODEL.SWIN.NUM_HEADS") or recipe.encoder.num_heads
    assert recipe.encoder.num_heads == (tuple(heads) if isinstance(heads, list) else heads)


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_the_recipe_imports_only_bases_of_the_repository(path: Path) -> None:
    """A recipe must not depend on a folder that is not there after a clone."""
    recipe = load_recipe(ROOT / path)
    assert not Path(recipe.data.root).is_absolute()
    assert not Path(recipe.output).is_absolute()
