"""scripts/visualize.py augment: a grid of what training sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from src.config import DataConfig, Recipe
from src.config.files import load_recipe
from src.data.loader import Loader
from src.data.opening import open_source
from src.data.resample import resized
from src.errors import UserError
from src.tasks.augment import Column, columns_of, draw_augmentation, original, row_of
from src.visual.gallery import displayed, write_grid
from tests.helpers import ROOT, MakeFolder, Run, assert_one_line_error

SCRIPT = "scripts/visualize.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, image_folder_factory: MakeFolder) -> Path:
    return image_folder_factory(tmp_path_factory.mktemp("augment"))


def recipe_file(place: Path, root: Path, text: str = "") -> str:
    file = place / "mine.yaml"
    file.write_text(f"encoder: {{name: vit_demo, image_size: [32, 48]}}\nmethod: mae\ndata: {{root: {root}{text}}}\n")
    return str(file)


ALL = ", auto_augment: rand-m9, brightness: 0.4, erasing: 0.5"


def changed(recipe: Recipe, column: Column) -> dict[str, Any]:
    """The random changes of a column."""
    off = replace(DataConfig(), hflip=0.0, crop_scale=(1.0, 1.0), crop_ratio=(1.5, 1.5))
    names = ("hflip", "crop_scale", "crop_ratio", "brightness", "contrast", "color_jitter", "auto_augment", "erasing")
    values = {name: getattr(column.data, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(off, name)}


def test_columns_have_all_changes_and_each_alone(tmp_path: Path, root: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, root, ALL))
    columns = columns_of(recipe, 2)
    assert [column.title for column in columns] == [
        *("epoch 1", "epoch 2", "crop and flip", "brightness 0.4, contrast 0", "rand-m9", "erasing (50% of images)")
    ]
    assert [column.data for column in columns[:2]] == [recipe.data] * 2 and columns[1].epoch == 1
    crop = {"hflip": 0.5, "crop_scale": (0.2, 1.0), "crop_ratio": (0.75, 4 / 3)}
    assert [changed(recipe, column) for column in columns[2:]] == [
        *(crop, {"brightness": 0.4}, {"auto_augment": "rand-m9"}, {"erasing": 1.0})
    ]
    assert len(columns_of(load_recipe(recipe_file(tmp_path, root)), 3)) == 3  # crop and flip is all there is


def test_an_epoch_is_what_training_sees(tmp_path: Path, root: Path) -> None:
    """The pixels of a training's loader, at their places in its order."""
    recipe = load_recipe(recipe_file(tmp_path, root, ALL + ", workers: 0"))
    source = open_source(recipe.data.training_place, "data.train")
    columns = columns_of(recipe, 2)
    loader = Loader(source, recipe.data, (32, 48), 3, 24, ("image", "number"), recipe.seed)
    for epoch in range(2):
        image, number = (column.asnumpy() for column in next(loader.epoch(epoch)))
        for index in (0, 13):
            row, note = row_of(recipe, source, columns, index)
            assert not note
            seen = displayed(recipe.data, image[number == index])[0]
            np.testing.assert_array_equal(row[1 + epoch], np.round(seen * 255))


def test_the_original_is_the_whole_file_in_its_own_shape(tmp_path: Path, root: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, root, ", decode: fast"))
    high = np.random.default_rng(0).integers(0, 256, (64, 8, 3), np.uint8)
    content = cv2.imencode(".png", high[..., ::-1])[1].tobytes()
    whole = original(recipe, content)
    assert whole.shape == (32, 48, 3) and (whole[:, :22] == 255).all() and (whole[:, 26:] == 255).all()
    np.testing.assert_array_equal(whole[:, 22:26], resized(high, (32, 4)))


def test_a_grid_is_written(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid.png"
    draw_augmentation(recipe_file(tmp_path, root, ALL), [], 3, 2, str(out))
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 7 * 200 and pixels.std() > 20
    assert "grid.png: 3 images of" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "mine.yaml"]


@pytest.mark.parametrize(("channels", "bands"), [(1, ""), (2, ""), (5, ", show_bands: [4, 2, 0]")])
def test_any_number_of_channels(channels: int, bands: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        np.save(tmp_path / f"train/{number}.npy", rng.random((30, 20, channels), np.float32))
    (tmp_path / "train/broken.npy").write_bytes(b"")
    file = recipe_file(tmp_path, tmp_path, f", mean: {[0.5] * channels}, std: {[0.3] * channels}{bands}")
    draw_augmentation(file, [f"encoder.in_chans={channels}"], 3, 1, str(tmp_path / "grid.png"))
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_statistics_of_another_scale_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train/0.npy", np.random.default_rng(0).normal(2000, 300, (30, 20, 3)).astype(np.float32))
    draw_augmentation(recipe_file(tmp_path, tmp_path), [], 1, 1, str(tmp_path / "grid.png"))
    printed = capsys.readouterr().out
    assert "data.mean: " in printed and "dataset_stats.py" in printed and "--channels 3" in printed
    fitting = ["data.mean=[2000,2000,2000]", "data.std=[300,300,300]"]
    draw_augmentation(recipe_file(tmp_path, tmp_path), fitting, 1, 1, str(tmp_path / "grid.png"))
    assert "data.mean" not in capsys.readouterr().out


def test_images_that_cannot_be_used_are_left_out(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train").mkdir()
    for number in range(5):
        (tmp_path / f"train/{number}.png").write_bytes(b"" if number != 2 else one_image(root))
    draw_augmentation(recipe_file(tmp_path, tmp_path), [], 2, 1, str(tmp_path / "grid.png"))
    printed = capsys.readouterr().out
    assert "left out: 4 images that cannot be used, first " in printed and "0.png: the file is empty" in printed
    (tmp_path / "train/2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.png: the file is empty; 5 images tried, none can be used"):
        draw_augmentation(recipe_file(tmp_path, tmp_path), [], 2, 1, str(tmp_path / "other.png"))
    assert not (tmp_path / "other.png").exists()


def one_image(root: Path) -> bytes:
    return next((root / "train").rglob("*.png")).read_bytes()


def test_mistakes_are_one_line(tmp_path: Path, root: Path, run_entry: Run) -> None:
    file = recipe_file(tmp_path, root)
    for arguments, words in (
        ((tmp_path / "gone.yaml",), ("gone.yaml", "no such file")),
        ((file, f"data.root={tmp_path / 'gone'}"), ("data.train", "there is no folder")),
        ((file, "--images", "0"), ("--images", "not a whole number above 0")),
        ((file, "--copies", "99"), ("--copies", "write 16 or less")),
        ((file, "--out", tmp_path), ("--out", "is a folder")),
        ((file, "--out", tmp_path / "gone" / "a.png"), ("--out", "does not exist")),
        ((file, "--out", tmp_path / "a.jpg"), ("--out", "write a.png")),
    ):
        assert_one_line_error(run_entry(SCRIPT, "augment", *arguments), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_the_script_does_not_import_mindspore(
    tmp_path: Path, root: Path, run_entry: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "grid.png"
    words = [SCRIPT, "augment", recipe_file(tmp_path, root), "--images", "1", "--copies", "1", "--out", str(out)]
    code = (
        f"import sys, runpy; sys.argv = {words}\n"
        f"try: runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert 'mindspore' not in sys.modules"
    )
    done = run_entry("-c", code)
    assert done.returncode == 0 and out.exists(), done.stderr


def test_a_grid_has_its_name_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [np.zeros((2, 4, 4, 3))]
    saved = Figure.savefig

    def broken(self: Figure, path: Path, **options: Any) -> None:
        saved(self, path, **options)
        assert path.exists() and not (tmp_path / "a.png").exists()
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="no space"):
        write_grid(pictures, ["a"], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(2, 1024), (1024, 2)])
def test_a_grid_of_any_shape(size: tuple[int, int], tmp_path: Path) -> None:
    write_grid([np.zeros((3, *size, 3))] * 2, ["a", "b"], tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert max(picture.size) <= 30_000
