"""Recipes, paths and arguments as people write them: right, or one clear line at once."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from src.config import MIMConfig, Recipe
from src.config.files import load_recipe
from src.config.paths import expanded
from src.errors import UserError
from tests.helpers import ROOT, Run, assert_one_line_error

DEMO = "config/demo/vit_fastmim_pretrain.yaml"
#: a recipe whose folders are there
READY = ("--config", DEMO, "data.root=tests", "data.train=written", "data.val=")


def loaded(tmp_path: Path, content: str | bytes, *changes: str) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_recipe(path, changes)


def refusal(tmp_path: Path, content: str | bytes, *changes: str) -> str:
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, content, *changes)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(tmp_path / "mine.yaml"), "FILE")


# --- YAML -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\ndevice: CPU\nseed: 2\n", "FILE: seed: appears in lines 1 and 3; remove one"),
        ("train:\n  epochs: 3\n  batch_size: 4\n  epochs: 5\n", "FILE: epochs: appears in lines 2 and 4; remove one"),
        ("train: {epochs: 3, epochs: 5}\n", "FILE: epochs: appears in lines 1 and 1; remove one"),
        ("encoder.image_size: 128\n", "write encoder: {image_size: ...}"),
        ("seed: 1\n---\nseed: 2\n", "is not YAML"),
        ("- seed\n", "must be a mapping of keys"),
        ("train:\n\tepochs: 3\n", "line 2 is not YAML"),
        ("1: 2\n", "FILE: 1: unknown key"),
        ("output: 2026-11-27\n", "FILE: output: must be text"),
        ("data: {val: no}\n", "put it in quotes"),
        (b"\x89PNG\r\n\x1a\n\x00", "cannot read"),
        ("a: " + "[" * 5000, "FILE"),
        ("data: {root: ~}\n", "FILE: data.root: is empty; write the folder of your images"),
        ("data: {root: ''}\n", "FILE: data.root: is empty"),
        ("data: {train: ''}\n", "FILE: data.train: is empty"),
        (
            "output: $NOBODY_SET_THIS/run\n",
            "FILE: output: '$NOBODY_SET_THIS/run': there is no variable",
        ),
        ("data: {root: '~nobody_here/x'}\n", "there is no user nobody_here"),
    ],
)
def test_what_cannot_be_meant_is_one_line(text: str | bytes, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, text)


def test_aliases_within_aliases_are_not_unfolded(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 12):
        names = ", ".join(f"k{number}: *a{level - 1}" for number in range(9))
        lines.append(f"a{level}: &a{level} {{{names}}}")
    assert "more than 100000 characters, with its aliases written out" in refusal(tmp_path, "\n".join(lines))


def test_what_people_write_is_read(tmp_path: Path) -> None:
    text = (
        "\ufeffseed: 7\r\ntrain:\r\n  # epochs: 3\r\nencoder:\r\nmethod: {mask_ratio: 5e-1}\r\ndata: &d {val: ''}\r\n"
    )
    recipe = loaded(tmp_path, text)
    assert recipe.seed == 7 and recipe.data.val == ""
    assert isinstance(recipe.method, MIMConfig) and recipe.method.mask_ratio == 0.5
    assert recipe.train == Recipe().train and recipe.encoder == Recipe().encoder


def test_a_merge_key_may_repeat_what_it_merges(tmp_path: Path) -> None:
    text = "train: &one {epochs: 3, batch_size: 4}\nstages: [{<<: {epochs: 1, image_size: 64}, epochs: 3}]\n"
    recipe = loaded(tmp_path, text + "encoder: {name: vit_demo}\nmethod: {mask_block: 16}\n")
    assert recipe.stages[0].epochs == 3 and recipe.stages[0].image_size == (64, 64)


def test_an_override_of_a_section_keeps_the_rest(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, "train: {epochs: 9, batch_size: 4}\n", "train={epochs: 3}", "data.train=2012")
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.data.train) == (3, 4, "2012")


def test_paths_are_expanded_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/me")
    monkeypatch.setenv("IMAGES", "/big/disk")
    text = "data: {root: $IMAGES/in, train: '${IMAGES}/t'}\noutput: ~/x\ninit_from: ~/a.ckpt\n"
    recipe = loaded(tmp_path, text)
    assert (recipe.data.root, recipe.data.train) == ("/big/disk/in", "/big/disk/t")
    assert (recipe.output, recipe.init_from) == ("/people/me/x", "/people/me/a.ckpt")
    assert loaded(tmp_path, "", "data.root=~/y").data.root == "/people/me/y"
    target = "method: {target: {name: features, teacher: ~/t.ckpt}}"
    assert loaded(tmp_path, target).method.teacher_network.file == "/people/me/t.ckpt"  # type: ignore[union-attr]
    (tmp_path / "child.yaml").write_text("base: $HERE/mine.yaml\n")
    monkeypatch.setenv("HERE", str(tmp_path))
    assert load_recipe("$HERE/child.yaml").method.teacher_network is not None
    assert expanded("plain/~/path", "key") == "plain/~/path"


def test_a_folder_lists_its_recipes_and_no_hidden_file(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("one.yaml", ".hidden.yaml", "below/two.yaml"):
        (tmp_path / name).write_text("seed: 1\n")
    for path in (tmp_path, tmp_path / "zzz"):
        with pytest.raises(UserError) as caught:
            load_recipe(path)
        assert "one.yaml" in str(caught.value) and "hidden" not in str(caught.value)
    with pytest.raises(UserError, match=r"below/two\.yaml"):
        load_recipe(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="it is a pipe"):
        load_recipe(tmp_path / "pipe.yaml")


# --- answers before MindSpore is imported -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.py", "--config", "config/demo/nope.yaml"], "cannot read"),
        (["train.py", "--config", "config/demo"], "vit_mae_pretrain.yaml"),
        (["train.py", "--config", DEMO, "train.epoch=3"], "did you mean epochs?"),
        (["train.py", "--config", DEMO, "train.epochs"], "is not key=value"),
        (["train.py", "--config", DEMO, "data.root=/nope"], "there is no folder /nope/train"),
        (["train.py", "--config", DEMO, f"data.root={'n' * 300}"], "data.train: "),
        (
            ["train.py", *READY, "--resume", "n.ckpt"],
            "n.ckpt",
        ),
        (
            ["train.py", *READY, "init_from=i.ckpt"],
            "i.ckpt",
        ),
        (["train.py", "--config", DEMO, "--plan", "--devices", "x"], "'x' is not a whole number"),
        (["eval.py", "--ckpt", "nope.ckpt"], "--ckpt: there is no file nope.ckpt"),
        (["eval.py", "--ckpt", "README.md", "--data", "nope"], "--data: there is no folder nope"),
        (["export.py", "--ckpt", "nope.ckpt"], "--ckpt: there is no file nope.ckpt"),
        (["export.py", "--ckpt", "README.md", "--batch", "-1"], "-1 is negative"),
        (["export.py", "--ckpt", "README.md", "--output", "a.onnx"], "does not end in .mindir"),
        (["scripts/predict.py", "--ckpt", "README.md", "nope.jpg"], "nope.jpg: no such file"),
        (["scripts/convert_weights.py", "nope.pth", "tests/out.ckpt"], "there is no file nope.pth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_without_mindspore(arguments: list[str], words: str, run_entry: Run) -> None:
    """Importing MindSpore takes seconds: an import of it is made to fail, and nobody notices."""
    block = "import sys, runpy; sys.modules['mindspore'] = None; sys.modules['numpy'] = None; "
    program = f"sys.argv = {arguments!r}; runpy.run_path({arguments[0]!r}, run_name='__main__')"
    assert_one_line_error(run_entry("-c", block + program), words)


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "src").rglob("*.py"))
        if path.name != "__main__.py"
    ],
)
def test_a_module_has_what_it_offers(module: str) -> None:
    """`from src.config import *` and the like."""
    imported = importlib.import_module(module)
    assert [name for name in getattr(imported, "__all__", []) if not hasattr(imported, name)] == []
