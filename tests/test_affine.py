"""Affine transforms have the numbers of Pillow's, with our library and without it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data import affine, resample
from src.data.affine import Matrix, rotation, transformed
from tests.helpers import ROOT

FILL = (9, 128, 250)
BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(params=["library", "Pillow"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """What transforms during a test."""
    path = request.getfixturevalue("library") if request.param == "library" else ""
    affine.use(path)
    assert (affine._state.function is not None) == bool(path)
    yield request.param
    affine.use("")


def image(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """Random pixels; half of them are 0 or 255, which cubics over- and undershoot."""
    return rng.integers(-128, 384, (rows, cols, 3)).clip(0, 255).astype(np.uint8)


def assert_same(pixels: np.ndarray, matrix: Matrix) -> None:
    before, picture = pixels.copy(), Image.fromarray(pixels)
    wanted = picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=FILL)
    actual = transformed(pixels, matrix, FILL)
    assert actual.dtype == np.uint8
    assert np.array_equal(actual, np.asarray(wanted)), (pixels.shape, matrix)
    assert np.array_equal(pixels, before)


@pytest.mark.usefixtures("way")
def test_random_shapes_and_matrices() -> None:
    rng = np.random.default_rng(1)
    for turn in range(150):
        rows, cols = map(int, rng.integers(1, 70 if turn % 3 else 7, 2))
        pixels, amount = image(rng, rows, cols), float(rng.uniform(-1, 1))
        assert_same(pixels, (1, amount, 0, 0, 1, 0))
        assert_same(pixels, (1, 0, 0, amount, 1, 0))
        assert_same(pixels, (1, 0, amount * cols, 0, 1, 0))
        assert_same(pixels, (1, 0, 0, 0, 1, amount * rows))
        a, b, c, d, e, f = rng.normal(size=6).tolist()
        assert_same(pixels, (a, b, 20 * c, d, e, 20 * f))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0, -1.0, 3.0, 1e-9, 1e9])
def test_whole_and_half_pixels_and_what_is_outside(amount: float) -> None:
    pixels = image(np.random.default_rng(2), 12, 19)
    for matrix in ((1, 0, amount, 0, 1, 0), (1, 0, 0, 0, 1, amount), (1, 0, amount, 0, 1, amount)):
        assert_same(pixels, matrix)
    assert_same(pixels, (amount, 0, 0, 0, amount, 0))


@pytest.mark.usefixtures("way")
def test_pixels_between_others_and_flat_ones() -> None:
    rng = np.random.default_rng(3)
    whole = image(rng, 50, 60)
    for pixels in (whole[5:30, 7:40], whole[::2], whole[:, ::3], whole[::-1], np.full((20, 30, 3), 77, np.uint8)):
        assert_same(pixels, (0.9, 0.2, 1.5, -0.3, 1.1, 2))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("rows", "cols"), [(24, 24), (17, 40), (1, 9)])
def test_a_rotation_is_that_of_pillow(rows: int, cols: int) -> None:
    pixels = image(np.random.default_rng(4), rows, cols)
    for degrees in (0.0, 27.0, -30.0, 1e-3, *np.random.default_rng(5).uniform(-30, 30, 20).tolist()):
        wanted = Image.fromarray(pixels).rotate(degrees, BICUBIC, fillcolor=FILL)
        assert np.array_equal(transformed(pixels, rotation(degrees, rows, cols), FILL), np.asarray(wanted)), degrees


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_other_pixels_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="cannot be transformed"):
        transformed(pixels, (1, 0, 0, 0, 1, 0), FILL)


@pytest.mark.compiles
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("right", "wrong"), [("2 * (a - b) + c - d", "2 * (a - b) + c"), ("affine_bic", "affine_quad")]
)
def test_a_library_with_other_numbers_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, right: str, wrong: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = resample.FURTHER.read_text(encoding="utf-8")
    assert source.count(right) == 1
    (tmp_path / "affine.cpp").write_text(source.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(resample, "FURTHER", tmp_path / "affine.cpp")
    path = resample.library()
    assert path
    affine.use(path)
    assert affine._state.function is None
    assert_same(image(np.random.default_rng(6), 20, 30), (1, 0.2, 0, 0, 1, 0))
    affine.use("")


@pytest.mark.compiles
@pytest.mark.parametrize("machine", ["native", "x86-64"])
def test_the_library_touches_no_memory_of_others(tmp_path: Path, machine: str) -> None:
    """tests/affine_driver.cpp calls it with arrays of exactly their size, under the compiler's checks."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

    def compiled(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [compiler, *flags, f"-march={machine}", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    if compiled(tmp_path / "empty.cpp", "-o", tmp_path / "empty").returncode:
        pytest.skip(f"{compiler} has no sanitizers or no {machine}")
    program = tmp_path / "driver"
    done = compiled("-Werror", ROOT / "tests" / "affine_driver.cpp", resample.FURTHER, "-o", program)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3000
