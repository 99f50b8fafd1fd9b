"""Evaluation transform, crops, augmentation, mixing."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from PIL import Image

from src.config import DataConfig, parse_auto_augment
from src.data import augment
from src.data.decode import Box
from src.data.resample import Filter, resized
from src.data.transform import Transform, draw_box, evaluation_pixels
from src.methods.classify import soft_cross_entropy
from src.methods.mixing import cut_box, mix, soft_targets
from tests.parity.common import Case, Findings, error, read_json


def share_of(crop: int, resize: int) -> float:
    """`data.eval_crop` that gives this resize for this crop: 1, the default, or another share."""
    shares = (1.0, DataConfig().eval_crop, crop / resize, crop / (resize + 0.5))
    return next((share for share in shares if share <= 1 and int(crop / share) == resize), DataConfig().eval_crop)


class Pixels:
    """Decoded pixels as a picture."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def crop(self, box: Box, least: tuple[int, int]) -> np.ndarray:
        top, left, rows, cols = box
        return self.pixels[top : top + rows, left : left + cols]


def png(pixels: np.ndarray) -> bytes:
    """The bytes of a PNG file, (H, W, 3) RGB."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def evaluation_transform(case: Case) -> Findings:
    """Resize, centre crop and normalisation of `eval.py`; the resize filter on stated boxes (training crops)."""
    data = case.data
    for row in case.info.get("eval", []):
        size = (row["crop"], row["crop"])
        crop = share_of(row["crop"], row["resize"])
        image = data[f"image_{row['image']}"]
        pixels = evaluation_pixels(Pixels(image), size, crop)
        yield row["array"], float(np.abs(pixels.astype(int) - data[row["array"]]).max()), 0.0
        if "float_array" in row:
            ours = np.empty((3, *size), np.float32)
            Transform(DataConfig(eval_crop=crop), size, 3, training=False)(png(image), (0, 0, 0, 0), ours)
            yield row["float_array"], error(ours, data[row["float_array"]]), case.tolerance.get("float32_rel", 1e-6)
    for row in case.info.get("random_resized_crop", []):
        image, size = data[f"image_{row['image']}"], (row["size"], row["size"])
        image = resized(Pixels(image).crop(tuple(row["top_left_height_width"]), size), size, row["interpolation"])
        yield row["array"], float(np.abs(image.astype(int) - data[row["array"]]).max()), 0.0
    for row in case.info.get("fallback_boxes", []):
        height, width = row["height"], row["width"]  # no drawn box fits, so it falls back
        box = draw_box(height, width, tuple(row["scale"]), tuple(row["ratio"]), np.random.default_rng(0))
        yield f"box of {row['width']}x{row['height']}", float(list(box) != row["top_left_height_width"]), 0.0


class GivenDraws(nn.Cell):
    """Mixing with stored random numbers: (image, label, lambda, box, CutMix or not) -> mixed images, soft targets."""

    def __init__(self, classes: int, smoothing: float):
        super().__init__()
        self.classes, self.smoothing = classes, smoothing

    def construct(
        self, image: Tensor, label: Tensor, lam: Tensor, box: Tensor, use_cutmix: Tensor
    ) -> tuple[Tensor, Tensor]:
        return mix(image, soft_targets(label, self.classes, self.smoothing), lam, box, use_cutmix)


class SoftLoss(nn.Cell):
    """Cross-entropy with soft targets or smoothed labels, and its gradient for the logits."""

    def __init__(self, classes: int, smoothing: float):
        super().__init__()
        self.classes, self.smoothing = classes, smoothing
        self.value_and_grad = ops.value_and_grad(soft_cross_entropy, 0)

    def construct(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.value_and_grad(logits, soft_targets(target, self.classes, self.smoothing))


class BoxFromCentre(nn.Cell):
    """CutMix's box around a centre: (lambda, (y, x)) -> (4,)."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.size = (height, width)

    def construct(self, lam: Tensor, centre: Tensor) -> Tensor:
        return cut_box(lam, centre, self.size[0], self.size[1])


def mixup(case: Case) -> Findings:
    """Boxes, mixed images and soft targets for stored random numbers; losses and gradients for stored logits."""
    data = case.data
    yield from mixup_boxes(case)
    stored = [int(name.removeprefix("label")) for name in data if re.fullmatch(r"label\d+", name)]
    for classes in np.atleast_1d(case.arguments.get("num_classes", stored)).tolist():
        lowest = float(data[f"soft{classes}"].min()) * classes  # of a class without label, times classes
        smoothing = case.arguments.get("label_smoothing", round(lowest, 6))
        cell, label = GivenDraws(classes, smoothing), Tensor(data[f"label{classes}"].astype(np.int32))
        mixed, soft = [], []
        for number, drawn in enumerate(data["lam_drawn"]):
            box = Tensor(data["box"][number].astype(np.int32))
            use_cutmix = Tensor(bool(data["use_cutmix"][number]))
            outputs = cell(Tensor(data["image"]), label, Tensor(drawn, ms.float32), box, use_cutmix)
            mixed.append(outputs[0].asnumpy())
            soft.append(outputs[1].asnumpy())
        yield f"mixed ({classes} classes)", error(np.stack(mixed), data["mixed"]), case.forward
        yield f"soft{classes}", error(np.stack(soft), data[f"soft{classes}"]), case.forward
        yield from mixup_losses(case, classes, smoothing)


def mixup_losses(case: Case, classes: int, smoothing: float) -> Findings:
    data, cell = case.data, SoftLoss(classes, smoothing)
    label = data[f"label{classes}"].astype(np.int32)
    logits = data.get(f"logits{classes}", np.zeros((0, 0, 0), np.float32))
    for kind in ("soft_ce", "label_smoothing_ce"):
        name = f"{kind}{classes}"
        for number, row in enumerate(logits if name in data else ()):
            target = Tensor(data[f"soft{classes}"][number] if kind == "soft_ce" else label)
            loss, gradient = cell(Tensor(row), target)
            yield f"{name}[{number}]", error(loss, data[name][number]), case.forward
            if f"{name}_grad" in data:
                yield f"{name}_grad[{number}]", error(gradient, data[f"{name}_grad"][number]), case.gradient


def mixup_boxes(case: Case) -> Findings:
    """The box of each CutMix batch; its centre is drawn again from the stored seed."""
    data, arguments = case.data, case.arguments
    if arguments.get("cutmix_minmax"):
        return
    height, width = data["image"].shape[2:]
    both = arguments["mixup_alpha"] > 0 and arguments["cutmix_alpha"] > 0
    for number, seed in enumerate(case.info.get("numpy_seeds", [])):
        if not data["use_cutmix"][number]:
            continue
        rng = np.random.RandomState(seed)
        for _ in range(2 if both else 1):
            rng.rand()
        lam = rng.beta(arguments["cutmix_alpha"], arguments["cutmix_alpha"])
        yield f"lam_drawn[{number}]", abs(lam - data["lam_drawn"][number]), 1e-9
        centre = np.array([rng.randint(0, height), rng.randint(0, width)], np.float32)
        ours = BoxFromCentre(height, width)(Tensor(lam, ms.float32), Tensor(centre)).asnumpy()
        yield f"box[{number}]", float(np.abs(ours - data["box"][number]).max()), 0.0


def randaugment_ops(case: Case) -> Findings:
    """Single operations and recorded sequences on one image; grey levels must be equal."""
    mean = case.info.get("hparams", {}).get("img_mean") or [round(255 * value) for value in DataConfig().mean]
    fill = tuple(mean)
    for entry in case.info["operations"]:
        argument = argument_of(entry["op"], entry["level"], entry["sign"] or 1)
        expected = entry["arg"]
        name = f"{entry['op']}[{entry['index']}]"
        same = (argument is None) == (expected is None)
        yield f"argument {name}", abs((argument or 0) - (expected or 0)) if same else float("inf"), 1e-9
        ours = changed(case.data["image"], [(entry["op"], argument)], fill, entry["interpolation"])
        yield f"output {name}", grey_levels(ours, case.data["output"][entry["index"]]), 0.0
    for entry in case.info["sequences"]:
        ours = changed(case.data["image"], [(step["op"], step["arg"]) for step in entry["applied"]], fill)
        theirs = case.data["sequence_output"][entry["index"]]
        yield f"sequence_output[{entry['index']}]", grey_levels(ours, theirs), 0.0


def argument_of(name: str, level: float, sign: int) -> float | None:
    rule = augment.ARGUMENTS.get(name)
    return rule(level, sign) if rule else None


def changed(
    image: np.ndarray,
    operations: list[tuple[str, float | None]],
    fill: Any,
    filter_name: Filter = "bicubic",
) -> np.ndarray:
    for name, argument in operations:
        image = augment.apply_operation(image, name, argument, fill, filter_name)
    return image


def grey_levels(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two uint8 images."""
    return float("inf") if ours.shape != theirs.shape else float(np.abs(ours.astype(int) - theirs).max())


def randaugment_rules(path: Path) -> Findings:
    """Our reading of a RandAugment text in timm's syntax: operations, probabilities, arguments at levels."""
    info = read_json(path)
    config = parse_auto_augment(info["config"])
    names = list(augment.operations_of(config))
    yield "operations", float(names != info["operations"]), 0.0
    yield "num_layers", abs(config.operations - info["num_layers"]), 0.0
    yield "probability_per_op", abs(augment.APPLY - info["probability_per_op"]), 0.0
    yield "magnitude", abs(config.magnitude - info["magnitude"]), 0.0
    yield "magnitude_std", abs(config.std - (info["magnitude_std"] or 0)), 0.0
    yield "level_denominator", abs(augment.LEVELS - info["level_denominator"]), 0.0
    for name, levels in info["argument_at_level"].items():
        for text, theirs in levels.items():
            ours = [argument_of(name, float(text), sign) for sign in (1, -1)]
            if theirs is None:
                yield f"{name} at {text}", 0.0 if ours == [None, None] else float("inf"), 0.0
                continue
            expected = theirs if len(theirs) == 2 else theirs * 2  # one value: the sign does not matter
            yield f"{name} at {text}", float(np.abs(np.subtract(np.array(ours, float), expected)).max()), 1e-9


def random_erasing(path: Path) -> Findings:
    """Ranges of the random numbers, and the box for each stored set of them."""
    info = read_json(path)
    erasing = augment.RandomErasing(info["used_as"]["probability"], tuple(info["area_fraction"]))
    aspect = [math.exp(-erasing.log_aspect), math.exp(erasing.log_aspect)]
    yield "area_fraction of the default", error(DataConfig().erasing_area, np.array(info["area_fraction"])), 1e-9
    yield "aspect_ratio", error(aspect, np.array(info["aspect_ratio"])), 1e-9
    yield "tries", abs(erasing.tries - info["tries"]), 0.0
    for number, box in enumerate(info["boxes"]):
        size = augment.erased_size(box["height"], box["width"], box["area_fraction"], box["log_aspect"])
        same = (size is not None) == box["accepted"] and (size is None or size == (box["h"], box["w"]))
        yield f"boxes[{number}]", 0.0 if same else float("inf"), 0.0
        if size is not None:
            ours = [(0, side - cut) for side, cut in zip((box["height"], box["width"]), size, strict=True)]
            yield f"boxes[{number}] place", error(ours, np.array([box["top_range"], box["left_range"]])), 0.0
