"""Image folders, order of the images, augmentation that repeats, evaluation equal to torchvision on Pillow images."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import dtype as mstype
from mindspore.dataset import vision
from mindspore.dataset.vision import Inter

from src.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from src.data.loader import Loader, evaluation_operations, has_scan
from src.data.sources import DataError, ImageFolder, image_folder, labelled_subset
from tests.helpers import MakeFolder

Image = pytest.importorskip("PIL.Image")
PILLOW = int(pytest.importorskip("PIL").__version__.split(".")[0])

pytestmark = pytest.mark.usefixtures("graph_mode")

BOTH = ("image", "label")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, image_folder_factory: MakeFolder) -> Path:
    return image_folder_factory(tmp_path_factory.mktemp("images"))


def picture(path: Path, size: tuple[int, int] = (8, 8), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))
    return path


def batches_of(loader: Loader, epoch: int = 0) -> list[tuple[np.ndarray, ...]]:
    return [tuple(part.asnumpy() for part in batch) for batch in loader.epoch(epoch)]


# --- folders ----------------------------------------------------------------------------------------------------


def test_classes_are_sorted_and_label_their_files(tmp_path: Path) -> None:
    for name in ("zebra/1.png", "ant/deep/2.jpg", "ant/1.JPEG", "cat/1.bmp"):
        picture(tmp_path / name)
    source = image_folder(tmp_path)
    assert source.classes == ["ant", "cat", "zebra"]
    names = [path.relative_to(tmp_path).as_posix() for path in source.files]
    assert list(zip(names, source.labels, strict=True)) == [
        ("ant/1.JPEG", 0),
        ("ant/deep/2.jpg", 0),
        ("cat/1.bmp", 1),
        ("zebra/1.png", 2),
    ]
    assert source.summary() == f"{tmp_path}: 4 images, 3 classes"


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.png")
    source = image_folder(tmp_path)
    assert [path.name for path in source.files] == ["a.png", "b.png"]
    assert source.classes == []
    assert source.summary() == f"{tmp_path}: 2 images, no labels"


def test_other_files_are_counted_and_hidden_ones_ignored(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    for name in ("notes.txt", "a/more.TXT", "a/LICENSE", "a/.hidden.png", ".DS_Store"):
        (tmp_path / name).write_text("x")
    picture(tmp_path / ".cache" / "1.png")
    (tmp_path / "empty_class").mkdir()
    source = image_folder(tmp_path)
    assert len(source) == 1 and source.classes == ["a"]
    assert source.skipped == Counter({".txt": 2, "": 1})
    assert source.summary().endswith("1 image, 1 class, 3 other files skipped (2 x .txt, 1 x no extension)")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        image_folder(tmp_path / "gone")
    text = str(caught.value)
    assert text.startswith(f"data: there is no folder {tmp_path / 'gone'}; ") and "set data.root" in text


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    formats = r"; .*\.bmp, \.jpeg, \.jpg, \.png, \.tif, \.tiff$"
    with pytest.raises(DataError, match=f"^data: no image in {tmp_path}{formats}"):
        image_folder(tmp_path)
    (tmp_path / "a" / "x.webp").write_text("x")
    with pytest.raises(DataError, match=rf"^data: no image in {tmp_path} \(1 other file\){formats}"):
        image_folder(tmp_path)


def test_images_next_to_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png")
    picture(tmp_path / "stray.png")
    with pytest.raises(DataError, match=f"^data: {tmp_path} .*stray.png next to cat/.*; move them into a class folder"):
        image_folder(tmp_path)


def fake_source(counts: dict[str, int]) -> ImageFolder:
    files = [Path(f"{name}/{number:03d}.png") for name, count in counts.items() for number in range(count)]
    labels = [label for label, count in enumerate(counts.values()) for _ in range(count)]
    return ImageFolder(Path("some/folder"), files, labels, list(counts))


def test_a_labelled_subset_is_spread_evenly_over_each_class() -> None:
    share = labelled_subset(fake_source({"a": 9, "b": 5}), 3)
    assert [path.as_posix() for path in share.files] == [
        *("a/000.png", "a/004.png", "a/008.png"),
        *("b/000.png", "b/002.png", "b/004.png"),
    ]
    assert share.labels == [0, 0, 0, 1, 1, 1] and share.classes == ["a", "b"]


def test_a_labelled_subset_of_zero_is_everything() -> None:
    source = fake_source({"a": 3, "b": 2})
    assert labelled_subset(source, 0) == source
    assert labelled_subset(source, 2).files[-2:] == source.files[-2:]


def test_a_labelled_subset_that_is_too_large() -> None:
    with pytest.raises(DataError, match=r"^data\.labels_per_class: 6, .*some/folder/b .*; write 5 or less$"):
        labelled_subset(fake_source({"a": 9, "b": 5, "c": 7}), 6)


# --- order ------------------------------------------------------------------------------------------------------


def order_loader(count: int, batch: int, seed: int = 0, training: bool = True) -> Loader:
    return Loader(fake_source({"a": count}), DataConfig(), (16, 16), 3, batch, ("image",), seed, training)


def test_the_training_order_is_a_permutation_without_the_incomplete_batch() -> None:
    full = order_loader(40, 8).order(0)
    assert sorted(full) == list(range(40)) and list(full) != list(range(40))
    loader = order_loader(43, 8)
    cut = loader.order(0)
    assert len(loader) == 5 and len(cut) == 40 and len(set(cut)) == 40


def test_the_training_order_is_a_function_of_seed_and_epoch() -> None:
    loader = order_loader(40, 8, seed=3)
    assert np.array_equal(loader.order(5), order_loader(40, 8, seed=3).order(5))
    assert not np.array_equal(loader.order(5), loader.order(6))
    assert not np.array_equal(loader.order(5), order_loader(40, 8, seed=4).order(5))


def deit_order(shuffled: np.ndarray, rank: int, ranks: int, repeats: int) -> np.ndarray:
    """RASampler of DeiT's samplers.py, given its permutation."""
    count = len(shuffled)
    indices = [index for index in shuffled for _ in range(repeats)]
    total = -(-count * repeats // ranks) * ranks
    indices += indices[: total - len(indices)]
    return np.array(indices[rank:total:ranks][: count // 256 * 256 // ranks])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_repeats_are_deits_sampler_over_ranks(ranks: int) -> None:
    """600 images are 512 in an epoch, of a third as many files; copies of one are on different ranks."""
    files, batch = fake_source({"a": 600}), 16
    shuffled = np.random.default_rng([5, 2]).permutation(600)
    config, seen = DataConfig(repeats=3), np.zeros(600, int)
    for rank in range(ranks):
        loader = Loader(files, config, (16, 16), 3, batch, ("image",), 5, True, rank, ranks)
        theirs = deit_order(shuffled, rank, ranks, 3)
        assert len(loader) == len(theirs) // batch == 512 // ranks // batch
        ours = loader.order(2)
        np.testing.assert_array_equal(ours, theirs[: len(loader) * batch])
        np.add.at(seen, ours, 1)
        if ranks == 3:
            assert len(set(ours)) == len(ours)
    assert seen.max() == 3 and (seen > 0).sum() == -(-seen.sum() // 3)


def test_repeats_of_few_images_are_an_epoch_too() -> None:
    loader = Loader(fake_source({"a": 40}), DataConfig(repeats=2), (16, 16), 3, 8, ("image",))
    assert len(loader) == 5 and sorted(np.bincount(loader.order(0), minlength=40)) == [0] * 20 + [2] * 20


def test_the_evaluation_order_is_every_image_once_then_padding() -> None:
    loader = order_loader(10, 4, training=False)
    assert len(loader) == 3
    assert list(loader.order(0)) == list(loader.order(1)) == [*range(10), -1, -1]


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(DataError) as caught:
        order_loader(5, 8)
    assert str(caught.value) == ("train.batch_size: 8 is more than the 5 images of some/folder; write 5 or less")


def test_only_one_or_three_channels_come_from_files() -> None:
    with pytest.raises(DataError) as caught:
        Loader(fake_source({"a": 8}), DataConfig(), (16, 16), 5, 4, ("image",))
    assert str(caught.value) == "encoder.in_chans: image files give 1 or 3 channels, not 5"


# --- batches ----------------------------------------------------------------------------------------------------


def test_training_batches_have_the_stated_shape_and_scale(root: Path) -> None:
    source = image_folder(root / "train")
    config = DataConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), workers=2)
    plain = batches_of(Loader(source, config, (32, 48), 3, 4, BOTH, seed=1))
    assert len(plain) == 6
    for image, label in plain:
        assert image.shape == (4, 3, 32, 48) and image.dtype == np.float32
        assert label.shape == (4,) and label.dtype == np.int32
    pixels = np.stack([image for image, _ in plain])
    assert pixels.min() >= 0 and 0.8 < pixels.max() <= 1
    normalised = replace(config, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    for (image, _), (other, _) in zip(
        plain, batches_of(Loader(source, normalised, (32, 48), 3, 4, BOTH, seed=1)), strict=True
    ):
        expected = (image - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(IMAGENET_STD, (3, 1, 1))
        np.testing.assert_allclose(other, expected, atol=1e-5)


def test_training_labels_belong_to_their_images(tmp_path: Path) -> None:
    for label in range(4):  # the grey level tells the class
        for number in range(3):
            path = tmp_path / f"class_{label}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            assert cv2.imwrite(str(path), np.full((20, 20, 3), 60 * label, np.uint8))
    config = DataConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), workers=2)
    loader = Loader(image_folder(tmp_path), config, (16, 16), 3, 4, BOTH, seed=2)
    for image, label in batches_of(loader):
        np.testing.assert_array_equal(np.round(image.mean(axis=(1, 2, 3)) * 255 / 60), label)


def test_an_epoch_repeats_bit_by_bit_and_differs_from_others(root: Path) -> None:
    config = DataConfig(brightness=0.4, contrast=0.4, workers=2)
    loader = Loader(image_folder(root / "train"), config, (32, 32), 3, 8, BOTH, seed=5)

    def epoch(number: int, of: Loader = loader) -> np.ndarray:
        return np.concatenate([image for image, _ in batches_of(of, number)])

    first = epoch(1)
    other = epoch(2)
    np.testing.assert_array_equal(epoch(1), first)  # also after another epoch was read: what resuming needs
    assert not np.array_equal(other, first)
    # the augmentation differs too, not only the order: compare sorted image means
    assert not np.allclose(np.sort(first.mean(axis=(1, 2, 3))), np.sort(other.mean(axis=(1, 2, 3))), atol=1e-6)
    assert not np.array_equal(epoch(1, replace(loader, seed=6)), first)


def test_evaluation_covers_every_image_once_with_padding(root: Path) -> None:
    source = image_folder(root / "val")
    loader = Loader(source, DataConfig(workers=2), (32, 32), 3, 4, BOTH, training=False)
    found = batches_of(loader)
    labels = np.concatenate([label for _, label in found])
    assert [len(image) for image, _ in found] == [4, 4, 4]
    assert list(labels[: len(source)]) == source.labels
    assert list(labels[len(source) :]) == [-1] * 3
    images = np.concatenate([image for image, _ in found])[: len(source)]
    assert len({image.tobytes() for image in images}) == len(source)


def test_only_the_columns_asked_for(root: Path) -> None:
    loader = Loader(image_folder(root / "val"), DataConfig(workers=2), (32, 32), 3, 4, ("image",), training=False)
    (batch, *_) = loader.epoch(0)
    assert len(batch) == 1 and batch[0].dtype == mstype.float32


# --- the evaluation transform -----------------------------------------------------------------------------------


def pillow_evaluation(path: Path, size: tuple[int, int], crop: float, mode: str = "RGB") -> np.ndarray:
    """torchvision's Resize (bicubic) and CenterCrop on a Pillow image, to (H, W, C) uint8."""
    image = Image.open(path).convert("RGB").convert(mode)
    width, height = image.size
    if size[0] == size[1]:
        short = int(size[0] / crop)
        resized = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    else:
        resized = (int(size[1] / crop), int(size[0] / crop))
    pixels = np.asarray(image.resize(resized, Image.BICUBIC))
    top, left = round((resized[1] - size[0]) / 2.0), round((resized[0] - size[1]) / 2.0)
    pixels = pixels[top : top + size[0], left : left + size[1]]
    return pixels if pixels.ndim == 3 else pixels[..., None]


@pytest.mark.parametrize(
    ("file_size", "size", "crop"),
    [
        ((50, 71), (32, 32), 0.875),  # 36 x 51: 19 / 2 rounds to 10, which flooring misses
        ((75, 50), (32, 32), 0.875),  # 54 x 36: 22 / 2
        ((50, 71), (32, 32), 1.0),  # 32 x 45: 13 / 2 rounds to 6
        ((50, 71), (32, 48), 0.875),  # 36 x 54 whatever the file's shape
        ((20, 30), (32, 32), 0.9),  # enlarged to 35 x 52
        ((488, 26), (39, 39), 1.0),  # 732 x 39, not 731, hence 346 rows above, not 345
        ((26, 488), (39, 39), 1.0),
        ((50, 71), (28, 28), 0.875),  # 32 x 45 with MindSpore's own rule
        ((9, 70), (24, 24), 0.875),  # wide and enlarged
    ],
)
def test_evaluation_equals_pillow(
    tmp_path: Path, file_size: tuple[int, int], size: tuple[int, int], crop: float
) -> None:
    path = picture(tmp_path / "a" / "1.png", file_size, seed=7)
    config = DataConfig(eval_crop=crop, workers=2)
    ours = batches_of(Loader(image_folder(tmp_path), config, size, 3, 1, ("image",), training=False))[0][0][0]
    pixels = pillow_evaluation(path, size, crop).transpose(2, 0, 1) / 255.0
    expected = (pixels - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(IMAGENET_STD, (3, 1, 1))
    np.testing.assert_allclose(ours, expected, atol=1e-5)  # one grey level is 0.017


def test_grey_evaluation_is_pillows_luminance(tmp_path: Path) -> None:
    path = picture(tmp_path / "a" / "1.png", (40, 40), seed=8)
    config = DataConfig(mean=(0.5,), std=(0.25,), eval_crop=1.0, workers=2)
    loader = Loader(image_folder(tmp_path), config, (40, 40), 1, 1, ("image",), training=False)
    ours = batches_of(loader)[0][0]
    assert ours.shape == (1, 1, 40, 40)
    expected = (pillow_evaluation(path, (40, 40), 1.0, "L").transpose(2, 0, 1) / 255.0 - 0.5) / 0.25
    np.testing.assert_allclose(ours[0], expected, atol=1.01 / 255 / 0.25)  # luminance weights round differently
    assert np.abs(ours[0] - expected).mean() < 0.5 / 255 / 0.25


def test_grey_training_batches_have_one_channel(root: Path) -> None:
    config = DataConfig(mean=(0.5,), std=(0.5,), brightness=0.2, workers=2)
    image = batches_of(Loader(image_folder(root / "train"), config, (16, 32), 1, 4, ("image",)))[0][0]
    assert image.shape == (4, 1, 16, 32) and image.dtype == np.float32
    assert -1 <= image.min() < -0.2 and 0.2 < image.max() <= 1


def test_every_pixel_of_the_centre_crop_comes_from_the_middle() -> None:
    crop = evaluation_operations((4, 4), 1.0)[1]
    image = np.arange(7 * 9).reshape(7, 9, 1)
    # 3 / 2 rounds to 2, 5 / 2 to 2: half to even
    np.testing.assert_array_equal(crop(image), image[2:6, 2:6])


# --- bicubic: MindSpore and Pillow ------------------------------------------------------------------------------


def pillow_bicubic(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.BICUBIC))


def width_first(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """In two calls, whose order no version of Pillow changes."""
    return pillow_bicubic(pillow_bicubic(pixels, pixels.shape[0], width), height, width)


def height_first_in_pillow_13(before: tuple[int, int], after: tuple[int, int]) -> bool:
    rows, cols = before[0] - after[0], before[1] - after[1]
    return rows > 0 and cols != 0 and rows > 2 * cols


def boxes_and_sizes(count: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(height, width) of a crop and of the result: any, one or both sides kept, and at the edge of the condition."""
    rng, found = np.random.default_rng(3), []
    for number in range(count):
        rows, cols, height, width = map(int, rng.integers(1, 100, 4))
        if number % 5 == 1:
            height = rows
        elif number % 5 == 2:
            width = cols
        elif number % 5 == 3:
            width = max(1, cols - number % 7)
            height = max(1, rows - 2 * (cols - width) - int(rng.integers(-1, 2)))
        found.append(((rows, cols), (rows, cols) if number % 25 == 0 else (height, width)))
    return found


@pytest.mark.parametrize(("lowest", "highest"), [(0, 256), (64, 192)], ids=["sharp", "soft"])
def test_a_crop_and_resize_takes_the_width_first_and_pillow_13_sometimes_the_height(lowest: int, highest: int) -> None:
    rng, worst = np.random.default_rng(5), 0
    for (rows, cols), (height, width) in boxes_and_sizes(400):
        top, left = map(int, rng.integers(0, 9, 2))
        image = rng.integers(lowest, highest, (rows + top + 2, cols + left + 2, 3), np.uint8)
        part = image[top : top + rows, left : left + cols]
        ours = vision.Resize((height, width), Inter.PILCUBIC)(vision.Crop((top, left), (rows, cols))(image))
        where = f"{rows}x{cols} to {height}x{width}"
        np.testing.assert_array_equal(ours, width_first(part, height, width), where)
        difference = np.abs(ours.astype(int) - pillow_bicubic(part, height, width)).max()
        if PILLOW < 13 or not height_first_in_pillow_13((rows, cols), (height, width)):
            assert difference == 0, where
        worst = max(worst, difference)
    if PILLOW < 13:
        assert worst == 0
    elif lowest:  # the first pass cannot leave 0..255: only its rounding differs
        assert 1 <= worst <= 2
    else:
        assert worst > 2


def test_the_training_crop_takes_the_width_first_too() -> None:
    """The operation of the training pipeline on boxes of one shape, of which one must give its result exactly."""
    rng, pillow_differs = np.random.default_rng(6), 0
    ds.config.set_seed(6)
    for (rows, cols), size in [((24, 18), (12, 16)), ((24, 18), (30, 9)), ((20, 20), (20, 20)), ((16, 24), (10, 30))]:
        image = rng.integers(0, 256, (28, 27, 3), np.uint8)
        area, ratio = rows * cols / (28 * 27), cols / rows
        ours = vision.RandomResizedCrop(size, (area, area), (ratio, ratio), Inter.PILCUBIC)(image)
        parts = [image[y : y + rows, x : x + cols] for y in range(29 - rows) for x in range(28 - cols)]
        (part,) = [part for part in parts if np.array_equal(width_first(part, *size), ours)]
        differs = not np.array_equal(pillow_bicubic(part, *size), ours)
        assert differs == (PILLOW >= 13 and height_first_in_pillow_13((rows, cols), size))
        pillow_differs += differs
    assert pillow_differs == (2 if PILLOW >= 13 else 0)


@pytest.mark.parametrize(
    ("side", "short", "long", "longer"),
    [
        (39, 26, 488, 732),  # of the first five MindSpore's own operation makes one pixel less
        (224, 112, 117, 234),
        (224, 140, 155, 248),
        (248, 248, 997, 997),
        (438, 102, 119, 511),
        (256, 375, 500, 341),
        (256, 192, 333, 444),
        (32, 48, 51, 34),
        (32, 47, 47, 32),
    ],
)
def test_the_longer_side_of_an_evaluation_is_torchvisions(side: int, short: int, long: int, longer: int) -> None:
    resize = evaluation_operations((side, side), 1.0)[0]
    assert longer == int(side * long / short)
    assert resize(np.zeros((long, short, 3), np.uint8)).shape == (longer, side, 3)
    assert resize(np.zeros((short, long, 3), np.uint8)).shape == (side, longer, 3)


# --- broken files -----------------------------------------------------------------------------------------------


#: a JPEG as far as its frame header: the size is there, no scan follows; MindSpore's decoder ends the process on it
HEADER = bytes.fromhex("ffd8 ffe0 0004 0000 ffc0 0011 08 0010 0010 03 012200 021101 031101".replace(" ", ""))


@pytest.mark.parametrize(
    "content",
    [b"", b"this is no image", b"\xff\xd8\xff\xe0 cut short", HEADER, HEADER + b"\xff\xff\xda\x00\x0c\x03"],
    ids=["empty", "text", "cut", "cut after the frame header", "cut in the scan header"],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_file_that_cannot_be_decoded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, training: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # MindSpore dumps a damaged JPEG into the current folder
    for number in range(3):
        picture(tmp_path / "a" / f"{number}.jpg", seed=number)
    (tmp_path / "a" / "broken.jpg").write_bytes(content)
    loader = Loader(image_folder(tmp_path), DataConfig(workers=2), (16, 16), 3, 2, BOTH, training=training)
    with pytest.raises(DataError) as caught:
        batches_of(loader)
    text = str(caught.value)
    assert text.startswith("data: ") and "\n" not in text
    assert "broken.jpg" in text


def test_a_jpeg_is_whole_from_its_first_scan_on(tmp_path: Path) -> None:
    """What comes after it the decoder can do without; the bytes before it it cannot."""
    picture(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    scan = content.index(b"\xff\xda")
    end = scan + 2 + int.from_bytes(content[scan + 2 : scan + 4], "big")
    found = [has_scan(memoryview(content[:size])) for size in (2, scan, end - 1, end, len(content))]
    assert found == [False, False, False, True, True]
    assert has_scan(memoryview(b"\x89PNG")) and has_scan(memoryview(b""))
