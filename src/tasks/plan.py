"""What a recipe will cost: sizes, masks, operations, learning rate, steps and memory, before anything compiles."""

from __future__ import annotations

import json
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
from ..data.loader import images_of_epoch
from ..data.sources import image_folder, labelled_subset
from ..engine import checkpoint, device
from ..engine.log import duration
from ..engine.optim import build_optimizer
from ..engine.schedule import effective_batch, peak_rate
from ..engine.step import TrainStep
from ..methods import build_method
from ..models import build_network

IMAGENET = 1_281_167  # training images of ImageNet-1K
STATE = 16  # bytes per trained parameter: weight, gradient and two moments in float32


class PlanError(ConfigError):
    """A plan that cannot be made; one line for the user."""


def print_plan(recipe: Recipe, devices: int = 1, images: int = 0, measure: bool = False, as_json: bool = False) -> None:
    """What `train.py --plan` does.

    Raises:
        PlanError: as `make_plan`.
    """
    plans = [make_plan(view, devices, images, measure) for view in parts_of(recipe)]
    if as_json:
        sys.stdout.write(json.dumps(plans if recipe.stages else plans[0]) + "\n")
        return
    for number, plan in enumerate(plans, 1):
        title = f"stage {number} of {len(plans)}\n" if recipe.stages else ""
        sys.stdout.write(title + as_table(plan) + "\n")


def parts_of(recipe: Recipe) -> list[Recipe]:
    """The recipe of each stage with the epochs of that stage alone; the recipe itself if it has none."""
    parts = []
    for number, stage in enumerate(recipe.stages):
        view = at_stage(recipe, number)
        warm_up = min(view.train.warmup_epochs, stage.epochs - 1)  # a longer one goes on in the next stage
        parts.append(replace(view, train=replace(view.train, epochs=stage.epochs, warmup_epochs=warm_up)))
    return parts or [recipe]


def make_plan(recipe: Recipe, devices: int = 1, images: int = 0, measure: bool = False) -> dict[str, Any]:
    """All figures of a plan under the names that `--json` prints.

    Args:
        recipe: the resolved recipe.
        devices: that train it together, each with `train.batch_size` images at a time.
        images: training images; 0 counts those of the data folder, or takes ImageNet-1K's if the folder is not there
            and has its name. Where neither says it, `images` and the steps of the plan are None.
        measure: run two real steps on random images.

    Raises:
        PlanError: the images are too few for one step.
        DataError, DeviceError: of the data folder, and of the device if it measures.
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
        found = measure_steps(recipe)
        whole = None if steps is None else found["step_seconds"] * train.passes(devices) * steps
        plan["measured"] = {**found, "training_seconds": whole}
    return plan


def steps_per_epoch(recipe: Recipe, devices: int, images: int) -> int:
    """Updates of an epoch.

    Raises:
        PlanError: there is none.
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
    """Training images of an epoch, None if nothing tells, and where the number comes from."""
    data = recipe.data
    folder = Path(data.root) / data.train
    if folder.is_dir():
        return len(labelled_subset(image_folder(folder), data.labels_per_class)), str(folder)
    if "imagenet" not in Path(data.root).name.lower():
        return None, f"there is no folder {folder}; set data.root, or write --images N"
    if data.labels_per_class and recipe.method.classifier:
        return data.labels_per_class * recipe.method.classifier.num_classes, "ImageNet-1K, data.labels_per_class"
    return IMAGENET, f"ImageNet-1K; there is no folder {folder}"


def count_parameters(recipe: Recipe) -> dict[str, int]:
    """Parameters that are trained, all of them (fixed positions too), and the encoder's."""
    with no_init_parameters():  # names and shapes only
        weights = checkpoint.weights_of(build_method(recipe))
    return {
        "trained": sum(p.size for p in weights.values() if p.requires_grad),
        "total": sum(p.size for p in weights.values()),
        "encoder": sum(p.size for name, p in weights.items() if name.startswith("encoder.")),
    }


def teacher_of(recipe: Recipe) -> dict[str, Any] | None:
    """Name, parameters and multiply-adds of one image of the teacher; None for a Method without one."""
    teacher = recipe.method.teacher_network
    if teacher is None:
        return None
    with no_init_parameters():
        network = build_network(teacher.encoder, teacher.classifier)
    flops = teacher.classifier.flops(teacher.encoder).values() if teacher.classifier else [teacher.encoder.flops()]
    size = sum(p.size for p in checkpoint.weights_of(network).values())
    return {"encoder": teacher.encoder.name, "parameters": size, "flops": sum(flops)}


def estimated_memory(recipe: Recipe, parameters: dict[str, int]) -> int:
    """Bytes of one device: 16 per trained and 4 per fixed parameter (a teacher's too), 4 per value that the backward
    pass needs.

    Float32 throughout; what the framework adds (its own code, buffers of operations) is not in it.
    """
    teacher = teacher_of(recipe)
    fixed = parameters["total"] - parameters["trained"] + (teacher["parameters"] if teacher else 0)
    values = recipe.method.saved_values(recipe.trained_encoder) * recipe.train.batch_size
    return STATE * parameters["trained"] + 4 * (fixed + values)


def measure_steps(recipe: Recipe) -> dict[str, Any]:
    """Two training steps on random images of the recipe's batch: seconds and peak bytes of one device."""
    recipe = replace(recipe, method=recipe.method.without_cache())  # random images have no kept answers
    train, encoder = recipe.train, recipe.trained_encoder
    used = device.set_up(recipe.device, recipe.seed)
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
    taken = []
    for number in (1, 2):
        values = optimizer.step_values(lambda scale: 0.0 * scale, number)
        float(step(values, *[columns[name] for name in method.columns])[0])  # waits for the step
        taken.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {
        "device": used,
        "first_step_seconds": taken[0],  # with compiling
        "step_seconds": taken[1],
        "images_per_second": train.batch_size / taken[1],
        "peak_memory": device.peak_memory(used),
    }


# --- printing ---------------------------------------------------------------------------------------------------


def as_table(plan: dict[str, Any]) -> str:
    """Names and values in two columns, for people."""
    rows = [
        ("network", f"{plan['encoder']}, {plan['method']}"),
        ("parameters", "{:,} trained, {:,} in all, {:,} in the encoder".format(*plan["parameters"].values())),
        ("image", "{} x {} pixels, ".format(*plan["image_size"]) + f"{plan['tokens']} tokens"),
    ]
    if plan["masked"]:
        rows.append(("masked", "{1} of {0} blocks, {2} of {3} tokens".format(*plan["masked"].values(), plan["tokens"])))
    if plan["teacher"]:
        name, size, flops = plan["teacher"].values()
        text = f"{name}, {size:,} parameters, {flops / 1e9:.2f} G multiply-adds per image"
        rows.append(("teacher", text))
    *parts, total = plan["flops"].items()
    shares = ", ".join(f"{name} {value / 1e9:.3f}" for name, value in parts)
    scaled = f"{plan['base_lr']:g} x {plan['effective_batch']} / {plan['lr_batch']}"
    passes, devices = plural(plan["accumulate"], "pass", "passes"), plural(plan["devices"], "device")
    batch = f"{plan['batch_size']} x {passes} x {devices}"
    memory = f"{plan['memory'] / 1e9:.2f} GB a device, estimated: weights, gradients, moments, kept activations"
    rows += [
        ("FLOPs per image", f"{total[1] / 1e9:.2f} G multiply-adds forward ({shares})"),
        ("effective batch", f"{plan['effective_batch']} = {batch}"),
        ("learning rate", f"{plan['learning_rate']:g}" + (f" = {scaled}" if plan["lr_batch"] else ", not scaled")),
        ("images", f"{counted(plan['images'])} ({plan['images_from']})"),
        ("steps", f"{counted(plan['steps'])} = {counted(plan['steps_per_epoch'])} x {plan['epochs']} epochs"),
        ("memory", memory),
        ("time", "not measured; --measure runs two steps"),
    ]
    found = plan["measured"]
    if found:
        rows[-1:] = [
            ("measured", f"{found['peak_memory'] / 1e9:.2f} GB at the most, of this process on {found['device']}"),
            (
                "step",
                f"{found['step_seconds']:.3f} s, {found['images_per_second']:.1f} images/s on one device; "
                f"the first {found['first_step_seconds']:.1f} s with compiling",
            ),
            ("time", time_of(found["training_seconds"])),
        ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def counted(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def time_of(seconds: float | None) -> str:
    if seconds is None:
        return "not known without the number of images"
    return f"{duration(seconds)} for all steps, if devices and data keep up with it"
