"""Every recipe below config/ loads, says how it is run and what to expect, and builds what it describes."""

from __future__ import annotations

from pathlib import Path

import pytest
from mindspore.nn.utils import no_init_parameters

from src.engine.optim import parameter_groups
from src.engine.schedule import peak_rate
from src.methods import build_method
from src.recipe import dump_recipe, load_recipe, parse_recipe
from tests.helpers import ROOT

pytestmark = pytest.mark.usefixtures("graph_mode")

#: recipes; folders that start with _ hold bases, which their children cover
RECIPES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "config").rglob("*.yaml")
    if not any(part.startswith("_") for part in path.relative_to(ROOT).parts)
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
    assert recipe.train.epochs * (batches // recipe.train.accumulate) > 0


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_the_recipe_imports_only_bases_of_the_repository(path: Path) -> None:
    """A recipe must not depend on a folder that is not there after a clone."""
    recipe = load_recipe(ROOT / path)
    assert not Path(recipe.data.root).is_absolute()
    assert not Path(recipe.output).is_absolute()
