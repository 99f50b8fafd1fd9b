"""Tests of scripts/prepare_demo.py: the demo folder is repeatable and its two splits share no pixel."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from scripts import prepare_demo as demo

pytest.importorskip("skimage")

COUNTS = {"train": 6, "val": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "deep" / "out"
    assert demo.prepare(out, COUNTS) is True
    return out


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_two_runs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    demo.prepare(again, COUNTS)
    assert contents(again) == contents(folder)


def test_layout_and_nothing_but_images(folder: Path) -> None:
    assert len(demo.PHOTOGRAPHS) == 17
    names = {
        f"{split}/{name}/{index:04d}.jpg"
        for split, count in COUNTS.items()
        for name in demo.PHOTOGRAPHS
        for index in range(count)
    }
    assert contents(folder).keys() == names
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no temporary folder is left


def test_images_are_grey_square_and_not_flat(folder: Path) -> None:
    for path in folder.rglob("*.jpg"):
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert image.shape == (64, 64), path
        assert image.dtype == np.uint8
        assert image.std() > 0.5 * demo.MIN_STD, path


def test_images_of_a_class_differ(folder: Path) -> None:
    files = contents(folder)
    assert len(set(files.values())) == len(files)


def test_bands_of_a_known_width() -> None:
    assert demo.bands(400) == {"train": [(0, 116), (200, 316)], "val": [(124, 192), (324, 392)]}


@pytest.mark.parametrize("width", [384, 448, 451, 512, 550, 741, 1000, 1411])
def test_bands_are_disjoint_with_a_gap(width: int) -> None:
    split_bands = demo.bands(width)
    spans = sorted(span for spans in split_bands.values() for span in spans)
    assert len(split_bands["train"]) == len(split_bands["val"]) == 2
    assert spans[0][0] >= 0 and spans[-1][1] <= width
    for (start, end), (following, _) in pairwise(spans):
        assert start < end
        assert following - end >= 0.03 * width / 2


@pytest.mark.parametrize("name", sorted(demo.PHOTOGRAPHS))
def test_no_train_box_shares_a_pixel_with_a_val_box(name: str) -> None:
    image = demo.load_grey(demo.photograph_folder() / demo.PHOTOGRAPHS[name])
    seen = {}
    for split in ("train", "val"):
        seen[split] = np.zeros(image.shape, dtype=bool)
        for box in demo.draw_boxes(image, name, split, demo.COUNTS[split]):
            assert 48 <= box.side <= 96
            assert box.x >= 0 and box.x + box.side <= image.shape[1]
            assert box.y >= 0 and box.y + box.side <= image.shape[0]
            seen[split][box.y : box.y + box.side, box.x : box.x + box.side] = True
    assert seen["train"].any() and seen["val"].any()
    assert not (seen["train"] & seen["val"]).any()


def test_the_image_is_the_box_of_the_photograph(folder: Path) -> None:
    image = demo.load_grey(demo.photograph_folder() / demo.PHOTOGRAPHS["camera"])
    for index, box in enumerate(demo.draw_boxes(image, "camera", "val", COUNTS["val"])):
        written = cv2.imread(str(folder / "val" / "camera" / f"{index:04d}.jpg"), cv2.IMREAD_GRAYSCALE)
        source = image[box.y : box.y + box.side, box.x : box.x + box.side]
        expected = cv2.resize(source, (64, 64), interpolation=cv2.INTER_LINEAR)
        assert np.corrcoef(written.ravel(), expected.ravel())[0, 1] > 0.97


def test_a_flat_photograph_is_an_error() -> None:
    image = np.full((200, 400), 90, dtype=np.uint8)
    with pytest.raises(demo.DemoError, match="only 0 of 5 val crops"):
        demo.draw_boxes(image, "blank", "val", 5)


def test_a_too_small_photograph_is_an_error() -> None:
    image = np.zeros((200, 200), dtype=np.uint8)
    with pytest.raises(demo.DemoError, match="needs 48 pixels"):
        demo.draw_boxes(image, "small", "val", 5)


def test_a_complete_folder_is_left_as_it_is(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert demo.prepare(folder, COUNTS) is False
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo.prepare(out, COUNTS)
    (out / "val" / "moon" / "0001.jpg").unlink()
    before = contents(out)
    with pytest.raises(demo.DemoError, match="not a complete demo folder"):
        demo.prepare(out, COUNTS)
    assert contents(out) == before


def test_a_foreign_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert demo.main(["--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "not a complete demo folder" in captured.err
    assert contents(tmp_path) == {"mine.txt": b"keep"}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.PHOTOGRAPHS, "text", "no_such_photograph.png")
    with pytest.raises(demo.DemoError, match=r"does not contain no_such_photograph\.png"):
        demo.prepare(tmp_path / "out", COUNTS)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_argument_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["--nothing"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
