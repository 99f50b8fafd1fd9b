"""MindRecord files as a source: images are read with the index of the file, without MindSpore.

A MindRecord file has a header (8 bytes of length, then JSON), and pages of equal size behind it. Images are in pages of
"blobs", each with its length in front; small fields are in other pages, as msgpack. The index `FILE.db` (SQLite) has
the place of each row, and the values of the indexed fields. Versions 2.0 and 3.0 differ only in arrays of integers,
which are not read here.

Sources: MindSpore minddata/mindrecord (shard_header.cc, shard_index_generator.cc, shard_column.cc, shard_reader.cc).
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sqlite3
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np

from ..config import plural
from .sources import DataError, Names, count_classes

VERSIONS = ("2.0", "3.0")
LENGTH = 8  # bytes of a stored length
#: names of fields, the first that a file has is used; without one of IMAGES, the only field of bytes
IMAGES = ("image", "data", "img", "images", "jpeg", "image_bytes", "image_data", "picture", "encoded", "image_encoded")
LABELS = ("label", "labels", "target", "class_id", "class", "category")
NAMES = ("file_name", "filename", "name", "path", "file", "key", "image_id", "id")
MAX_HEADER = 128 * 2**20  # bytes, as MindSpore
MAX_CLASSES = 1_000_000
CHUNK = 50_000  # rows of an index in memory as Python objects


@dataclass(frozen=True, eq=False)
class MindRecords:
    """Images in the shards of a MindRecord set (a `Source`).

    Attributes:
        place: the file that messages name.
        shards: files of the set.
        shard: index into `shards` of each image, (n,) int32.
        rows: number of the row within the shard, (n,) int64.
        starts, sizes: position and length of the row's blob in the file in bytes, both (n,) int64.
        part: position of the image among the fields of a blob, and their number.
        keys: names that the file has for its images; None without a field for them.
        labels, classes, skipped: as in `Source`.
        numbered: the labels are numbers, which count the classes of whatever the images are used with; `classes` are
            these numbers as texts.
        base: relative `shards` begin here; worker processes have another working folder.
    """

    place: Path
    shards: list[Path]
    shard: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    part: tuple[int, int]
    keys: Names | None
    labels: np.ndarray
    classes: list[str]
    skipped: Counter[str] = field(default_factory=Counter)
    numbered: bool = False
    base: Path = field(default_factory=Path.cwd)

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, index: int) -> str:
        place = f"{self.shards[int(self.shard[index])]}[{int(self.rows[index])}]"
        return f"{place} {self.keys[index]}" if self.keys is not None else place

    def key(self, index: int) -> str:
        """Return the name that the set has for an image, or where it is."""
        return self.keys[index] if self.keys is not None else self.name(index)

    def read(self, index: int) -> bytes:
        path = self.base / self.shards[int(self.shard[index])]
        size = int(self.sizes[index])
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            blob = os.pread(handle, LENGTH + size, int(self.starts[index]))
        finally:
            os.close(handle)
        if len(blob) != LENGTH + size or int.from_bytes(blob[:LENGTH], "little") != size:
            raise damaged_row(path)
        return blob_field(blob[LENGTH:], *self.part, path)

    def subset(self, indices: Sequence[int] | np.ndarray) -> MindRecords:
        chosen = np.asarray(indices, np.int64)
        arrays = {name: getattr(self, name)[chosen] for name in ("shard", "rows", "starts", "sizes", "labels")}
        keys = None if self.keys is None else self.keys.subset(chosen)
        return replace(self, keys=keys, **arrays)

    def checksum(self) -> int:
        text = zlib.crc32("\n".join(path.name for path in self.shards).encode("utf-8", "surrogateescape"))
        if self.keys is not None:
            text = zlib.crc32(self.keys.ends.tobytes(), zlib.crc32(self.keys.text.tobytes()))
        else:
            text = zlib.crc32(self.rows.tobytes(), zlib.crc32(self.shard.tobytes(), text))
        return zlib.crc32(self.labels.astype(np.int32).tobytes(), text)

    def summary(self) -> str:
        files = plural(len(self.shards), "MindRecord file")
        return f"{self.place}: {plural(len(self), 'image')} in {files}, {count_classes(self)}"


@dataclass(frozen=True)
class Header:
    """What the header of a shard says.

    Attributes:
        path: the shard.
        start, page_size: of the pages in bytes.
        shards: file names of the set.
        fields: name of a field -> its type, with its shape if it is an array.
        blobs: the fields in blobs, in their order.
        indexed: field -> its column in the index.
        rows: number of rows.
        end: bytes that the file has at least.
        note: the description of the schema; the class names, if `scripts/prepare_mindrecord.py` wrote it.
    """

    path: Path
    start: int
    page_size: int
    shards: list[str]
    fields: dict[str, str]
    blobs: list[str]
    indexed: dict[str, str]
    rows: int
    end: int
    note: str

    def same_fields(self, other: Header) -> bool:
        return self.fields == other.fields and self.blobs == other.blobs


@dataclass(frozen=True)
class Columns:
    """The fields that are used: of the image, and of label and name if there are any."""

    image: str
    label: str
    name: str


def is_mindrecord(path: Path) -> bool:
    """Whether a path names a MindRecord set: by its name, or because it has an index next to it."""
    if re.search(r"\.mindrecord\d*$", path.name):
        return True
    return path.is_file() and index_of(path).is_file()


def open_mindrecord(path: Path, key: str = "data") -> MindRecords:
    """Open a set of MindRecord files.

    Args:
        path: one of its files, or their name without the number at the end.
        key: the field or option that names it, for errors.

    Raises:
        DataError: a file is missing or damaged, or has no images.
    """
    try:
        return _opened(path)
    except DataError as error:
        raise DataError(f"{key}: {error}") from None


def _opened(path: Path) -> MindRecords:
    headers = [read_header(shard) for shard in shards_of(path)]
    first = headers[0]
    for header in headers[1:]:
        if not header.same_fields(first):
            raise DataError(
                f"{header.path} has other fields ({shown_fields(header)}) than {first.path} "
                f"({shown_fields(first)}); they are not of one set"
            )
    columns = columns_of(first)
    parts = [read_index(header, columns) for header in headers]
    counts = [len(part.rows) for part in parts]
    if not sum(counts):
        raise DataError(f"{path} has no image")
    labels, classes = np.zeros(sum(counts), np.int32), list[str]()
    if columns.label:
        stored = np.concatenate([part.labels for part in parts if len(part.rows)])
        labels, classes = labels_of(stored, class_names(first.note), path, columns.label)
    return MindRecords(
        place=path,
        shards=[header.path for header in headers],
        shard=np.repeat(np.arange(len(headers), dtype=np.int32), counts),
        rows=np.concatenate([part.rows for part in parts]),
        starts=np.concatenate([part.starts for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        part=(first.blobs.index(columns.image), len(first.blobs)),
        keys=joined([part.names for part in parts]) if columns.name else None,
        labels=labels,
        classes=classes,
        numbered=bool(classes) and first.fields[columns.label] != "string" and not class_names(first.note),
    )


def joined(tables: list[Names]) -> Names:
    """Return the entries of all tables."""
    offsets = np.cumsum([0, *(len(table.text) for table in tables[:-1])])
    ends = [table.ends + offset for table, offset in zip(tables, offsets, strict=True)]
    return Names(np.concatenate([table.text for table in tables]), np.concatenate(ends))


def index_of(path: Path) -> Path:
    """Return the path of the index of a shard."""
    return path.with_name(f"{path.name}.db")


def shards_of(path: Path) -> list[Path]:
    """Return the files of a set, in their order.

    Raises:
        DataError: one is missing.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a MindRecord file in it")
    if path.exists():
        starts = [path]
    else:
        pattern = re.compile(re.escape(path.name) + r"\d+")
        listed = path.parent.iterdir() if path.parent.is_dir() else iter(())
        starts = sorted((p for p in listed if pattern.fullmatch(p.name)), key=lambda p: (len(p.name), p.name))
    if not starts:
        raise DataError(f"there is no MindRecord file {path}, nor {path.name}0; name one that exists")
    names: dict[str, None] = {}
    sets = [read_header(start).shards for start in starts]
    if max(map(len, sets)) > 1 and any(listed_names != sets[0] for listed_names in sets):
        raise DataError(f"{path} may be several sets ({short([start.name for start in starts])}); name a file of one")
    for start, listed_names in zip(starts, sets, strict=True):
        # the header of a file alone may have its earlier name
        for name in [start.name] if len(listed_names) == 1 else listed_names:
            names[name] = None
        if start.name not in names:
            raise DataError(
                f"{start} was renamed: its header lists {short(listed_names)}; give the files their names back"
            )
    shards = [path.parent / name for name in names]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {plural(len(shards), 'file')} of its set not found in {path.parent} "
            f"({short(missing)}); copy them there"
        )
    return shards


def short(names: Sequence[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_header(path: Path) -> Header:
    """Read and check the header of a shard.

    Raises:
        DataError: it is no MindRecord file, or is damaged or cut off.
    """
    try:
        size, raw = header_json(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise DataError(
            f"{path} is not a MindRecord file, or is damaged or encrypted; write it again or name another file"
        ) from None
    try:
        version = raw["version"]
        if version not in VERSIONS:
            raise DataError(
                f"{path} has version {str(version)[:20]!r} of the format; versions {' and '.join(VERSIONS)} are "
                "read, write it again with this MindSpore"
            )
        header = parsed_header(path, raw)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: its header is damaged; write the file again") from None
    if size < header.end:
        raise DataError(f"{path} is cut off: it has {size} bytes, its header says {header.end}; copy or write it again")
    return header


def header_json(path: Path) -> tuple[int, Any]:
    """Return size and header of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it does not start with a header.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        size = os.fstat(handle).st_size
        length = int.from_bytes(file.read(LENGTH), "little")
        if not 2 <= length <= min(MAX_HEADER, size - LENGTH):
            raise ValueError("no header")
        return size, json.loads(file.read(length))


def parsed_header(path: Path, raw: dict[str, Any]) -> Header:
    """Take the parts of a header; errors of a damaged one are those of Python."""
    start, page_size = whole(raw["header_size"]), whole(raw["page_size"])
    schema = raw["schema"][0]
    pages = raw["page"] or []
    blob_pages = [page for page in pages if page["page_type"] == "BLOB_DATA"]
    ends = [start + page_size * whole(page["page_id"]) + whole(page["page_size"]) for page in pages]
    names = [str(name) for name in raw["shard_addresses"]]
    if not names or any(name in ("", ".", "..") or "/" in name or "\0" in name for name in names):
        raise ValueError("names of shards")
    return Header(
        path=path,
        start=start,
        page_size=page_size,
        shards=names,
        fields={str(name): shown_type(kind) for name, kind in schema["schema"].items()},
        blobs=[str(name) for name in schema["blob_fields"] or []],
        indexed={
            str(entry["index_field"]): re.sub("[-.]", "_", entry["index_field"]) + f"_{whole(entry['schema_id'])}"
            for entry in raw["index_fields"] or []
        },
        rows=sum(whole(page["end_row_id"]) - whole(page["start_row_id"]) for page in blob_pages),
        end=max(ends, default=0),
        note=str(schema.get("desc", "")),
    )


def whole(value: Any) -> int:
    """Return a whole number that is not negative and fits a file position.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(value)
    return value


def shown_type(kind: dict[str, Any]) -> str:
    return str(kind["type"]) + (f" {kind['shape']}" if "shape" in kind else "")


def shown_fields(header: Header) -> str:
    return ", ".join(f"{name}: {kind}" for name, kind in header.fields.items())


def columns_of(header: Header) -> Columns:
    """Choose the fields of image, label and name.

    Raises:
        DataError: there is no field for the image, or the label is of another type.
    """
    lower = {name.lower(): name for name in header.fields}
    of_bytes = [name for name in header.blobs if header.fields.get(name) == "bytes"]
    image = next((lower[name] for name in IMAGES if lower.get(name) in of_bytes), "")
    if not image and len(of_bytes) == 1:
        image = of_bytes[0]
    if not image:
        raise DataError(
            f"{header.path} has the fields {shown_fields(header)}; one of bytes named image or data, with an "
            "image file in it, is needed (and label, a whole number or text)"
        )
    label = next((lower[name] for name in LABELS if name in lower), "")
    if label and header.fields[label] not in ("int32", "int64", "string"):
        raise DataError(f"{header.path} has the fields {shown_fields(header)}; {label} must be int32, int64 or string")
    singles = [name for name, kind in header.fields.items() if kind in ("string", "int32", "int64")]
    name = next((lower[name] for name in NAMES if lower.get(name) in singles), "")
    return Columns(image, label, name)


@dataclass
class Rows:
    """The rows of one shard: their numbers, blobs, labels as stored, and names."""

    rows: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: Names


def read_index(header: Header, columns: Columns) -> Rows:
    """Read the index of a shard.

    Raises:
        DataError: it is missing, damaged, or of another file.
    """
    path = index_of(header.path)
    if not path.is_file():
        raise DataError(f"{header.path} has no index {path.name}; copy it there too")
    damage = DataError(f"{path} is damaged, or the index of another file; copy or write {header.path.name} again")
    try:
        rows = query(header, columns, path)
    except (sqlite3.Error, struct.error, ValueError, TypeError, OverflowError, LookupError) as error:
        raise error if isinstance(error, DataError) else damage from None
    except OSError as error:
        raise DataError(f"{header.path} cannot be read ({error.strerror or error})") from None
    if len(rows.rows) != header.rows:
        raise damage
    return rows


def query(header: Header, columns: Columns, path: Path) -> Rows:
    """Read place, label and name of each row; the two come from the pages of the file if they are not in its index."""
    stored = [name for name in (columns.label, columns.name) if name]
    from_index = all(name in header.indexed for name in stored)
    taken = [f'"{header.indexed[name]}"' for name in stored] if from_index else []
    places = ["ROW_ID", "PAGE_ID_BLOB", "PAGE_OFFSET_BLOB", "PAGE_OFFSET_BLOB_END"]
    places += [] if from_index else ["PAGE_ID_RAW", "PAGE_OFFSET_RAW", "PAGE_OFFSET_RAW_END"]
    text = f"SELECT {', '.join(places + taken)} FROM INDEXES ORDER BY ROW_ID"
    count = len(places)
    numbers, labels, names = [np.zeros((0, count), np.int64)], [], []
    with closing(sqlite3.connect(f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1", uri=True)) as database:
        database.text_factory = lambda content: content.decode("utf-8", "surrogateescape")
        of = [row[0] for row in database.execute("SELECT NAME FROM SHARD_NAME LIMIT 2")]
        if len(header.shards) > 1 and of != [header.path.name]:
            raise ValueError("the index of another file")
        found = database.execute(text)
        while chunk := found.fetchmany(CHUNK):
            numbers.append(np.array([row[:count] for row in chunk]).astype(np.int64, casting="safe"))
            values = [row[count:] for row in chunk] if from_index else raw_values(header, numbers[-1], stored)
            if columns.label:
                labels += [checked_label(row[0], header.fields[columns.label]) for row in values]
            if columns.name:
                names += [str(row[-1]) for row in values]
    rows = np.concatenate(numbers)
    page, start, end = rows[:, 1], rows[:, 2], rows[:, 3]
    sizes = end - start - LENGTH
    last_page = header.end // header.page_size  # larger numbers might overflow below
    if len(rows) and (rows.min() < 0 or sizes.min() < 0 or end.max() > header.page_size or page.max() > last_page):
        raise ValueError("places")
    starts = header.start + header.page_size * page + start
    if len(rows) and int((starts + LENGTH + sizes).max()) > header.end:
        raise ValueError("places")
    return Rows(rows[:, 0].copy(), starts, sizes, np.array(labels), Names.of(names))


def checked_label(value: Any, kind: str) -> int | str:
    """Return a label if it is of the type that the header says."""
    if type(value) is not (str if kind == "string" else int):
        raise TypeError(value)
    return value


def raw_values(header: Header, rows: np.ndarray, names: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of fields from the pages of small fields; rows as in `query`."""
    with header.path.open("rb") as file:
        for _, _, _, _, page, start, end in rows.tolist():
            size = end - start - LENGTH
            if start < 0 or not 0 <= size <= header.page_size:
                raise ValueError("places")
            file.seek(header.start + header.page_size * page + start + LENGTH)
            row = unpacked(file.read(size))
            yield tuple(row[name] for name in names)


#: code of a msgpack value -> form of its number, or of the length of its text
PACKED_NUMBERS = {
    **{0xCA: "f", 0xCB: "d", 0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q"},
    **{0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q"},
}
PACKED_TEXTS = {0xD9: "B", 0xDA: "H", 0xDB: "I"}
PACKED_WORDS = {0xC0: None, 0xC2: False, 0xC3: True}


def unpacked(content: bytes) -> dict[Any, Any]:
    """Decode a msgpack map of numbers and texts, as MindRecord has it.

    Raises:
        ValueError, IndexError, struct.error: it is cut off, or of another form.
    """
    file = io.BytesIO(content)
    code = file.read(1)[0]
    if code == 0xDE:
        count = unpacked_number(file, "H")
    elif 0x80 <= code < 0x90:
        count = code - 0x80
    else:
        raise ValueError("no map")
    return {unpacked_value(file): unpacked_value(file) for _ in range(count)}


def unpacked_value(file: BinaryIO) -> Any:
    code = file.read(1)[0]
    if code < 0x80 or code >= 0xE0:
        return code if code < 0x80 else code - 256
    if code in PACKED_NUMBERS:
        return unpacked_number(file, PACKED_NUMBERS[code])
    if 0xA0 <= code < 0xC0 or code in PACKED_TEXTS:
        size = unpacked_number(file, PACKED_TEXTS[code]) if code in PACKED_TEXTS else code - 0xA0
        text = file.read(size)
        if len(text) != size:
            raise ValueError("cut off")
        return text.decode("utf-8", "surrogateescape")
    return PACKED_WORDS[code]


def unpacked_number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(f">{form}", file.read(struct.calcsize(form)))[0]


def blob_field(blob: bytes, part: int, parts: int, path: Path) -> bytes:
    """Return one field of a blob; several have their length before each of them, in big endian.

    Raises:
        OSError: the lengths do not fit.
    """
    if parts == 1:
        return blob
    start = 0
    for number in range(parts):
        size = int.from_bytes(blob[start : start + LENGTH], "big")
        end = start + LENGTH + size
        if end > len(blob):
            raise damaged_row(path)
        if number == part:
            return blob[start + LENGTH : end]
        start = end
    raise damaged_row(path)


def damaged_row(path: Path) -> OSError:
    return OSError(errno.EIO, "damaged or cut off MindRecord row", str(path))


def class_names(note: str) -> list[str]:
    """Return the class names that `scripts/prepare_mindrecord.py` puts into the description of the schema."""
    try:
        names = json.loads(note)["classes"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    usable = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if usable else []


def labels_of(values: np.ndarray, names: list[str], path: Path, label: str) -> tuple[np.ndarray, list[str]]:
    """Return labels and class names: the stored names, the texts in sorted order, or the numbers from 0 as text.

    Raises:
        DataError: a number is negative or too large.
    """
    if values.dtype.kind == "U":
        classes, labels = np.unique(values, return_inverse=True)
        return labels.astype(np.int32), [str(name) for name in classes]
    low, high = int(values.min()), int(values.max())
    limit = len(names) or MAX_CLASSES
    if low < 0 or high >= limit:
        wrong = low if low < 0 else high
        raise DataError(f"{path}: {label} is {wrong} in a row; labels go from 0 to {limit - 1}")
    return values.astype(np.int32), names or [str(number) for number in range(high + 1)]
