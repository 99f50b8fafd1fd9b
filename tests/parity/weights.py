"""Transfer between networks, resized tables, converted checkpoints."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from src.config import ClassifyConfig, HOGConfig, MAEConfig
from src.engine.checkpoint import weights_of
from src.methods import Classify, MaskedAutoencoder, MaskedImageModel
from src.models import build_classifier, build_encoder
from src.models.graph import AsGraph
from src.models.layers import sincos_position
from src.tasks.networks import BareEncoder
from src.weights import foreign
from src.weights.derive import Hints, pair
from src.weights.load import Origin, load_encoder_weights
from src.weights.names import BUFFERS, naming_for, recognise
from src.weights.resize import TABLE_RULES, Progression, resize_offsets, resize_positions
from src.weights.torch_file import StoredTensor
from tests.parity.common import (
    Case,
    Findings,
    Gradients,
    StatedArguments,
    UnknownError,
    absolute,
    error,
    load_weights,
    rename_with,
)
from tests.parity.pretraining import (
    GivenMask,
    GivenNoise,
    classifier_config,
    fastmim_config,
    mask_ratio,
    simmim_encoder,
    swin_config,
    vit_config,
)


def remap_tables(case: Case) -> Findings:
    """Arrays <pair>_src and <pair>_dst (SimMIM) or <pair>_simmim and <pair>_interpolate (FastMIM's two modes)."""
    rules = {"dst": "simmim", "simmim": "fastmim", "interpolate": "bicubic"}
    limit = case.tolerance.get("abs", 1e-5)
    for name, theirs in case.data.items():
        pair, _, kind = name.rpartition("_")
        if kind == "src":
            continue
        if kind not in rules:
            raise UnknownError(f"the rule that resized {name} is unknown")
        ours = case.data[f"{pair}_src"]
        old, new = window_of(ours), window_of(theirs)
        rule = TABLE_RULES[rules[kind]]
        yield name, absolute(resize_offsets(ours, (old, old), (new, new), rule) if old != new else ours, theirs), limit
        positions = case.info.get("pairs", {}).get(pair, {}).get("source_positions")
        if positions and isinstance(rule, Progression):
            yield f"{name} offsets", absolute(rule.offsets(old - 1, new - 1), np.array(positions)), limit


def window_of(table: np.ndarray) -> int:
    """Window of a table ((2w-1)^2, heads), or with three more entries for a class token."""
    for entries in (len(table), len(table) - 3):
        side = math.isqrt(max(entries, 0))
        if side**2 == entries and side % 2:
            return (side + 1) // 2
    raise UnknownError(f"{len(table)} entries do not fit a square window")


def grid_of(table: np.ndarray) -> int:
    """Side of the grid of a table (1, 1 + side^2, dim)."""
    side = math.isqrt(table.shape[-2] - 1)
    if side**2 != table.shape[-2] - 1:
        raise UnknownError(f"{table.shape[-2] - 1} positions do not fit a square grid")
    return side


def pos_embed(case: Case) -> Findings:
    """Arrays grid<a>_to_<b>_src and _dst, and sincos_<dim>_<side> with a class token."""
    limit = case.tolerance.get("abs", 1e-5)
    for name, theirs in case.data.items():
        if name.startswith("sincos"):
            side = grid_of(theirs)
            yield (
                name,
                absolute(sincos_position(theirs.shape[-1], (side, side), True)[0], theirs),
                case.tolerance.get("abs", 1e-5),
            )
        elif name.endswith("_dst"):
            ours = case.data[name.removesuffix("_dst") + "_src"]
            old, new = grid_of(ours), grid_of(theirs)
            ours = resize_positions(ours, (old, old), (new, new)) if old != new else ours
            yield name, absolute(ours, theirs), limit


def remap(case: Case) -> Findings:
    """Load a pre-trained checkpoint into a classifier: names that are copied, resized, or fresh."""
    before, after = (StatedArguments(case.info.get(f"{stage}_arguments") or {}) for stage in ("pretrain", "finetune"))
    source = "simmim" if "MODEL.TYPE" in after else "fastmim"
    side = before["DATA.IMG_SIZE" if source == "simmim" else "img_size"]
    heads = before.get("num_heads")
    hints = Hints(image_size=(side, side), num_heads=heads if isinstance(heads, int) else None)
    done = foreign.to_ours(foreign.open_foreign(case.folder / "input.safetensors"), source, hints)
    if source == "simmim":
        vit = after["MODEL.TYPE"] == "vit"
        pool_mean = after.get("MODEL.VIT.USE_MEAN_POOLING")
        encoder, classes = simmim_encoder(after), after["MODEL.NUM_CLASSES"]
    else:
        vit, classes = isinstance(after["num_heads"], int), after["num_classes"]
        pool_mean = after.get("global_pool")
        ape = after.get("ape", False)
        encoder = vit_config(after, position="learned") if vit else swin_config(after, absolute_position=ape)
    method = Classify(build_classifier(encoder, classifier_config(classes, vit, bool(pool_mean))), 0.0)
    weights = weights_of(method)
    fresh = {name: value.asnumpy().copy() for name, value in weights.items()}
    report = load_encoder_weights(
        weights, done.weights, case.folder, Origin(done.sources, done.encoder, (), tuple(done.unused)), encoder
    )
    rename = rename_with(naming_for(source, weights))
    result = {rename(name): value for name, value in case.tensors("result").items()}
    for name, value in weights.items():
        theirs = result.pop(name, None)
        kind = "fresh" if theirs is None else "table" if name in report.resized else "exact"
        tolerance = case.tolerance.get("tables_abs", 1e-5) if kind == "table" else 0.0
        yield f"{kind} {name}", absolute(value.asnumpy(), fresh[name] if theirs is None else theirs), tolerance
    yield f"not in our network: {sorted(result)[:3]}", float(bool(result)), 0.0
    missing = {rename(name) for name in case.info["missing_keys"] if not re.fullmatch(BUFFERS, name)}
    yield "fresh names", float(missing != set(report.missing)), 0.0


def convert_file(case: Case, file: str, source: str = "", key: str = "", **hints: Any) -> Any:
    """Convert a file of a case; the user's hints come from the arguments of the case."""
    heads = case.arguments.get("num_heads", case.arguments.get("MODEL.VIT.NUM_HEADS"))
    user_hints = Hints(num_heads=heads if isinstance(heads, int) else None, **hints)
    return foreign.to_ours(foreign.open_foreign(case.folder / file, key), source, user_hints)


def round_trip(case: Case, file: str, done: Any) -> Findings:
    """Convert back and write both formats: names, number types, shapes and bits must equal those of the file."""
    before = foreign.open_foreign(case.folder / file)
    tensors, key = foreign.to_theirs(done.weights, done.unused, done.note, "")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".pth", ".safetensors"):
            path = Path(folder) / f"back{suffix}"
            foreign.write_foreign(path, tensors, key if suffix == ".pth" else "")
            after = foreign.open_foreign(path)
            same = list(before.tensors) == list(after.tensors) and before.prefix == after.prefix
            same = same and all(equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
            yield f"{file} and back as {suffix}", float(not same), 0.0


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """The same number type, shape and bits."""
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same and one.read().tobytes() == other.read().tobytes()


def build_converted(done: Any, **changes: Any) -> Any:
    """The derived network with the converted weights, in evaluation mode."""
    if isinstance(done.method, ClassifyConfig):
        network: Any = build_classifier(done.encoder, done.method)
    elif done.method is None:
        network = BareEncoder(build_encoder(done.encoder))
    else:
        method = replace(done.method, **changes)
        kind = MaskedAutoencoder if isinstance(method, MAEConfig) else MaskedImageModel
        network = kind(build_encoder(done.encoder), method, done.encoder.image_size)
    load_weights(network, done.weights, lambda name: name)
    network.set_train(False)
    return network


def reference_of(case: Case) -> str:
    return str(case.info.get("reference", "")).lower()


def container(case: Case) -> Findings:
    """Every file of a checkpoint case: entries, round trip, outputs of its network."""
    files = [case.info["checkpoint"], *(text.split()[0] for text in case.info.get("other_files") or [])]
    # several sources share some names, so the source comes from the case
    source = "simmim" if "MODEL.TYPE" in case.arguments else "fastmim" if "fastmim" in reference_of(case) else ""
    for file in files:
        opened = foreign.open_foreign(case.folder / file)
        entries = [[name, list(tensor.shape), tensor.dtype] for name, tensor in opened.tensors.items()]
        if "state_dict_entries" in case.info:
            yield f"{file} entries", float(entries != case.info["state_dict_entries"]), 0.0
        if "weights" in case.info:
            stored = case.tensors(Path(case.info["weights"]["file"]).stem)
            for name, theirs in stored.items():
                yield f"{file} {name}", absolute(opened.tensors[name].array(), theirs), 0.0
        yield from round_trip(case, file, convert_file(case, file))
    tables = {"": ""} | ({"_ema": "model_ema"} if "logits_ema" in case.data else {})
    for suffix, key in tables.items():
        done = convert_file(case, files[0], source if key == "" else "", key)
        yield from container_outputs(case, done, suffix)


def container_arguments(case: Case, done: Any) -> dict[str, Any]:
    """Arguments of a case, completed from the converted network and the noise."""
    image, noise = case.data["image"], case.data["noise"]
    block = round(math.sqrt(image.shape[2] * image.shape[3] / noise.shape[-1]))
    kind = "HOG" if isinstance(done.method.target, HOGConfig) else "l2"
    return {"block_size": block, "mim_loss": kind} | case.arguments


def container_outputs(case: Case, done: Any, suffix: str) -> Findings:
    data = case.data
    image = Tensor(data["image"])
    if isinstance(done.method, ClassifyConfig):
        yield f"logits{suffix}", error(build_converted(done)(image), data[f"logits{suffix}"]), case.forward
        return
    if "noise" in data:  # the case's arguments differ from those in the file
        config = fastmim_config(container_arguments(case, done), mask_ratio(case), done.encoder.stride)
        network = build_converted(
            done, mask_ratio=config.mask_ratio, mask_block=config.mask_block, target=config.target
        )
        loss, _, prediction, _ = GivenNoise(network)(image, Tensor(data["noise"]))
        if "pred" in data:
            yield "pred", error(prediction, data["pred"]), case.forward
    else:
        loss = GivenMask(build_converted(done))(image, Tensor(data["mask"].astype(np.float32)))[0]
    yield "loss", error(loss, data["loss"]), case.forward


def hugging_face(case: Case) -> Findings:
    """Outputs of a converted model.safetensors with its config.json."""
    file = case.info.get("model_file", {}).get("file", "model.safetensors")
    done = convert_file(case, file)
    yield from round_trip(case, file, done)
    data = case.data
    network, image = build_converted(done), Tensor(data["image"])
    if "noise" in data:
        yield from autoencoder(case, network)
    elif "mask" in data:
        rows, cols = (side // done.encoder.patch_size for side in done.encoder.image_size)
        mask = Tensor(data["mask"].reshape(-1, rows, cols).astype(np.float32))
        loss, _, prediction, _ = GivenMask(network)(image, mask)
        restored = network.target.to_image(prediction.asnumpy(), data["image"])
        yield "reconstruction", error(restored, data["reconstruction"]), case.forward
        yield "loss", error(loss, data["loss"]), case.forward
    else:
        yield "logits", error(network(image), data["logits"]), case.forward
        if "last_hidden_state" in data:
            yield "last_hidden_state", error(network.encoder(image), data["last_hidden_state"]), case.forward


def autoencoder(case: Case, network: Any) -> Findings:
    """MAE with stored noise: encoder outputs of all and of the visible patches, prediction, loss."""
    data, image = case.data, Tensor(case.data["image"])
    if "encoder_all" in data:
        yield "encoder_all", error(network.encoder(image), data["encoder_all"]), case.forward
    if "encoder" in data:
        count = data["encoder"].shape[1] - network.encoder.num_prefix_tokens
        keep = Tensor(np.argsort(data["noise"], axis=1, kind="stable")[:, :count].astype(np.int32))
        encode = AsGraph(network.encoder, network.encoder.encode)
        yield "encoder", error(encode(network.encoder.embed(image), keep), data["encoder"]), case.forward
    loss, _, prediction, _ = GivenNoise(network)(image, Tensor(data["noise"]))
    mask = AsGraph(network, network.mask.from_noise)(Tensor(data["noise"])).asnumpy()
    yield "mask", float((mask.reshape(data["mask"].shape) != data["mask"]).mean()), 0.0
    theirs = data["logits"] if "logits" in data else data["pred"]
    yield "prediction", error(prediction, theirs), case.forward
    yield "loss", error(loss, data["loss"]), case.forward


def masked_share(case: Case) -> float | None:
    """The stated mask ratio, else one that masks as many patches as the stored mask, else None."""
    if "mask_ratio" in case.arguments or "mask" not in case.data:
        return case.arguments.get("mask_ratio")
    mask = case.data["mask"].reshape(len(case.data["mask"]), -1)
    return float((mask[0].sum() - 0.5) / mask.shape[1])


def mae(case: Case) -> Findings:
    """MAE pre-training with Hugging Face's names: prediction, loss, gradient of every trained parameter."""
    done = convert_file(case, "model.safetensors", mask_ratio=masked_share(case))
    network = build_converted(done)
    yield from autoencoder(case, network)
    weights = ms.ParameterTuple(network.trainable_params())
    image, noise = Tensor(case.data["image"]), Tensor(case.data["noise"])
    _, grads = Gradients(GivenNoise(network), weights)(image, noise)
    ours = {weight.name: grad.asnumpy() for weight, grad in zip(weights, grads, strict=True)}
    reference = case.tensors("grads")
    naming = recognise(reference).naming
    compared = set()
    for name, theirs in reference.items():
        our_name = naming.ours(name)
        assert our_name is not None, name
        whole, third = our_name
        compared.add(whole)
        gradient = ours[whole] if third is None else np.split(ours[whole], 3)[third]
        if third == 1 and name.endswith("bias"):  # the bias of the keys has no effect on the softmax
            scale = max(float(np.abs(ours[whole]).max()), 1e-12)
            yield f"grad {name}", absolute(gradient, theirs) / scale, case.gradient
        else:
            yield f"grad {name}", error(gradient.reshape(theirs.shape), theirs), case.gradient
    compared.add("encoder.pos_embed")  # never trained in the reference
    yield "trained parameters without a reference", float(len(set(ours) - compared)), 0.0


def timm(case: Case) -> Findings:
    """Outputs of a converted classifier; features are pooled (timm 0.5.4), all tokens, or a map (current timm)."""
    stored = case.info["checkpoint"]
    file = stored["file"] if isinstance(stored, dict) else stored
    done = convert_file(
        case, file, image_size=pair(case.data["image"].shape[-2:]), pool=case.arguments.get("global_pool", "")
    )
    for name, theirs in case.tensors("weights").items():
        ours = foreign.open_foreign(case.folder / file).tensors[name]
        yield name, absolute(ours.array(), theirs), 0.0
    yield from round_trip(case, file, done)
    data = case.data
    network, image = build_converted(done), Tensor(data["image"])
    yield "logits", error(network(image), data["logits"]), case.forward
    sequence = network.encoder(image).asnumpy()
    if "features_dist" in data:
        yield "features_cls", error(sequence[:, 0], data["features_cls"]), case.forward
        yield "features_dist", error(sequence[:, 1], data["features_dist"]), case.forward
    elif data["features"].ndim == 2:
        yield "features", error(AsGraph(network, network.features)(image), data["features"]), case.forward
    else:
        theirs = data["features"].reshape(len(sequence), -1, sequence.shape[-1])
        yield "features", error(sequence, theirs), case.forward
