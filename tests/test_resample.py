"""Resizing has the numbers of Pillow's two passes, with our library and without it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src import native
from src.data import resample
from src.data.resample import Filter, Part
from tests.helpers import ROOT, Run

BOTH: list[Filter] = ["bicubic", "bilinear"]


@pytest.fixture(params=["library", "Pillow"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """What resizes during a test."""
    path = request.getfixturevalue("library") if request.param == "library" else ""
    assert bool(resample.set_up(path)) == (not path)
    yield request.param
    resample.set_up("")


def expected(pixels: np.ndarray, size: tuple[int, int], filter_name: Filter) -> np.ndarray:
    """Pillow's result for each band alone, with the width first."""
    method = resample.FILTERS[filter_name]
    bands = []
    for band in range(pixels.shape[2]):
        image = Image.fromarray(np.ascontiguousarray(pixels[:, :, band]))
        bands.append(np.asarray(image.resize((size[1], image.height), method).resize((size[1], size[0]), method)))
    return np.stack(bands, axis=-1)


def assert_same(
    pixels: np.ndarray, size: tuple[int, int], filter_name: Filter = "bicubic", part: Part | None = None
) -> None:
    before = pixels.copy()
    actual = resample.resized(pixels, size, filter_name, part)
    top, left, rows, cols = part or (0, 0, *size)
    wanted = expected(pixels, size, filter_name)[top : top + rows, left : left + cols]
    assert (actual.dtype, actual.shape) == (pixels.dtype, wanted.shape)
    assert np.array_equal(actual, wanted), (pixels.shape, pixels.strides, size, filter_name, part)
    assert np.array_equal(pixels, before)


def image(rng: np.random.Generator, rows: int, cols: int, channels: int, kind: type = np.uint8) -> np.ndarray:
    """Random pixels; half of them are 0 or 255, which sums over- and undershoot."""
    pixels = rng.integers(-128, 384, (rows, cols, channels)).clip(0, 255)
    return pixels.astype(kind) if kind is np.uint8 else (pixels / np.float32(255)).astype(kind)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("filter_name", BOTH)
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize(("side", "count"), [(12, 150), (70, 60), (401, 12)])
def test_random_sizes_and_parts(filter_name: Filter, kind: type, side: int, count: int) -> None:
    rng = np.random.default_rng(side)
    for turn in range(count):
        rows, cols, height, width = map(int, rng.integers(1, side, 4))
        height, width = rows if turn % 5 == 0 else height, cols if turn % 7 == 0 else width
        top, left = int(rng.integers(height)), int(rng.integers(width))
        part = (top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)))
        pixels = image(rng, rows, cols, 1 + turn % 6, kind)
        assert_same(pixels, (height, width), filter_name, part if turn % 2 else None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("filter_name", BOTH)
@pytest.mark.parametrize(
    ("before", "size"),
    [
        ((1, 1), (1, 1)),
        ((1, 1), (300, 200)),
        ((300, 200), (1, 1)),
        ((1, 5000), (224, 300)),
        ((5000, 1), (300, 224)),
        ((3, 9000), (5, 700)),  # more values in a row than are transposed at once
        ((9000, 3), (700, 5)),
        ((2, 3), (1000, 2)),
        ((375, 500), (128, 128)),
    ],
)
def test_extreme_sizes(before: tuple[int, int], size: tuple[int, int], filter_name: Filter) -> None:
    assert_same(image(np.random.default_rng(1), *before, 3), size, filter_name)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("channels", [2, 4, 13, 5000])
def test_many_channels(channels: int) -> None:
    """More than one pixel of 5000 channels has more values than are transposed at once."""
    rng = np.random.default_rng(channels)
    side = 9 if channels < 100 else 3
    for kind in (np.uint8, np.float32):
        assert_same(image(rng, side, side + 1, channels, kind), (side - 1, side + 3))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_views_of_a_larger_array(kind: type) -> None:
    whole = image(np.random.default_rng(2), 60, 50, 4, kind)
    for view in (
        whole[7:40, 9:41],
        whole[::-1],
        whole[::3],
        whole[:, ::-1],
        whole[:, ::2],
        whole[:, :, :3],
        whole[:, :, ::-1],
        whole.swapaxes(0, 1),
        np.asfortranarray(whole),
        np.broadcast_to(whole[:1], whole.shape),
        whole[5:6, 5:6],
    ):
        assert_same(view, (31, 29))
        assert_same(view, (len(view), 29))
        assert_same(view, (31, view.shape[1]), part=(3, 0, 9, max(view.shape[1] - 1, 1)))


@pytest.mark.usefixtures("way")
def test_arrays_in_odd_places() -> None:
    memory = np.zeros(4 * 600 + 1, np.uint8)
    shifted = memory[1:].view(np.float32).reshape(10, 20, 3)
    shifted[:] = image(np.random.default_rng(3), 10, 20, 3, np.float32)
    assert_same(shifted, (7, 23))
    fixed = image(np.random.default_rng(3), 10, 20, 3)
    fixed.flags.writeable = False
    assert_same(fixed, (7, 23))


@pytest.mark.parametrize("filter_name", BOTH)
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_a_part_of_an_enormous_result(library: str, filter_name: Filter, kind: type) -> None:
    """Only the part is computed; the whole would have two thousand million pixels and more."""
    rng = np.random.default_rng(4)
    for before, size, part in [
        ((4, 3000), (256, 192_000), (16, 95_888, 224, 224)),
        ((3000, 4), (192_000, 256), (95_888, 16, 224, 224)),
        ((3, 2), (40_000, 60_000), (0, 59_990, 20, 10)),
        ((70_000, 2), (35_000, 2), (34_990, 0, 10, 2)),
        ((1_000_000, 2), (2_000_000, 3000), (900_000, 1000, 10, 10)),
        ((40_000, 3), (9, 2), (0, 0, 9, 2)),
        ((3, 40_000), (2, 9), (0, 0, 2, 9)),
    ]:
        pixels = image(rng, *before, 3, kind)
        resample.set_up("")
        by_pillow = resample.resized(pixels, size, filter_name, part)
        assert resample.set_up(library) == ""
        by_library = resample.resized(pixels, size, filter_name, part)
        assert np.array_equal(by_pillow, by_library), (before, size)
        if size[0] * size[1] * 3 < 10**8:
            top, left, rows, cols = part
            whole = expected(pixels, size, filter_name)
            assert np.array_equal(by_pillow, whole[top : top + rows, left : left + cols]), (before, size)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("pixels", "size", "part"),
    [
        (np.zeros((4, 4, 3), np.int16), (2, 2), None),
        (np.zeros((4, 4), np.uint8), (2, 2), None),
        (np.zeros((0, 4, 3), np.uint8), (2, 2), None),
        (np.zeros((4, 4, 0), np.uint8), (2, 2), None),
        (np.zeros((4, 4, 3), np.uint8), (0, 2), None),
        (np.zeros((4, 4, 3), np.uint8), (2, 2), (0, 0, 2, 3)),
        (np.zeros((4, 4, 3), np.uint8), (2, 2), (-1, 0, 2, 2)),
        (np.zeros((4, 4, 3), np.uint8), (2, 2), (1, 1, 0, 1)),
        (np.zeros((4, 4, 3), ">f4"), (2, 2), None),
    ],
)
def test_what_cannot_be_resized_is_refused(pixels: np.ndarray, size: tuple[int, int], part: Part | None) -> None:
    with pytest.raises(ValueError, match="cannot be resized"):
        resample.resized(pixels, size, part=part)


@pytest.mark.usefixtures("way")
def test_threads_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(5)
    images = [image(rng, *map(int, rng.integers(20, 200, 2)), 3) for _ in range(40)]
    wanted = [expected(pixels, (64, 80), "bicubic") for pixels in images]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda pixels: resample.resized(pixels, (64, 80)), images * 5))
    assert all(np.array_equal(one, other) for one, other in zip(done, wanted * 5, strict=True))


def test_pillow_is_used_where_the_library_takes_too_much_memory(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "MOST", 100_000)
    functions = resample.functions_of(library)
    pixels = image(np.random.default_rng(6), 300, 300, 3)
    resample.set_up(library)
    with ThreadPoolExecutor(1) as pool:  # a thread that has no memory yet
        by_library = pool.submit(resample.by_library, functions, pixels, (90, 80), "bicubic", (0, 0, 90, 80)).result()
        done = pool.submit(resample.resized, pixels, (90, 80)).result()
    resample.set_up("")
    assert by_library is None and np.array_equal(done, expected(pixels, (90, 80), "bicubic"))


@pytest.mark.usefixtures("way")
def test_too_many_pixels_are_refused() -> None:
    pixels = np.broadcast_to(np.uint8(0), (100_000_000, 1, 1))
    with pytest.raises(MemoryError):
        resample.resized(pixels, (224, 224))


# --- where there is no library ----------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    yield tmp_path / "cache" / "mim_mindspore"
    resample.set_up("")


@pytest.mark.parametrize(("compiler", "words"), [("/bin/false", "/bin/false fails"), ("no-such", "does not run")])
def test_without_a_compiler_pillow_is_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, words: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert resample.library() == ""
    assert words in resample.set_up("")
    assert_same(image(np.random.default_rng(7), 20, 30, 3), (11, 44))
    assert [path.name for path in cache.iterdir()] == [".lock"] if cache.exists() else True


@pytest.mark.parametrize("content", [None, b"", b"rubbish"])
def test_a_file_that_is_no_library_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "resample.so"
    if content is not None:
        path.write_bytes(content)
    assert "cannot be loaded" in resample.set_up(str(path))
    assert_same(image(np.random.default_rng(7), 20, 30, 3), (11, 44))


@pytest.mark.compiles
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("1 << (BITS - 1)", "1 << (BITS - 2)", "resize of uint8 differs from Pillow's"),
        ("near = ((a + 2.0)", "near = ((a + 2.0001)", "bicubic resize of "),
        ("x < 1.0 ? 1.0 - x", "x < 0.99 ? 1.0 - x", "bilinear resize of "),
        ("START = 0;", "START = 1e-5;", "resize of float32 differs"),
        ("resample_float32", "resample_float", "cannot be loaded"),
    ],
)
def test_a_library_with_other_numbers_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str, wrong: str, words: str
) -> None:
    source = resample.SOURCE.read_text(encoding="utf-8")
    assert source.count(right) == 1
    (tmp_path / "resample.cpp").write_text(source.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(resample, "SOURCE", tmp_path / "resample.cpp")
    path = resample.library()
    assert Path(path).parent == cache
    assert words in resample.set_up(path)
    assert_same(image(np.random.default_rng(7), 20, 30, 3), (11, 44))


def test_workers_need_no_mindspore(run_entry: Run, library: str) -> None:
    code = (
        f"import sys; from src.data import resample; print([resample.set_up('{library}'), 'mindspore' in sys.modules])"
    )
    done = run_entry("-c", code)
    assert done.stdout.strip() == "['', False]", done.stderr


SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.compiles
@pytest.mark.parametrize("machine", ["native", "x86-64"])
def test_the_library_touches_no_memory_of_others(tmp_path: Path, machine: str) -> None:
    """tests/resample_driver.cpp calls it with arrays of exactly their size, under the compiler's checks."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler")

    def compiled(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [compiler, "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wno-psabi", *SANITIZERS]
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)

    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    if compiled(f"-march={machine}", tmp_path / "empty.cpp", "-o", tmp_path / "empty").returncode:
        pytest.skip(f"{compiler} has no sanitizers or no {machine}")
    program = tmp_path / "driver"
    driver = ROOT / "tests" / "resample_driver.cpp"
    done = compiled(f"-march={machine}", "-Werror", driver, resample.SOURCE, "-o", program)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


def test_the_flags_are_those_of_every_compiled_file() -> None:
    assert "-march=native" in native.FLAGS and "-ffast-math" not in native.FLAGS + resample.FLAGS
