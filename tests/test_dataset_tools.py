"""The scripts that look at a data set or write MindRecord files from it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import DataConfig
from src.data.decode import Decoder
from src.data.job import ImageJob
from src.data.opening import open_source
from src.data.records import MindRecords, open_mindrecord
from src.data.sources import Files, plain_files
from src.data.transform import Transform
from src.errors import UserError
from src.tasks import records
from src.tasks.dataset import Measure, Moments, images_of, shown, verify
from src.tasks.records import Converted, Options, check, prepare
from src.tasks.sweep import Bad, sweep
from tests.crashing import length_or_crash
from tests.helpers import ROOT, MakeFolder, Run, assert_one_line_error

OPTIONS = Options(shards=3, shorter_side=0, quality=95, channels=3, max_pixels=10**6, page=2**20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, image_folder_factory: MakeFolder) -> Path:
    """Three classes with eight training images each."""
    return image_folder_factory(tmp_path_factory.mktemp("good") / "images ü")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy with a file that is no image, one that is cut off, and an empty one."""
    root = tmp_path / "broken"
    shutil.copytree(folder, root)
    place = root / "train" / "class_1"
    (place / "text.jpg").write_text("no image")
    (place / "empty.png").write_bytes(b"")
    (place / "line\nend.jpg").write_bytes((place / "1_00.jpg").read_bytes()[:600])
    return root


def files_below(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


# sweep


@pytest.mark.compiles
def test_a_crash_of_a_decoder_is_the_fault_of_one_image(tmp_path: Path) -> None:
    contents = [b"a" * n for n in range(20)]
    contents[3], contents[13], contents[14], contents[17] = b"crash", b"crash", b"bad", b"large"
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    source = plain_files([tmp_path / str(number) for number in range(21)])
    found = dict(sweep(source, length_or_crash, 2, "test"))
    assert list(found) == list(range(21))
    assert found[3] == found[13] == Bad("its decoding ended the process")
    assert found[14] == Bad("said to be bad") and found[17] == Bad("does not fit into memory")
    assert found[20] == Bad("cannot be read (No such file or directory)")
    assert [found[n] for n in (0, 2, 4, 12, 19)] == [0, 2, 4, 12, 19]


def test_a_part_of_the_images_in_the_asked_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    source = plain_files([tmp_path / "a"] * 12)
    assert list(sweep(source, length_or_crash, 1, "test", np.array([7, 2, 11]))) == [(7, 1), (2, 1), (11, 1)]


# verify_dataset.py


def test_verify_finds_every_bad_file(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not verify([str(broken)], Decoder(), 2, str(tmp_path / "out.jsonl"))
    printed = capsys.readouterr().out
    listed = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    names = {"text.jpg", "empty.png", "line\nend.jpg"}
    assert {Path(entry["image"]).name for entry in listed} == names and all(entry["reason"] for entry in listed)
    assert all(entry.keys() == {"image", "reason"} for entry in listed)
    assert "36 images decoded, 3 bad" in printed
    assert sum(text.startswith("bad: ") for text in printed.splitlines()) == 3
    assert r"line\nend.jpg" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out.jsonl"]


def test_verify_takes_lists_and_single_files_too(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = broken / "train" / "class_0" / "0_00.jpg"
    assert len(images_of(str(image))) == 1
    (broken / "list.txt").write_text("train/class_0/0_00.jpg\ntrain/class_0/gone.jpg\n")
    assert not verify([str(broken / "list.txt"), str(image)], Decoder(), 1, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 3 and report["bad"] == 1
    assert [Path(entry["image"]).name for entry in report["files"]] == ["gone.jpg"]
    assert sum(report["reasons"].values()) == 1


@pytest.mark.compiles
def test_verify_exit_codes(folder: Path, broken: Path, tmp_path: Path, run_entry: Run) -> None:
    script = ROOT / "scripts" / "verify_dataset.py"
    good = run_entry(script, folder)
    assert good.returncode == 0 and good.stdout.endswith("33 images decoded, 0 bad\n") and not good.stderr, good.stderr
    assert run_entry(script, broken / "train").returncode == 1
    assert_one_line_error(run_entry(script, tmp_path / "gone"), "gone", "command line")
    assert_one_line_error(run_entry(script, folder, "--workers", "0"), "--workers")
    assert_one_line_error(run_entry(script, folder, "--out", tmp_path / "no" / "a.jsonl"), "--out")
    assert_one_line_error(run_entry(script, folder, "--out", tmp_path), "--out", "is a folder")


# dataset_stats.py


def test_files_in_the_working_folder_are_not_imported(folder: Path, tmp_path: Path) -> None:
    """A process that Python starts looks for modules there first."""
    for name in ("multiprocessing", "socket", "numpy", "cv2"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})")
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, str(ROOT / "scripts" / "verify_dataset.py"), str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_mean_and_std_are_those_of_all_pixels(folder: Path) -> None:
    moments, pixels = Moments(), []
    for path in sorted(folder.rglob("*.png")):
        moments.add(Measure(Decoder())(path.read_bytes()))
        pixels.append(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3) / 255)
    mean, std = moments.result()
    every = np.concatenate(pixels)
    np.testing.assert_allclose(mean, every.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, every.std(0), rtol=1e-12)


def test_sums_of_grey_levels_are_exact() -> None:
    """A white image of more than one part, whose variance is exactly 0."""
    file = io.BytesIO()
    Image.fromarray(np.full((3001, 1000, 3), 255, np.uint8)).save(file, "PNG")
    image = Measure(Decoder())(file.getvalue())
    assert image.sums == [255 * 3_001_000] * 3 and image.squares == [255**2 * 3_001_000] * 3
    moments = Moments()
    moments.add(image)
    assert moments.result() == ([1, 1, 1], [0, 0, 0])


def test_one_channel_is_luminance(folder: Path) -> None:
    path = folder / "train" / "class_0" / "0_01.png"
    moments = Moments()
    moments.add(Measure(Decoder(channels=1))(path.read_bytes()))
    grey = np.asarray(Image.open(path).convert("RGB").convert("L")) / 255
    np.testing.assert_allclose(moments.result(), [[grey.mean()], [grey.std()]], rtol=1e-12)


def test_bands_of_arrays_are_measured() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (30, 20, 5), np.uint8), rng.random((10, 40, 5)).astype(np.float32)]
    moments = Moments()
    for array in arrays:
        file = io.BytesIO()
        np.save(file, array)
        moments.add(Measure(Decoder(channels=5))(file.getvalue()))
    every = np.concatenate([arrays[0].reshape(-1, 5) / 255, arrays[1].reshape(-1, 5).astype(np.float64)])
    np.testing.assert_allclose(moments.result(), [every.mean(0), every.std(0)], rtol=1e-7)


def test_numbers_have_no_exponent() -> None:
    assert [shown(value) for value in (0.485, 0.123456, 0.00001234567, 1.0, 0.0)] == [
        *("0.485", "0.1235", "0.00001235", "1.0", "0.0"),
    ]


@pytest.mark.compiles
def test_the_block_can_be_pasted_into_a_recipe(broken: Path, tmp_path: Path, run_entry: Run) -> None:
    from src.config.files import load_recipe

    script = ROOT / "scripts" / "dataset_stats.py"
    done = run_entry(script, broken)
    assert done.returncode == 0 and not done.stderr, done.stderr
    text, block = done.stdout.split("for the recipe:\n")
    assert "24 to" not in text and "images of a class: 8 (class_0) to 11 (class_1)" in text and "3 bad" in text
    assert "height: 40 to 40 pixels, median 40" in text and "width: 48 to 48 pixels, median 48" in text
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"encoder: vit_tiny\nmethod: mae\n{block}  root: {broken}\n", encoding="utf-8")
    data = load_recipe(recipe).data
    assert len(data.mean) == 3 and 0 < data.std[0] < 0.5
    same = run_entry(script, recipe, "--json")
    assert same.returncode == 0, same.stderr
    report = json.loads(same.stdout)
    np.testing.assert_allclose(report["mean"], data.mean, atol=1e-4)
    assert report["images"] == 27 and report["decoded"] == 27 and report["bad"] == 3
    few = json.loads(run_entry(script, recipe, "data.train=val", "--json", "--sample", "4").stdout)
    assert few["images"] == 9 and few["decoded"] == 4


@pytest.mark.compiles
def test_stats_mistakes_are_one_line(folder: Path, tmp_path: Path, run_entry: Run) -> None:
    script = ROOT / "scripts" / "dataset_stats.py"
    assert_one_line_error(run_entry(script, tmp_path / "gone"), "gone")
    assert_one_line_error(run_entry(script, folder, "--sample", "few"), "--sample")
    assert_one_line_error(run_entry(script, folder, "data.train=a"), "data.train=a", "name a recipe")
    (tmp_path / "a.png").write_bytes(b"no image")
    assert_one_line_error(run_entry(script, tmp_path), "a.png", "cannot be used")


# prepare_mindrecord.py


def same_images(source: Files, written: MindRecords) -> None:
    assert len(written) == len(source)
    for index in range(len(source)):
        assert written.read(index) == source.read(index)
        assert written.key(index) == source.names[index]
    assert written.classes == source.classes and written.labels.tolist() == source.labels.tolist()


def opened(place: Path) -> Files:
    source = open_source(place)
    assert isinstance(source, Files)
    return source


@pytest.mark.compiles
@pytest.mark.parametrize("shards", [1, 3, 11])
def test_a_set_has_the_images_in_their_order(folder: Path, tmp_path: Path, shards: int) -> None:
    target = tmp_path / "records"
    prepare(str(folder / "train"), str(target), Options(**{**vars(OPTIONS), "shards": shards}), 1)
    written = open_mindrecord(target / "train.mindrecord")
    same_images(opened(folder / "train"), written)
    names = (
        ["train.mindrecord"]
        if shards == 1
        else [f"train.mindrecord{n:0{len(str(shards - 1))}d}" for n in range(shards)]
    )
    assert sorted(files_below(target)) == sorted([*names, *(f"{name}.db" for name in names), "train.mindrecord.json"])
    assert (target / names[0]).stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_training_draws_the_same_pictures_from_the_set(folder: Path, tmp_path: Path) -> None:
    prepare(str(folder / "train"), str(tmp_path / "set.mindrecord"), OPTIONS, 1)
    images = []
    for place in (folder / "train", tmp_path / "set.mindrecord"):
        job = ImageJob(open_source(place), Transform(DataConfig(), (32, 32), 3, training=True), seed=3, replaces=True)
        images.append(np.zeros((24, *job.shape), np.float32))
        faults = [job.load(index, 1, 0, out, lambda number: None) for index, out in enumerate(images[-1])]
        assert faults == [None] * 24
    np.testing.assert_array_equal(*images)


def test_mindspore_reads_the_whole_set_from_one_file(folder: Path, tmp_path: Path) -> None:
    import mindspore.dataset as ds

    prepare(str(folder / "train"), str(tmp_path / "set.mindrecord"), OPTIONS, 1)
    ours = open_mindrecord(tmp_path / "set.mindrecord")
    loaded = ds.MindDataset(str(tmp_path / "set.mindrecord0"), shuffle=False, num_parallel_workers=1)
    rows = list(loaded.create_dict_iterator(1, output_numpy=True))
    assert [bytes(row["data"]) for row in rows] == [ours.read(index) for index in range(24)]
    assert [int(row["label"]) for row in rows] == ours.labels.tolist()


def test_images_without_labels(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(folder / "val" / "class_0", flat)
    prepare(str(flat), str(tmp_path / "set.mindrecord"), Options(**{**vars(OPTIONS), "shards": 0}), 1)
    same_images(opened(flat), open_mindrecord(tmp_path / "set.mindrecord"))


@pytest.mark.compiles
def test_bad_images_are_left_out_and_listed(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of the files has nothing but a bad image."""
    target = tmp_path / "set.mindrecord"
    prepare(str(broken / "train"), str(target), Options(**{**vars(OPTIONS), "shards": 27}), 1)
    written = open_mindrecord(target)
    assert len(written) == 24 and written.classes == ["class_0", "class_1", "class_2"]
    listed = json.loads((tmp_path / "set.mindrecord.json").read_text("utf-8"))["bad"]
    assert {Path(entry["image"]).name for entry in listed} == {"text.jpg", "empty.png", "line\nend.jpg"}
    assert "24 images in 27 files, 3 bad images left out" in capsys.readouterr().out
    assert check(str(target))


def test_no_set_of_bad_images_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no image of .* can be used; .*a\.png"):
        prepare(str(tmp_path / "images"), str(tmp_path), Options(**{**vars(OPTIONS), "shards": 1}), 1)
    assert sorted(files_below(tmp_path)) == ["images/a.png"]


def picture(size: tuple[int, int], form: str, turned: int = 1) -> bytes:
    """An image file of height x width."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turned
    file = io.BytesIO()
    image.save(file, form, exif=exif)
    return file.getvalue()


def test_only_larger_images_are_resized_and_keep_their_orientation() -> None:
    work = Converted(Options(**{**vars(OPTIONS), "shorter_side": 40}))
    small = picture((40, 300), "PNG")
    assert work(small) == small
    for turned in (1, 6):
        content = work(picture((100, 60), "WEBP", turned))
        assert isinstance(content, bytes)
        image = Image.open(io.BytesIO(content))
        assert image.format == "JPEG" and image.size == (40, 67)
        assert image.getexif().get(0x0112, 1) == turned


def test_an_image_must_fit_into_a_page() -> None:
    assert isinstance(Converted(OPTIONS)(picture((700, 700), "BMP")), Bad)
    assert isinstance(Converted(Options(**{**vars(OPTIONS), "shorter_side": 300}))(picture((700, 700), "BMP")), bytes)


class Stopped(BaseException):
    """As Ctrl-C, at a chosen moment."""


@pytest.mark.compiles
@pytest.mark.parametrize("moment", ["second file", "moving"])
def test_a_stopped_run_goes_on(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    """Nothing has its final name before all is complete, and the result is that of a run that was not stopped."""
    source, options = str(broken / "train"), Options(**{**vars(OPTIONS), "shards": 5})
    prepare(source, str(tmp_path / "whole" / "set.mindrecord"), options, 1)
    target = tmp_path / "stopped" / "set.mindrecord"
    close, replace, calls = records.Writer.close, Path.replace, []

    def stop_closing(writer: records.Writer, files: list[str], number: int) -> None:
        calls.append(number)
        if len(calls) == 2:
            raise Stopped
        close(writer, files, number)

    def stop_moving(path: Path, to: Path) -> Path:
        if to.parent == target.parent:
            calls.append(0)
            if len(calls) == 8:
                raise Stopped
        return replace(path, to)

    if moment == "moving":
        monkeypatch.setattr(Path, "replace", stop_moving)
    else:
        monkeypatch.setattr(records.Writer, "close", stop_closing)
    with pytest.raises(Stopped):
        prepare(source, str(target), options, 1)
    monkeypatch.undo()
    assert not target.with_name("set.mindrecord.json").exists()
    if moment != "moving":
        assert [path.name for path in target.parent.iterdir()] == [".set.mindrecord.partial"]
    with pytest.raises(UserError, match=r"other images or options .*quality: 95 there, 90 here"):
        prepare(source, str(target), Options(**{**vars(options), "quality": 90}), 1)
    capsys.readouterr()
    prepare(source, str(target), options, 1)
    done = {"second file": "1 of 5 files are written already", "moving": "5 of 5 files"}[moment]
    assert done in capsys.readouterr().out
    assert files_below(target.parent) == files_below(tmp_path / "whole")


def test_a_finished_set_stays_unchanged(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(folder / "train"), tmp_path / "set.mindrecord"
    prepare(source, str(target), OPTIONS, 1)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    prepare(source, str(target), OPTIONS, 1)
    assert "complete and unchanged" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    with pytest.raises(UserError, match="has other images or options"):
        prepare(str(folder / "val"), str(target), OPTIONS, 1)
    with pytest.raises(UserError, match=r"exists already; write another OUT"):
        target.with_name("set.mindrecord.json").rename(tmp_path / "away")
        prepare(source, str(target), OPTIONS, 1)
    assert sorted(files_below(tmp_path)) == sorted(
        [*(p.name for p in times if p.name != "set.mindrecord.json"), "away"]
    )


#: what happens to a file of a finished set -> words of the report
CHANGES = {
    "cut": "set.mindrecord1 has changed (bytes, sha256)",
    "byte": "set.mindrecord1 has changed (sha256)",
    "index": "set.mindrecord1.db has changed",
    "gone": "set.mindrecord1: No such file",
}


@pytest.mark.parametrize("change", CHANGES)
def test_check_finds_changed_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    target = tmp_path / "set.mindrecord"
    prepare(str(folder / "train"), str(target), OPTIONS, 1)
    assert check(str(target)) and check(str(tmp_path)) and check(f"{target}2")
    assert "24 images in 3 MindRecord files, 3 classes; complete" in capsys.readouterr().out
    path = tmp_path / ("set.mindrecord1.db" if change == "index" else "set.mindrecord1")
    content = bytearray(path.read_bytes())
    if change == "gone":
        path.unlink()
    else:
        content[-5] ^= 1
        path.write_bytes(content[:-9] if change == "cut" else content)
    assert not check(str(target))
    assert CHANGES[change] in capsys.readouterr().out
    with pytest.raises(UserError, match="remove the files"):
        prepare(str(folder / "train"), str(target), OPTIONS, 1)


@pytest.mark.compiles
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_no_workers_and_goes_on(
    folder: Path, tmp_path: Path, run_entry: Run, number: signal.Signals
) -> None:
    script = ROOT / "scripts" / "prepare_mindrecord.py"
    arguments = [
        script,
        folder / "train",
        tmp_path / "a.mindrecord",
        "--shards",
        "12",
        "--page-size",
        "1",
        "--workers",
        "1",
    ]
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    partial = tmp_path / ".a.mindrecord.partial"
    deadline = time.monotonic() + 120
    while not (partial / "a.mindrecord00.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: all processes get it
        assert process.communicate()[1] == "interrupted\n" and process.returncode == 130
    else:
        process.send_signal(number)
        process.wait()
    assert children and not (tmp_path / "a.mindrecord.json").exists()
    while any(running(int(child)) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    done = run_entry(*arguments)
    assert done.returncode == 0 and "of 12 files are written already" in done.stdout, done.stdout + done.stderr
    same_images(opened(folder / "train"), open_mindrecord(tmp_path / "a.mindrecord"))
    checked = run_entry(script, "--check", tmp_path / "a.mindrecord")
    assert checked.returncode == 0 and not partial.exists(), checked.stdout
    (tmp_path / "a.mindrecord07").unlink()
    checked = run_entry(script, "--check", tmp_path / "a.mindrecord")
    assert checked.returncode == 1 and "a.mindrecord07" in checked.stdout and not checked.stderr


def running(process: int) -> bool:
    """Whether a process runs; one that has ended may wait to be collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_two_writers_do_not_meet(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = records.Writer.close
    target = str(tmp_path / "a.mindrecord")

    def meet(writer: records.Writer, files: list[str], number: int) -> None:
        with pytest.raises(UserError, match="is being written by another process"):
            prepare(str(folder / "train"), target, OPTIONS, 1)
        close(writer, files, number)

    monkeypatch.setattr(records.Writer, "close", meet)
    prepare(str(folder / "train"), target, OPTIONS, 1)
    assert check(target)


@pytest.mark.compiles
def test_prepare_mistakes_are_one_line(folder: Path, tmp_path: Path, run_entry: Run) -> None:
    script, source = ROOT / "scripts" / "prepare_mindrecord.py", folder / "train"
    (tmp_path / "file").write_text("a")
    for arguments, words in (
        ([tmp_path / "gone", tmp_path], ["gone"]),
        ([source], ["OUT is missing"]),
        ([source, tmp_path, "--shards", "25"], ["--shards", "24 images", "write 24 or less"]),
        ([source, tmp_path, "--shards", "0"], ["--shards"]),
        ([source, tmp_path, "--quality", "101"], ["--quality"]),
        ([source, tmp_path, "--page-size", "257"], ["--page-size"]),
        ([source, tmp_path, "--shorter-side", "8", "--channels", "5"], ["--shorter-side"]),
        ([source, tmp_path / "file" / "a.mindrecord"], ["cannot be written"]),
        ([source, tmp_path / "a:b.mindrecord"], ["cannot have :"]),
        (["--check", tmp_path], ["has 0 finished sets"]),
        (["--check", tmp_path / "a.mindrecord"], ["a.mindrecord.json"]),
        (["--check", source, tmp_path], ["--check"]),
    ):
        assert_one_line_error(run_entry(script, *arguments), *words)
    assert sorted(files_below(tmp_path)) == ["file"]
