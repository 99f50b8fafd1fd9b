"""Sources of images: folders and their stored lists, list files, ImageNet's files, classes by name, splits."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import socket
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from src.config.files import load_recipe
from src.data import index, listing
from src.data.folders import image_folder, images_below
from src.data.lists import TRUTH, split_line
from src.data.opening import open_source
from src.data.sources import (
    DataError,
    Files,
    Labels,
    Names,
    Source,
    labelled_subset,
    plain_files,
    read_file,
    with_classes,
    without_labels,
)
from tests.helpers import ROOT, Run, assert_one_line_error


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def touch(root: Path, *names: str) -> Path:
    """Write empty files; nothing here decodes them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def names_of(source: Source) -> list[str]:
    assert isinstance(source, Files)
    return [source.names[i] for i in range(len(source))]


def labelled(source: Source) -> list[tuple[str, str]]:
    """Name and class of each image."""
    return [(name, source.classes[label]) for name, label in zip(names_of(source), source.labels, strict=True)]


def error_of(path: Path, labels: Labels = "any", key: str = "data.train") -> str:
    with pytest.raises(DataError) as caught:
        open_source(path, key, labels)
    text = str(caught.value)
    assert text.startswith(f"{key}: "), text
    return text


# --- tables and files -------------------------------------------------------------------------------------------

ODD_NAMES = ["", "a", "ü/日本 x.png", "line\nend.jpg", 'quote".gif', os.fsdecode(b"\xff\xfe.png"), "b" * 300]


def test_a_table_of_names_returns_what_it_was_given() -> None:
    table = Names.of(ODD_NAMES)
    assert [table[i] for i in range(len(table))] == ODD_NAMES
    copy = pickle.loads(pickle.dumps(table))
    assert [copy[i] for i in range(len(copy))] == ODD_NAMES
    assert len(Names.of([])) == 0


def test_a_part_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.data.sources.CHUNK", 3)  # so that there are several
    table = Names.of(ODD_NAMES)
    order = [6, 0, 0, 3, 5, 2, 1, 4, 4]
    part = table.subset(order)
    assert [part[i] for i in range(len(part))] == [ODD_NAMES[i] for i in order]
    assert len(table.subset([])) == 0


def test_a_source_is_read_and_travels_to_other_processes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"content")
    source = pickle.loads(pickle.dumps(image_folder(tmp_path)))
    assert source.read(0) == b"content" and source.name(0) == str(tmp_path / "a/1.png")
    assert source.checksum() == image_folder(tmp_path).checksum()


def test_a_checksum_tells_names_and_labels(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/2.png")
    source = image_folder(tmp_path)
    assert source.checksum() != source.subset([1, 0]).checksum()
    assert source.checksum() != replace(source, labels=source.labels[::-1]).checksum()
    moved = shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    assert image_folder(moved).checksum() == source.checksum()


def test_reading_ends_for_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "gone.png", "."):
        with pytest.raises(OSError):
            read_file(tmp_path / name)
    source = plain_files([tmp_path / "x.png"])
    assert source.name(0) == str(tmp_path / "x.png") and source.classes == []


# --- folders ----------------------------------------------------------------------------------------------------


def test_classes_are_sorted_and_label_their_files(tmp_path: Path) -> None:
    touch(tmp_path, "zebra/1.png", "ant/deep/2.jpg", "ant/1.JPEG", "cat/1.WebP", "cat/2.jfif", "cat/3.npy", "cat/4.gif")
    for labels in ("any", "needed", "complete"):
        source = open_source(tmp_path, "data", labels)  # type: ignore[arg-type] # mypy sees texts
        assert source.classes == ["ant", "cat", "zebra"]
        assert labelled(source) == [
            ("ant/1.JPEG", "ant"),
            ("ant/deep/2.jpg", "ant"),
            *((f"cat/{name}", "cat") for name in ("1.WebP", "2.jfif", "3.npy", "4.gif")),
            ("zebra/1.png", "zebra"),
        ]
        assert source.labels.dtype == np.int32
        assert source.summary() == f"{tmp_path}: 7 images, 3 classes"


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = open_source(touch(tmp_path, "b.png", "a.png", "line\nend ü.png"))
    assert names_of(source) == ["a.png", "b.png", "line\nend ü.png"]
    assert source.classes == [] and source.summary() == f"{tmp_path}: 3 images, no labels"
    text = error_of(tmp_path, "needed")
    assert f"{tmp_path} has no class folders" in text and "move the images of each class into a folder" in text


def test_images_next_to_folders_are_images_without_labels(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.png", "stray.png", "cat/deep/2.png")
    source = open_source(tmp_path)
    assert names_of(source) == ["stray.png", "cat/1.png", "cat/deep/2.png"] and source.classes == []
    for labels in ("needed", "complete"):
        text = error_of(tmp_path, labels)  # type: ignore[arg-type]
        assert "stray.png next to cat/" in text and "move them into a class folder" in text


def test_hidden_and_other_files_are_left_out_and_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "notes.txt", "a/more.TXT", "a/LICENSE", "a/.hidden.png", ".DS_Store", "a/x.a\tb")
    touch(tmp_path, ".cache/1.png", "a/.ipynb_checkpoints/1-checkpoint.png", "a/deep/.git/1.png", "a/@eaDir/1.png")
    touch(tmp_path, "__MACOSX/a/1.png")
    source = image_folder(tmp_path)
    assert names_of(source) == ["a/1.png"] and source.classes == ["a"]
    assert source.skipped == {
        **{".txt": 2, "no extension": 2, "hidden file": 2, "hidden folder": 3, "system folder": 2}
    }
    summary = source.summary()
    assert ": 1 image, 1 class, 11 others skipped (3 x hidden folder, " in summary and "2 x .txt" in summary


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    store = touch(tmp_path / "store", "x.png", "set/y.png", "set/deep/z.png")
    root = touch(tmp_path / "root", "a/1.png")
    (root / "a" / "link.png").symlink_to(store / "x.png")
    (root / "b").symlink_to(store / "set")
    (root / "a" / "more").symlink_to("../../store/set/deep")
    source = image_folder(root)
    assert names_of(source) == ["a/1.png", "a/link.png", "a/more/z.png", "b/y.png", "b/deep/z.png"]
    (tmp_path / "whole").symlink_to(root)
    assert names_of(image_folder(tmp_path / "whole")) == names_of(source) and not source.skipped


def test_loops_of_links_end(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/2.png")
    for link, target in (("a/up", ".."), ("a/own", "."), ("a/other", "../b"), ("b/other", "../a"), ("a/self", "self")):
        (tmp_path / link).symlink_to(target)
    source = image_folder(tmp_path)
    assert names_of(source) == ["a/1.png", "a/other/2.png", "b/2.png", "b/other/1.png"]
    assert source.skipped[listing.LOOP] >= 4 and source.skipped[listing.NOWHERE] == 2


def test_links_between_many_folders_give_few_paths(tmp_path: Path) -> None:
    """Every order of the folders is a path: 14 factorial of them."""
    letters = "abcdefghijklmn"
    for name in letters:
        touch(tmp_path, f"{name}/{name}.png")
        for other in letters:
            (tmp_path / name / f"to_{other}").symlink_to(f"../{other}")
    source = image_folder(tmp_path)
    assert len(source) == len(letters) ** 2 and set(np.bincount(source.labels)) == {len(letters)}


def test_what_has_the_name_of_an_image_but_is_none(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "a/folder.jpg/2.png")
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(tmp_path / "a" / "s.jpg"))  # a long path is no address
        source = image_folder(tmp_path)
    assert names_of(source) == ["a/1.png"]
    kinds = {"folder with the name of an image": 1, listing.NOWHERE: 2, "pipe, socket or device": 2}
    assert source.skipped == kinds


def test_a_folder_that_cannot_be_listed_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.png", "b/2.png", "b/closed/3.png")
    scandir = os.scandir

    def refuse(path: bytes) -> Any:
        if path.rstrip(b"/").endswith(b"closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = image_folder(tmp_path)
    assert names_of(source) == ["a/1.png", "b/2.png"] and source.skipped == {listing.UNLISTED: 1}
    assert "b/closed cannot be listed (Permission denied)" in error_of(tmp_path / "b" / "closed")


def test_a_folder_that_goes_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def remove(path: bytes) -> Any:
        if isinstance(path, bytes) and path.endswith(b"a"):
            shutil.rmtree(tmp_path / "b")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", remove)
    assert image_folder(tmp_path).skipped == {listing.UNLISTED: 1, "folder without an image": 1}


def test_very_deep_folders(tmp_path: Path) -> None:
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1200):  # deeper than Python's recursion
            Path("dd").mkdir()
            os.chdir("dd")
        Path("x.png").write_bytes(b"")
        for _ in range(900):  # longer than a path may be
            Path("eeee").mkdir()
            os.chdir("eeee")
    finally:
        os.chdir(here)
    try:
        source = image_folder(tmp_path)
        assert len(source) == 1 and source.skipped[listing.UNLISTED] == 1
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "dd"], check=True)  # too deep for pytest


# --- errors of folders ------------------------------------------------------------------------------------------


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    text = error_of(tmp_path)
    assert f"no image in {tmp_path}; valid formats: .bmp, .gif, " in text
    touch(tmp_path, "a/x.heic", "a/.b.png")
    text = error_of(tmp_path)
    assert f"no image in {tmp_path} (1 x .heic, 1 x hidden file); valid formats: " in text


def test_a_class_folder_without_an_image(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/1.png", "tiger/1.heic", "tiger/2.heic", "tiger/n.txt")
    text = error_of(tmp_path, "complete")
    assert f"no image in class folder {tmp_path}/tiger (2 x .heic, 1 x .txt); put images into it, or remove it" in text
    (tmp_path / "empty").mkdir()
    text = error_of(tmp_path, "complete")
    assert f"class folder {tmp_path}/empty and 1 other class folder (it is empty); put images" in text
    for labels in ("any", "needed"):
        source = open_source(tmp_path, "data", labels)  # type: ignore[arg-type]
        assert source.classes == ["a", "b"] and "2 x folder without an image" in source.summary()


def test_one_level_too_high(tmp_path: Path) -> None:
    touch(tmp_path, "set/train/a/1.png", "set/val/a/1.png", "set/train/b/1.png")
    for labels in ("needed", "complete"):
        text = error_of(tmp_path / "set", labels)  # type: ignore[arg-type]
        assert (
            "are parts of a data set (train, val), not classes" in text and f"for example {tmp_path}/set/train" in text
        )
        text = error_of(tmp_path, labels)  # type: ignore[arg-type]
        assert "are data sets (set), not classes" in text and f"for example {tmp_path}/set/train" in text
        text = error_of(tmp_path / "set" / "train" / "..", labels)  # type: ignore[arg-type]
        assert "not classes" in text
    assert open_source(tmp_path / "set").summary().endswith("3 images, no labels")
    text = error_of(touch(tmp_path / "more", "flowers/rose/1.png", "flowers/tulip/1.png"), "complete")
    assert "a single class folder, flowers, with 2 folders" in text and f"for example {tmp_path}/more/flowers" in text
    touch(tmp_path / "set", "samples/1.png")
    assert "(samples, train, val), not classes" in error_of(tmp_path / "set", "complete")
    touch(tmp_path / "set2", "x/1.png")
    (tmp_path / "sets").mkdir()
    for name in ("set", "set2"):
        (tmp_path / name).rename(tmp_path / "sets" / name)
    shutil.rmtree(tmp_path / "sets" / "set" / "samples")
    assert f"for example {tmp_path}/sets/set/train" in error_of(tmp_path / "sets", "complete")
    touch(tmp_path / "vehicles", "train/1.png", "car/1.png")
    assert open_source(tmp_path / "vehicles", "data", "complete").classes == ["car", "train"]


def test_what_is_no_folder(tmp_path: Path) -> None:
    touch(tmp_path, "x.jpg", "LIST")
    (tmp_path / "link").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe.txt")
    remedy = "set data.root (and data.train, data.val) to your images"
    assert error_of(tmp_path / "gone").endswith(f"there is no folder {tmp_path}/gone; {remedy}")
    assert f"there is no file {tmp_path}/gone.csv; {remedy}" in error_of(tmp_path / "gone.csv")
    assert "name a folder of images, or a list" in error_of(tmp_path / "gone", key="--data")
    assert "link that leads nowhere; set data.root" in error_of(tmp_path / "link")
    assert "there is no folder" in error_of(tmp_path / "x.jpg" / "below")
    for name in ("x.jpg", "LIST", "pipe.txt"):
        text = error_of(tmp_path / name)
        assert f"{tmp_path}/{name} is no folder, no list of images (.txt, .csv, .tsv, .jsonl)" in text
    (tmp_path / "folder.mindrecord").mkdir()
    assert "no image in" in error_of(tmp_path / "folder.mindrecord")
    assert "set.mindrecord" in error_of(tmp_path / "set.mindrecord")
    assert "(File name too long)" in error_of(tmp_path / ("n" * 300 + ".mindrecord"))
    assert "cannot be used (File name too long); name another" in error_of(tmp_path / ("n" * 300))
    assert "cannot be used (embedded null byte)" in error_of(tmp_path / "nul\0")


# --- labels_per_class -------------------------------------------------------------------------------------------


def fake_source(counts: dict[str, int]) -> Files:
    names = [f"{name}/{number:03d}.png" for name, count in counts.items() for number in range(count)]
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), list(counts.values()))
    return Files(Path("some/folder"), Path("some/folder"), Names.of(names), labels, list(counts))


def test_a_labelled_subset_is_spread_evenly_over_each_class() -> None:
    share = labelled_subset(fake_source({"a": 9, "b": 5}), 3)
    assert names_of(share) == ["a/000.png", "a/004.png", "a/008.png", "b/000.png", "b/002.png", "b/004.png"]
    assert share.labels.tolist() == [0, 0, 0, 1, 1, 1] and share.classes == ["a", "b"]


def test_a_labelled_subset_of_zero_is_everything() -> None:
    source = fake_source({"a": 3, "b": 2})
    assert labelled_subset(source, 0) is source
    assert names_of(labelled_subset(source, 2))[-2:] == names_of(source)[-2:]


def test_a_labelled_subset_of_mixed_labels() -> None:
    source = fake_source({"a": 3, "b": 3}).subset([3, 0, 4, 1, 5, 2])
    assert names_of(labelled_subset(source, 2)) == ["a/000.png", "a/002.png", "b/000.png", "b/002.png"]


def test_a_labelled_subset_that_cannot_be_had() -> None:
    words = r"^data\.labels_per_class: 6, .*class b of some/folder .* 5 images; write 5 or less$"
    with pytest.raises(DataError, match=words):
        labelled_subset(fake_source({"a": 9, "b": 5, "c": 7}), 6)
    with pytest.raises(DataError, match=r"^data\.labels_per_class: 6, but some/folder has no labels; write 0$"):
        labelled_subset(without_labels(fake_source({"a": 9})), 6)


# --- the stored list of a folder --------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose list is stored: it is large enough, and has not changed for an hour."""
    monkeypatch.setattr(index, "LEAST", 3)
    root = touch(tmp_path / "images", "a/1.png", "a/deep/2.png", "b/ü.png", "b/n.txt", "x.txt")
    settle(root)
    return root


def settle(root: Path) -> None:
    hour = time.time() - 3600
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, (hour, hour))


def same(first: Source, second: Source) -> bool:
    return (labelled(first), first.skipped) == (labelled(second), second.skipped)


def listings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the folders that are listed from now on."""
    counts: Counter[str] = Counter()
    scandir = os.scandir

    def counted(path: Any = ".") -> Any:
        counts["listed"] += isinstance(path, bytes)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    return counts


def test_a_stored_list_saves_the_listing(stored: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = listings(monkeypatch)
    first = image_folder(stored)
    assert counts["listed"] == 4 and first.skipped == {".txt": 2}
    assert same(image_folder(stored), first) and counts["listed"] == 4
    monkeypatch.chdir(stored.parent)
    assert labelled(image_folder(Path("images"))) == labelled(first) and counts["listed"] == 4
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".npz"]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: touch(root, "a/3.png"),
        lambda root: touch(root, "a/deep/3.png"),
        lambda root: touch(root, "new/3.png"),
        lambda root: (root / "b" / "ü.png").unlink(),
        lambda root: (root / "b" / "ü.png").rename(root / "b" / "u.png"),
        lambda root: shutil.rmtree(root / "b"),
        lambda root: (root / "a").rename(root / "c"),
        lambda root: (root.rename(root.with_name("old")), touch(root, "q/1.png")),
    ],
    ids=["file", "deep", "folder", "gone", "name", "folder gone", "folder name", "replaced"],
)
def test_a_list_that_is_no_longer_true_is_made_again(stored: Path, change: Any) -> None:
    before = labelled(image_folder(stored))
    change(stored)
    after = image_folder(stored)
    assert labelled(after) != before
    assert names_of(after) == [name for name in names_of(image_folder(stored)) if (stored / name).is_file()]
    assert len(after) == sum(path.suffix == ".png" for path in stored.rglob("*"))


def test_a_folder_that_changed_just_before_its_listing_is_listed_again(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(stored / "b")
    counts = listings(monkeypatch)
    image_folder(stored)
    image_folder(stored)
    assert counts["listed"] == 8


def test_a_list_with_a_link_that_leads_nowhere_is_not_stored(stored: Path, cache: Path) -> None:
    (stored / "b" / "late.png").symlink_to(stored.parent / "late.png")
    settle(stored)
    assert len(image_folder(stored)) == 3
    touch(stored.parent, "late.png")
    assert len(image_folder(stored)) == 4


def test_small_folders_have_no_list(stored: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "LEAST", 4)
    image_folder(stored)
    assert not list(cache.rglob("*.npz"))


def test_a_damaged_or_foreign_list_is_replaced(stored: Path, cache: Path) -> None:
    first = image_folder(stored)
    (path,) = cache.rglob("*.npz")
    content = path.read_bytes()
    other = touch(stored.parent / "other", "z/1.png", "z/2.png", "z/3.png")
    settle(other)
    image_folder(other)
    (foreign,) = (file.read_bytes() for file in cache.rglob("*.npz") if file != path)
    flipped = bytearray(content)
    flipped[content.index(b"a/1.png")] ^= 1
    for damaged in (b"", b"hello", content[: len(content) // 2], bytes(flipped), foreign, pickle.dumps([1])):
        path.write_bytes(damaged)
        assert same(image_folder(stored), first)
        assert same(image_folder(stored), first) and len(path.read_bytes()) == len(content)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ends", np.array([3, 2, 19])),
        ("ends", np.array([3, 9], np.int64)),
        ("ends", np.array([3, 9, 900], np.int64)),
        ("top", np.array([0, 0, 9], np.int32)),
        ("top", np.array([0, 0], np.int32)),
        ("stamps", np.zeros((1, 3), np.int64)),
        ("about", np.frombuffer(b"{}", np.uint8)),
        ("about", np.frombuffer(b"[", np.uint8)),
    ],
)
def test_an_inconsistent_list_is_replaced(stored: Path, cache: Path, name: str, values: np.ndarray) -> None:
    first = image_folder(stored)
    (path,) = cache.rglob("*.npz")
    with np.load(path) as file:
        parts = {key: file[key] for key in file.files}
    with path.open("wb") as opened:
        np.savez(opened, **{**parts, name: values})
    assert same(image_folder(stored), first)


def test_without_a_cache_folder_all_works(stored: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "mim_mindspore").write_text("a file")
    assert len(image_folder(stored)) == 3
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    assert len(image_folder(stored)) == 3


def test_a_long_listing_says_so_on_the_first_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path, "a/1.png", "b/1.png")
    image_folder(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(listing, "SECONDS", 0.0)
    image_folder(tmp_path)
    assert f"listing {tmp_path}: 2 images so far\n" in capsys.readouterr().err
    monkeypatch.setenv("RANK_ID", "1")
    image_folder(tmp_path)
    assert capsys.readouterr().err == ""


# --- list files -------------------------------------------------------------------------------------------------


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)
    return path


FILES = ("cr\r\nlf.png", "my cat.jpg", "ü/日本.png", "x.JPEG", "noext", "line\nend.png", 'q"uote.gif')


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return touch(tmp_path, *FILES)


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.jpg", "a.jpg", ""),
        ("a.jpg 3", "a.jpg", "3"),
        ("my cat.JPG  golden retriever ", "my cat.JPG", "golden retriever"),
        ("my.jpg folder/a b.webp", "my.jpg folder/a b.webp", ""),
        ("my.jpg folder/a b.webp 7", "my.jpg folder/a b.webp", "7"),
        ("noext cat", "noext", "cat"),
        ("noext", "noext", ""),
        ('"a b" cat', "a b", "cat"),
        ('"a b"', "a b", ""),
        ('"a ""b"".jpg" cat', 'a "b".jpg', "cat"),
        ("a b\tc d", "a b", "c d"),
        ('"a b"\tc', "a b", "c"),
        (" a.jpg", " a.jpg", ""),
        ("#1.jpg 2", "#1.jpg", "2"),
        ("/abs/a.jpg 2", "/abs/a.jpg", "2"),
        ("a.jpg\t", "a.jpg", ""),
    ],
)
def test_a_line_of_a_text_list(line: str, path: str, label: str) -> None:
    assert split_line(line) == (path, label)


def test_a_text_list(images: Path) -> None:
    text = "my cat.jpg dog\n\nü/日本.png ünï\r\nx.JPEG golden retriever\n   \nnoext\tdog"
    for content in (text, "\ufeff" + text, text.encode("utf-16"), text.replace("\r\n", "\r").replace("\n", "\r")):
        source = open_source(write(images / "train.txt", content), "data", "complete")
        assert source.classes == ["dog", "golden retriever", "ünï"]
        expected = [("my cat.jpg", "dog"), ("ü/日本.png", "ünï"), ("x.JPEG", "golden retriever"), ("noext", "dog")]
        assert labelled(source) == expected
    assert source.summary() == f"{images}/train.txt: 4 images, 3 classes"
    assert source.name(0) == str(images / "my cat.jpg") and source.read(0) == b""


def test_a_csv_list(images: Path) -> None:
    rows = [(name, f"class {len(name) % 2}") for name in FILES]
    for header in ([], [("path", "label")], [("Image", "class")]):
        with (images / "train.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([*header, *rows])
        assert labelled(open_source(images / "train.csv")) == rows
    write(images / "more.csv", 'width,label,path\n3,a,"x.JPEG"\n\n4,b,noext\n')
    assert labelled(open_source(images / "more.csv")) == [("x.JPEG", "a"), ("noext", "b")]
    write(images / "t.tsv", "x.JPEG\ta, b\nmy cat.jpg\tc")
    assert labelled(open_source(images / "t.tsv")) == [("x.JPEG", "a, b"), ("my cat.jpg", "c")]
    assert open_source(write(images / "p.csv", "x.JPEG\nnoext\n")).classes == []


def test_a_json_list(images: Path) -> None:
    rows = [(name, f"class {len(name) % 2}") for name in FILES]
    for keys in (("path", "label"), ("image", "class")):
        text = "\n\n".join(json.dumps({"id": 3, **dict(zip(keys, row, strict=True))}) for row in rows)
        assert labelled(open_source(write(images / "t.jsonl", text))) == rows
    source = open_source(write(images / "p.jsonl", '{"path": "x.JPEG"}\n{"path": "noext", "label": null}'))
    assert names_of(source) == ["x.JPEG", "noext"] and source.classes == []


def test_absolute_paths_and_names_that_are_no_utf8(images: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe.png")
    touch(images, odd)
    (images / "lists").mkdir()
    source = open_source(write(images / "lists" / "t.txt", f"{images}/x.JPEG\n../{odd}\n"))
    assert [Path(source.name(i)).is_file() for i in range(2)] == [True, True]


def test_numbers_count_the_classes_from_0(images: Path) -> None:
    source = open_source(write(images / "t.txt", "x.JPEG 2\nnoext 0\nmy cat.jpg 2"))
    assert source.labels.tolist() == [2, 0, 2] and source.classes == ["0", "1", "2"]
    assert source.summary().endswith("3 images, 2 of 3 classes")
    assert with_classes(source, ["ant", "bee", "cat", "dog"], "the checkpoint").classes[2] == "cat"
    assert with_classes(source, ["ant", "bee", "cat", "dog"], "the checkpoint").labels.tolist() == [2, 0, 2]
    by_name = with_classes(source, ["0", "1", "10", "2"], "the checkpoint")
    assert by_name.labels.tolist() == [3, 0, 3]
    with pytest.raises(DataError, match=r"^data\.val: .*t\.txt has images of 1 class that the checkpoint .* \(2\)"):
        with_classes(source, ["ant", "bee"], "the checkpoint", "data.val")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "path,class\nx.JPEG,10\nnoext,2\n"),
        ("t.jsonl", '{"path": "x.JPEG", "label": "10"}\n{"path": "noext", "label": "2"}'),
        ("t.txt", "x.JPEG 10\nnoext 02"),
    ],
)
def test_numbers_that_are_names(images: Path, name: str, text: str) -> None:
    source = open_source(write(images / name, text))
    assert len(source.classes) == 2 and labelled(source)[0][1] == "10"
    with pytest.raises(DataError, match="that the checkpoint does not have"):
        with_classes(source, [f"class {i}" for i in range(20)], "the checkpoint")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.txt", "x.JPEG a\n\nnoext\n", ":3: no label, but line 1 has one; write a label on each line, or on none"),
        ("t.txt", "x.JPEG\nmy cat.jpg\nx.JPEG a\n", ":1: no label, but line 3 has one"),
        ("t.txt", "x.JPEG a\nx.JPEG b\nx.JPEG\n", ":3: no label, but line 1 has one"),
        ("t.csv", "path,label\nx.JPEG,a\nnoext\n", ":3: no label, but line 2 has one"),
        ("t.txt", "", "names no image; write a path on each line"),
        ("t.csv", "path,label\n", "names no image"),
        ("t.txt", "gone.jpg 1\nlost.jpg 2", ":1: there is no file {root}/gone.jpg, and none of 2 files tried exists"),
        ("t.txt", "\ngone.jpg 1", ":2: there is no file {root}/gone.jpg, and none of 1 file tried exists; write paths"),
        ("t.txt", "n" * 300 + " 1", "; write paths relative to the folder of the list"),
        ("t.txt", "x.JPEG 1\nx.JPEG -1", ":2: -1 is no class number; write 0"),
        ("t.txt", "x.JPEG 1\nx.JPEG 99999999999999999999", ":2: 99999999999999999999 is no class number"),
        ("t.txt", "x.JPEG 1\n\0\0\0", ":2: the path has a NUL"),
        ("t.txt", "x" * 100_000, ":1: the line has 65,536 characters or more; this is no list"),
        ("t.txt", b"\xff\xfea", "is not a text file in UTF-8; save it as UTF-8"),
        ("t.csv", 'x.JPEG,a\n"noext,b\n', ":2: no CSV ("),
        ("t.csv", 'x.JPEG,a\n"noext"x,b\n', ":2: no CSV ("),
        ("t.csv", "x.JPEG,a\n,b\n", ":2: the path is empty"),
        ("t.csv", "x.JPEG,a,1\n", ":1: 3 columns; name them in a first line, path,label"),
        ("t.csv", "label,path\na\n", ":2: 1 column, too few for a path; write PATH,LABEL"),
        ("t.csv", '"' + "x\n" * 100_000, "no CSV ("),
        ("t.jsonl", "{", ':1: no JSON; write {{"path": "a.jpg", "label": "cat"}}'),
        ("t.jsonl", "[" * 60_000, ":1: no JSON"),
        ("t.jsonl", "[1]", ":1: no object"),
        ("t.jsonl", '{"path": 3}', ':1: no text under "path"'),
        ("t.jsonl", '{"name": "a.jpg"}', ':1: no text under "path"'),
        ("t.jsonl", '{"path": "x.JPEG", "label": 1.5}', ":1: the label is neither"),
        ("t.jsonl", '{"path": "x.JPEG", "label": true}', ":1: the label is neither"),
        ("t.jsonl", '{"path": "x\\ud800.png"}', ":1: the path 'x\\ud800.png' is no text"),
        ("t.jsonl", '{"path": "x\\u0000.png"}', ":1: the path has a NUL"),
    ],
)
def test_a_list_that_is_wrong_is_one_line(images: Path, name: str, text: str | bytes, words: str) -> None:
    found = error_of(write(images / name, text))
    assert words.format(root=images) in found and f"{images}/{name}" in found and "\n" not in found


def test_a_list_without_labels_where_they_are_needed(images: Path) -> None:
    path = write(images / "t.txt", "x.JPEG\nnoext")
    assert f"{path} has no labels, and accuracy and classifiers need them; write one" in error_of(path, "needed")


def test_a_list_that_cannot_be_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(images / "t.txt", "x.JPEG\n")

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert f"{path} cannot be read (Permission denied)" in error_of(path)


# --- ImageNet ---------------------------------------------------------------------------------------------------

WNIDS = {1: "n03", 2: "n01", 3: "n02"}  # ILSVRC2012_ID -> class


def meta_mat(path: Path) -> None:
    """As in the development kit: the classes, then a synset above them."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [*((number, wnid, 0) for number, wnid in WNIDS.items()), (4, "n00", 3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"synsets": np.array(rows, kinds).reshape(-1, 1)})


def val_images(folder: Path, count: int = 4) -> Path:
    return touch(folder, *(f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, count + 1)))


@pytest.mark.parametrize("layout", ["devkit", "next to val", "inside val"])
def test_the_ground_truth_of_imagenet(tmp_path: Path, layout: str) -> None:
    kits = {"devkit": "ILSVRC2012_devkit_t12/data", "next to val": ".", "inside val": "val"}
    kit = tmp_path / kits[layout]
    val_images(tmp_path / "val")
    meta_mat(kit / "meta.mat")
    write(kit / TRUTH, "2\n3\n1\n2\n")
    for path in (tmp_path / "val", kit / TRUTH):
        source = open_source(path, "data.val", "needed")
        assert source.classes == ["n01", "n02", "n03"] and source.labels.tolist() == [0, 1, 2, 0]
        assert Path(source.name(3)).resolve() == tmp_path / "val/ILSVRC2012_val_00000004.JPEG"
    assert open_source(tmp_path / "val").classes == []  # where labels are not needed


def test_a_ground_truth_that_is_wrong(tmp_path: Path) -> None:
    val_images(tmp_path)
    path = write(tmp_path / TRUTH, "2\n3\n")
    assert f"there is no file {tmp_path}/meta.mat" in error_of(path) and "development kit" in error_of(path)
    write(tmp_path / "meta.mat", "no mat")
    assert f"{tmp_path}/meta.mat cannot be read (" in error_of(path) and "development kit" in error_of(path)
    meta_mat(tmp_path / "meta.mat")
    for text, words in (
        ("2\n4\n", ":2: '4' is no number of a class"),
        ("", "is empty"),
        ("ü", "cannot be read"),
        ("\n", ":1: ''"),
    ):
        assert words in error_of(write(path, text))
    shutil.rmtree(tmp_path)
    meta_mat(tmp_path / "meta.mat")
    assert "there is no file" in error_of(write(path, "2\n"))


def test_other_labels_of_imagenet(tmp_path: Path) -> None:
    val_images(tmp_path / "ILSVRC/Data/CLS-LOC/val", 2)
    kaggle = "ImageId,PredictionString\nILSVRC2012_val_00000002,n02 1 2 3 4 n02 5 6 7 8 \n"
    kaggle += "ILSVRC2012_val_00000001,n01 1 2 3 4 \n"
    source = open_source(write(tmp_path / "LOC_val_solution.csv", kaggle), "data.val", "needed")
    assert labelled(source) == [("ILSVRC2012_val_00000002.JPEG", "n02"), ("ILSVRC2012_val_00000001.JPEG", "n01")]
    val_images(tmp_path / "val", 2)
    caffe = "ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\n"
    source = open_source(write(tmp_path / "val.txt", caffe), "data.val", "needed")
    wnids = [f"n{number:08d}" for number in range(1000)]
    assert labelled(with_classes(source, wnids, "data.train"))[1] == ("ILSVRC2012_val_00000002.JPEG", "n00000970")
    assert Path(source.name(0)).parent == tmp_path / "val"
    text = error_of(write(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\na,b,c\n"))
    assert ":2: not two columns as in LOC_val_solution.csv" in text


# --- classes by name --------------------------------------------------------------------------------------------


def test_a_part_of_the_classes_is_mapped_by_name(tmp_path: Path) -> None:
    source = open_source(touch(tmp_path, "cat/1.png", "ant/1.png"))
    mapped = with_classes(source, ["ant", "bee", "cat"], "the checkpoint")
    assert mapped.labels.tolist() == [0, 2] and mapped.classes == ["ant", "bee", "cat"]
    assert mapped.summary() == f"{tmp_path}: 2 images, 2 of 3 classes"
    other_order = with_classes(source, ["cat", "bee", "ant"], "the checkpoint")
    assert other_order.labels.tolist() == [2, 0]


def test_accents_of_class_names_may_be_written_apart(tmp_path: Path) -> None:
    """macOS writes them as two characters."""
    one, two = "caf\u00e9", "cafe\u0301"
    source = open_source(touch(tmp_path, f"{two}/1.png", "tea/1.png"))
    for name in (one, two):
        mapped = with_classes(source, ["ant", name, "tea"], "the checkpoint")
        assert labelled(mapped) == [(f"{two}/1.png", name), ("tea/1.png", "tea")]
    both = with_classes(source, [one, two, "tea"], "the checkpoint")
    assert labelled(both)[0] == (f"{two}/1.png", two)


def test_an_unknown_class_is_refused_by_name(tmp_path: Path) -> None:
    source = open_source(touch(tmp_path, "cat/1.png", "yak/1.png", "zebra/1.png"))
    with pytest.raises(DataError) as caught:
        with_classes(source, ["ant", "cat"], "the checkpoint", "--data")
    assert str(caught.value).startswith(f"--data: {tmp_path} has images of 2 classes that the checkpoint does not have")
    assert "(yak, zebra); leave these out" in str(caught.value)
    assert with_classes(source.subset([0]), ["ant", "cat"], "the checkpoint").labels.tolist() == [1]


def checkpoint_of(count: int, names: list[str]) -> Any:
    return SimpleNamespace(weights={"head.weight": np.zeros((count, 2))}, meta={"classes": names})


def test_images_for_a_checkpoint(tmp_path: Path) -> None:
    from src.tasks.evaluate import with_trained_classes

    folder = open_source(touch(tmp_path, "cat/1.png", "ant/1.png"))
    source = with_trained_classes(folder, checkpoint_of(3, ["ant", "bee", "cat"]), "--data")
    assert source.labels.tolist() == [0, 2] and len(source.classes) == 3
    assert with_trained_classes(folder, checkpoint_of(2, []), "--data") is folder  # a converted checkpoint has no names
    with pytest.raises(
        DataError, match=r"^--data: .* has 2 classes, and the checkpoint 3 without names; name images of"
    ):
        with_trained_classes(folder, checkpoint_of(3, []), "--data")
    numbers = open_source(write(tmp_path / "t.txt", "cat/1.png 2\nant/1.png 0"))
    source = with_trained_classes(numbers, checkpoint_of(4, []), "--data")
    assert source.labels.tolist() == [2, 0] and len(source.classes) == 4
    with pytest.raises(DataError, match=r"^--data: .* has 3 classes, and the checkpoint 2 without names"):
        with_trained_classes(numbers, checkpoint_of(2, []), "--data")


RECIPE = """
encoder: {{name: vit, image_size: 32, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}}
method: {method}
data: {{root: "{root}"}}
device: CPU
"""
CLASSIFY = "{name: classify, num_classes: 3}"
PRETRAIN = "{name: simmim, mask_block: 8}"


def sources_of(root: Path, method: str, *overrides: str) -> tuple[Source, Source | None]:
    from src.tasks.images import load_sources

    path = write(root.parent / "recipe.yaml", RECIPE.format(method=method, root=root))
    return load_sources(load_recipe(path, list(overrides)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Training images of three classes, validation images of two of them."""
    root = tmp_path / "set"
    touch(root / "train", *(f"{name}/{number}.png" for name in ("ant", "bee", "cat") for number in range(3)))
    return touch(root, "val/cat/1.png", "val/ant/1.png")


def refused(root: Path, method: str, *overrides: str) -> str:
    with pytest.raises(DataError) as caught:
        sources_of(root, method, *overrides)
    return str(caught.value)


def test_validation_may_lack_a_class(root: Path) -> None:
    training, validation = sources_of(root, CLASSIFY)
    assert validation is not None and validation.classes == training.classes == ["ant", "bee", "cat"]
    assert validation.labels.tolist() == [0, 2] and validation.summary().endswith("2 images, 2 of 3 classes")
    touch(root, "val/zebra/1.png")
    text = refused(root, CLASSIFY)
    assert text.startswith(f"data.val: {root}/val has images of 1 class that {root}/train does not have (zebra)")
    assert sources_of(root, PRETRAIN)[1] is not None  # its labels are not used
    assert "(zebra)" in refused(root, PRETRAIN, "train.knn=5")
    assert sources_of(root, CLASSIFY, "data.val=")[1] is None


def test_the_number_of_classes_is_checked(root: Path) -> None:
    assert refused(root, CLASSIFY, "method.num_classes=5") == (
        f"method.num_classes: 5, but {root}/train has 3 classes; write 3"
    )
    (root / "train" / "dog").mkdir()
    text = refused(root, CLASSIFY)
    assert text.startswith(f"data.train: no image in class folder {root}/train/dog (it is empty)")
    assert "not classes" in refused(root, CLASSIFY, "data.train=.")


def test_pretraining_takes_any_folder(root: Path) -> None:
    touch(root / "nested", "1.png", "a/2.png", "a/b/3.png")
    training, validation = sources_of(root, PRETRAIN, "data.train=nested", "train.knn=5")
    assert len(training) == 3 and training.classes == []
    assert validation is not None and validation.classes == []  # nothing to compare its labels with
    assert len(sources_of(root, PRETRAIN, "data.train=.", "data.val=")[0]) == 14
    text = refused(root, PRETRAIN, "data.train=nested", "data.labels_per_class=1")
    assert text.startswith("data.labels_per_class: 1, but") and text.endswith("has no labels; write 0")


def test_training_from_lists(root: Path) -> None:
    write(root / "train.csv", "path,label\n" + "".join(f"train/{n}/1.png,{n}\n" for n in ("ant", "bee", "cat")))
    write(root / "val.txt", "val/ant/1.png 0\nval/cat/1.png 2\n")
    training, validation = sources_of(root, CLASSIFY, "data.train=train.csv", "data.val=val.txt")
    assert validation is not None and labelled(validation) == [("val/ant/1.png", "ant"), ("val/cat/1.png", "cat")]
    training, validation = sources_of(root, CLASSIFY, "data.train=val.txt", "data.val=val.txt", "method.num_classes=7")
    assert training.classes == list("0123456") and training.labels.tolist() == [0, 2]
    text = refused(root, CLASSIFY, "data.train=val.txt", "method.num_classes=2")
    assert text.startswith("method.num_classes: 2, but") and text.endswith("has 3 classes; write 3")
    assert len(sources_of(root, CLASSIFY, "data.train=val.txt", "data.val=")[0].classes) == 3
    write(root / "one.txt", "val/ant/1.png 1\nval/cat/1.png 3\n")
    assert len(sources_of(root, CLASSIFY, "data.train=one.txt", "data.val=", "method.num_classes=4")[0].classes) == 4
    text = refused(root, CLASSIFY, "data.train=one.txt")
    assert "has class numbers 1 to 3, and they count from 0; subtract 1 from each" in text


def test_paths_are_checked_before_slow_imports(root: Path, run_entry: Run) -> None:
    path = write(root.parent / "recipe.yaml", RECIPE.format(method=CLASSIFY, root=root))
    code = "import sys; from src.config.files import load_recipe; from src.config.paths import check_training_paths\n"
    code += "check_training_paths(load_recipe(sys.argv[1], sys.argv[2:]), '')"
    write(root / "train.txt", "train/ant/1.png\n")
    for name in ("train.txt", "set.mindrecord"):
        assert run_entry("-c", code, path, f"data.train={name}").returncode == 0
    for name, words in (("gone", "there is no folder"), ("gone.csv", "there is no file")):
        done = run_entry("-c", code, path, f"data.train={name}")
        assert f"data.train: {words} {root}/{name}; set data.root" in done.stderr


# --- the task modules -------------------------------------------------------------------------------------------


def test_files_of_a_prediction(tmp_path: Path) -> None:
    from src.tasks.predict import image_files

    touch(tmp_path, "a/2.png", "a/b/1.webp", "a/.c/3.png", "noext")
    os.mkfifo(tmp_path / "pipe")
    files = image_files([str(tmp_path / "noext"), str(tmp_path / "a")])
    assert files == [tmp_path / "noext", tmp_path / "a/2.png", tmp_path / "a/b/1.webp"]
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("gone", "gone: no such file or folder"),
        ("pipe", "pipe: is a pipe, a socket or a device; name a file"),
        ("empty", "command line: no image in "),
        ("n" * 300, "no such file or folder"),
        ("nul\0", "no such file or folder"),
    ):
        with pytest.raises(DataError, match=words):
            image_files([str(tmp_path / name)])
    assert images_below(tmp_path / "a").classes == []


def test_a_plan_counts_a_list(root: Path) -> None:
    from src.tasks.plan import count_images

    write(root / "train.txt", "train/ant/1.png\ntrain/bee/1.png\n")
    path = write(root.parent / "recipe.yaml", RECIPE.format(method=PRETRAIN, root=root))
    assert count_images(load_recipe(path, ["data.train=train.txt"])) == (2, str(root / "train.txt"))
    for name in ("gone", "n" * 300):
        assert count_images(load_recipe(path, [f"data.train={name}"]))[0] is None


# --- scripts/split_dataset.py -----------------------------------------------------------------------------------


def split(run_entry: Run, *arguments: str | Path) -> Any:
    return run_entry("scripts/split_dataset.py", *arguments)


def sets_of(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    train, val = (open_source(folder / f"{name}.csv", "data", "complete") for name in ("train", "val"))
    return labelled(train), labelled(val)


@pytest.fixture
def resisc(tmp_path: Path) -> Path:
    """Class folders without a split; names with a space, a comma and a line end."""
    folder = tmp_path / "NWPU"
    return touch(folder, *(f"{c}/{c} {i:03d},\n.jpg" for c in ("7", "airport", "beach") for i in range(10)))


@pytest.mark.compiles
def test_a_split_is_whole_disjoint_and_repeats(resisc: Path, tmp_path: Path, run_entry: Run) -> None:
    done = split(run_entry, resisc, "--val", "0.3", "--out", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/new/train.csv: 21 images" in done.stdout and "val.csv: 9 images" in done.stdout
    train, val = sets_of(tmp_path / "new")
    whole = [(str(resisc / name), label) for name, label in labelled(image_folder(resisc))]
    assert sorted(train + val) == sorted(whole)
    assert Counter(label for _, label in val) == {"7": 3, "airport": 3, "beach": 3}
    assert split(run_entry, resisc, "--val", "0.3").returncode == 0  # the lists in FOLDER have other paths
    assert [(str(resisc / name), label) for name, label in sets_of(resisc)[1]] == val
    assert split(run_entry, resisc, "--val", "0.3", "--seed", "1", "--out", tmp_path).returncode == 0
    assert [(str(tmp_path / name), label) for name, label in sets_of(tmp_path)[1]] != val
    assert sets_of(tmp_path)[0][0][0].startswith("NWPU/")


@pytest.mark.compiles
def test_a_split_with_a_number_of_images(resisc: Path, run_entry: Run) -> None:
    assert split(run_entry, resisc, "--per-class", "4").returncode == 0
    train, val = sets_of(resisc)
    assert Counter(label for _, label in train) == {"7": 4, "airport": 4, "beach": 4} and len(val) == 18
    before = (resisc / "train.csv").read_bytes()
    assert_one_line_error(split(run_entry, resisc), f"--out: {resisc}/train.csv exists; remove it, or write --out DIR")
    assert (resisc / "train.csv").read_bytes() == before


@pytest.mark.compiles
def test_a_split_that_cannot_be_made(resisc: Path, tmp_path: Path, run_entry: Run) -> None:
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["gone"], ["FOLDER: there is no folder gone"]),
        ([resisc, "--val", "2"], ["--val: '2' is not a number between 0 and 1", "write for example 0.2"]),
        ([resisc, "--val", "nan"], ["--val: 'nan'"]),
        ([resisc, "--per-class", "0"], ["--per-class: '0' is not a whole number above 0"]),
        ([resisc, "--val", "0.1", "--per-class", "2"], ["--val and --per-class exclude each other"]),
        ([resisc, "--per-class", "10"], ["class 7 of", "has 10 images", "more than 10", "smaller --per-class"]),
        ([resisc / "7"], ["has no class folders; move the images of each class into a folder"]),
        ([resisc, "--out", tmp_path / "file"], [f"--out: {tmp_path}/file cannot be written", "write --out DIR"]),
    ):
        assert_one_line_error(split(run_entry, *arguments), *words)
    touch(resisc, "one/1.png")
    assert_one_line_error(split(run_entry, resisc), "class one of", "needs 2 or more; add images, or remove the folder")
    assert not list(resisc.glob("*.csv")) and sorted(path.name for path in tmp_path.iterdir()) == ["NWPU", "file"]


def test_worker_processes_need_no_mindspore(run_entry: Run) -> None:
    code = "import sys, src.data.opening; print(sorted({'mindspore', 'scipy', 'cv2', 'PIL'} & set(sys.modules)))"
    assert run_entry("-c", code).stdout.strip() == "[]" and ROOT.is_dir()
