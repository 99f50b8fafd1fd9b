"""Classifiers, and ten steps of training."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from src.config import EncoderConfig, SwinV2Config, TrainConfig, ViTConfig
from src.engine.optim import build_optimizer
from src.engine.schedule import learning_rate, position
from src.engine.step import TrainStep
from src.methods import Classify
from src.models import build_classifier, build_encoder
from src.models.graph import AsGraph
from tests.parity.common import (
    TOKENS,
    Case,
    Findings,
    Gradients,
    error,
    from_fastmim,
    from_fastmim_pooled,
    from_plain,
    from_simmim,
    gradient_findings,
    load_weights,
)
from tests.parity.networks import case_encoder
from tests.parity.pretraining import (
    GivenMask,
    GivenNoise,
    classifier_config,
    coordinate_tables,
    fastmim_swin_model,
    fastmim_vit_model,
    simmim_encoder,
    simmim_model,
    swin_config,
    vit_config,
    without_buffers,
)
from tests.parity.recipes import SIMMIM_DECAYED, known_schedule


def simmim_ft(case: Case) -> Findings:
    weights = case.tensors("weights")
    encoder = case_encoder(case, lambda: simmim_encoder(case.arguments), weights, case.arguments)
    if isinstance(encoder, SwinV2Config):
        yield from coordinate_tables(case, build_encoder(encoder))
    yield from classifier(case, encoder, weights, from_plain)


def train10_simmim(case: Case) -> Findings:
    method = simmim_model(case, case.data["image"])
    schedule = case.info["schedule"]
    settings = {
        "rule": "timm",
        "schedule": known_schedule(schedule["name"]),
        "base_lr": schedule["base_lr"],
        "lr_batch": 0,
        "warmup_lr": schedule["warmup_lr"],
        "milestones": tuple(schedule.get("multisteps", ())),
        "gamma": schedule.get("gamma", 0.1),
        "decayed": SIMMIM_DECAYED["swin" if hasattr(method.encoder, "layers") else "vit", False],
    }
    yield from train10(case, method, GivenMask(method), ("image", "mask"), from_simmim, settings)


def fastmim_ft_swin(case: Case) -> Findings:
    arguments, weights, image = case.arguments, case.tensors("weights"), case.data["image"]
    ape = arguments.get("ape", False)
    encoder = case_encoder(case, lambda: swin_config(arguments, image, absolute_position=ape), weights, arguments)
    yield from classifier(case, encoder, weights, from_fastmim_pooled)


def train10_fastmim_swin(case: Case) -> Findings:
    method = fastmim_swin_model(case, case.data["image"])
    yield from train10(case, method, GivenNoise(method), ("image", "noise"), from_fastmim, FASTMIM_TRAIN)


def fastmim_ft_vit(case: Case) -> Findings:
    arguments, weights, image = case.arguments, case.tensors("weights"), case.data["image"]
    encoder = case_encoder(case, lambda: vit_config(arguments, image, position="learned"), weights, arguments)
    yield from classifier(case, encoder, weights, from_plain)


def label_smoothing(case: Case) -> float:
    """From the arguments or the description of the loss; else 0.1 as in SimMIM and FastMIM."""
    stated = case.arguments.get("smoothing", case.arguments.get("MODEL.LABEL_SMOOTHING"))
    text = re.search(r"smoothing\D*(\d+(?:\.\d+)?)", str(case.info.get("loss", "")))
    return float(stated if stated is not None else text.group(1) if text else 0.1)


def classifier(
    case: Case, encoder: EncoderConfig, loaded: dict[str, np.ndarray], rename: Callable[[str], str]
) -> Findings:
    """A ViT with mean pooling has `fc_norm`; a Swin always pools with the mean."""
    vit, names = isinstance(encoder, ViTConfig), {rename(name): name for name in without_buffers(loaded)}
    pool_mean = "fc_norm.weight" in names if vit else True
    classes = case.arguments.get("num_classes", case.arguments.get("MODEL.NUM_CLASSES"))
    config = classifier_config(classes or loaded[names["head.weight"]].shape[0], vit, pool_mean)
    config = replace(config, label_smoothing=label_smoothing(case))
    data = case.data
    method = Classify(build_classifier(encoder, config), config.label_smoothing)
    load_weights(method, without_buffers(loaded), rename)
    image, label = Tensor(data["image"]), Tensor(data["label"].astype(np.int32))
    weights = ms.ParameterTuple(method.trainable_params())
    (loss, _), grads = Gradients(method, weights)(image, label)
    if "features" in data:
        yield "features", error(AsGraph(method, method.classifier.features)(image), data["features"]), case.forward
    if "logits" in data:
        yield "logits", error(AsGraph(method, method.classifier)(image), data["logits"]), case.forward
    yield "loss", error(loss, data["loss"]), case.forward
    yield from gradient_findings(case, [w.name for w in weights], grads, rename)


def train10_fastmim_vit(case: Case) -> Findings:
    method = fastmim_vit_model(case, case.data["image"])
    yield from train10(case, method, GivenNoise(method), ("image", "noise"), from_fastmim, FASTMIM_TRAIN)


class FirstTwo(nn.Cell):
    """The first two outputs of a Cell, loss and another one, as a Method returns them."""

    def __init__(self, cell: nn.Cell):
        super().__init__(auto_prefix=False)
        self.cell = cell

    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.cell(*inputs)
        return outputs[0], outputs[1]


#: FastMIM's training settings
FASTMIM_TRAIN: dict[str, Any] = {"decayed": TOKENS}


def train10(
    case: Case,
    method: Any,
    network: nn.Cell,
    inputs: tuple[str, str],
    rename: Callable[[str], str],
    settings: dict[str, Any],
) -> Findings:
    """Ten steps with the engine's optimiser and step: losses, gradient norms, rates, final weights."""
    data, schedule, tolerance = case.data, case.info["schedule"], {"loss_rel": 1e-4, "final_weight_abs": 2e-4}
    tolerance |= case.tolerance
    optimizer_info = {"betas": TrainConfig.betas} | case.info["optimizer"]
    train = TrainConfig(
        epochs=schedule["epochs"],
        warmup_epochs=schedule["warmup_epochs"],
        min_lr=schedule["min_lr"],
        betas=tuple(optimizer_info["betas"]),
        eps=optimizer_info.get("eps", 1e-8),
        weight_decay=optimizer_info["weight_decay"],
        clip_norm=optimizer_info.get("clip_grad") or 0.0,
        **settings,
    )
    optimizer = build_optimizer(method, train)
    step = TrainStep(FirstTwo(network), optimizer, train.clip_norm)
    losses, norms, rates = [], [], []
    per_epoch = schedule["steps_per_epoch"]
    peak = schedule["lr"] if "lr" in schedule else schedule["base_lr"]
    for number in range(len(data["loss"])):
        here = position(number // per_epoch, number % per_epoch, per_epoch, 1)

        def rate_of(scale: float, here: float = here) -> float:
            return learning_rate(train, peak, here, scale, per_epoch)

        rates.append(rate_of(1.0))
        values = optimizer.step_values(rate_of, number + 1)
        loss, _, norm = step(values, Tensor(data[inputs[0]]), Tensor(data[inputs[1]][number]))
        losses.append(float(loss))
        norms.append(float(norm))
    yield "lr", error(np.array(rates), data["lr"]), 1e-9
    yield "loss", float(np.abs(np.array(losses) / data["loss"] - 1).max()), tolerance["loss_rel"]
    # with L1, a residual that changes its sign changes all later gradients: noise of 1e-7 on the reference's weights
    # changes its norms by 0.85 %
    yield "grad_norm[:2]", error(np.array(norms[:2]), data["grad_norm"][:2]), case.gradient
    yield "grad_norm", error(np.array(norms), data["grad_norm"]), 2e-2 if "mask" in data else case.gradient
    ours = {p.name: p.asnumpy() for p in method.get_parameters()}
    for name, theirs in without_buffers(case.tensors("weights_final")).items():
        difference = np.abs(ours[rename(name)].reshape(theirs.shape) - theirs)
        if name.endswith("qkv.bias"):  # the key third has no gradient: Adam turns rounding noise into steps there
            third = len(theirs) // 3
            difference[third : 2 * third] = 0
        yield f"final {name}", float(difference.max()), tolerance["final_weight_abs"]
