"""The cost of a recipe: sizes, masks, FLOPs, learning rate, steps and memory, computed without compiling a graph."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

from ..config import Recipe, at_stage, plural
from ..config.files import ConfigError
from ..config.paths import RECORDS
from ..data.loader import images_of_epoch
from ..data.opening import open_source
from ..data.sources import labelled_subset
from ..engine import checkpoint, device
from ..engine.log import duration
from ..engine.optim import build_optimizer
from ..engine.schedule import effective_batch, peak_rate
from ..engine.step import TrainStep
from ..errors import one_line
from ..methods import build_method
from ..models import build_network
from ..operations import kernels

IMAGENET = 1_281_167  # training images of ImageNet-1K
STATE = 16  # bytes per trained parameter: weight, gradient and two moments in float32


class PlanError(ConfigError):
    """The recipe cannot be planned; the text is one line for the user."""


def print_plan(recipe: Recipe, devices: int = 1, images: int = 0, measure: bool = False, as_json: bool = False) -> None:
    """Print the plan of a recipe (`train.py --plan`).

    Raises:
        PlanError: as in `make_plan`.
    """
    plans = [make_plan(part, devices, images, measure) for part in split_by_stage(recipe)]
    if as_json:
        sys.stdout.write(json.dumps(plans if recipe.stages else plans[0]) + "\n")
        return
    for number, plan in enumerate(plans, 1):
        title = f"stage {number} of {len(plans)}\n" if recipe.stages else ""
        sys.stdout.write(title + as_table(plan) + "\n")


def split_by_stage(recipe: Recipe) -> list[Recipe]:
    """Return a recipe per stage with the epochs of that stage; the recipe itself if it has no stages."""
    parts = []
    for number, stage in enumerate(recipe.stages):
        part = at_stage(recipe, number)
        warm_up = min(part.train.warmup_epochs, stage.epochs - 1)  # a longer warm-up continues in the next stage
        parts.append(replace(part, train=replace(part.train, epochs=stage.epochs, warmup_epochs=warm_up)))
    return parts or [recipe]


def make_plan(recipe: Recipe, devices: int = 1, images: int = 0, measure: bool = False) -> dict[str, Any]:
    """Return all figures of a plan under the names that `--json` prints.

    Args:
        recipe: the resolved recipe.
        devices: number of devices; each takes `train.batch_size` images per pass.
        images: number of training images. 0: count those of `data.train`, or use ImageNet-1K's number if a folder of
            that name does not exist. If neither is known, `images` and the steps of the plan are None.
        measure: also run two training steps on random images.

    Raises:
        PlanError: there are too few images for one update.
        DataError: the data folder is unusable.
        DeviceError: the device for the measurement is unavailable.
    """
    train, encoder = recipe.train, recipe.trained_encoder
    count, source = (images, "--images") if images else count_images(recipe)
    per_epoch = None if count is None else steps_per_epoch(recipe, devices, count)
    steps = None if per_epoch is None else per_epoch * train.epochs
    parameters = count_parameters(recipe)
    flops = recipe.method.flops(encoder)
    plan = {
        "encoder": encoder.name,
        "method": recipe.method.name,
        "parameters": parameters,
        "image_size": list(encoder.image_size),
        "tokens": encoder.num_tokens,
        "masked": recipe.method.masked(encoder),
        "teacher": teacher_of(recipe),
        "flops": {**flops, "total": sum(flops.values())},
        "devices": devices,
        "batch_size": train.batch_size,
        "accumulate": train.passes(devices),
        "effective_batch": effective_batch(train, devices),
        "base_lr": train.base_lr,
        "lr_batch": train.lr_batch,
        "learning_rate": peak_rate(train, devices),
        "images": count,
        "images_from": source,
        "steps_per_epoch": per_epoch,
        "epochs": train.epochs,
        "steps": steps,
        "memory": estimated_memory(recipe, parameters),
        "measured": None,
    }
    if measure:
        measured = measure_steps(recipe)
        seconds = None if steps is None else measured["step_seconds"] * train.passes(devices) * steps
        plan["measured"] = {**measured, "training_seconds": seconds}
    return plan


def steps_per_epoch(recipe: Recipe, devices: int, images: int) -> int:
    """Return the updates of an epoch.

    Raises:
        PlanError: an epoch has too few images for one update.
    """
    train = recipe.train
    count = images_of_epoch(images, recipe.data.repeats) // (train.batch_size * devices) // train.passes(devices)
    if not count:
        raise PlanError(
            f"train.batch_size: {effective_batch(train, devices)} images per update (train.batch_size "
            f"{train.batch_size} x {plural(train.passes(devices), 'pass', 'passes')} x {plural(devices, 'device')}) "
            f"are more than the {plural(images, 'image')} of an epoch; write less"
        )
    return count


def count_images(recipe: Recipe) -> tuple[int | None, str]:
    """Return the training images of an epoch (None if unknown) and the source of that number."""
    data = recipe.data
    place = data.training_place
    if place.suffix.startswith(RECORDS) or os.path.exists(place):  # noqa: PTH110 # never raises
        return len(labelled_subset(open_source(place, "data.train"), data.labels_per_class)), str(place)
    if "imagenet" not in Path(data.root).name.lower():
        return None, f"there is no folder {place}; set data.root, or write --images N"
    if data.labels_per_class and recipe.method.classifier:
        return data.labels_per_class * recipe.method.classifier.num_classes, "ImageNet-1K, data.labels_per_class"
    return IMAGENET, f"ImageNet-1K; there is no folder {place}"


def count_parameters(recipe: Recipe) -> dict[str, int]:
    """Count the trained parameters, all parameters (with fixed position tables) and those of the encoder."""
    with no_init_parameters(), kernels.builtin():  # names and shapes only
        weights = checkpoint.weights_of(build_method(recipe))
    return {
        "trained": sum(p.size for p in weights.values() if p.requires_grad),
        "total": sum(p.size for p in weights.values()),
        "encoder": sum(p.size for name, p in weights.items() if name.startswith("encoder.")),
    }


def teacher_of(recipe: Recipe) -> dict[str, Any] | None:
    """Return name, parameters and multiply-adds per image of the teacher; None for a Method without one."""
    teacher = recipe.method.teacher_network
    if teacher is None:
        return None
    with no_init_parameters(), kernels.builtin():
        network = build_network(teacher.encoder, teacher.classifier)
    flops = teacher.classifier.flops(teacher.encoder).values() if teacher.classifier else [teacher.encoder.flops()]
    size = sum(p.size for p in checkpoint.weights_of(network).values())
    return {"encoder": teacher.encoder.name, "parameters": size, "flops": sum(flops)}


def estimated_memory(recipe: Recipe, parameters: dict[str, int]) -> int:
    """Estimate the bytes on one device, all in float32.

    16 per trained parameter, 4 per fixed parameter (with those of a teacher), 4 per value saved for the backward pass.
    Memory of the framework itself and buffers inside operations are not included.
    """
    teacher = teacher_of(recipe)
    fixed = parameters["total"] - parameters["trained"] + (teacher["parameters"] if teacher else 0)
    values = recipe.method.saved_values(recipe.trained_encoder) * recipe.train.batch_size
    return STATE * parameters["trained"] + 4 * (fixed + values)


def measure_steps(recipe: Recipe) -> dict[str, Any]:
    """Run two training steps on random images with the recipe's batch size; return seconds and peak memory."""
    recipe = replace(recipe, method=recipe.method.without_cache())  # random images have no stored teacher outputs
    train, encoder = recipe.train, recipe.trained_encoder
    used = device.set_up(recipe.device, recipe.seed, recipe.train)
    start = time.perf_counter()
    method = build_method(recipe)
    optimizer = build_optimizer(method, train)
    step = TrainStep(method, optimizer, train.clip_norm)
    step.set_train(True)
    rng = np.random.default_rng(recipe.seed)
    columns: dict[str, Any] = {
        "image": Tensor(rng.standard_normal((train.batch_size, encoder.in_chans, *encoder.image_size), np.float32))
    }
    if recipe.method.classifier:
        labels = rng.integers(recipe.method.classifier.num_classes, size=train.batch_size)
        columns["label"] = Tensor(labels.astype(np.int32))
    seconds = []
    for number in (1, 2):
        values = optimizer.step_values(lambda scale: 0.0 * scale, number)
        float(step(values, *[columns[name] for name in method.columns])[0])  # waits for the step
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {
        "device": used,
        "kernels": kernels.description().removeprefix("CPU kernels: ") if used == "CPU" else "",
        "first_step_seconds": seconds[0],  # with compiling
        "step_seconds": seconds[1],
        "images_per_second": train.batch_size / seconds[1],
        "peak_memory": device.peak_memory(used),
    }


# --- printing ---------------------------------------------------------------------------------------------------


def as_table(plan: dict[str, Any]) -> str:
    """Format a plan as two columns, names and values."""
    lines = [
        ("network", f"{plan['encoder']}, {plan['method']}"),
        ("parameters", "{:,} trained, {:,} in all, {:,} in the encoder".format(*plan["parameters"].values())),
        ("image", "{} x {} pixels, ".format(*plan["image_size"]) + f"{plan['tokens']} tokens"),
    ]
    if plan["masked"]:
        masked = "{1} of {0} blocks, {2} of {3} tokens".format(*plan["masked"].values(), plan["tokens"])
        lines.append(("masked", masked))
    if plan["teacher"]:
        name, size, flops = plan["teacher"].values()
        text = f"{name}, {size:,} parameters, {flops / 1e9:.2f} G multiply-adds per image"
        lines.append(("teacher", text))
    *parts, total = plan["flops"].items()
    shares = ", ".join(f"{name} {value / 1e9:.3f}" for name, value in parts)
    scaled = f"{plan['base_lr']:g} x {plan['effective_batch']} / {plan['lr_batch']}"
    passes, devices = plural(plan["accumulate"], "pass", "passes"), plural(plan["devices"], "device")
    batch = f"{plan['batch_size']} x {passes} x {devices}"
    memory = f"{plan['memory'] / 1e9:.2f} GB per device, estimated: weights, gradients, moments, activations"
    lines += [
        ("FLOPs per image", f"{total[1] / 1e9:.2f} G multiply-adds forward ({shares})"),
        ("effective batch", f"{plan['effective_batch']} = {batch}"),
        ("learning rate", f"{plan['learning_rate']:g}" + (f" = {scaled}" if plan["lr_batch"] else ", not scaled")),
        ("images", f"{show_count(plan['images'])} ({plan['images_from']})"),
        ("steps", f"{show_count(plan['steps'])} = {show_count(plan['steps_per_epoch'])} x {plan['epochs']} epochs"),
        ("memory", memory),
        ("time", "not measured; --measure runs two steps"),
    ]
    measured = plan["measured"]
    if measured:
        lines[-1:] = [
            ("measured", f"{measured['peak_memory'] / 1e9:.2f} GB peak memory of this process on {measured['device']}"),
            (
                "step",
                f"{measured['step_seconds']:.3f} s, {measured['images_per_second']:.1f} images/s on one device; "
                f"first step with compiling {measured['first_step_seconds']:.1f} s",
            ),
            ("time", show_time(measured["training_seconds"])),
        ]
        if measured["kernels"]:
            lines.append(("kernels", measured["kernels"]))
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{one_line(value)}" for name, value in lines)


def show_count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def show_time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown without the number of images"
    return f"{duration(seconds)} for all steps, if all devices and the data loading are as fast as this step"
