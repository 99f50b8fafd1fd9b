"""Manifold distillation: relations, whole losses, students with a second head."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file

from src.config import CaiTConfig, ClassifyConfig, EncoderConfig, ManifoldConfig, SwinConfig, relation_maps
from src.methods import ManifoldDistiller
from src.methods.manifold import Relations, merge
from src.models import build_classifier
from src.models.graph import AsGraph
from src.weights.derive import pair
from src.weights.names import recognise
from tests.parity.common import Case, Findings, Gradients, error, gradient_findings, load_weights, rename_with
from tests.parity.pretraining import swin_config, trained, vit_config


def manifold_config(arguments: dict[str, Any], **changes: Any) -> ManifoldConfig:
    """The reference's flags, those of mf_loss or of a whole run."""
    keys = {"w_sample": "w_sample", "w_patch": "w_patch", "w_rand": "w_rand", "K": "samples"}
    keys |= {"max_patch_num": "max_patch_num", "distillation_beta": "beta"}
    keys |= {"distillation_alpha": "alpha", "distillation_tau": "tau", "distillation_type": "distillation"}
    for theirs in (("s_id", "layer_ids_s"), ("t_id", "layer_ids_t")):
        keys |= dict.fromkeys(theirs, "student_layers" if theirs[0] == "s_id" else "teacher_layers")
    taken = {ours: arguments[theirs] for theirs, ours in keys.items() if theirs in arguments}
    taken |= {key: tuple(taken[key]) for key in ("student_layers", "teacher_layers")}
    if taken.get("distillation") == "none":  # the reference's then has no relations either
        taken["beta"] = 0.0
    return ManifoldConfig(**taken | changes)


class SumOfRelations(nn.Cell):
    """Sequences of the student's blocks -> sum of the relation losses, and each of them."""

    def __init__(self, relations: Relations, places: tuple[int, ...], teachers: Any, indices: Any):
        super().__init__(auto_prefix=False)
        self.relations, self.places, self.teachers, self.indices = relations, places, teachers, indices

    def construct(self, *students: Tensor) -> tuple[Tensor, ...]:
        chosen = tuple([students[place] for place in self.places])
        sample, patch, rand, _ = self.relations(chosen, self.teachers, self.indices)
        return sample + patch + rand, sample, patch, rand


class WithInputGradients(nn.Cell):
    """Outputs of a Cell that returns the loss first, and the loss's gradient for every input."""

    def __init__(self, cell: nn.Cell, inputs: int):
        super().__init__(auto_prefix=False)
        self.value_and_grad = ops.value_and_grad(cell, tuple(range(inputs)), None, has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Any, Any]:
        return self.value_and_grad(*inputs)


def manifold_losses(case: Case) -> Findings:
    """mf_loss on stored block outputs: losses, those of each pair without weights, gradients, merged tokens."""
    data, config = case.data, manifold_config(case.arguments)
    extra = data["student_0"].shape[1] - data["teacher_0"].shape[1]  # of the first blocks, as there
    pairs = list(zip(config.student_layers, config.teacher_layers, strict=True))
    maps, indices = [], []
    for number, (ours, theirs) in enumerate(pairs):
        own, given = data[f"student_{ours}"].shape[1] - extra, data[f"teacher_{theirs}"].shape[1]
        limit = config.max_patch_num
        merged = math.isqrt(limit) ** 2 if limit and own > limit else own
        maps.append(((own, 1), (given, 1), (merged, 1)))
        indices.append(Tensor(data[f"perm_{number}"][: config.samples].astype(np.int32)))
    blocks = sorted(set(config.student_layers))
    students = [Tensor(data[f"student_{block}"]) for block in blocks]
    teachers = tuple(Tensor(data[f"teacher_{theirs}"]) for _, theirs in pairs)
    places = tuple(blocks.index(ours) for ours, _ in pairs)
    whole = SumOfRelations(Relations(config, tuple(maps)), places, teachers, tuple(indices))
    (_, *losses), grads = WithInputGradients(whole, len(blocks))(*students)
    yield "losses", error(np.array([float(loss) for loss in losses]), data["losses"]), case.forward
    for block, grad in zip(blocks, grads if len(blocks) > 1 else [grads], strict=True):
        yield f"grad_student_{block}", error(grad, data[f"grad_student_{block}"]), case.gradient
    alone = replace(config, w_sample=1.0, w_patch=1.0, w_rand=1.0)
    for number in range(len(pairs)):
        one = Relations(alone, (maps[number],))
        pair = SumOfRelations(one, (places[number],), (teachers[number],), (indices[number],))
        _, sample, patch, rand = (float(value) for value in pair(*students))
        yield f"per_layer[{number}]", error(np.array([patch, sample, rand]), data["per_layer"][number]), case.forward
    if "merged_student" in data:
        first = Tensor(data[f"student_{config.student_layers[0]}"][:, extra:])
        yield "merged_student", error(merge(first, config.max_patch_num), data["merged_student"]), case.forward


def timm_encoder(arguments: dict[str, Any]) -> EncoderConfig:
    """A network of timm 0.5.4 by its class and arguments."""
    kind = arguments.get("cls", "VisionTransformer").lower()
    if "swin" in kind:
        return swin_config(arguments, patch_size=arguments.get("patch_size", 4))
    if "cait" in kind:
        keys = ("in_chans", "patch_size", "embed_dim", "depth", "depth_token_only", "num_heads", "qkv_bias")
        taken = {key: arguments[key] for key in keys if key in arguments}
        scale = arguments.get("init_scale", arguments.get("init_values", 1e-5))
        ratios = [float(arguments.get(key, 4.0)) for key in ("mlp_ratio", "mlp_ratio_clstk")]
        return CaiTConfig(
            image_size=pair(arguments["img_size"]),
            layer_scale=scale,
            mlp_ratio=ratios[0],
            mlp_ratio_token_only=ratios[1],
            **taken,
        )
    return vit_config(arguments, position="learned", distilled=arguments.get("distilled", False))


def timm_classifier(arguments: dict[str, Any], weights: dict[str, np.ndarray]) -> tuple[EncoderConfig, Any, Any]:
    """Encoder, classifier with the reference's weights, and the name of ours for each of theirs."""
    encoder = timm_encoder(arguments)
    pool: Any = "mean" if isinstance(encoder, SwinConfig) else "cls"
    network = build_classifier(encoder, ClassifyConfig(num_classes=arguments["num_classes"], pool=pool, fc_norm=False))
    rename = rename_with(recognise(list(weights)).naming)
    load_weights(network, trained(weights), rename)
    return encoder, network, rename


class GivenTokens(nn.Cell):
    """A distillation whose tokens for relations at random are stored: (image, label) -> loss, parts and sums."""

    def __init__(self, method: ManifoldDistiller, indices: tuple[Tensor, ...]):
        super().__init__(auto_prefix=False)
        self.method, self.indices = method, indices

    def construct(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        image, target = self.method.mixed(image, label)
        return self.method.run(image, target, self.method.ask(image), self.indices)


class Sequences(nn.Cell):
    """Image -> logits, and the sequences after some blocks."""

    def __init__(self, network: Any, blocks: tuple[int, ...]):
        super().__init__(auto_prefix=False)
        self.network, self.blocks = network, blocks

    def construct(self, image: Tensor) -> tuple[Tensor, ...]:
        encoder = self.network.encoder
        sequence, taken = encoder.outputs(encoder.embed(image), self.blocks)
        return (self.network.logits(sequence), *taken)


def manifold(case: Case) -> Findings:
    """DistillationLoss with a student and a teacher: components, gradients, outputs of both networks."""
    data, folder = case.data, case.folder
    if not (folder / "student.safetensors").exists():
        folder = folder.parent / case.info["weights"].split("of case ")[1].split()[0]
    arguments = case.arguments
    encoder, student, rename = timm_classifier(arguments["student"], load_file(str(folder / "student.safetensors")))
    theirs, teacher, _ = timm_classifier(arguments["teacher"], load_file(str(folder / "teacher.safetensors")))
    for name, network in (("student", student), ("teacher", teacher)):
        stored = {"logits", *(key.removeprefix(f"{name}_") for key in data if key.startswith(f"{name}_block_"))}
        blocks = tuple(sorted(int(key.removeprefix("block_")) for key in stored - {"logits"}))
        if f"{name}_logits" in data:
            ours = Sequences(network, blocks)(Tensor(data["image"]))
            for key, found in zip(("logits", *(f"block_{block}" for block in blocks)), ours, strict=True):
                yield f"{name}_{key}", error(found, data[f"{name}_{key}"]), case.forward
    smoothing = arguments.get("smoothing", 0.1) if "LabelSmoothing" in case.info["base_criterion"] else 0.0
    config = manifold_config(
        arguments,
        num_classes=arguments["student"]["num_classes"],
        teacher_encoder=theirs,
        label_smoothing=smoothing,
    )
    method = ManifoldDistiller(student, config, relation_maps(encoder, config), teacher)
    perms = [data[f"perm_{number}"][: config.samples] for number in range(len(config.student_layers))]
    network = GivenTokens(method, tuple(Tensor(perm.astype(np.int32)) for perm in perms))
    label = data["label"] if data["label"].ndim == 2 else data["label"].astype(np.int32)
    weights = ms.ParameterTuple(method.trainable_params())
    (loss, *parts, _), grads = Gradients(network, weights)(Tensor(data["image"]), Tensor(label))
    yield "total", error(loss, data["total"]), case.forward
    expected = np.zeros(5)  # type none gives the base loss alone
    expected[: len(data["components"])] = data["components"]
    scale = max(np.abs(expected).max(), 1e-12)  # one array: a batch of one image has relations of rounding noise alone
    for name, ours, part in zip(method.parts, parts, expected, strict=True):
        yield name, abs(float(ours) - part) / scale, case.forward
    yield from gradient_findings(case, [w.name for w in weights], grads, rename)


def distilled_student(case: Case) -> Findings:
    """A student with two heads: what training sees of them, what evaluation makes of them."""
    data = case.data
    encoder, network, _ = timm_classifier(case.arguments, case.tensors("weights"))
    image, last = Tensor(data["image"]), len(encoder.block_maps) - 1
    first, second = AsGraph(network, network.heads)(network.encoder(image))
    yield "train_cls", error(first, data["train_cls"]), case.forward
    yield "train_dist", error(second, data["train_dist"]), case.forward
    logits, block = Sequences(network, (last,))(image)
    yield "eval_logits", error(logits, data["eval_logits"]), case.forward
    yield "last_block", error(block, data["last_block"]), case.forward
