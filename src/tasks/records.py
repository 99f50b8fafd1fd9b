"""Write a MindRecord set from the images of a source, one file after the other, so that a stopped run goes on.

Everything is in the folder `.NAME.partial` next to the set until all files are complete; a file there is complete once
its record (`FILE.json`) exists. The images keep their order, so a training draws the same pictures from the set as from
its source.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..config import plural
from ..config.paths import expanded
from ..data.decode import Decoder
from ..data.opening import open_source
from ..data.records import LENGTH, MindRecords, index_of, open_mindrecord, read_header
from ..data.resample import resized
from ..data.sources import Files, Source
from ..errors import UserError
from .command import line
from .dataset import replace_text
from .sweep import Bad, decoded, sweep, uninterrupted

SUFFIX = ".mindrecord"
FORMAT = 1  # of the manifest
IMAGES_PER_FILE = 10_000  # if the number of files is not given
MOST_FILES = 1000  # of MindSpore
BATCH_BYTES, BATCH_ROWS = 16 * 2**20, 64  # what is written at once
HEADERS = (2**20, 2**27)  # bytes of the header: usual, and for very many class names
FORBIDDEN = set("\\/:*?\"<>|`&';")  # in names of MindRecord files
ORIENTATION = 0x0112  # tag of EXIF


@dataclass(frozen=True)
class Options:
    """What the files of a set depend on, besides the images.

    Attributes:
        shards: number of files.
        shorter_side: images with a larger one are resized to it; 0: none.
        quality: of JPEG for resized images.
        channels, max_pixels: as in `Decoder`.
        page: bytes of a page, the most that an image may have.
    """

    shards: int
    shorter_side: int
    quality: int
    channels: int
    max_pixels: int
    page: int


@dataclass(frozen=True)
class Converted:
    """Check an image by decoding it, and make it smaller if it is larger than `shorter_side`."""

    options: Options

    def __call__(self, content: bytes) -> bytes | Bad:
        options = self.options
        pixels = decoded(Decoder(options.channels, max_pixels=options.max_pixels), content)
        height, width = pixels.shape[:2]
        side = options.shorter_side
        if side and min(height, width) > side:
            scale = side / min(height, width)
            size = (max(side, round(height * scale)), max(side, round(width * scale)))
            content = encoded(Image.fromarray(resized(pixels, size)), options.quality, orientation(content))
        if len(content) + LENGTH > options.page:
            return Bad(f"larger than a page, {options.page >> 20} MiB; see --page-size and --shorter-side")
        return content


def orientation(content: bytes) -> int:
    """Return the EXIF orientation of an image; 1 without one."""
    try:
        return int(Image.open(io.BytesIO(content)).getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF, which decoding ignores too
        return 1


def encoded(image: Image.Image, quality: int, turned: int) -> bytes:
    """Return an image as JPEG; an EXIF orientation is kept."""
    exif = Image.Exif()
    if turned != 1:
        exif[ORIENTATION] = turned
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, exif=exif)
    return file.getvalue()


def prepare(text: str, out: str, options: Options, processes: int) -> None:
    """Write a set, or go on with it; a finished set is checked and stays as it is.

    Args:
        text: folder, list or MindRecord file.
        out: the file to write, NAME.mindrecord, or a folder for it.
        options: with 0 shards, one file for each `IMAGES_PER_FILE` images.

    Raises:
        UserError: source or output cannot be used, or the output has other images or options.
    """
    place = Path(expanded(text, "command line"))
    target = target_of(out, place)
    source = open_source(place, "command line")
    shards = options.shards or min(MOST_FILES, -(-len(source) // IMAGES_PER_FILE))
    options = Options(**{**asdict(options), "shards": shards})
    if shards > min(MOST_FILES, len(source)):
        most = min(MOST_FILES, len(source))
        raise UserError(f"--shards: {shards}, but {place} has {plural(len(source), 'image')}; write {most} or less")
    if options.shorter_side and options.channels not in (1, 3):
        raise UserError(f"--shorter-side: images with {options.channels} bands are not resized; leave it out")
    line(source.summary())
    plan = {"images": len(source), "names": source.checksum(), "classes": len(source.classes), **asdict(options)}
    job = Job(source, target, options, plan, processes)
    if job.manifest.exists():
        job.check_finished()
    else:
        job.run()


def target_of(out: str, source: Path) -> Path:
    """Return the name of the set.

    Raises:
        UserError: MindSpore cannot use the name.
    """
    target = Path(expanded(out, "command line")).absolute()
    if target.suffix != SUFFIX:
        target = target / f"{source.resolve().name if source.is_dir() else source.stem}{SUFFIX}"
    wrong = sorted(FORBIDDEN & set(target.name))
    if wrong or target.name.startswith(" "):
        raise UserError(
            f"{target}: MindRecord files cannot have {' '.join(wrong) or 'a space'} in their name; write OUT"
        )
    if target.is_dir():
        raise UserError(f"{target} is a folder; name another file or remove it")
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise UserError(f"{target}: MindRecord needs a path in UTF-8; write another OUT") from None
    return target


class Job:
    """Writes one set.

    Attributes:
        files: names of its files.
        manifest: what the finished set has, with checksums.
        partial: folder of the files before the set is complete.
    """

    def __init__(self, source: Source, target: Path, options: Options, plan: dict[str, Any], processes: int):
        self.source, self.target, self.options, self.plan, self.processes = source, target, options, plan, processes
        count = options.shards
        digits = len(str(count - 1))
        self.files = [f"{target.name}{n:0{digits}d}" for n in range(count)] if count > 1 else [target.name]
        self.manifest = manifest_of(target)
        self.partial = target.with_name(f".{target.name}.partial")

    def check_finished(self) -> None:
        """Check that the finished set is of the same images and options, and complete."""
        found = read_manifest(self.manifest)
        if found["plan"] != self.plan:
            raise UserError(f"{self.target} exists and has other images or options ({self._differences(found['plan'])})"
                            "; write another OUT, or remove it")  # fmt: skip
        if damaged := list(damages(self.manifest)):
            raise UserError(f"{damaged[0]}; remove the files of {self.target} and write them again")
        self._remove_partial()
        line(f"{self.target}: {found['images']} images in {plural(len(self.files), 'file')}, complete and unchanged")

    def _differences(self, other: dict[str, Any]) -> str:
        keys = [key for key in self.plan if other.get(key) != self.plan[key]]
        return ", ".join(f"{key}: {other.get(key)} there, {self.plan[key]} here" for key in keys[:3])

    def run(self) -> None:
        """Write what is missing, and move the files to their place."""
        with written_to(self.target), self._locked():
            self._check_place()
            bounds = [len(self.source) * n // len(self.files) for n in range(len(self.files) + 1)]
            open_files = [n for n in range(len(self.files)) if self._record(n) is None]
            if done := len(self.files) - len(open_files):
                line(f"{done} of {plural(len(self.files), 'file')} are written already")
            indices = [index for n in open_files for index in range(bounds[n], bounds[n + 1])]
            work = Converted(self.options)
            with closing(sweep(self.source, work, self.processes, self.target.name, indices)) as results:
                for n in open_files:
                    self._write(n, (next(results) for _ in range(bounds[n], bounds[n + 1])))
            self._finish()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Create the folder of the incomplete set, and keep others from writing into it."""
        self.partial.mkdir(parents=True, exist_ok=True)
        with (self.partial / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.target} is being written by another process; wait for it, or end it") from None
            yield

    def _check_place(self) -> None:
        """Check that the files that exist are of this set."""
        path = self.partial / "plan.json"
        if path.exists():
            try:
                plan = json.loads(path.read_text("utf-8"))
            except ValueError:
                plan = {}
            if plan != self.plan:
                raise UserError(
                    f"{self.partial} has a part of a set with other images or options "
                    f"({self._differences(plan)}); use those, or remove this folder"
                )
            return
        existing = [name for name in self.files if self.target.with_name(name).exists()]
        if existing:
            self._remove_partial()
            raise UserError(f"{self.target.with_name(existing[0])} exists already; write another OUT, or remove it")
        replace_text(path, json.dumps(self.plan))

    def _place(self, name: str) -> Path:
        """Where a file is now."""
        final = self.target.with_name(name)
        return self.partial / name if (self.partial / name).exists() else final

    def _record(self, number: int) -> dict[str, Any] | None:
        """Return the record of a complete file; None if it is not."""
        name = self.files[number]
        try:
            record: dict[str, Any] = json.loads((self.partial / f"{name}.json").read_text("utf-8"))
            sizes = [self._place(part).stat().st_size for part in (name, f"{name}.db")]
            return record if sizes == [record["bytes"], record["index_bytes"]] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, number: int, results: Iterator[tuple[int, bytes | Bad]]) -> None:
        """Write one file, and its record."""
        path = self.partial / self.files[number]
        for old in self.partial.glob(f"{path.name}*"):
            if re.fullmatch(re.escape(path.name) + r"(\D.*)?", old.name):
                old.unlink()
        bad: list[dict[str, str]] = []
        writer = Writer(path, self.source, self.options.page)
        for index, result in results:
            if isinstance(result, Bad):
                bad.append({"image": self.source.name(index), "reason": result.reason})
            else:
                writer.add(index, result)
        writer.close(self.files, number)
        record = {"file": path.name, "images": writer.count, "bad": bad, **checksums(path)}
        replace_text(self.partial / f"{path.name}.json", json.dumps(record))

    def _finish(self) -> None:
        """Move the files to their place; the manifest is the last."""
        records = [record for n in range(len(self.files)) if (record := self._record(n)) is not None]
        bad = [entry for record in records for entry in record.pop("bad")]
        images = sum(record["images"] for record in records)
        if not images:
            self._remove_partial()
            raise UserError(f"no image of {self.source.place} can be used; {bad[0]['image']}: {bad[0]['reason']}")
        for name in [f"{name}.db" for name in self.files] + self.files:
            if (self.partial / name).exists():
                (self.partial / name).replace(self.target.with_name(name))
        manifest = {"format": FORMAT, "images": images, "plan": self.plan, "bad": bad, "files": records}
        replace_text(self.manifest, json.dumps(manifest, indent=1) + "\n")
        self._remove_partial()
        for entry in bad[:10]:
            line(f"left out: {entry['image']}: {entry['reason']}")
        left_out = f", {len(bad)} bad images left out (listed in {self.manifest.name})" if bad else ""
        line(f"{self.target}: {plural(images, 'image')} in {plural(len(self.files), 'file')}{left_out}")

    def _remove_partial(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


class Writer:
    """One MindRecord file.

    Attributes:
        count: images written.
    """

    def __init__(self, path: Path, source: Source, page: int):
        with uninterrupted():  # MindSpore turns Ctrl-C during its import into another error
            from mindspore.mindrecord import FileWriter

        self.path, self.source, self.count = path, source, 0
        self.rows: list[dict[str, Any]] = []
        self.size = 0
        named = source.classes and not getattr(source, "numbered", False)
        note = json.dumps({"classes": source.classes}) if named else ""
        fields = {"file_name": "string", "data": "bytes", **({"label": "int32"} if source.classes else {})}
        with mindspore_errors(path):
            self.writer = FileWriter(str(path))
            self.writer.set_header_size(HEADERS[len(note) > HEADERS[0] // 4])
            self.writer.set_page_size(page)
            self.writer.add_schema({name: {"type": kind} for name, kind in fields.items()}, note)
            self.writer.add_index([name for name in fields if name != "data"])

    def add(self, index: int, content: bytes) -> None:
        """Append an image."""
        label = {"label": int(self.source.labels[index])} if self.source.classes else {}
        self.rows.append({"file_name": name_of(self.source, index), "data": content, **label})
        self.size += len(content)
        if self.size >= BATCH_BYTES or len(self.rows) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            with mindspore_errors(self.path):
                self.writer.write_raw_data(self.rows)
            self.count += len(self.rows)
            self.rows, self.size = [], 0

    def close(self, files: list[str], number: int) -> None:
        """Complete the file, as one of a set."""
        self._flush()
        with mindspore_errors(self.path):
            self.writer.commit()
        join(self.path, files, number)
        if read_header(self.path).rows != self.count:
            raise UserError(f"{self.path}: MindSpore did not write all images; is there space left?")
        for path in (self.path, index_of(self.path)):
            shutil.copymode(self.path.with_name("plan.json"), path)  # MindSpore's are for the owner only
            with path.open("rb") as file:
                os.fsync(file.fileno())


def name_of(source: Source, index: int) -> str:
    """Return the name of an image within its source, as text that MindRecord can have."""
    if isinstance(source, MindRecords):
        name = source.key(index)
    else:
        name = source.names[index] if isinstance(source, Files) else source.name(index)
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def join(path: Path, files: list[str], number: int) -> None:
    """Make a file that was written alone a part of a set, in its header."""
    with path.open("r+b") as file:
        header = json.loads(file.read(int.from_bytes(file.read(LENGTH), "little")))
        header["shard_addresses"], header["shard_id"] = files, number
        for page in header["page"] or []:
            page["shard_id"] = number
        content = json.dumps(header, separators=(",", ":")).encode()
        if LENGTH + len(content) > header["header_size"]:
            raise UserError(f"{path}: the names of the files do not fit into the header; write a smaller --shards")
        file.seek(0)
        file.write(len(content).to_bytes(LENGTH, "little") + content)


@contextmanager
def mindspore_errors(path: Path) -> Iterator[None]:
    """Turn an error of MindSpore into one line."""
    try:
        yield
    except Exception as error:
        match = re.search(r"\[ERROR\] *(.*\S)", str(error))
        reason = match[1] if match else " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: MindSpore cannot write it ({reason})") from None


@contextmanager
def written_to(target: Path) -> Iterator[None]:
    """Turn an error of the file system into one line."""
    try:
        yield
    except OSError as error:
        place = error.filename or target
        raise UserError(f"{target} cannot be written ({place}: {error.strerror or error}); write another OUT") from None


def checksums(path: Path) -> dict[str, Any]:
    """Return sizes and SHA-256 of a file and its index."""
    index = index_of(path)
    return {
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "index_bytes": index.stat().st_size,
        "index_sha256": sha256(index),
    }


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def manifest_of(target: Path) -> Path:
    """Return the path of the manifest of a set."""
    return target.with_name(f"{target.name}.json")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        UserError: it does not exist, or is damaged.
    """
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError("format")
        if not all(entry["file"] == Path(entry["file"]).name for entry in manifest["files"]):
            raise ValueError("names")
        _ = dict(manifest["plan"]), manifest["images"]
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}; only a set that prepare_mindrecord.py has finished can be checked"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged; remove the set and write it again") from None
    return dict(manifest)


def damages(manifest: Path) -> Iterator[str]:
    """Compare the files of a set with its manifest; yields what is wrong with each."""
    entries = read_manifest(manifest)["files"]
    with tqdm(entries, desc="check", unit=" files", disable=not sys.stderr.isatty(), leave=False) as bar:
        for entry in bar:
            path = manifest.with_name(entry["file"])
            try:
                found = checksums(path)
            except OSError as error:
                yield f"{error.filename or path}: {error.strerror or error}"
                continue
            if wrong := [key for key, value in found.items() if entry.get(key) != value]:
                place = index_of(path) if wrong[0].startswith("index") else path
                yield f"{place} has changed ({', '.join(wrong)})"


def check(text: str) -> bool:
    """Check a finished set; returns whether it is complete.

    Raises:
        UserError: there is no set.
    """
    path = Path(expanded(text, "command line"))
    if path.is_dir():
        found = sorted(path.glob(f"*{SUFFIX}.json"))
        if len(found) != 1:
            raise UserError(f"{path} has {len(found)} finished sets; name one, for example {path / 'train.mindrecord'}")
        manifest = found[0]
    else:
        manifest = manifest_of(path.with_name(re.sub(rf"({re.escape(SUFFIX)})\d+$", r"\1", path.name)))
    count = 0
    for damage in damages(manifest):
        count += 1
        line(f"bad: {damage}")
    if not count:
        line(f"{open_mindrecord(manifest.with_suffix('')).summary()}; complete")
    return not count
