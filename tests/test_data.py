"""Order of the images on every rank, batches that no number of workers and ranks changes, unusable images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from mindspore import dtype as mstype

from src.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from src.data.loader import Loader
from src.data.sources import DataError, Files, Names
from tests.helpers import MakeFolder

pytestmark = pytest.mark.usefixtures("graph_mode")

BOTH = ("image", "label")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, image_folder_factory: MakeFolder) -> Path:
    return image_folder_factory(tmp_path_factory.mktemp("images"))


def batches_of(loader: Loader, epoch: int = 0) -> list[tuple[np.ndarray, ...]]:
    return [tuple(part.asnumpy() for part in batch) for batch in loader.epoch(epoch)]


def files_in(folder: Path) -> Files:
    """The files of class folders, as a source."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    classes = sorted({path.parent.name for path in paths})
    labels = np.array([classes.index(path.parent.name) for path in paths], np.int32)
    return Files(folder, folder, Names.of([str(path.relative_to(folder)) for path in paths]), labels, classes)


def fake_source(counts: dict[str, int]) -> Files:
    names = [f"{name}/{number:03d}.png" for name, count in counts.items() for number in range(count)]
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), list(counts.values()))
    return Files(Path("some/folder"), Path("some/folder"), Names.of(names), labels, list(counts))


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


# --- batches ----------------------------------------------------------------------------------------------------


def test_training_batches_have_the_stated_shape_and_scale(root: Path) -> None:
    source = files_in(root / "train")
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
    loader = Loader(files_in(tmp_path), config, (16, 16), 3, 4, BOTH, seed=2)
    for image, label in batches_of(loader):
        np.testing.assert_array_equal(np.round(image.mean(axis=(1, 2, 3)) * 255 / 60), label)


def test_an_epoch_repeats_bit_by_bit_and_differs_from_others(root: Path) -> None:
    config = DataConfig(brightness=0.4, contrast=0.4, workers=2)
    loader = Loader(files_in(root / "train"), config, (32, 32), 3, 8, BOTH, seed=5)

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
    source = files_in(root / "val")
    loader = Loader(source, DataConfig(workers=2), (32, 32), 3, 4, BOTH, training=False)
    found = batches_of(loader)
    labels = np.concatenate([label for _, label in found])
    assert [len(image) for image, _ in found] == [4, 4, 4]
    assert list(labels[: len(source)]) == list(source.labels)
    assert list(labels[len(source) :]) == [-1] * 3
    images = np.concatenate([image for image, _ in found])[: len(source)]
    assert len({image.tobytes() for image in images}) == len(source)


def test_only_the_columns_asked_for(root: Path) -> None:
    loader = Loader(files_in(root / "val"), DataConfig(workers=2), (32, 32), 3, 4, ("image",), training=False)
    (batch, *_) = loader.epoch(0)
    assert len(batch) == 1 and batch[0].dtype == mstype.float32


# --- workers, ranks, prefetching --------------------------------------------------------------------------------


#: every kind of random change
CHANGES = DataConfig(
    auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5, brightness=0.3, contrast=0.3, interpolation="bilinear", workers=0
)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, image_folder_factory: MakeFolder) -> Files:
    """72 images of 3 classes."""
    return files_in(image_folder_factory(tmp_path_factory.mktemp("many"), train=24) / "train")


def images_of(batches: Iterator[tuple[object, ...]]) -> dict[tuple[int, int], np.ndarray]:
    """(image, how often it came before) -> pixels."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for image, number in batches:
        for pixels, index in zip(image.asnumpy(), number.asnumpy().tolist(), strict=True):  # type: ignore[attr-defined]
            found[index, sum(key[0] == index for key in found)] = pixels
    return found


def equal(a: dict[tuple[int, int], np.ndarray], b: dict[tuple[int, int], np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def augmented(source: Files, config: DataConfig = CHANGES, batch: int = 8, rank: int = 0, ranks: int = 1) -> Loader:
    return Loader(source, config, (24, 16), 3, batch, ("image", "number"), 5, True, rank, ranks)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_number_of_workers_changes_nothing(many: Files, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.data.loader.cores", lambda: 4)  # also where there are fewer
    here = [tuple(part.asnumpy() for part in batch) for batch in augmented(many).stream(range(2, 4))]
    there = augmented(many, replace(CHANGES, workers=workers)).stream(range(2, 4))
    for ours, theirs in zip(here, there, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b.asnumpy())
    assert len(here) == 18


def test_workers_find_images_below_a_relative_folder(many: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the working folder of this process has changed."""
    monkeypatch.chdir(many.folder.parent)
    source = files_in(Path(many.folder.name))
    monkeypatch.chdir("/")
    loader = augmented(source, replace(CHANGES, workers=2))
    for ours, theirs in zip(loader.epoch(0), augmented(many).epoch(0), strict=True):
        np.testing.assert_array_equal(ours[0].asnumpy(), theirs[0].asnumpy())
    assert loader.take_faults() == [] and source.name(0).startswith(many.folder.name)


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_number_of_ranks_and_the_batch_change_no_image(many: Files, repeats: int) -> None:
    config = replace(CHANGES, repeats=repeats)
    whole = images_of(augmented(many, config).epoch(1))
    for ranks in (2, 3):
        parts = [images_of(augmented(many, config, 4, rank, ranks).epoch(1)) for rank in range(ranks)]
        pixels = {part.tobytes() for images in parts for part in images.values()}
        assert pixels == {part.tobytes() for part in whole.values()}


def test_copies_of_an_image_differ(many: Files) -> None:
    images = images_of(augmented(many, DataConfig(repeats=2, workers=0)).epoch(0))
    pairs = [(images[index, 0], images[index, 1]) for index, copy in images if copy == 1]
    assert len(pairs) == 36 and all(not np.array_equal(a, b) for a, b in pairs)


def test_a_stream_of_epochs_is_the_epochs_one_after_the_other(many: Files) -> None:
    loader = augmented(many, replace(CHANGES, workers=2))
    stream = list(loader.stream(range(1, 4), 5))
    parts = [batch for epoch in (1, 2, 3) for batch in list(loader.epoch(epoch))[:5]]
    assert len(stream) == 15
    for ours, theirs in zip(stream, parts, strict=True):
        np.testing.assert_array_equal(ours[0].asnumpy(), theirs[0].asnumpy())


def test_a_batch_keeps_its_values_while_others_are_loaded(many: Files) -> None:
    for workers in (0, 2):
        batches = augmented(many, replace(CHANGES, workers=workers)).epoch(0)
        first = next(batches)[0]
        before = first.asnumpy().copy()
        assert len(list(batches)) == 8
        np.testing.assert_array_equal(first.asnumpy(), before)


# --- images that cannot be used ---------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path, image_folder_factory: MakeFolder) -> Files:
    """36 images of 3 classes, of which four cannot be used, each for another reason."""
    source = files_in(image_folder_factory(tmp_path, train=12) / "train")
    source.path(1).write_bytes(b"")
    source.path(13).write_bytes(b"this is no image")
    source.path(14).unlink()
    source.path(30).unlink()
    source.path(30).mkdir()
    return source


def test_an_unusable_training_image_is_replaced_by_one_of_its_class_in_every_epoch(damaged: Files) -> None:
    loaders = [augmented(damaged, replace(CHANGES, workers=workers), 4) for workers in (0, 2)]
    for loader in loaders:
        assert len(list(loader.stream(range(3)))) == 27
    faults = [sorted(loader.faults.known.values()) for loader in loaders]
    assert faults[0] == faults[1] and [fault.image for fault in faults[0]] == [1, 13, 14, 30]
    for fault in faults[0]:
        assert damaged.labels[fault.replacement] == damaged.labels[fault.image]
        assert fault.replacement not in (1, 13, 14, 30)
    lines = loaders[0].take_faults()
    assert len(lines) == 4 and loaders[0].take_faults() == []
    assert {line["image"] for line in lines} == {damaged.name(index) for index in (1, 13, 14, 30)}
    assert all(line["reason"] and "\n" not in line["reason"] for line in lines)
    assert {line["replacement"] for line in lines} == {damaged.name(fault.replacement) for fault in faults[0]}


def test_every_rank_replaces_the_same_image_by_the_same(damaged: Files) -> None:
    known: dict[int, int] = {}
    for rank in range(2):
        loader = augmented(damaged, DataConfig(workers=0), 2, rank, 2)
        list(loader.stream(range(4)))
        for fault in loader.faults.known.values():
            assert known.setdefault(fault.image, fault.replacement) == fault.replacement
    assert set(known) == {1, 13, 14, 30}


def test_a_replacement_shows_its_image(damaged: Files) -> None:
    plain = DataConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0, workers=0)
    extras = {"answer": np.arange(len(damaged), dtype=np.float32)}
    loader = replace(augmented(damaged, plain, 4), columns=("image", "number", "answer"), extras=extras)
    batches = [tuple(part.asnumpy() for part in batch) for batch in loader.epoch(0)]
    images = {int(n): (image, a) for batch in batches for image, n, a in zip(*batch, strict=True)}
    assert len(loader.faults.known) == 4
    for fault in loader.faults.known.values():
        np.testing.assert_array_equal(images[fault.image][0], images[fault.replacement][0])
        assert images[fault.image][1] == fault.replacement, "an answer about other pixels"


def test_an_unusable_evaluation_image_has_no_label(damaged: Files) -> None:
    loader = Loader(damaged, DataConfig(workers=2), (16, 16), 3, 8, ("image", "label", "number"), training=False)
    found = [tuple(part.asnumpy() for part in batch) for batch in loader.epoch(0)]
    labels = np.concatenate([label for _, label, _ in found])
    assert [int(index) for index in np.flatnonzero(labels < 0)] == [1, 13, 14, 30, 36, 37, 38, 39]
    lines = loader.take_faults()
    assert len(lines) == 4 and all("replacement" not in line for line in lines)


def test_a_class_without_a_usable_image_stops_with_a_line(tmp_path: Path, image_folder_factory: MakeFolder) -> None:
    source = files_in(image_folder_factory(tmp_path, train=4) / "train")
    for index in range(4, 8):
        source.path(index).write_bytes(b"x")
    with pytest.raises(DataError, match=r"^data\.train: .*class_1/.*; no other image of class class_1 can"):
        list(replace(augmented(source, DataConfig(workers=0), 4), columns=("image", "label")).epoch(0))
    unlabelled = augmented(source, DataConfig(workers=0), 4)  # any other image replaces it
    assert len(list(unlabelled.epoch(0))) == 3
    assert sorted(fault.image for fault in unlabelled.faults.known.values()) == [4, 5, 6, 7]
    assert all(fault.replacement not in range(4, 8) for fault in unlabelled.faults.known.values())
