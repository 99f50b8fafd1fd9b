"""The output folder: nothing is left by a refused run, and nothing trained is lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.config.files import load_recipe
from src.engine import checkpoint
from src.engine.log import RunError, RunFolder, append_line
from src.errors import UserError
from src.methods import MaskedImageModel
from src.tasks.train import train
from tests.helpers import MakeFolder

pytestmark = pytest.mark.usefixtures("graph_mode")

RECIPE = """
encoder: {{name: vit, image_size: 32, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}}
method: {{name: fastmim, mask_block: 8, decoder: {{width: 32}}}}
data: {{root: {root}, workers: 1}}
train: {{epochs: 2, batch_size: 10, base_lr: 1e-3, lr_batch: 0, log_every: 1, eval_every: 0}}
device: CPU
output: {output}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, image_folder_factory: MakeFolder) -> Path:
    return image_folder_factory(tmp_path_factory.mktemp("folder") / "stripes")


def recipe_of(data: Path, output: Path, *changes: str) -> Any:
    path = data.parent / "recipe.yaml"
    path.write_text(RECIPE.format(root=data, output=output))
    return load_recipe(path, changes)


def state_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# --- the folder at the start ------------------------------------------------------------------------------------


def places(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    return {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "run",
        "in proc": Path("/proc/run"),
        "a name too long": tmp_path / ("n" * 300),
        "a symbolic link to nothing": tmp_path / "dangling",
        "a NUL character": tmp_path / "a\0b",
        "below a new folder, too long": tmp_path / "new" / ("n" * 300),
    }


@pytest.mark.parametrize(
    "kind",
    [
        *("a file", "below a file", "in proc", "a name too long", "a symbolic link to nothing", "a NUL character"),
        "below a new folder, too long",
    ],
)
def test_a_folder_that_cannot_be_is_one_line_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    output = places(tmp_path)[kind]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError) as caught:
        RunFolder(output, resume=False)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("output: ") and "write output=" in text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("only root can make a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_at_the_start_is_one_line_and_leaves_nothing(small_disk: Path) -> None:
    (small_disk / "big").write_bytes(bytes(256 * 1024))
    with pytest.raises(RunError, match="No space left on device"):
        RunFolder(small_disk / "new" / "run", resume=False)
    assert [path.name for path in small_disk.iterdir()] == ["big"]


@pytest.mark.compiles
def test_a_full_disk_in_the_middle_names_the_file(small_disk: Path, data: Path) -> None:
    """Room for the start of a run, not for its checkpoint."""
    (small_disk / "big").write_bytes(bytes(150 * 1024))
    with pytest.raises(UserError) as caught:
        train(recipe_of(data, small_disk / "run"))
    assert f"{small_disk / 'run' / 'last.ckpt'}: cannot be written" in str(caught.value)
    assert not [path for path in (small_disk / "run").iterdir() if path.suffix in (".ckpt", ".tmp")]


def test_a_line_that_cannot_be_added_is_not_half_there(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    append_line(path, "first")
    (small_disk / "big").write_bytes(bytes(256 * 1024 - 8192))
    with pytest.raises(OSError, match="No space"):
        append_line(path, "x" * 100_000)
    assert path.read_text() == "first\n"


def test_nothing_is_written_before_a_run_is_accepted(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accumulate"):
        train(recipe_of(data, tmp_path / "new" / "run", "train.accumulate=9"))
    assert not (tmp_path / "new").exists()


# --- resuming ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(compiled: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    train(recipe_of(data, output))
    return output


@pytest.mark.parametrize(
    "changes",
    [
        ("train.epochs=3", "encoder.depth=2"),
        ("train.epochs=3", "method.decoder.width=64"),
        ("train.epochs=3", "data.train=gone"),
        ("train.epochs=3", "train.batch_size=99"),
        ("train.epochs=3", "train.effective_batch=15"),
    ],
    ids=["encoder", "decoder", "data", "batch", "effective batch"],
)
def test_a_refused_resume_changes_nothing(changes: tuple[str, ...], finished: Path, data: Path) -> None:
    before = state_of(finished)
    with pytest.raises(UserError):
        train(recipe_of(data, finished, *changes), "auto")
    assert state_of(finished) == before


def test_a_finished_run_says_that_nothing_is_left(
    finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state_of(finished)
    metrics = train(recipe_of(data, finished), "auto")
    assert "epoch 2 of 2 is done; nothing is left to train" in capsys.readouterr().out
    assert metrics == checkpoint.load(finished / "last.ckpt").meta["metrics"]
    assert state_of(finished) == before


def test_images_left_over_are_told_once(finished: Path) -> None:
    text = (finished / "train.log").read_text()
    assert text.count("each epoch leaves out 4 of 24 images") == 1
    assert "10 x 1 pass)" in text and "2 updates per epoch, 2 epochs" in text


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", resume=True)
    folder.open("a: 1\n", "CPU", 1)
    folder.metrics("train", epoch=0.5, step=1)
    folder.metrics("train", epoch=1.5, step=2)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    folder.drop_metrics_after(1, 1)
    folder.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


# --- what may fail without harm ---------------------------------------------------------------------------------


@pytest.mark.compiles
def test_a_picture_that_fails_costs_a_line_and_no_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        saved.append(checkpoint.load(tmp_path / "run" / "last.ckpt").meta["epoch"])  # before the picture is drawn
        raise ZeroDivisionError("no colours\nleft")

    saved: list[int] = []

    monkeypatch.setattr(MaskedImageModel, "panels", fail)
    train(recipe_of(data, tmp_path / "run", "train.gallery_every=1"))
    text = (tmp_path / "run" / "train.log").read_text()
    assert text.count("no gallery: no colours left") == 2
    assert saved == [1, 2]


@pytest.mark.compiles
def test_a_loss_that_is_not_finite_ends_the_run(data: Path, tmp_path: Path) -> None:
    """And the line names a checkpoint only where there is one."""
    with pytest.raises(RunError) as caught:
        train(recipe_of(data, tmp_path / "run", "train.base_lr=1e30"))
    text = str(caught.value)
    assert "the loss is not finite before update 2" in text and "checkpoint" not in text
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] == 1


@pytest.mark.compiles
def test_an_evaluation_that_fails_keeps_the_epochs(
    data: Path, tmp_path: Path, image_folder_factory: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files break after the start of the run, which checks some of them."""
    monkeypatch.setattr("src.tasks.train.check_usable", lambda *arguments: "")
    root = image_folder_factory(tmp_path / "images")
    for file in (root / "val").rglob("*.*"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"^9 of 9 images cannot be used"):
        train(recipe_of(data, tmp_path / "run", f"data.root={root}", "train.eval_every=1"))
    assert checkpoint.load(tmp_path / "run" / "last.ckpt").meta["epoch"] == 1


def test_a_line_of_the_log_stays_one_line(tmp_path: Path) -> None:
    """Names of images may contain line ends, and bytes that are no text."""
    folder = RunFolder(tmp_path / "run", resume=False)
    folder.open("recipe", "CPU", 1)
    folder.info("a\nb\udcff.jpg cannot be used")
    folder.close()
    (line,) = (tmp_path / "run" / "train.log").read_text(encoding="utf-8").splitlines()
    assert line.endswith(" a\\nb\\udcff.jpg cannot be used")
