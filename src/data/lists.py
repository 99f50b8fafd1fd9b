r"""List files: the path of an image on each line, relative to the list's folder or absolute, and optionally its label.

.txt: `PATH LABEL`, separated by a tab or by the space after the image's extension; a path with another space before the
      label, or without an extension, is written in double quotes. There are no comments: `#` may begin a name.
.csv: `PATH,LABEL`, quoted as in any CSV file, so that names may contain line ends; .tsv with tabs. With a first line of
      names (`path` or `image`, and `label` or `class`) there may be other columns, in any order.
.jsonl: an object on each line, {"path": "a.jpg", "label": "cat"}.

Labels are class names, or numbers that count the classes from 0 if all labels of the list are numbers. A `class`, and a
text in .jsonl, is always a name.

Files of ImageNet are read as they are: `val.txt` (`ILSVRC2012_val_00000001.JPEG 65`), `LOC_val_solution.csv`, and
`ILSVRC2012_validation_ground_truth.txt` with `meta.mat` of the development kit next to it. Their images may be next to
the list or in one of `IMAGENET_FOLDERS`.
"""

from __future__ import annotations

import csv
import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from ..config import plural
from .listing import EXTENSIONS
from .sources import DataError, Files, NameTable

PATH_NAMES = ("path", "image", "file", "filename", "file_name", "image_path")
LABEL_NAMES = ("label", "target", "class")
LONGEST = 1 << 16  # characters of a line
MOST_CLASSES = 1 << 20  # a larger class number is a mistake
TRIED = 10  # files that must not all be missing

TRUTH = "ILSVRC2012_validation_ground_truth.txt"
#: where the validation images of ImageNet are, relative to a list: unpacked, and as Kaggle has them
IMAGENET_FOLDERS = (".", "val", "ILSVRC2012_img_val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val")
DEVKIT = "ILSVRC2012_devkit_t12/data"

_SUFFIX = "|".join(re.escape(suffix) for suffix in sorted(EXTENSIONS))
_PATH_ONLY = re.compile(rf"(?:{_SUFFIX})$", re.IGNORECASE)
_PATH_AND_LABEL = re.compile(rf"(.*(?:{_SUFFIX}))\s+(\S.*)", re.IGNORECASE | re.DOTALL)
_QUOTED = re.compile(r'"((?:[^"]|"")+)"(?:\s+(\S.*))?')
_NUMBER = re.compile(r"0|-?[1-9][0-9]*")


class Row(NamedTuple):
    """An image of a list; an empty label is none. `named`: the label is a name, even if it looks like a number."""

    line: int
    path: str
    label: str
    named: bool = False


class LineError(Exception):
    """What is wrong with a line, and its number."""

    def __init__(self, line: int, text: str):
        super().__init__(text)
        self.line = line


def open_list(path: Path, key: str = "data") -> Files:
    """Read a list file.

    Raises:
        DataError: a line is wrong, a part of the labels is missing, or the files do not exist.
    """
    table = _Table(path, key)
    try:
        with path.open(encoding=_encoding(path), errors="surrogateescape", newline=_line_ends(path)) as file:
            for row in _rows(path, file):
                table.add(row)
    except LineError as problem:
        raise DataError(f"{key}: {path}:{problem.line}: {problem}") from None
    except UnicodeError:
        raise DataError(f"{key}: {path} is not a text file in UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read ({error.strerror or error})") from None
    return table.files()


class _Table:
    """The rows of a list as they are read."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.names = NameTable()
        self.codes = array("i")
        self.labels: dict[str, int] = {}  # label -> code
        self.lines: list[int] = []  # where each first appears
        self.first = 0
        self.named = False

    def add(self, row: Row) -> None:
        """Append an image.

        Raises:
            LineError: its path or label is wrong.
        """
        if not row.path or "\0" in row.path:
            raise LineError(row.line, "the path is empty" if not row.path else "the path has a NUL character")
        code = self.labels.setdefault(row.label, len(self.labels))
        if code == len(self.lines):
            self.lines.append(row.line)
            if len(self.labels) > 1 and "" in self.labels:
                raise LineError(self.lines[self.labels[""]], self._partly(row))
        try:
            self.names.add([row.path.encode("utf-8", "surrogateescape")])
        except UnicodeEncodeError:
            raise LineError(row.line, f"the path {row.path!r} is no text") from None
        self.codes.append(code)
        self.first = self.first or row.line
        self.named |= row.named

    def _partly(self, row: Row) -> str:
        other = row.line if row.label else min(self.lines[code] for label, code in self.labels.items() if label)
        return f"no label, but line {other} has one; write a label on each line, or on none"

    def files(self) -> Files:
        """Return the images.

        Raises:
            DataError: there is none, they do not exist, or a number is no class.
        """
        if not len(self.names):
            raise DataError(f"{self.key}: {self.path} names no image; write a path on each line")
        names = self.names.names()
        folder = _folder_of(self.path, names[0])
        files = Files(self.path, folder, names, np.zeros(len(names), np.int32), [])
        _check_found(files, self.key, self.first)
        codes = np.frombuffer(self.codes, np.int32)
        if "" in self.labels:
            return files
        texts = list(self.labels)
        numbered = not self.named and all(map(_NUMBER.fullmatch, texts))
        classes = [str(n) for n in range(self._numbers(texts))] if numbered else sorted(texts)
        order = {name: index for index, name in enumerate(classes)}
        table = np.array([order[text] for text in texts], np.int32)
        return Files(self.path, folder, names, table[codes], classes, numbered=numbered)

    def _numbers(self, texts: list[str]) -> int:
        """Return how many classes these numbers count.

        Raises:
            DataError: one is negative or too large.
        """
        for text, line in zip(texts, self.lines, strict=True):
            if text.startswith("-") or len(text) > 9 or int(text) >= MOST_CLASSES:
                raise DataError(
                    f"{self.key}: {self.path}:{line}: {text[:40]} is no class number; "
                    "write 0 to the number of classes - 1"
                )
        return max(map(int, texts)) + 1


def _check_found(files: Files, key: str, line: int) -> None:
    """Check that not all of a few images are missing."""
    tried = np.unique(np.linspace(0, len(files) - 1, TRIED).astype(int))
    try:
        found = any(files.path(int(index)).exists() for index in tried)
    except OSError:  # a name too long
        found = False
    if not found:
        raise DataError(
            f"{key}: {files.place}:{line}: there is no file {files.path(0)}, and none of {plural(len(tried), 'file')} "
            "tried exists; write paths relative to the folder of the list, or absolute ones"
        )


# --- forms ------------------------------------------------------------------------------------------------------


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _line_ends(path: Path) -> str | None:
    """Return the `newline` of `open`: CSV fields keep their line ends."""
    return "" if path.suffix.lower() in (".csv", ".tsv") else None


def _rows(path: Path, file: TextIO) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _json_rows(file)
    if suffix == ".txt":
        return _text_rows(file)
    return _csv_rows(file, "\t" if suffix == ".tsv" else ",")


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line.

    Raises:
        LineError: a line is too long to be one of a list.
    """
    number = 0
    while line := file.readline(LONGEST):
        number += 1
        if len(line) == LONGEST and not line.endswith(("\n", "\r")):
            raise LineError(number, f"the line has {LONGEST:,} characters or more; this is no list of images")
        yield number, line


def _text_rows(file: TextIO) -> Iterator[Row]:
    for number, line in _lines(file):
        text = line.rstrip("\n")
        if text and not text.isspace():
            yield Row(number, *split_line(text))


def split_line(text: str) -> tuple[str, str]:
    """Return path and label of a line of a .txt file."""
    if "\t" in text:
        path, _, label = text.rpartition("\t")
        quoted = _QUOTED.fullmatch(path)
        return (quoted[1].replace('""', '"') if quoted and not quoted[2] else path), label.strip()
    quoted = _QUOTED.fullmatch(text.strip())
    if quoted:
        return quoted[1].replace('""', '"'), (quoted[2] or "").strip()
    text = text.rstrip()
    if _PATH_ONLY.search(text):
        return text, ""
    match = _PATH_AND_LABEL.fullmatch(text)
    if match:
        return match[1], match[2]
    path, _, label = text.rpartition(" ")
    return (path.rstrip(), label) if path.strip() else (text, "")


def _csv_rows(file: TextIO, delimiter: str) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(file)), delimiter=delimiter, strict=True)
    columns: tuple[int, int, bool] | None = None
    last = 0
    try:
        for fields in reader:
            number, last = last + 1, reader.line_num
            if not fields:
                continue
            if columns is None:
                if fields == ["ImageId", "PredictionString"]:
                    yield from _kaggle_rows(reader)
                    return
                columns = _columns(fields)
                if columns is not None:
                    continue
                columns = (0, 1, False)
                if len(fields) > 2:
                    raise LineError(number, f"{len(fields)} columns; name them in a first line, path{delimiter}label")
            path, label, named = columns
            if len(fields) <= path:
                raise LineError(
                    number, f"{plural(len(fields), 'column')}, too few for a path; write PATH{delimiter}LABEL"
                )
            yield Row(number, fields[path], fields[label].strip() if 0 <= label < len(fields) else "", named)
    except csv.Error as error:
        raise LineError(last + 1, f"no CSV ({error}); write quotes around a name, and double those in it") from None


def _columns(fields: list[str]) -> tuple[int, int, bool] | None:
    """Return the columns of path and label (-1: none), and whether labels are names, if this is a line of names."""
    names = [field.strip().lower() for field in fields]
    paths = [names.index(name) for name in PATH_NAMES if name in names]
    labels = [names.index(name) for name in LABEL_NAMES if name in names]
    label = labels[0] if labels else -1
    return (paths[0], label, label >= 0 and names[label] == "class") if paths else None


def _kaggle_rows(reader: Any) -> Iterator[Row]:
    """Rows of ImageNet's LOC_val_solution.csv: an image without extension, and `WNID box WNID box ...`."""
    for fields in reader:
        if len(fields) != 2:
            raise LineError(reader.line_num, "not two columns as in LOC_val_solution.csv; unpack that file again")
        yield Row(reader.line_num, f"{fields[0]}.JPEG", fields[1].split(" ")[0])


def _json_rows(file: TextIO) -> Iterator[Row]:
    for number, line in _lines(file):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise LineError(number, 'no JSON; write {"path": "a.jpg", "label": "cat"}') from None
        if not isinstance(value, dict):
            raise LineError(number, 'no object; write {"path": "a.jpg", "label": "cat"}')
        path = next((value[name] for name in PATH_NAMES if name in value), None)
        label = next((value[name] for name in LABEL_NAMES if name in value), None)
        if not isinstance(path, str):
            raise LineError(number, 'no text under "path"; write {"path": "a.jpg", "label": "cat"}')
        if not (label is None or isinstance(label, str) or (isinstance(label, int) and not isinstance(label, bool))):
            raise LineError(number, "the label is neither a class name nor a whole number; write one of these")
        yield Row(number, path, "" if label is None else str(label).strip(), isinstance(label, str))


# --- ImageNet ---------------------------------------------------------------------------------------------------


def is_ground_truth(path: Path) -> bool:
    """Whether a file has the name of ImageNet's validation labels."""
    return path.name == TRUTH


def ground_truth_of(folder: Path) -> Path | None:
    """Return the file of validation labels in a folder of images or next to it, also in the development kit."""
    places = [base / part / TRUTH for base in (folder, folder.parent) for part in (".", DEVKIT)]
    return next((path for path in places if path.is_file()), None)


def ground_truth(path: Path, key: str = "data") -> Files:
    """Read ImageNet's validation labels: for each image in the order of names its ILSVRC2012_ID, 1 to 1000.

    The development kit's meta.mat says which class (WordNet number) an ID is; classes are sorted as their folders are.

    Raises:
        DataError: one of the two files is wrong, or the images do not exist.
    """
    wnids = _wnids(path.with_name("meta.mat"), key)
    names, labels = NameTable(), array("i")
    classes = sorted(wnids.values())
    order = {number: classes.index(wnid) for number, wnid in wnids.items()}
    try:
        with path.open(encoding="ascii") as file:
            for number, line in _lines(file):
                text = line.strip()
                if not text.isdecimal() or len(text) > 9 or int(text) not in order:
                    raise LineError(
                        number, f"{text[:40]!r} is no number of a class in meta.mat; download the file again"
                    )
                labels.append(order[int(text)])
                names.add([b"ILSVRC2012_val_%08d.JPEG" % number])
    except LineError as problem:
        raise DataError(f"{key}: {path}:{problem.line}: {problem}") from None
    except (OSError, UnicodeError) as error:
        raise DataError(f"{key}: {path} cannot be read ({getattr(error, 'strerror', None) or 'not a text'})") from None
    if not len(names):
        raise DataError(f"{key}: {path} is empty; download it again")
    table = names.names()
    files = Files(path, _folder_of(path, table[0]), table, np.frombuffer(labels, np.int32), classes)
    _check_found(files, key, 1)
    return files


def _folder_of(path: Path, name: str) -> Path:
    """Return the folder that the names in a list are relative to: the list's own, but see `IMAGENET_FOLDERS`."""
    if name.startswith("ILSVRC2012_val_"):
        bases = [path.parent, *([path.parent.parent.parent] if path.parent.name == "data" else [])]
        for folder in (base / part for base in bases for part in IMAGENET_FOLDERS):
            if (folder / name).exists():
                return folder
    return path.parent


def _wnids(path: Path, key: str) -> dict[int, str]:
    """Return ILSVRC2012_ID -> WordNet number of the classes in meta.mat (the synsets without children).

    Raises:
        DataError: it is missing or damaged.
    """
    remedy = "put that file of the development kit (ILSVRC2012_devkit_t12/data) there"
    if not path.is_file():
        raise DataError(f"{key}: there is no file {path}, which says what the numbers in {TRUTH} are; {remedy}")
    try:
        from scipy.io import loadmat

        synsets = np.atleast_1d(loadmat(path, squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"].astype(int) == 0]
        numbers = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
    except Exception as error:  # of any kind, in a damaged file
        raise DataError(f"{key}: {path} cannot be read ({' '.join(str(error).split())[:200]}); {remedy}") from None
    if not numbers:
        raise DataError(f"{key}: {path} has no classes; {remedy}")
    return numbers
