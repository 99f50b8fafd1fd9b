"""What a checkpoint is used for once it is trained: evaluation, prediction, export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from .config import ClassifyConfig, Recipe, plain_classifier
from .data.loader import Loader
from .data.sources import EXTENSIONS, DataError, ImageFolder, image_folder, images_below
from .engine import checkpoint, device
from .engine.evaluate import Measure, evaluate
from .engine.log import RunError
from .methods import build_method
from .recipe import ConfigError, load_recipe, override, parse_recipe
from .run import loader
from .zoo import classifier_recipe, deployed, fill

#: largest difference of an exported network's outputs, relative to the largest output
EXPORT_TOLERANCE = 1e-5
#: batch sizes an export of any batch is compared at
COMPARED_BATCHES = (1, 4)


def open_checkpoint(path: str, overrides: list[str]) -> tuple[Recipe, checkpoint.Checkpoint]:
    """A checkpoint and the recipe inside it, with overrides."""
    found = checkpoint.load(Path(path))
    recipe = parse_recipe(found.meta["recipe"], path)
    return (override(recipe, overrides, path) if overrides else recipe), found


def open_classifier(path: str, overrides: list[str], config: str = "") -> tuple[Recipe, checkpoint.Checkpoint]:
    """Likewise for a checkpoint with a classifier; the recipe file `config` takes the place of its own recipe."""
    found = checkpoint.load(Path(path))
    own = classifier_recipe(found)
    recipe = load_recipe(config, overrides) if config else override(own, overrides, path)
    if not isinstance(recipe.method, ClassifyConfig):
        raise ConfigError(f"{config or path}: method: {recipe.method.name} has no classifier; use method: classify")
    recipe = replace(recipe, method=plain_classifier(recipe.method))
    assert isinstance(own.method, ClassifyConfig) and isinstance(recipe.method, ClassifyConfig)
    if recipe.method.num_classes != own.method.num_classes:
        raise checkpoint.CheckpointError(
            f"{path}: its head has {own.method.num_classes} classes, but method.num_classes is "
            f"{recipe.method.num_classes}; write {own.method.num_classes}"
        )
    return recipe, found


# --- evaluate ---------------------------------------------------------------------------------------------------


def evaluate_checkpoint(path: str, data: str, overrides: list[str], config: str = "") -> dict[str, Any]:
    """Accuracy of a checkpoint on its own validation folder or on another image folder `data`.

    Returns:
        ckpt, data (the folder), count, top1 and top5 as shares, top1_correct and top5_correct as numbers of images,
        and loss (cross-entropy without smoothing).
    """
    recipe, found = open_classifier(path, overrides, config)
    source = image_folder(Path(data) if data else Path(recipe.data.root) / (recipe.data.val or recipe.data.train))
    check_classes(source, found)
    device.set_up(recipe.device, recipe.seed)
    method = build_method(recipe)
    checkpoint.assign(checkpoint.weights_of(method), found.weights, found.path)
    result = evaluate(Measure(method), loader(recipe, source, ("image", "label"), training=False).epoch(0))
    count = int(result["count"])
    shares = {key: result[key] for key in ("top1", "top5")}
    correct = {f"{key}_correct": round(share * count) for key, share in shares.items()}
    return {"ckpt": path, "data": str(source.folder), "count": count, **shares, **correct, "loss": result["loss"]}


def check_classes(source: ImageFolder, found: checkpoint.Checkpoint) -> None:
    """The folder has the classes the checkpoint was trained on, by name; a converted one knows only how many."""
    wanted = found.meta["classes"] or [str(number) for number in range(len(found.weights["head.weight"]))]
    known = bool(found.meta["classes"])
    if source.classes == wanted or (not known and len(source.classes) == len(wanted)):
        return
    if not source.classes:
        raise DataError(f"data: {source.folder} has no class folders; accuracy needs one for each of {len(wanted)}")
    odd = sorted(set(source.classes) ^ set(wanted)) if known else []
    raise DataError(
        f"data: {source.folder} has {len(source.classes)} classes, the checkpoint {len(wanted)}"
        + (f"; not in both: {', '.join(odd[:5])}" if odd else "")
        + (", ..." if len(odd) > 5 else "")
    )


# --- predict ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first; none if the file cannot be read."""

    path: Path
    classes: list[tuple[str, float]]


def predict(path: str, images: list[str], top: int, overrides: list[str]) -> Iterator[Prediction]:
    """Classes of image files and of all images below folders, preprocessed as evaluation does.

    Raises:
        DataError: a path does not exist or is no image, or a folder holds none; before the first prediction.
    """
    recipe, found = open_classifier(path, overrides)
    if top < 1:
        raise ConfigError(f"--top: {top} is not above 0")
    files = image_files(images)
    device.set_up(recipe.device, recipe.seed)
    network = fill(deployed(recipe), found)
    batch = min(recipe.train.batch_size, len(files))
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        decoded = read_images(recipe, part)
        rows = [image for image in decoded if image is not None]
        scores = iter(probabilities(network, rows, batch))
        for file, image in zip(part, decoded, strict=True):
            best = [] if image is None else ranked(next(scores), found.meta["classes"], top)
            yield Prediction(file, best)


def image_files(images: list[str]) -> list[Path]:
    """Image files and the images below folders, in the order given."""
    files: list[Path] = []
    for name in images:
        path = Path(name)
        if path.is_dir():
            below = images_below(path)
            if not below:
                raise DataError(f"{path}: no image in this folder; readable are {', '.join(sorted(EXTENSIONS))}")
            files += below
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder")
        elif path.suffix.lower() not in EXTENSIONS:
            raise DataError(f"{path}: not an image file; readable are {', '.join(sorted(EXTENSIONS))}")
        else:
            files.append(path)
    return files


def read_images(recipe: Recipe, files: list[Path]) -> list[np.ndarray | None]:
    """Each file through the evaluation transform, (in_chans, H, W); None for one that cannot be read."""

    sound = [path for path in files if is_image(path)]
    found: dict[Path, np.ndarray] = {}
    try:
        if sound:
            batch = next(evaluation_batches(recipe, sound, len(sound)))[0].asnumpy()
            found = dict(zip(sound, batch, strict=True))
    except DataError:
        if len(files) > 1:
            return [read_images(recipe, [path])[0] for path in files]
    return [found.get(path) for path in files]


def is_image(path: Path) -> bool:
    """Whether a file decodes; MindSpore ends the process on a JPEG that stops inside its header."""
    content = np.fromfile(path, np.uint8)
    return bool(content.size) and cv2.imdecode(content, cv2.IMREAD_REDUCED_COLOR_8) is not None


def evaluation_batches(recipe: Recipe, files: list[Path], batch: int) -> Iterator[tuple[Tensor, ...]]:
    """Images of single files in batches, as evaluation sees them."""
    source = ImageFolder(files[0].parent, files, [0] * len(files), [])
    encoder = recipe.encoder
    return Loader(
        source, recipe.data, encoder.image_size, encoder.in_chans, batch, ("image",), recipe.seed, training=False
    ).epoch(0)


def probabilities(network: nn.Cell, images: list[np.ndarray], batch: int) -> np.ndarray:
    """Softmax of the logits (len(images), classes); the batch is filled up so that one graph serves all."""
    if not images:
        return np.empty((0, 0))
    filled = np.stack(images + [np.zeros_like(images[0])] * (batch - len(images)))
    return ops.softmax(network(Tensor(filled)), -1).asnumpy()[: len(images)]


def ranked(probability: np.ndarray, classes: list[str], top: int) -> list[tuple[str, float]]:
    best = np.argsort(-probability, kind="stable")[:top]
    return [(classes[index] if classes else str(index), float(probability[index])) for index in best]


# --- export -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """A written network: its file, how it was compared and the largest relative difference found."""

    path: Path
    difference: float
    batches: tuple[int, ...]
    images: str  # what it was compared on


def export_checkpoint(path: str, file_format: str, output: str, batch: int, overrides: list[str]) -> Export:
    """Write a MindIR beside a JSON of its preprocessing, read it back and compare outputs.

    A fine-tuned checkpoint gives its classifier (logits), one of pre-training its encoder (tokens).

    Args:
        path: the checkpoint.
        file_format: mindir, or air (Ascend only, cannot be read back).
        output: the file to write, empty for one beside the checkpoint.
        batch: images per call, 0 for any number.
        overrides: changes to the recipe.

    Raises:
        RunError: the format cannot be written here, or the file gives other outputs.
    """
    recipe, found = open_checkpoint(path, overrides)
    if batch < 0:
        raise ConfigError(f"--batch: {batch} is negative; 0 exports for any batch")
    used = device.set_up(recipe.device, recipe.seed)
    if file_format == "air" and used != "Ascend":
        raise RunError(f"--format air: MindSpore writes AIR on Ascend only, this is {used}; write --format mindir")
    target = Path(output) if output else Path(path).with_suffix(f".{file_format}")
    if target.suffix != f".{file_format}":
        raise RunError(f"--output: {target} does not end in .{file_format}")
    target.parent.mkdir(parents=True, exist_ok=True)
    network = fill(deployed(recipe), found)
    sizes = (batch,) if batch else COMPARED_BATCHES
    images, described = example_images(recipe, max(sizes))
    temporary = target.with_name(f".{target.stem}.partial.{file_format}")
    try:
        # the network compared with is built anew, because an export fixes the inputs of the one it is given
        example = example_input(recipe, batch or (1 if file_format == "air" else 0))
        ms.export(network, example, file_name=str(temporary.with_suffix("")), file_format=file_format.upper())
        difference = float("nan")
        if file_format == "mindir":
            difference = compare(temporary, fill(deployed(recipe), found), images, sizes)
            if not difference <= EXPORT_TOLERANCE:
                raise RunError(
                    f"{target}: the exported network differs from the checkpoint by {difference:.3g}; not written"
                )
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    content = json.dumps(preprocessing(recipe, found.meta["classes"], batch), indent=2) + "\n"
    target.with_suffix(".json").write_text(content, encoding="utf-8")
    return Export(target, difference, sizes, described)


def example_input(recipe: Recipe, batch: int) -> Tensor:
    """What an export traces: so many images, 0 for any number (AIR takes fixed shapes only)."""
    shape = (recipe.encoder.in_chans, *recipe.encoder.image_size)
    return Tensor(np.zeros((batch, *shape), np.float32)) if batch else Tensor(shape=[None, *shape], dtype=ms.float32)


def compare(path: Path, network: nn.Cell, images: np.ndarray, sizes: tuple[int, ...]) -> float:
    """The largest difference of a MindIR file's outputs from a network's, relative to the largest output."""
    reread = nn.GraphCell(ms.load(str(path)))
    worst = 0.0
    for size in sizes:
        batch = Tensor(images[:size])
        theirs, ours = reread(batch).asnumpy(), network(batch).asnumpy()
        difference = np.abs(theirs - ours).max() / max(np.abs(ours).max(), 1e-12)
        worst = max(worst, float(difference)) if np.isfinite(difference) else float("inf")
    return worst


def example_images(recipe: Recipe, count: int) -> tuple[np.ndarray, str]:
    """Validation images of the recipe, repeated up to `count`, or noise if its data is not here; and which."""
    try:
        source = image_folder(Path(recipe.data.root) / (recipe.data.val or recipe.data.train))
    except DataError:
        shape = (count, recipe.encoder.in_chans, *recipe.encoder.image_size)
        return np.random.default_rng(0).standard_normal(shape).astype(
            np.float32
        ), "noise, the recipe's data is not here"
    spread = np.linspace(0, len(source) - 1, count).astype(int)
    batch = next(evaluation_batches(recipe, [source.files[index] for index in spread], count))
    return batch[0].asnumpy(), f"images of {source.folder}"


def preprocessing(recipe: Recipe, classes: list[str], batch: int) -> dict[str, Any]:
    """How to turn a file into the network's input, and what its output means."""
    height, width = recipe.encoder.image_size
    crop = recipe.data.eval_crop
    resize = [int(height / crop)] if height == width else [int(height / crop), int(width / crop)]
    classifies = isinstance(recipe.method, ClassifyConfig)
    return {
        "input": [batch or "batch", recipe.encoder.in_chans, height, width],
        "resize_short_side" if height == width else "resize": resize[0] if height == width else resize,
        "interpolation": "bicubic as in Pillow",
        "centre_crop": [height, width],
        "scale": 1 / 255,
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
        "output": "logits" if classifies else "tokens",
        "classes": classes if classifies else [],
    }
