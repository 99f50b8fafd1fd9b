"""MindRecord files are read as MindSpore reads them, and whatever is wrong with one is a line."""

from __future__ import annotations

import json
import pickle
import shutil
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.config.paths import check_images
from src.data.opening import open_source
from src.data.records import MindRecords, is_mindrecord, open_mindrecord, unpacked
from src.data.sources import DataError, with_classes
from tests.helpers import ROOT

SCHEMA = {"file_name": {"type": "string"}, "label": {"type": "int32"}, "data": {"type": "bytes"}}
Row = dict[str, Any]
PAGE = 2**15  # bytes, the least; the default is 32 MiB


def write(
    path: Path, schema: dict[str, Any], rows: Sequence[Row], shards: int = 1, index: Sequence[str] = (), note: str = ""
) -> Path:
    """Write a set as other people do, with MindSpore."""
    from mindspore.mindrecord import FileWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = FileWriter(str(path), shards)
    writer.set_header_size(2**14)
    writer.set_page_size(PAGE)
    writer.add_schema(schema, note)
    if index:
        writer.add_index(list(index))
    for start in range(0, len(rows), 7):  # several calls with several rows each
        writer.write_raw_data([dict(row) for row in rows[start : start + 7]])
    writer.commit()
    return path


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(50 + 13 * number)


def plain_rows(count: int) -> list[Row]:
    return [{"file_name": f"n0{i % 4}/ö '{i}\".JPEG", "label": i % 4, "data": content(i)} for i in range(count)]


def held(source: MindRecords) -> list[tuple[str, str, bytes]]:
    """Name, class and content of all images."""
    assert source.keys is not None
    return [
        (source.keys[i], source.classes[source.labels[i]] if source.classes else "", source.read(i))
        for i in range(len(source))
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three files with 40 images of four classes."""
    return write(tmp_path_factory.mktemp("set") / "train.mindrecord", SCHEMA, plain_rows(40), shards=3)


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    """A copy of the set, to be damaged."""
    for file in shards.parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / shards.name


def test_the_set_is_what_file_reader_reads(shards: Path) -> None:
    from mindspore.mindrecord import FileReader

    reader = FileReader(f"{shards}0")
    theirs = [(row["file_name"], str(row["label"]), bytes(row["data"])) for row in reader.get_next()]
    reader.close()
    ours = open_mindrecord(shards)
    assert len(ours.shards) == 3 and len(ours) == 40 and ours.classes == ["0", "1", "2", "3"]
    assert sorted(held(ours)) == sorted(theirs)


def test_the_set_is_what_mind_dataset_reads_in_its_order(shards: Path) -> None:
    import mindspore.dataset as ds

    files = [f"{shards}{number}" for number in range(3)]
    loaded = ds.MindDataset(files, num_parallel_workers=1, shuffle=False).create_dict_iterator(1, output_numpy=True)
    theirs = [(str(row["file_name"]), str(row["label"]), bytes(row["data"])) for row in loaded]
    assert held(open_mindrecord(shards)) == theirs


@pytest.mark.parametrize("name", ["train.mindrecord", "train.mindrecord0", "train.mindrecord2"])
def test_a_set_is_named_by_any_of_its_files_or_without_the_number(shards: Path, name: str) -> None:
    path = shards.with_name(name)
    check_images(path, "data.train")
    assert len(open_source(path)) == 40
    assert held(open_mindrecord(path)) == held(open_mindrecord(shards))
    assert f"{path}: 40 images in 3 MindRecord files, 4 classes" == open_mindrecord(path).summary()


def test_several_pages_and_rows_of_every_size(tmp_path: Path) -> None:
    """More than a page, so that later pages are read too."""
    rows = [{"label": i, "data": bytes([i]) * (3_000 if i % 3 else i + 1)} for i in range(30)]
    path = write(tmp_path / "big.mindrecord", {"label": {"type": "int64"}, "data": {"type": "bytes"}}, rows)
    ours = open_mindrecord(path)
    assert {int(ours.labels[i]): ours.read(i) for i in range(30)} == {row["label"]: row["data"] for row in rows}
    assert len({start // PAGE for start in ours.starts.tolist()}) > 1


#: schema, row, fields of the index
FOREIGN: dict[str, tuple[dict[str, Any], Row, Sequence[str]]] = {
    "imagenet": (
        {"image": {"type": "bytes"}, "label": {"type": "int64"}, "file_name": {"type": "string"}},
        {"image": b"x", "label": 1, "file_name": "a"},
        ("label",),
    ),
    "cifar": (
        {"id": {"type": "int64"}, "label": {"type": "int64"}, "data": {"type": "bytes"}},
        {"id": 5, "label": 1, "data": b"x"},
        ("id", "label"),
    ),
    "label not in the index": (SCHEMA, {"file_name": "a", "label": 1, "data": b"x"}, ("file_name",)),
    "several blobs": (
        {
            "boxes": {"type": "float32", "shape": [-1]},
            "img": {"type": "bytes"},
            "ids": {"type": "int32", "shape": [-1]},
            "label": {"type": "int32"},
        },
        {"boxes": np.ones(3, np.float32), "img": b"x", "ids": np.arange(4, dtype=np.int32), "label": 1},
        (),
    ),
    "another name of the only bytes": (
        {"jpg_file": {"type": "bytes"}, "label": {"type": "int32"}},
        {"jpg_file": b"x", "label": 1},
        (),
    ),
    "image and mask": (
        {"mask": {"type": "bytes"}, "Image": {"type": "bytes"}, "Label": {"type": "int32"}},
        {"mask": b"m", "Image": b"x", "Label": 1},
        (),
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_schemas_of_others(tmp_path: Path, kind: str) -> None:
    schema, row, index = FOREIGN[kind]
    source = open_mindrecord(write(tmp_path / "theirs.mr", schema, [row, row], index=index))
    assert len(open_source(tmp_path / "theirs.mr")) == 2
    assert [source.read(i) for i in range(2)] == [b"x", b"x"]
    assert source.classes == ["0", "1"] and source.labels.tolist() == [1, 1]


def test_labels_that_are_texts_are_class_names(tmp_path: Path) -> None:
    schema = {"label": {"type": "string"}, "data": {"type": "bytes"}}
    rows = [{"label": name, "data": b"x"} for name in ("zebra", "ant", "Öl", "ant")]
    source = open_mindrecord(write(tmp_path / "text.mindrecord", schema, rows))
    assert source.classes == ["ant", "zebra", "Öl"] and source.labels.tolist() == [1, 0, 2, 0]


def test_images_without_labels_and_names(tmp_path: Path) -> None:
    source = open_mindrecord(write(tmp_path / "flat.mindrecord", {"data": {"type": "bytes"}}, [{"data": b"x"}] * 3))
    assert source.classes == [] and source.labels.tolist() == [0, 0, 0] and source.read(2) == b"x"
    assert source.name(1) == f"{tmp_path / 'flat.mindrecord'}[1]"


def test_class_names_come_from_the_description(tmp_path: Path) -> None:
    names = ["a", "b", "ü", "d"]
    path = write(tmp_path / "named.mindrecord", SCHEMA, plain_rows(5), note=json.dumps({"classes": names}))
    assert open_mindrecord(path).classes == names
    path = write(tmp_path / "few.mindrecord", SCHEMA, plain_rows(5), note=json.dumps({"classes": names[:2]}))
    with pytest.raises(DataError, match=r"label is 3 in a row; labels go from 0 to 1"):
        open_mindrecord(path)


#: schema, row -> words of the error
REFUSED: dict[str, tuple[dict[str, Any], Row, str]] = {
    "two fields of bytes": (
        {"left": {"type": "bytes"}, "right": {"type": "bytes"}},
        {"left": b"x", "right": b"y"},
        "left: bytes, right: bytes",
    ),
    "no bytes": (
        {"pixels": {"type": "float32", "shape": [2]}, "label": {"type": "int32"}},
        {"pixels": np.ones(2, np.float32), "label": 0},
        r"pixels: float32 \[2\]",
    ),
    "label is a float": (
        {"data": {"type": "bytes"}, "label": {"type": "float32"}},
        {"data": b"x", "label": 1.5},
        "label must be int32, int64 or string",
    ),
    "label is an array": (
        {"data": {"type": "bytes"}, "label": {"type": "int32", "shape": [1]}},
        {"data": b"x", "label": np.ones(1, np.int32)},
        r"label: int32 \[1\]",
    ),
    "negative label": (
        {"data": {"type": "bytes"}, "label": {"type": "int32"}},
        {"data": b"x", "label": -1},
        "label is -1 in a row",
    ),
    "huge label": (
        {"data": {"type": "bytes"}, "label": {"type": "int32"}},
        {"data": b"x", "label": 2**31 - 1},
        "label is 2147483647",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_schemas_are_refused_with_their_fields(tmp_path: Path, kind: str) -> None:
    schema, row, words = REFUSED[kind]
    path = write(tmp_path / "theirs.mindrecord", schema, [row, row])
    with pytest.raises(DataError, match=words) as error:
        open_mindrecord(path)
    assert "\n" not in str(error.value)


def change_header(path: Path, old: bytes, new: bytes) -> None:
    """Replace a text in the header by one of the same length."""
    data = bytearray(path.read_bytes())
    place = data.index(old)
    assert len(old) == len(new)
    data[place : place + len(old)] = new
    path.write_bytes(data)


def changed_index(path: Path, statement: str) -> None:
    database = sqlite3.connect(path)
    database.execute(statement)
    database.commit()
    database.close()


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


#: what is done to the second of three files (its path, its index) -> words of the error
DAMAGE = {
    "file missing": (
        lambda file, index: file.unlink(),
        r"1 of 3 files of its set not found .*train.mindrecord1\); copy",
    ),
    "index missing": (lambda file, index: index.unlink(), "has no index train.mindrecord1.db; copy it"),
    "index empty": (lambda file, index: cut(index, 0), "train.mindrecord1.db is damaged"),
    "index cut": (lambda file, index: cut(index, 6000), "train.mindrecord1.db is damaged"),
    "index of noise": (lambda file, index: index.write_bytes(content(500)), "train.mindrecord1.db is damaged"),
    "index is a folder": (lambda file, index: (index.unlink(), index.mkdir()), "has no index"),
    "index of another file": (
        lambda file, index: shutil.copy(file.with_name("train.mindrecord0.db"), index),
        "train.mindrecord1.db is damaged, or the index of another file",
    ),
    "row missing in the index": (
        lambda file, index: changed_index(index, "DELETE FROM INDEXES WHERE ROW_ID = 3"),
        "is damaged",
    ),
    "place outside": (
        lambda file, index: changed_index(index, "UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = 99999999"),
        "is damaged",
    ),
    "page outside": (
        lambda file, index: changed_index(index, f"UPDATE INDEXES SET PAGE_ID_BLOB = {2**62}"),
        "is damaged",
    ),
    "text for a place": (
        lambda file, index: changed_index(index, "UPDATE INDEXES SET PAGE_OFFSET_BLOB = 'a'"),
        "is damaged",
    ),
    "nothing for a label": (
        lambda file, index: changed_index(index, "UPDATE INDEXES SET label_0 = NULL WHERE ROW_ID = 1"),
        "is damaged",
    ),
    "no table": (lambda file, index: changed_index(index, "DROP TABLE INDEXES"), "is damaged"),
    "file empty": (lambda file, index: cut(file, 0), "train.mindrecord1 is not a MindRecord file"),
    "file of zeros": (lambda file, index: file.write_bytes(bytes(9999)), "is not a MindRecord file"),
    "file of noise": (lambda file, index: file.write_bytes(content(900)), "is not a MindRecord file"),
    "header cut": (lambda file, index: cut(file, 300), "is not a MindRecord file"),
    "file cut": (lambda file, index: cut(file, 17_000), "train.mindrecord1 is cut off: it has 17000 bytes"),
    "file cut by a byte": (lambda file, index: cut(file, file.stat().st_size - 1), "is cut off"),
    "nested header": (
        lambda file, index: file.write_bytes((60_000).to_bytes(8, "little") + b"[" * 60_000),
        "is not a MindRecord file",
    ),
    "version": (lambda file, index: change_header(file, b'"version":"3.0"', b'"version":"9.0"'), "has version '9.0'"),
    "header without pages": (
        lambda file, index: change_header(file, b'"page":', b'"pagf":'),
        "its header is damaged",
    ),
    "negative page size": (
        lambda file, index: change_header(file, b'"page_size":32768', b'"page_size":-2768'),
        "its header is damaged",
    ),
    "other fields": (
        lambda file, index: change_header(file, b'"data":{"type"', b'"dato":{"type"'),
        "has other fields",
    ),
    "another folder in the header": (
        lambda file, index: change_header(
            file.with_name("train.mindrecord0"), b"train.mindrecord1", b"../rain.mindrecor"
        ),
        "its header is damaged",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_set_is_one_line(copied: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    file = copied.with_name("train.mindrecord1")
    damage(file, file.with_name("train.mindrecord1.db"))
    before = sorted(path.name for path in copied.parent.iterdir())
    with pytest.raises(DataError, match=words) as error:
        open_mindrecord(copied.with_name("train.mindrecord0"))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in copied.parent.iterdir()) == before


def test_paths_that_are_no_set(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(DataError, match=r"data.train: there is no MindRecord file .*, nor a.mindrecord0"):
        open_mindrecord(tmp_path / "a.mindrecord", "data.train")
    with pytest.raises(DataError, match="is a folder"):
        open_mindrecord(tmp_path)
    (tmp_path / "text.txt").write_text("a")
    assert not is_mindrecord(tmp_path / "text.txt") and not is_mindrecord(tmp_path)


def test_a_renamed_set_is_refused_and_a_renamed_single_file_is_read(copied: Path, tmp_path: Path) -> None:
    copied.with_name("train.mindrecord0").rename(tmp_path / "val.mindrecord0")
    with pytest.raises(DataError, match=r"was renamed: its header lists train\.mindrecord0, train"):
        open_mindrecord(tmp_path / "val.mindrecord0")
    one = write(tmp_path / "one.mindrecord", SCHEMA, plain_rows(2))
    for suffix in ("", ".db"):
        Path(f"{one}{suffix}").rename(tmp_path / f"ünd er%20?#.mindrecord{suffix}")
    assert len(open_mindrecord(tmp_path / "ünd er%20?#.mindrecord")) == 2


def test_files_that_were_written_one_by_one_are_a_set(tmp_path: Path) -> None:
    for number in range(11):  # 10 after 9
        write(tmp_path / f"part.mindrecord{number}", SCHEMA, plain_rows(number + 1)[-1:])
    assert [key[0] for key in held(open_mindrecord(tmp_path / "part.mindrecord"))] == [
        row["file_name"] for row in plain_rows(11)
    ]
    assert len(open_mindrecord(tmp_path / "part.mindrecord3")) == 1


def test_files_of_several_sets_are_not_mixed(copied: Path) -> None:
    write(copied.with_name("train.mindrecord00"), SCHEMA, plain_rows(3))
    with pytest.raises(DataError, match=r"may be several sets .*; name a file of one"):
        open_mindrecord(copied)
    assert len(open_mindrecord(copied.with_name("train.mindrecord0"))) == 40


def test_a_row_that_changes_later_is_an_error_of_reading(copied: Path) -> None:
    source = open_mindrecord(copied)
    path, start = source.shards[0], int(source.starts[0])
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 8)
    with pytest.raises(OSError, match="damaged or cut off MindRecord row"):
        source.read(0)
    cut(path, start + 20)
    with pytest.raises(OSError, match="damaged"):
        source.read(1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        source.read(1)


def test_numbers_count_the_classes_of_others_and_names_are_mapped(shards: Path, tmp_path: Path) -> None:
    """A set without class names is used with class folders: its labels are their numbers in sorted order."""
    source = open_mindrecord(shards)
    names = ["ant", "bee", "cat", "dog", "eel"]
    assert source.numbered and with_classes(source, names, "training").labels.tolist() == source.labels.tolist()
    with pytest.raises(DataError, match="that training does not have"):
        with_classes(source, names[:3], "training")
    note = json.dumps({"classes": ["eel", "cat", "bee", "ant"]})
    named = open_mindrecord(write(tmp_path / "named.mindrecord", SCHEMA, plain_rows(4), note=note))
    assert not named.numbered and with_classes(named, names, "training").labels.tolist() == [4, 2, 1, 0]


def test_images_of_a_relative_path_are_read_from_another_working_folder(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As worker processes have it."""
    monkeypatch.chdir(shards.parent)
    source = open_mindrecord(Path(shards.name))
    monkeypatch.chdir("/")
    assert held(source) == held(open_mindrecord(shards)) and source.name(0).startswith(shards.name)


def test_subset_checksum_and_pickle(shards: Path) -> None:
    source = open_mindrecord(shards)
    part = source.subset([7, 3, 39])
    assert held(part) == [held(source)[i] for i in (7, 3, 39)] and part.classes == source.classes
    assert held(pickle.loads(pickle.dumps(part))) == held(part)
    assert part.checksum() != source.checksum() == open_mindrecord(shards.with_name("train.mindrecord1")).checksum()
    assert source.subset([3, 7, 39]).checksum() != part.checksum()


def test_reading_needs_no_mindspore(shards: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from src.data.records import open_mindrecord; "
        f"print(len(open_mindrecord(Path({str(shards)!r})).read(0)) > 0, 'mindspore' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_small_fields_are_unpacked() -> None:
    packed = b"\x86\xa1a\x05\xa1b\xff\xa1c\xcd\x01\x00\xa1d\xd9\x02\xc3\xbc\xa1e\xd3" + b"\xff" * 8 + b"\xa1f\xc0"
    assert unpacked(packed) == {"a": 5, "b": -1, "c": 256, "d": "ü", "e": -1, "f": None}
    for broken in (b"", b"\x05", b"\x81", b"\x81\xa1a", b"\x81\xa1a\xcd\x01", b"\x81\xa1a\xc1", b"\x81\xa5a"):
        with pytest.raises((ValueError, LookupError, struct.error)):
            unpacked(broken)
