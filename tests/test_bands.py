"""Images with other numbers of channels than 3, from file to pictures; what a run checks before it starts."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src.config import DataConfig, Recipe
from src.config.files import ConfigError, load_recipe
from src.data.decode import Decoder, Undecodable
from src.data.opening import open_source
from src.data.sources import DataError, Files
from src.data.transform import MOST_OF_OPENCV, Key, Transform, luminance
from src.engine.parallel import RankError
from src.tasks.dataset import Measure, Moments
from src.tasks.evaluate import evaluate_checkpoint
from src.tasks.export import export_checkpoint
from src.tasks.images import TRIED, check_usable
from src.tasks.predict import predict
from src.tasks.train import train
from src.visual.gallery import displayed
from tests.helpers import Run, assert_one_line_error

tifffile = pytest.importorskip("tifffile")  # comes with scikit-image

KEY: Key = (3, 1, 7, 0)  # seed, epoch, image, copy
TYPES = ("uint8", "uint16", "float32")


def pixels_of(kind: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Random pixels; floats are in the scale 0 to 1."""
    rng = np.random.default_rng(seed)
    return rng.random(shape, np.float32) if kind == "float32" else rng.integers(0, np.iinfo(kind).max, shape, kind)


def npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def tiff(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="contig" if pixels.ndim == 3 else None)
    return file.getvalue()


def data(channels: int, **changes: Any) -> DataConfig:
    return DataConfig(mean=(0.4,) * channels, std=(0.2,) * channels, **changes)


def transformed(content: bytes, config: DataConfig, training: bool = True, key: Key = KEY) -> np.ndarray:
    out = np.full((len(config.mean), 24, 40), np.nan, np.float32)
    Transform(config, (24, 40), len(config.mean), training)(content, key, out)
    return out


# --- the transform ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("channels", [2, 4, 5, 12, MOST_OF_OPENCV + 1, 600])
def test_every_band_is_changed_like_the_others(channels: int, kind: str, training: bool) -> None:
    """Bands of two files in one: crop, flip and resize are those of each file alone."""
    pixels = pixels_of(kind, 30, 44, channels)
    for number in range(4):  # some flipped, some not
        key = (3, 1, number, 0)
        whole = transformed(npy(pixels), data(channels), training, key)
        for band in (0, channels - 1):
            alone = transformed(npy(pixels[:, :, [band, band]]), data(2), training, key)
            np.testing.assert_array_equal(whole[band], alone[0])
    assert np.isfinite(whole).all() and abs(float(whole.mean()) - 0.5) < 0.1  # (0.5 - 0.4) / 0.2


@pytest.mark.parametrize("kind", TYPES)
def test_tiff_and_npy_are_the_same_image(kind: str) -> None:
    pixels = pixels_of(kind, 30, 44, 5)
    np.testing.assert_array_equal(transformed(npy(pixels), data(5)), transformed(tiff(pixels), data(5)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("axes", [2, 3])
def test_grey_arrays(axes: int, kind: str, training: bool) -> None:
    pixels = pixels_of(kind, 30, 44, 1)
    grey = transformed(npy(pixels if axes == 3 else pixels[:, :, 0]), data(1), training)
    twice = transformed(npy(np.repeat(pixels, 2, axis=2)), data(2), training)
    np.testing.assert_allclose(grey[0], twice[0], atol=1e-5)
    colour = transformed(npy(pixels), data(3), training)
    np.testing.assert_allclose(colour, np.repeat(twice[:1], 3, axis=0), atol=1e-5)


def test_luminance_of_floats_is_that_of_grey_levels() -> None:
    pixels = pixels_of("uint8", 20, 30, 3)
    np.testing.assert_allclose(luminance(pixels / np.float32(255)) * 255, luminance(pixels), atol=0.51)


@pytest.mark.parametrize("changes", [{"auto_augment": "rand-m9"}, {"color_jitter": 0.4}, {"brightness": 0.3}])
@pytest.mark.parametrize("channels", [1, 3])
def test_colours_of_floats_are_changed_in_8_bits(channels: int, changes: dict[str, Any]) -> None:
    levels = pixels_of("uint8", 30, 44, 3)
    config = data(channels, **changes)
    whole = transformed(npy(levels), config)
    np.testing.assert_array_equal(transformed(npy(levels / np.float32(255)), config), whole)
    np.testing.assert_array_equal(transformed(npy(levels.astype(np.uint16) * 257), config), whole)
    for wrong in (levels.astype(np.float32), levels / np.float32(255) - 0.5):
        with pytest.raises(Undecodable, match=r"values outside of 0 to 1.*data\.auto_augment"):
            transformed(npy(wrong), config)
        transformed(npy(wrong), replace(config, auto_augment="", color_jitter=0.0, brightness=0.0))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("channels", [1, 2, 5, 600])
def test_statistics_of_bands(channels: int, kind: str) -> None:
    pixels = pixels_of(kind, 30, 44, channels)
    moments = Moments()
    moments.add(Measure(Decoder(channels))(npy(pixels)))
    values = pixels / (np.iinfo(kind).max if kind != "float32" else 1)
    np.testing.assert_allclose(moments.result(), [values.mean((0, 1)), values.std((0, 1))], rtol=1e-4)


# --- pictures ---------------------------------------------------------------------------------------------------


def test_pictures_show_the_chosen_bands() -> None:
    image = np.random.default_rng(0).standard_normal((2, 5, 4, 6)).astype(np.float32) / 4
    config = data(5)
    spread = np.clip(image / 4 + 0.5, 0, 1)  # two standard deviations to both sides
    np.testing.assert_allclose(displayed(config, image), spread[:, :3].transpose(0, 2, 3, 1))
    chosen = displayed(replace(config, show_bands=(4, 2, 0)), image)
    np.testing.assert_allclose(chosen, spread[:, [4, 2, 0]].transpose(0, 2, 3, 1))
    grey = displayed(replace(config, show_bands=(3,)), image)
    np.testing.assert_allclose(grey, np.repeat(spread[:, 3, :, :, None], 3, axis=-1))
    two = displayed(data(2), image[:, :2])
    np.testing.assert_allclose(two, np.repeat(spread[:, 0, :, :, None], 3, axis=-1))


def test_1_and_3_channels_are_shown_from_0_to_1() -> None:
    image = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)
    shown = np.clip(image * 0.2 + 0.4, 0, 1).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(displayed(data(3), image), shown, atol=1e-6)
    np.testing.assert_allclose(displayed(data(3, show_bands=(2, 1, 0)), image), shown[..., ::-1], atol=1e-6)
    np.testing.assert_allclose(displayed(data(1), image[:, :1]), np.repeat(shown[..., :1], 3, axis=-1), atol=1e-6)
    radiance = DataConfig(mean=(2000.0,) * 3, std=(500.0,) * 3)
    np.testing.assert_allclose(displayed(radiance, image), np.clip(image / 4 + 0.5, 0, 1).transpose(0, 2, 3, 1))


# --- the recipe -------------------------------------------------------------------------------------------------

FIVE = "encoder: {name: vit, in_chans: 5}\nmethod: mae\ndata: {mean: [0, 0, 0, 0, 0], std: [1, 1, 1, 1, 1]}\n"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.auto_augment=rand-m9", ("rand-m9 changes colours", "encoder.in_chans 1 or 3, not 5", "write ''")),
        ("data.color_jitter=0.4", ("encoder.in_chans 1 or 3, not 5", "write 0")),
        ("data.brightness=0.4", ("encoder.in_chans 1 or 3, not 5", "write 0")),
        ("data.contrast=0.4", ("encoder.in_chans 1 or 3, not 5", "write 0")),
        ("data.show_bands=[0,1]", ("has 2 channels", "three for red, green and blue, or one for grey")),
        ("data.show_bands=[0,1,5]", ("5 is not a channel of encoder.in_chans 5", "[0, 1, 2]")),
        ("data.show_bands=[-1]", ("-1 is not a channel", "[0, 1, 2]")),
    ],
)
def test_what_does_not_fit_the_channels_is_one_line(override: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(FIVE, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_recipe(tmp_path / "recipe.yaml", [override])
    for word in (override.split("=")[0], *words):
        assert word in str(raised.value)
    load_recipe(tmp_path / "recipe.yaml", ["data.show_bands=[4,0,2]", "data.erasing=0.5"])


def test_a_recipe_without_statistics_of_its_channels_leads_to_the_script(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("encoder: {name: vit, in_chans: 5}\nmethod: mae\n", encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        load_recipe(tmp_path / "recipe.yaml", ["data.root=my images"])
    assert "data.mean: has 3 values for encoder.in_chans 5; write one per channel" in str(raised.value)
    assert "python scripts/dataset_stats.py 'my images/train' --channels 5" in str(raised.value)


# --- before a run -----------------------------------------------------------------------------------------------


def folder(place: Path, files: dict[str, bytes]) -> Files:
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    found = open_source(place, "data.train")
    assert isinstance(found, Files) and len(found) == len(files)
    return found


def recipe_of(root: Path, channels: int = 5, **changes: Any) -> Recipe:
    root.mkdir(parents=True, exist_ok=True)
    file = root / "recipe.yaml"
    statistics = f"mean: {[0.5] * channels}, std: {[0.25] * channels}"
    file.write_text(
        f"encoder: {{name: vit, image_size: [16, 32], patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, "
        f"in_chans: {channels}}}\n"
        f"data: {{root: {root}, workers: 0, show_bands: {[channels - 1]}, {statistics}}}\n"
        "train: {epochs: 1, batch_size: 6, base_lr: 1e-3, lr_batch: 0}\ndevice: CPU\n",
        encoding="utf-8",
    )
    return load_recipe(file, [f"{key}={value}" for key, value in {"method": "mae", **changes}.items()])


def test_a_run_whose_images_all_have_other_bands_does_not_start(tmp_path: Path) -> None:
    bad = npy(pixels_of("uint8", 20, 20, 4))
    source = folder(tmp_path / "train", {f"{number}.npy": bad for number in range(60)})
    with pytest.raises(DataError) as raised:
        check_usable(recipe_of(tmp_path), source, "data.train")
    text = str(raised.value)
    assert "data.train: " in text and ".npy: has 4 bands, encoder.in_chans is 5" in text
    assert f"none of {TRIED - 1} others tried" in text and "--channels 5" in text
    check_usable(recipe_of(tmp_path, channels=4), source, "data.train")
    recipe = recipe_of(tmp_path, **{"data.val": "''", "output": tmp_path / "run"})
    with pytest.raises((DataError, RankError), match="has 4 bands"):
        train(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"no image", npy(np.full((9, 9, 5), np.nan))])
def test_the_only_image_cannot_be_used(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.val: .*0\.npy: .*; python scripts/verify_dataset\.py"):
        check_usable(recipe_of(tmp_path), folder(tmp_path / "val", {"0.npy": content}), "data.val")


def test_statistics_of_another_scale_are_noticed(tmp_path: Path) -> None:
    """The images are arrays of radiances; the recipe has mean 0.5 and std 0.25."""
    values = np.random.default_rng(0).normal([2000, 200, 20, 2, 0.2], 0.1, (20, 20, 5)).astype(np.float32)
    source = folder(tmp_path / "train", {f"{number}.npy": npy(values) for number in range(4)})
    note = check_usable(recipe_of(tmp_path), source, "data.train")
    assert "channel 0 has the mean 2000 in" in note and "python scripts/dataset_stats.py" in note
    grey = folder(tmp_path / "val", {f"{number}.npy": npy(values[..., 4]) for number in range(4)})
    assert not check_usable(recipe_of(tmp_path, channels=1), grey, "data.val")


def test_many_broken_files_are_no_reason_to_stop(tmp_path: Path) -> None:
    good = npy(pixels_of("uint8", 20, 20, 5))
    source = folder(tmp_path / "train", {f"{n}.npy": good if n % 5 == 0 else b"" for n in range(20)})
    check_usable(recipe_of(tmp_path), source, "data.train")


# --- the whole program ------------------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.usefixtures("graph_mode")
def test_five_bands_through_the_whole_program(tmp_path: Path, run_entry: Run) -> None:
    """TIFF of 16 bits for training, arrays of floats for validation; non-square images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in range(2):
            place = tmp_path / split / f"class_{label}"
            place.mkdir(parents=True)
            for number in range(count):
                bands = np.clip(rng.normal(0.4 + 0.2 * label, 0.1, (20, 36, 5)), 0, 1)
                if split == "train":
                    (place / f"{number}.tif").write_bytes(tiff((bands * 65535).astype(np.uint16)))
                else:
                    (place / f"{number}.npy").write_bytes(npy(bands.astype(np.float32)))
    method = "{name: fastmim, mask_block: 8, mask_ratio: 0.5, decoder: {width: 32, depth: 0}}"
    pretraining = recipe_of(tmp_path, method=method, output=tmp_path / "hog", **{"train.knn": 1})
    assert 0 <= train(pretraining)["knn_top1"] <= 1
    with Image.open(next((tmp_path / "hog/gallery").glob("*.png"))) as gallery:
        pixels = np.asarray(gallery.convert("RGB"))
    inputs = pixels[80:, : pixels.shape[1] // 4]
    assert (inputs[..., 0] == inputs[..., 1]).all() and len(np.unique(inputs)) > 20  # one band in grey

    method = "{name: classify, num_classes: 2}"
    tuning = recipe_of(tmp_path, method=method, output=tmp_path / "run", init_from=tmp_path / "hog/last.ckpt")
    metrics = train(tuning)
    file = str(tmp_path / "run/last.ckpt")
    result = evaluate_checkpoint(file, "", [])
    assert result["count"] == 4 and result["top1"] == metrics["top1"]
    images = sorted(map(str, (tmp_path / "val").rglob("*.npy")))
    predictions = list(predict(file, images, 1, []))
    right = sum(one.classes[0][0] == one.path.parent.name for one in predictions)
    assert right == result["top1_correct"]

    export = export_checkpoint(file, "mindir", str(tmp_path / "net.mindir"), 2, [])
    assert str(tmp_path / "val") in export.images
    info = json.loads((tmp_path / "net.json").read_text(encoding="utf-8"))
    assert info["input"] == [2, 5, 16, 32] and len(info["mean"]) == 5 and "bands" in info["channels"]

    (tmp_path / "other").mkdir()
    (tmp_path / "other/0.npy").write_bytes(npy(pixels_of("uint8", 20, 20, 4)))
    (tmp_path / "other.csv").write_text("other/0.npy,class_0\n", encoding="utf-8")
    done = run_entry("eval.py", "--ckpt", file, "--data", tmp_path / "other.csv")
    assert_one_line_error(done, "--data", "0.npy: has 4 bands, encoder.in_chans is 5")
    export = export_checkpoint(file, "mindir", "", 1, [f"data.root={tmp_path}", "data.val=other.csv"])
    assert "noise" in export.images and "cannot be used" in export.images
