"""Export a checkpoint (`export.py`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ..config import Recipe
from ..data.opening import open_source
from ..data.sources import DataError
from ..engine import device
from ..engine.log import RunError
from ..operations import kernels
from .command import check_export
from .evaluate import open_checkpoint
from .images import evaluation_batches
from .networks import deployed, fill

#: largest difference allowed between outputs of file and checkpoint, relative to the largest output
EXPORT_TOLERANCE = 1e-5
#: batch sizes of the comparison, for an export of any batch size
COMPARED_BATCHES = (1, 4)
#: number of channels -> what they are
CHANNELS = {1: "luminance", 3: "red, green, blue"}


@dataclass(frozen=True)
class Export:
    """An exported file and its comparison with the checkpoint.

    Attributes:
        path: the file.
        difference: largest relative difference of the outputs.
        batches: compared batch sizes.
        images: description of the compared images.
    """

    path: Path
    difference: float
    batches: tuple[int, ...]
    images: str


def export_checkpoint(path: str, file_format: str, output: str, batch: int, overrides: list[str]) -> Export:
    """Write a MindIR and a JSON of its preprocessing, read the MindIR back and compare outputs.

    A fine-tuned checkpoint exports its classifier (logits), a pre-trained one its encoder (tokens).

    Args:
        path: the checkpoint.
        file_format: mindir, or air (Ascend only, cannot be read back).
        output: the file to write; empty: next to the checkpoint.
        batch: images per call; 0: any number.
        overrides: changes to the recipe.

    Raises:
        RunError: the format cannot be written on this device, or the outputs differ.
    """
    recipe, loaded = open_checkpoint(path, overrides)
    check_export(output, file_format, batch)
    used = device.set_up(recipe.device, recipe.seed, recipe.train)
    if recipe.train.precision.on(used) != "float32":
        raise RunError("train.precision: an exported file has float32 only; write float32")
    if file_format == "air" and used != "Ascend":
        raise RunError(f"--format air: MindSpore writes AIR on Ascend only, not on {used}; write --format mindir")
    target = Path(output) if output else Path(path).with_suffix(f".{file_format}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with kernels.builtin():
        network, compared = (fill(deployed(recipe), loaded) for _ in range(2))
    sizes = (batch,) if batch else COMPARED_BATCHES
    images, description = example_images(recipe, max(sizes))
    temporary = target.with_name(f".{target.stem}.partial.{file_format}")
    try:
        # ms.export fixes the input shapes of its network, so the comparison needs a second one
        example = example_input(recipe, batch or (1 if file_format == "air" else 0))
        ms.export(network, example, file_name=str(temporary.with_suffix("")), file_format=file_format.upper())
        difference = float("nan")
        if file_format == "mindir":
            difference = largest_difference(temporary, compared, images, sizes)
            if not difference <= EXPORT_TOLERANCE:
                raise RunError(
                    f"{target}: the exported network differs from the checkpoint by {difference:.3g}; not written"
                )
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    content = json.dumps(preprocessing(recipe, loaded.meta["classes"], batch), indent=2) + "\n"
    target.with_suffix(".json").write_text(content, encoding="utf-8")
    return Export(target, difference, sizes, description)


def example_input(recipe: Recipe, batch: int) -> Tensor:
    """Return the input that an export traces: `batch` images, 0 for any number (AIR needs fixed shapes)."""
    shape = (recipe.encoder.in_chans, *recipe.encoder.image_size)
    return Tensor(np.zeros((batch, *shape), np.float32)) if batch else Tensor(shape=[None, *shape], dtype=ms.float32)


def largest_difference(path: Path, network: nn.Cell, images: np.ndarray, sizes: tuple[int, ...]) -> float:
    """Return the largest difference between outputs of a MindIR file and a network, relative to the largest output."""
    exported = nn.GraphCell(ms.load(str(path)))
    worst = 0.0
    for size in sizes:
        batch = Tensor(images[:size])
        actual, expected = exported(batch).asnumpy(), network(batch).asnumpy()
        difference = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12)
        worst = max(worst, float(difference)) if np.isfinite(difference) else float("inf")
    return worst


def example_images(recipe: Recipe, count: int) -> tuple[np.ndarray, str]:
    """Return `count` validation images of the recipe, or noise without its data, and a description of them."""
    try:
        source = open_source(recipe.data.evaluation_place)
    except DataError:
        why = "the recipe's data folder does not exist"
    else:
        spread = np.linspace(0, len(source) - 1, count).astype(int)
        image, label = next(evaluation_batches(recipe, source.subset(spread), count, ("image", "label")))
        usable = image.asnumpy()[label.asnumpy() >= 0]
        if len(usable):
            return np.resize(usable, (count, *usable.shape[1:])), f"images of {source.place}"
        why = f"images of {source.place} cannot be used"
    shape = (count, recipe.encoder.in_chans, *recipe.encoder.image_size)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32), f"noise, since {why}"


def preprocessing(recipe: Recipe, classes: list[str], batch: int) -> dict[str, Any]:
    """Describe how to turn an image file into the network's input, and what the output means."""
    height, width = recipe.encoder.image_size
    crop = recipe.data.eval_crop
    resize = [int(height / crop)] if height == width else [int(height / crop), int(width / crop)]
    classifies = recipe.method.classifier is not None
    return {
        "input": [batch or "batch", recipe.encoder.in_chans, height, width],
        "resize_short_side" if height == width else "resize": resize[0] if height == width else resize,
        "interpolation": "bicubic as in Pillow",
        "centre_crop": [height, width],
        "channels": CHANNELS.get(recipe.encoder.in_chans, "bands in the order of the file"),
        "scale": 1 / 255,  # of uint8
        "scale_of_other_values": "unsigned integers: 1 / their largest value; floats: 1",
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
        "output": "logits" if classifies else "tokens",
        "classes": classes if classifies else [],
    }
