"""A trained checkpoint through evaluation, load_model, prediction and export: the same answers at every door."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from PIL import Image

from src import load_model
from src.config.files import dump_recipe, load_recipe
from src.engine import checkpoint
from src.engine.ckpt_file import CHECKSUM
from src.methods import build_method
from src.tasks.command import run_command
from src.tasks.evaluate import evaluate_checkpoint, measure_checkpoint, measure_confusion, open_checkpoint
from src.tasks.export import EXPORT_TOLERANCE, export_checkpoint, largest_difference, preprocessing
from src.tasks.networks import deployed, fill
from src.tasks.predict import predict
from tests.helpers import MakeFolder, Run, assert_one_line_error

pytestmark = pytest.mark.usefixtures("graph_mode")


def validation_files(data: Path) -> tuple[list[Path], np.ndarray]:
    files = sorted((data / "val").rglob("*.*"))
    return files, np.array([int(path.parent.name.removeprefix("class_")) for path in files])


def by_the_exported_json(info: dict[str, Any], path: Path) -> np.ndarray:
    """A file turned into the network's input by nothing but the JSON beside an exported network, with Pillow."""
    image = Image.fromarray(cv2.imread(str(path))[:, :, ::-1])  # decoders of JPEG differ by a level, so one for all
    size, (height, width) = info["resize_short_side"], info["centre_crop"]
    short = min(image.size)
    image = image.resize(tuple(int(size * side / short) for side in image.size), Image.Resampling.BICUBIC)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) * info["scale"]
    return ((pixels - info["mean"]) / info["std"]).transpose(2, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def exported(fine_tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    target = tmp_path_factory.mktemp("export") / "net.mindir"
    done = export_checkpoint(str(fine_tuned), "mindir", str(target), 0, [])
    assert done.path == target and done.batches == (1, 4) and "val" in done.images
    return target, json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def logits(fine_tuned: Path, exported: tuple[Path, dict[str, Any]], tiny_data: Path) -> np.ndarray:
    """Of all validation images, from load_model."""
    images = [by_the_exported_json(exported[1], path) for path in validation_files(tiny_data)[0]]
    return load_model(fine_tuned)(Tensor(np.stack(images))).asnumpy()


def test_training_evaluation_and_load_model_agree(fine_tuned: Path, tiny_data: Path, logits: np.ndarray) -> None:
    trained = checkpoint.load(fine_tuned).meta["metrics"]
    result = evaluate_checkpoint(str(fine_tuned), "", [])
    labels = validation_files(tiny_data)[1]
    assert result["count"] == len(labels) == 24
    assert {key: result[key] for key in trained} == trained
    correct = int((logits.argmax(axis=1) == labels).sum())
    assert result["top1_correct"] == correct and result["top1"] == pytest.approx(correct / 24, abs=1e-6)
    assert correct > 6  # better than chance, so that agreement says something
    ranked = (-logits).argsort(axis=1)[:, :5]
    assert result["top5_correct"] == int((ranked == labels[:, None]).sum())
    names, matrix = measure_confusion(str(fine_tuned))
    pairs = list(zip(labels.tolist(), logits.argmax(axis=1).tolist(), strict=True))
    assert names == [f"class_{label}" for label in range(6)]
    assert matrix.tolist() == [[pairs.count((true, found)) for found in range(6)] for true in range(6)]


@pytest.mark.parametrize("size", [1, 3, 24])
def test_the_exported_network_gives_the_same_logits(
    exported: tuple[Path, dict[str, Any]], tiny_data: Path, logits: np.ndarray, size: int
) -> None:
    network = nn.GraphCell(ms.load(str(exported[0])))
    images = np.stack([by_the_exported_json(exported[1], path) for path in validation_files(tiny_data)[0][:size]])
    found = network(Tensor(images)).asnumpy()
    np.testing.assert_allclose(found, logits[:size], rtol=0, atol=1e-5)
    assert (found.argmax(axis=1) == logits[:size].argmax(axis=1)).all()


def test_the_exported_json_says_what_the_network_is(exported: tuple[Path, dict[str, Any]]) -> None:
    info = exported[1]
    assert info["input"] == ["batch", 3, 32, 32] and info["output"] == "logits"
    assert info["classes"] == [f"class_{label}" for label in range(6)]
    assert sorted(path.name for path in exported[0].parent.iterdir()) == ["net.json", "net.mindir"]


def test_an_export_for_a_fixed_batch(fine_tuned: Path, tmp_path: Path, logits: np.ndarray, tiny_data: Path) -> None:
    done = export_checkpoint(str(fine_tuned), "mindir", str(tmp_path / "three.mindir"), 3, [])
    info = json.loads((tmp_path / "three.json").read_text(encoding="utf-8"))
    assert done.batches == (3,) and info["input"] == [3, 3, 32, 32]
    images = np.stack([by_the_exported_json(info, path) for path in validation_files(tiny_data)[0][:3]])
    np.testing.assert_allclose(nn.GraphCell(ms.load(str(done.path)))(Tensor(images)).asnumpy(), logits[:3], atol=1e-5)


def test_a_wrong_export_is_seen(fine_tuned: Path, exported: tuple[Path, dict[str, Any]]) -> None:
    recipe, found = open_checkpoint(str(fine_tuned), [])
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    found.weights["head.bias"][0] += 1e-2
    assert largest_difference(exported[0], fill(deployed(recipe), found), images, (2,)) > EXPORT_TOLERANCE


# --- pre-training checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pre_trained(fine_tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as pre-training writes it, with fresh weights."""
    folder = tmp_path_factory.mktemp("pretrain")
    recipe = load_recipe(
        fine_tuned.parent / "config.yaml",
        ["method.name=fastmim", "method.mask_block=8", "method.target.cell=4", "method.decoder.width=32"],
    )
    meta = {"recipe": dump_recipe(recipe), "method": "fastmim", "classes": [], "epoch": 1, "step": 1, "best": None}
    checkpoint.save(folder / "pre.ckpt", checkpoint.weights_of(build_method(recipe)), {}, {**meta, "metrics": {}})
    return folder / "pre.ckpt"


@pytest.mark.compiles
def test_a_bare_encoder_is_exported(pre_trained: Path, tmp_path: Path) -> None:
    done = export_checkpoint(str(pre_trained), "mindir", str(tmp_path / "encoder.mindir"), 0, [])
    assert done.difference <= EXPORT_TOLERANCE
    info = json.loads((tmp_path / "encoder.json").read_text(encoding="utf-8"))
    assert info["output"] == "tokens" and info["classes"] == []
    images = Tensor(np.random.default_rng(3).standard_normal((5, 3, 32, 32)).astype(np.float32))
    tokens = nn.GraphCell(ms.load(str(done.path)))(images).asnumpy()
    encoder = open_checkpoint(str(pre_trained), [])[0].encoder
    assert tokens.shape[0] == 5 and tokens.shape[2] == encoder.out_dim and tokens.shape[1] >= encoder.num_tokens
    assert np.abs(tokens[0] - tokens[1]).max() > 1e-3


def test_a_pre_training_checkpoint_has_no_classifier(pre_trained: Path, capfd: Any) -> None:
    words = f"{pre_trained}: a pre-training checkpoint (fastmim) has no classifier; fine-tune it first"
    assert words in refused(capfd, str(pre_trained), "", [])
    with pytest.raises(checkpoint.CheckpointError, match="has no classifier"):
        load_model(pre_trained)


# --- predict ----------------------------------------------------------------------------------------------------


def test_predict_says_what_the_network_says(
    one_fine_tuned: Path, tiny_data: Path, tmp_path: Path, run_entry: Run
) -> None:
    """Many files in several batches, beside files that cannot be read: those are named, the others answered."""
    short, empty = tmp_path / "short.jpg", tmp_path / "empty.png"
    short.write_bytes(validation_files(tiny_data)[0][0].read_bytes()[:200])  # ends inside the header
    empty.write_bytes(b"")
    done = run_entry("scripts/predict.py", "--ckpt", one_fine_tuned, "--json", tiny_data / "val", short, empty)
    assert_one_line_error(done, f"2 of 26 images cannot be used: {short} (", f"{empty} (the file is empty)")
    lines = [json.loads(line) for line in done.stdout.strip().splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in validation_files(tiny_data)[0]]
    info = preprocessing(open_checkpoint(str(one_fine_tuned), [])[0], [], 0)
    images = np.stack([by_the_exported_json(info, path) for path in validation_files(tiny_data)[0]])
    logits = load_model(one_fine_tuned)(Tensor(images)).asnumpy()
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for line, row in zip(lines, expected, strict=True):
        assert len(line["classes"]) == 5
        for item in line["classes"]:
            assert item["probability"] == pytest.approx(row[int(item["class"].removeprefix("class_"))], abs=1e-5)
        assert line["classes"][0]["class"] == f"class_{row.argmax()}"


def test_predict_prints_a_table(one_fine_tuned: Path, tiny_data: Path, run_entry: Run) -> None:
    path = validation_files(tiny_data)[0][5]
    done = run_entry("scripts/predict.py", "--ckpt", one_fine_tuned, path, "--top", "2", "device=CPU")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    assert line.startswith(f"{path}  class_") and line.count("%") == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("notes.heic/", "no image in "),
        ("gone.png", "no such file or folder"),
        ("", "no image in "),
    ],
    ids=["empty folder with a suffix", "missing", "empty folder"],
)
def test_predict_on_no_image(one_fine_tuned: Path, tmp_path: Path, capfd: Any, name: str, words: str) -> None:
    (tmp_path / "notes.heic").mkdir()
    assert run_command(lambda: list(predict(str(one_fine_tuned), [str(tmp_path / name)], 5, [])) and None) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and f"{tmp_path / name}" in error[0] and words in error[0]


# --- errors -----------------------------------------------------------------------------------------------------


def refused(capfd: Any, *arguments: Any) -> str:
    """The one line with which an evaluation is refused, exit code 2."""
    capfd.readouterr()
    assert run_command(lambda: evaluate_checkpoint(*arguments) and None) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_eval_of_a_folder_names_its_checkpoints(one_fine_tuned: Path, capfd: Any) -> None:
    line = refused(capfd, str(one_fine_tuned.parent), "", [])
    assert "a folder; name a file in it: best.ckpt, last.ckpt" in line


@pytest.mark.parametrize("kind", ["text.ckpt", "picture.ckpt", "zip.ckpt", "empty.ckpt", "weights.pth"])
def test_eval_of_another_kind_of_file(tmp_path: Path, capfd: Any, kind: str) -> None:
    path = tmp_path / kind
    if kind == "picture.ckpt":
        path.write_bytes(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    elif kind in ("zip.ckpt", "weights.pth"):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    else:
        path.write_text("hello" if kind == "text.ckpt" else "")
    expected = "not a .ckpt file" if kind.endswith(".pth") else "damaged or not a MindSpore checkpoint"
    assert f"{path}: {expected}" in refused(capfd, str(path), "", [])


def test_eval_of_a_mindspore_checkpoint_without_recipe(tmp_path: Path, capfd: Any) -> None:
    path = tmp_path / "plain.ckpt"
    ms.save_checkpoint([{"name": "weight", "data": Tensor(np.ones(3, np.float32))}], str(path), crc_check=True)
    assert "without the recipe that this project stores in it" in refused(capfd, str(path), "", [])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_eval_of_a_truncated_checkpoint(one_fine_tuned: Path, tmp_path: Path, capfd: Any, share: float) -> None:
    content = one_fine_tuned.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(content[: int(share * len(content))])
    assert f"{path}: " in refused(capfd, str(path), "", [])


def test_eval_of_a_checkpoint_that_lost_its_checksum(one_fine_tuned: Path, tmp_path: Path, capfd: Any) -> None:
    """MindSpore loads such a file without a check, whatever it holds."""
    path = tmp_path / "cut.ckpt"
    path.write_bytes(one_fine_tuned.read_bytes()[: -len(CHECKSUM) - 10])
    assert "truncated, the checksum at its end is missing" in refused(capfd, str(path), "", [])


def test_a_flipped_bit_anywhere_is_seen(one_fine_tuned: Path, tmp_path: Path) -> None:
    content = one_fine_tuned.read_bytes()
    rng = np.random.default_rng(0)
    for number, position in enumerate(rng.integers(0, len(content), 60)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(path)


def test_eval_with_another_recipe(one_fine_tuned: Path, tmp_path: Path, capfd: Any) -> None:
    """--config takes the place of the checkpoint's recipe, and has to fit it."""
    own = one_fine_tuned.parent / "config.yaml"
    trained = checkpoint.load(one_fine_tuned).meta["metrics"]
    result = evaluate_checkpoint(str(one_fine_tuned), "", [], str(own))
    assert {key: result[key] for key in trained} == trained
    other = tmp_path / "other.yaml"
    text = own.read_text(encoding="utf-8")
    other.write_text(text.replace("num_classes: 6", "num_classes: 5"), encoding="utf-8")
    line = refused(capfd, str(one_fine_tuned), "", [], str(other))
    assert "its head has 6 classes, but method.num_classes is 5; write 6" in line
    assert "method.num_classes is 9; write 6" in refused(capfd, str(one_fine_tuned), "", ["method.num_classes=9"])
    other.write_text(dump_recipe(load_recipe(own, ["method=fastmim", "method.mask_block=8", "method.target.cell=4"])))
    assert "fastmim has no classifier" in refused(capfd, str(one_fine_tuned), "", [], str(other))


def test_eval_on_another_folder(
    one_fine_tuned: Path, tiny_data: Path, tmp_path: Path, image_folder_factory: MakeFolder, capfd: Any
) -> None:
    result = evaluate_checkpoint(str(one_fine_tuned), str(tiny_data / "train"), [])
    assert result["count"] == 72 and result["data"] == str(tiny_data / "train") and result["classes"] == 6
    more = image_folder_factory(tmp_path / "more", classes=7, train=1, val=1) / "val"
    assert f"--data: {more} has images of 1 class that the checkpoint does not have (class_6)" in refused(
        capfd, str(one_fine_tuned), str(more), []
    )
    flat = image_folder_factory(tmp_path / "flat", classes=2, train=1, val=1, flat=True) / "val"
    assert "has no class folders" in refused(capfd, str(one_fine_tuned), str(flat), [])


def test_eval_on_a_part_of_the_classes(one_fine_tuned: Path, tiny_data: Path, tmp_path: Path) -> None:
    whole = evaluate_checkpoint(str(one_fine_tuned), str(tiny_data / "val"), [])
    correct = 0
    for number, names in enumerate((["class_4"], ["class_0", "class_1"], ["class_2", "class_3", "class_5"])):
        part = tmp_path / str(number)
        part.mkdir()
        for name in names:
            (part / name).symlink_to(tiny_data / "val" / name)
        result, line = measure_checkpoint(str(one_fine_tuned), str(part), [])
        assert result["count"] == 4 * len(names) and result["classes"] == len(names)
        assert line.endswith(f", images of {len(names)} of 6 classes")
        correct += result["top1_correct"]
        classes, matrix = measure_confusion(str(one_fine_tuned), str(part))
        assert classes == [f"class_{label}" for label in range(6)] and matrix.shape == (6, 6)
        assert [name for name, row in zip(classes, matrix, strict=True) if row.sum()] == names
        assert np.trace(matrix) == result["top1_correct"]
    assert correct == whole["top1_correct"]
    path = tmp_path / "val.csv"
    rows = [f"{tiny_data}/val/class_{label}/{label}_00.jpg,class_{label}" for label in (5, 0, 3)]
    path.write_text("path,class\n" + "\n".join(rows))
    assert evaluate_checkpoint(str(one_fine_tuned), str(path), [])["count"] == 3
