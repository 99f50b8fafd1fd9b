"""Manifold distillation: relations, whole losses, students with a second head."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
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
from tests.parity.common import (
    Case,
    Findings,
    Gradients,
    StatedArguments,
    UnknownError,
    error,
    gradient_findings,
    load_weights,
    read_json,
    rename_with,
)
from tests.parity.networks import case_encoder, naming_of
from tests.parity.pretraining import swin_config, vit_config, without_buffers


def manifold_config(arguments: dict[str, Any], **changes: Any) -> ManifoldConfig:
    """Configuration from the reference's flags, those of mf_loss or of a whole run."""
    keys = {"w_sample": "w_sample", "w_patch": "w_patch", "w_rand": "w_rand", "K": "samples"}
    keys |= {"max_patch_num": "max_patch_num", "distillation_beta": "beta"}
    keys |= {"distillation_alpha": "alpha", "distillation_tau": "tau", "distillation_type": "distillation"}
    for theirs in (("s_id", "layer_ids_s"), ("t_id", "layer_ids_t")):
        keys |= dict.fromkeys(theirs, "student_layers" if theirs[0] == "s_id" else "teacher_layers")
    values = {ours: arguments[theirs] for theirs, ours in keys.items() if theirs in arguments}
    if not {"student_layers", "teacher_layers"} <= set(values):
        raise UnknownError("its arguments do not state the layers")
    values |= {key: tuple(values[key]) for key in ("student_layers", "teacher_layers")}
    if values.get("distillation") == "none":  # then the reference has no relations either
        values["beta"] = 0.0
    return ManifoldConfig(**values | changes)


class SumOfRelations(nn.Cell):
    """Sequences of student blocks -> sum of the relation losses, and each of them.

    Args:
        relations: the losses.
        positions: position of each pair's student sequence in the input.
        teachers, indices: as in `Relations`.
    """

    def __init__(self, relations: Relations, positions: tuple[int, ...], teachers: Any, indices: Any):
        super().__init__(auto_prefix=False)
        self.relations = relations
        self.positions = positions
        self.teachers = teachers
        self.indices = indices

    def construct(self, *students: Tensor) -> tuple[Tensor, ...]:
        of_pairs = tuple([students[position] for position in self.positions])
        sample, patch, rand, _ = self.relations(of_pairs, self.teachers, self.indices)
        return sample + patch + rand, sample, patch, rand


class WithInputGradients(nn.Cell):
    """Outputs of a Cell that returns the loss first, and the gradient of the loss for every input."""

    def __init__(self, cell: nn.Cell, inputs: int):
        super().__init__(auto_prefix=False)
        self.value_and_grad = ops.value_and_grad(cell, tuple(range(inputs)), None, has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Any, Any]:
        return self.value_and_grad(*inputs)


def number(name: str) -> int:
    """The number at the end of an array's name."""
    return int(name.rpartition("_")[2])


def manifold_losses(case: Case) -> Findings:
    """mf_loss on stored block outputs: losses, unweighted losses of each pair, gradients, merged tokens."""
    data, config = case.data, manifold_config(case.arguments)
    first = [min(number(name) for name in data if name.startswith(f"{side}_")) for side in ("student", "teacher")]
    # the reference cuts the difference of the first blocks
    extra = data[f"student_{first[0]}"].shape[1] - data[f"teacher_{first[1]}"].shape[1]
    pairs = list(zip(config.student_layers, config.teacher_layers, strict=True))
    maps, indices = [], []
    for index, (student_layer, teacher_layer) in enumerate(pairs):
        student_tokens = data[f"student_{student_layer}"].shape[1] - extra
        teacher_tokens = data[f"teacher_{teacher_layer}"].shape[1]
        limit = config.max_patch_num
        merged = math.isqrt(limit) ** 2 if limit and student_tokens > limit else student_tokens
        maps.append(((student_tokens, 1), (teacher_tokens, 1), (merged, 1)))
        indices.append(Tensor(data[f"perm_{index}"][: config.samples].astype(np.int32)))
    blocks = sorted(set(config.student_layers))
    students = [Tensor(data[f"student_{block}"]) for block in blocks]
    teachers = tuple(Tensor(data[f"teacher_{layer}"]) for _, layer in pairs)
    positions = tuple(blocks.index(layer) for layer, _ in pairs)
    whole = SumOfRelations(Relations(config, tuple(maps)), positions, teachers, tuple(indices))
    (_, *losses), grads = WithInputGradients(whole, len(blocks))(*students)
    yield "losses", error(np.array([float(loss) for loss in losses]), data["losses"]), case.forward
    for block, grad in zip(blocks, grads if len(blocks) > 1 else [grads], strict=True):
        yield f"grad_student_{block}", error(grad, data[f"grad_student_{block}"]), case.gradient
    unweighted = replace(config, w_sample=1.0, w_patch=1.0, w_rand=1.0)
    for index in range(len(pairs)):
        relations = Relations(unweighted, (maps[index],))
        of_pair = SumOfRelations(relations, (positions[index],), (teachers[index],), (indices[index],))
        _, sample, patch, rand = (float(value) for value in of_pair(*students))
        yield f"per_layer[{index}]", error(np.array([patch, sample, rand]), data["per_layer"][index]), case.forward
    if "merged_student" in data:
        first = Tensor(data[f"student_{config.student_layers[0]}"][:, extra:])
        yield "merged_student", error(merge(first, config.max_patch_num), data["merged_student"]), case.forward


def timm_encoder(arguments: dict[str, Any]) -> EncoderConfig:
    """Configuration of a timm 0.5.4 network from its class and arguments."""
    kind = arguments.get("cls", "VisionTransformer").lower()
    if "swin" in kind:
        return swin_config(arguments, patch_size=arguments.get("patch_size", 4))
    if "cait" in kind:
        keys = ("in_chans", "patch_size", "embed_dim", "depth", "depth_token_only", "num_heads", "qkv_bias")
        values = {key: arguments[key] for key in keys if key in arguments}
        scale = arguments.get("init_scale", arguments.get("init_values", 1e-5))
        ratios = [float(arguments.get(key, 4.0)) for key in ("mlp_ratio", "mlp_ratio_clstk")]
        return CaiTConfig(
            image_size=pair(arguments["img_size"]),
            layer_scale=scale,
            mlp_ratio=ratios[0],
            mlp_ratio_token_only=ratios[1],
            **values,
        )
    return vit_config(arguments, position="learned", distilled=arguments.get("distilled", False))


def head_size(weights: dict[str, np.ndarray]) -> int:
    return next(value.shape[0] for name, value in weights.items() if re.fullmatch(r"head(\.fc)?\.weight", name))


def timm_classifier(
    case: Case, arguments: dict[str, Any], weights: dict[str, np.ndarray]
) -> tuple[EncoderConfig, Any, Any]:
    """Encoder configuration, classifier with the reference's weights, and function from their names to ours."""
    arguments, rename = StatedArguments(arguments), rename_with(naming_of(list(weights)))
    encoder = case_encoder(case, lambda: timm_encoder(arguments), weights, arguments)
    pool: Any = "mean" if isinstance(encoder, SwinConfig) else "cls"
    classes = arguments.get("num_classes") or head_size(weights)
    network = build_classifier(encoder, ClassifyConfig(num_classes=classes, pool=pool, fc_norm=False))
    load_weights(network, without_buffers(weights), rename)
    return encoder, network, rename


class GivenTokens(nn.Cell):
    """A distillation with stored random tokens: (image, label) -> loss, parts, sums."""

    def __init__(self, method: ManifoldDistiller, indices: tuple[Tensor, ...]):
        super().__init__(auto_prefix=False)
        self.method, self.indices = method, indices

    def construct(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        image, target = self.method.mixed(image, label)
        return self.method.run(image, target, self.method.teacher_outputs(image), self.indices)


class Sequences(nn.Cell):
    """Image -> logits, and the sequences after some blocks."""

    def __init__(self, network: Any, blocks: tuple[int, ...]):
        super().__init__(auto_prefix=False)
        self.network, self.blocks = network, blocks

    def construct(self, image: Tensor) -> tuple[Tensor, ...]:
        encoder = self.network.encoder
        sequence, taken = encoder.outputs(encoder.embed(image), self.blocks)
        return (self.network.logits(sequence), *taken)


def weights_folder(case: Case) -> Path:
    """The folder with the weights of a case: its own, else the one that it names, else one with the same networks."""
    files = ("student.safetensors", "teacher.safetensors")

    def has_weights(folder: Path) -> bool:
        return all((folder / file).exists() for file in files)

    if has_weights(case.folder):
        return case.folder
    folders = sorted(case.folder.parent.iterdir())
    others = [path for path in folders if has_weights(path) and (path / "case.json").exists()]
    words = set(re.findall(r"\w+", str(case.info.get("weights", ""))))
    infos = {path: read_json(path / "case.json") for path in others}
    named = [path for path in others if {path.name, infos[path].get("case")} & words]
    networks = [case.arguments.get(key) for key in ("student", "teacher")]
    same = [
        path for path in others if [infos[path].get("arguments", {}).get(k) for k in ("student", "teacher")] == networks
    ]
    for candidates in (named, same):
        if len({tuple((path / file).read_bytes() for file in files) for path in candidates}) == 1:
            return candidates[0]
    raise UnknownError("the folder with the weights of its student and teacher is unknown")


def manifold(case: Case) -> Findings:
    """DistillationLoss with a student and a teacher: components, gradients, outputs of both networks."""
    data, arguments, folder = case.data, case.arguments, weights_folder(case)
    loaded = {kind: load_file(str(folder / f"{kind}.safetensors")) for kind in ("student", "teacher")}
    encoder, student, rename = timm_classifier(case, arguments["student"], loaded["student"])
    theirs, teacher, _ = timm_classifier(case, arguments["teacher"], loaded["teacher"])
    for name, network in (("student", student), ("teacher", teacher)):
        stored = {"logits", *(key.removeprefix(f"{name}_") for key in data if key.startswith(f"{name}_block_"))}
        blocks = tuple(sorted(int(key.removeprefix("block_")) for key in stored - {"logits"}))
        if f"{name}_logits" in data:
            ours = Sequences(network, blocks)(Tensor(data["image"]))
            for key, output in zip(("logits", *(f"block_{block}" for block in blocks)), ours, strict=True):
                yield f"{name}_{key}", error(output, data[f"{name}_{key}"]), case.forward
    criterion = case.info.get("base_criterion", "SoftTarget" if data["label"].ndim == 2 else "")
    if not criterion:
        raise UnknownError("its base criterion is unknown")
    smoothing = arguments.get("smoothing", 0.1) if "LabelSmoothing" in criterion else 0.0
    config = manifold_config(
        arguments,
        num_classes=head_size(loaded["student"]),
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
    expected = np.zeros(5)  # type none gives only the base loss
    expected[: len(data["components"])] = data["components"]
    scale = max(np.abs(expected).max(), 1e-12)  # relations in a batch of one image are noise
    for name, ours, part in zip(method.parts, parts, expected, strict=True):
        yield name, abs(float(ours) - part) / scale, case.forward
    yield from gradient_findings(case, [w.name for w in weights], grads, rename)


def distilled_student(case: Case) -> Findings:
    """A student with two heads: their logits in training, the logits in evaluation, the last block."""
    data = case.data
    encoder, network, _ = timm_classifier(case, case.arguments, case.tensors("weights"))
    image, last = Tensor(data["image"]), len(encoder.block_maps) - 1
    first, second = AsGraph(network, network.heads)(network.encoder(image))
    yield "train_cls", error(first, data["train_cls"]), case.forward
    yield "train_dist", error(second, data["train_dist"]), case.forward
    logits, block = Sequences(network, (last,))(image)
    yield "eval_logits", error(logits, data["eval_logits"]), case.forward
    if "last_block" in data:
        yield "last_block", error(block, data["last_block"]), case.forward
