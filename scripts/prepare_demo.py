"""Crop the photographs of the scikit-image package into a small labelled image folder, without a download.

    python scripts/prepare_demo.py [--out data/demo]

Each of the 17 photographs or textures is one class. Its grey 64x64 crops are written to OUT/train/<class>/NNNN.jpg
and OUT/val/<class>/NNNN.jpg. The two splits use disjoint bands of columns (see ``bands``), so they share no pixel of a
photograph. The same library versions always write the same bytes. A complete OUT stays unchanged; any other existing
OUT is an error.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import cv2
import numpy as np
from numpy.typing import NDArray

PHOTOGRAPHS: dict[str, str] = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cell": "cell.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "moon": "moon.png",
    "motorcycle_left": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "text": "text.png",
}
COUNTS: dict[str, int] = {"train": 180, "val": 50}
PERIODS = 2
BAND_PERCENT: dict[str, tuple[int, int]] = {"train": (0, 58), "val": (62, 96)}  # of one period
CROP_SIZE = 64
SIDE_RANGE = (48, 96)
MIN_STD = 5.0  # grey levels; crops below are blank paper, sky, table or the black rim of the retina
TRIES_PER_CROP = 20
JPEG_QUALITY = 92

GreyImage = NDArray[np.uint8]


class DemoError(Exception):
    """The demo folder cannot be created; the text is one line for the user."""


class Box(NamedTuple):
    """A square of a photograph: columns x to x + side and rows y to y + side, without the ends."""

    x: int
    y: int
    side: int


class Parser(argparse.ArgumentParser):
    """Print an error of the command line as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def bands(width: int) -> dict[str, list[tuple[int, int]]]:
    """Return the half-open column ranges of each split, with gaps between them.

    The width is divided into two equal periods; each has a train band and a val band.
    """
    parts = 100 * PERIODS  # whole numbers, so the rounding is exact
    return {
        split: [(-(-(100 * k + low) * width // parts), (100 * k + high) * width // parts) for k in range(PERIODS)]
        for split, (low, high) in BAND_PERCENT.items()
    }


def photograph_folder() -> Path:
    """Return the folder of the photographs inside the installed scikit-image package."""
    try:
        import skimage.data
    except ImportError as error:
        raise DemoError(f"scikit-image is needed for its photographs: {error}") from error
    return Path(skimage.data.__file__).parent


def load_grey(path: Path) -> GreyImage:
    """Read a photograph from the package, never from the network, as 8-bit grey."""
    from skimage import io  # cv2's reader prints warnings about the colour profiles of these files

    if not path.is_file():
        raise DemoError(f"the installed scikit-image does not contain {path.name}")
    image = io.imread(path)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise DemoError(f"{path.name} is not an 8-bit grey or RGB image: {image.dtype} {image.shape}")
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.ascontiguousarray(image, dtype=np.uint8)


def draw_boxes(image: GreyImage, name: str, split: str, count: int) -> list[Box]:
    """Draw the crops of one class and split from its bands; crops of low contrast are drawn again."""
    height, width = image.shape
    columns = bands(width)[split]
    smallest = min(height, *(x1 - x0 for x0, x1 in columns))
    if smallest < SIDE_RANGE[0]:
        raise DemoError(f"class {name}: a {split} crop needs {SIDE_RANGE[0]} pixels, the band has {smallest}")
    rng = np.random.default_rng(zlib.crc32(f"{name}/{split}".encode()))
    boxes: list[Box] = []
    for _ in range(TRIES_PER_CROP * count):
        if len(boxes) == count:
            break
        x0, x1 = columns[rng.integers(len(columns))]
        side = int(rng.integers(SIDE_RANGE[0], min(SIDE_RANGE[1], x1 - x0, height) + 1))
        x = int(rng.integers(x0, x1 - side + 1))
        y = int(rng.integers(0, height - side + 1))
        if image[y : y + side, x : x + side].std() >= MIN_STD:
            boxes.append(Box(x, y, side))
    if len(boxes) < count:
        raise DemoError(f"class {name}: only {len(boxes)} of {count} {split} crops have enough contrast")
    return boxes


def cut(image: GreyImage, box: Box) -> GreyImage:
    """Resize the box of the photograph to 64x64 pixels."""
    crop = image[box.y : box.y + box.side, box.x : box.x + box.side]
    interpolation = cv2.INTER_AREA if box.side > CROP_SIZE else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(crop, (CROP_SIZE, CROP_SIZE), interpolation=interpolation), dtype=np.uint8)


def write_jpeg(path: Path, image: GreyImage) -> None:
    done, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise DemoError(f"cannot encode {path.name} as JPEG")
    path.write_bytes(code.tobytes())


def expected_files(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield the paths of a complete folder, relative to it."""
    for split, count in counts.items():
        for name in PHOTOGRAPHS:
            for index in range(count):
                yield f"{split}/{name}/{index:04d}.jpg"


def is_complete(out: Path, counts: Mapping[str, int]) -> bool:
    """Whether the folder has exactly the expected images, none of them empty."""
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if not path.is_dir()}
    return files.keys() == set(expected_files(counts)) and all(p.stat().st_size > 0 for p in files.values())


def write_images(folder: Path, counts: Mapping[str, int]) -> None:
    source = photograph_folder()
    for name, file_name in PHOTOGRAPHS.items():
        image = load_grey(source / file_name)
        for split, count in counts.items():
            target = folder / split / name
            target.mkdir(parents=True)
            for index, box in enumerate(draw_boxes(image, name, split, count)):
                write_jpeg(target / f"{index:04d}.jpg", cut(image, box))


def prepare(out: Path, counts: Mapping[str, int] = COUNTS) -> bool:
    """Create the folder; return False if it was already complete.

    The images are written to a temporary folder next to it, which is renamed when it is complete.
    """
    if out.is_dir() and is_complete(out, counts):
        return False
    if out.exists() or out.is_symlink():
        raise DemoError(f"{out} exists and is not a complete demo folder; remove it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        images = Path(temporary, "images")
        write_images(images, counts)
        images.rename(out)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="prepare_demo.py", description="Create a small labelled image folder for a demo run.")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to create (%(default)s)")
    out: Path = parser.parse_args(argv).out
    try:
        created = prepare(out)
    except (DemoError, OSError) as error:
        print(f"prepare_demo.py: error: {error}", file=sys.stderr)
        return 2
    numbers = ", ".join(f"{len(PHOTOGRAPHS) * count} {split}" for split, count in COUNTS.items())
    state = "" if created else " (already complete, unchanged)"
    print(f"{len(PHOTOGRAPHS)} classes, {numbers} images in {out}{state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
