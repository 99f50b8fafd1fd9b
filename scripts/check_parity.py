"""Compare this code with numbers of the reference implementations.

    python scripts/check_parity.py DIR [CASE ...]

DIR holds one folder per case (`case.json`, `data.npz`, `weights.safetensors`, `grads.safetensors`, ...) and the JSON
files of `schedules/` and `optimizer_groups/`. Prints `PASS <case> <worst error>`, `FAIL <case> <array> <error>` or
`not covered <case>` for each, then the counts; exit code 1 if any failed. Everything runs in graph mode. Errors are
max|a-b| / max|b| per array, with the tolerances of the case.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOG_v", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file

from src.config import (
    ClassifyConfig,
    HOGConfig,
    MIMConfig,
    PixelsConfig,
    TrainConfig,
    TransformerDecoderConfig,
    ViTConfig,
)
from src.engine.optim import build_optimizer, parameter_groups
from src.engine.schedule import learning_rate, position
from src.engine.step import TrainStep
from src.methods import Classify, MaskedImageModel
from src.methods.targets import HOG
from src.models import build_classifier, build_encoder
from src.models.layers import sincos_position
from src.weights.names import from_fastmim

#: array name, error, tolerance
Finding = tuple[str, float, float]
Findings = Iterator[Finding]


class Case:
    """One folder of reference numbers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.info = json.loads((folder / "case.json").read_text())
        self.arguments = self.info.get("arguments", {})
        tolerance = self.info.get("tolerance", {})
        tolerance = tolerance if isinstance(tolerance, dict) else {}
        self.forward = tolerance.get("float32_forward_rel", 1e-4)
        self.gradient = tolerance.get("float32_grad_rel", 1e-3)
        data = folder / "data.npz"
        self.data = dict(np.load(data)) if data.exists() else {}

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        return load_file(str(self.folder / f"{name}.safetensors"))

    @property
    def batch(self) -> int:
        return self.data["image"].shape[0]


class Call(nn.Cell):
    """A bound method of a Cell as a graph of its own."""

    def __init__(self, cell: nn.Cell, function: Callable[..., Any]):
        super().__init__(auto_prefix=False)
        self.cell, self.function = cell, function

    def construct(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class GivenNoise(nn.Cell):
    """A masked image model whose mask comes from stored noise: (image, noise) -> loss, parts, prediction, target."""

    def __init__(self, method: MaskedImageModel):
        super().__init__(auto_prefix=False)
        self.method = method

    def construct(self, image: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return self.method.run(image, self.method.mask.from_noise(noise))


class Gradients(nn.Cell):
    """Loss, other outputs and parameter gradients of a Cell that returns the loss first."""

    def __init__(self, cell: nn.Cell, weights: ms.ParameterTuple):
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.value_and_grad = ops.value_and_grad(cell, None, weights, has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Any, Any]:
        return self.value_and_grad(*inputs)


def error(ours: Any, theirs: np.ndarray) -> float:
    """max|a-b| / max|b|, infinite for another shape or values that are not finite."""
    ours = ours.asnumpy() if isinstance(ours, Tensor) else np.asarray(ours)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    if not ours.size:
        return 0.0
    return float(np.abs(ours.astype(np.float64) - theirs).max() / max(np.abs(theirs).max(), 1e-12))


def load_weights(cell: nn.Cell, weights: dict[str, np.ndarray], rename: Callable[[str], str]) -> None:
    """Copy reference weights into our network; every name must find its place."""
    ours = {p.name: p for p in cell.get_parameters()}
    left = {name for name in ours if not name.endswith(".draws")}
    for name, value in weights.items():
        target = ours[rename(name)]
        target.set_data(Tensor(value.reshape(target.shape)))
        left.discard(target.name)
    if left:
        raise KeyError(f"no reference weight for {sorted(left)}")


def gradient_findings(
    case: Case, names: list[str], grads: tuple[Tensor, ...], rename: Callable[[str], str]
) -> Findings:
    """Every reference gradient against ours; key biases, whose gradient is zero, on the scale of the whole bias."""
    by_name = dict(zip(names, grads, strict=True))
    reference = case.tensors("grads")
    missing = set(names) - {rename(name) for name in reference}
    if missing:
        yield f"gradients without reference: {sorted(missing)[:3]}", float("inf"), case.gradient
    for name, theirs in reference.items():
        yield (
            f"grad {name}",
            error(by_name[rename(name)].asnumpy().reshape(theirs.shape), theirs),
            case.gradient,
        )


# --- what each kind of case compares ----------------------------------------------------------------------------


def hog(case: Case) -> Findings:
    image = case.data["image"]
    kinds = case.info.get("sample_kinds", ["exact"] * len(image))
    for name, theirs in case.data.items():
        if not name.startswith("hog_norm"):
            continue
        normalize, window = (int(part.strip("hognrmw")) for part in name.split("_")[1:])
        config = HOGConfig(
            bins=case.arguments["nbins"],
            cell=case.arguments["pool"],
            normalize=bool(normalize),
            gaussian_window=window,
        )
        target = HOG(config, config.cell, image.shape[1])
        ours = Call(target, target.histograms)(Tensor(image)).asnumpy()
        for sample, kind in enumerate(kinds):
            yield from hog_sample(case, f"{name}[{sample}]", kind, sample, ours[sample], theirs[sample])


def hog_sample(case: Case, name: str, kind: str, sample: int, ours: np.ndarray, theirs: np.ndarray) -> Findings:
    """Samples whose bins hang on rounding are compared where the case says that they can be."""
    chans = case.data["image"].shape[1]
    if kind == "flat_generic":  # zero or a unit vector in bin 0, as rounding has it
        bins = np.abs(ours.reshape(chans, -1, *ours.shape[1:]))
        yield name, float(bins[:, 1:].max()), case.forward
    elif kind == "photo_raw":
        clear = case.data["ambiguous_fraction"][sample] < 1e-3
        clear = np.repeat(clear, ours.shape[0] // chans, axis=0)
        yield name, error(np.where(clear, ours, 0), np.where(clear, theirs, 0)), 2e-3
    else:
        yield name, error(ours, theirs), case.forward


def fastmim_config(arguments: dict[str, Any], mask_ratio: float, stride: int) -> MIMConfig:
    normalize = bool(arguments.get("norm_pix_loss", False))
    if arguments.get("mim_loss", "HOG").lower() == "hog":
        target: HOGConfig | PixelsConfig = HOGConfig(normalize=normalize)
    else:
        target = PixelsConfig(normalize="patch" if normalize else "none")
    decoder = TransformerDecoderConfig(
        width=arguments.get("decoder_embed_dim", 256), depth=arguments.get("decoder_depth", 4)
    )
    block = arguments.get("block_size", stride)
    return MIMConfig(mask_ratio=mask_ratio, mask_block=block, target=target, decoder=decoder)


def vit_config(arguments: dict[str, Any], image: np.ndarray | None = None, **changes: Any) -> ViTConfig:
    side = arguments.get("img_size", 224)
    size = image.shape[-2:] if image is not None else (side, side) if isinstance(side, int) else tuple(side)
    taken = {key: arguments[key] for key in ("patch_size", "embed_dim", "depth", "num_heads") if key in arguments}
    return ViTConfig(
        image_size=size,
        in_chans=image.shape[1] if image is not None else arguments.get("in_chans", 3),
        mlp_ratio=float(arguments.get("mlp_ratio", 4.0)),
        qkv_bias=arguments.get("qkv_bias", True),
        norm_eps=norm_eps(arguments),
        **taken,
        **changes,
    )


def norm_eps(arguments: dict[str, Any]) -> float:
    """The epsilon in a norm_layer argument such as LayerNorm(eps=1e-6), which is FastMIM's for ViT."""
    text = str(arguments.get("norm_layer", ""))
    return float(text.split("eps=")[1].rstrip(")")) if "eps=" in text else 1e-6


def fastmim_vit_model(case: Case, image: np.ndarray) -> MaskedImageModel:
    encoder = vit_config(case.arguments, image, position="sincos")
    config = fastmim_config(case.arguments, case.info["call"]["mask_ratio"], encoder.stride)
    method = MaskedImageModel(build_encoder(encoder), config, encoder.image_size)
    table = sincos_position(encoder.embed_dim, method.grid, encoder.class_token)
    weights = case.tensors("weights")
    if error(table, weights["pos_embed"]) > 1e-6:
        raise ValueError("our sine-cosine table differs from the reference's")
    load_weights(method, weights, from_fastmim)
    return method


def fastmim_vit(case: Case) -> Findings:
    data = case.data
    method = fastmim_vit_model(case, data["image"])
    image, noise = Tensor(data["image"]), Tensor(data["noise"])
    weights = ms.ParameterTuple(method.trainable_params())
    (loss, _, prediction, target), grads = Gradients(GivenNoise(method), weights)(image, noise)
    mask = Call(method, method.mask.from_noise)(noise)
    hidden = np.kron(
        mask.asnumpy(), np.ones((1, *[s // m for s, m in zip(image.shape[2:], mask.shape[1:], strict=True)]))
    )
    yield "mask", float((hidden[:, None] != data["mask"]).mean()), 0.0
    latent = Call(method, lambda_free_latent(method))(image, mask)
    yield "latent", error(latent, data["latent"]), case.forward
    if "hog_target_tokens" in data:
        yield "hog_target_tokens", error(target, data["hog_target_tokens"]), case.forward
    if "l2_target" in data:
        theirs = data["l2_target"].reshape(*data["l2_target"].shape[:2], -1).transpose(0, 2, 1)
        yield "l2_target", error(target, theirs), case.forward
    yield "pred", error(prediction, data["pred"]), case.forward
    yield "loss", error(loss, data["loss"]), case.forward
    yield from gradient_findings(case, [w.name for w in weights], grads, from_fastmim)


def lambda_free_latent(method: MaskedImageModel) -> Callable[..., Tensor]:
    """Encoder output of a masked image (graph mode parses named functions only)."""

    def latent(image: Tensor, mask: Tensor) -> Tensor:
        return method.encoder(method.hide(image, mask))

    return latent


def fastmim_ft_vit(case: Case) -> Findings:
    data, arguments = case.data, case.arguments
    pool = "mean" if arguments["global_pool"] else "cls"
    config = ClassifyConfig(num_classes=arguments["num_classes"], pool=pool, fc_norm=pool == "mean")
    encoder = vit_config(arguments, data["image"], position="learned")
    method = Classify(build_classifier(encoder, config), config.label_smoothing)
    load_weights(method, case.tensors("weights"), from_fastmim)
    image, label = Tensor(data["image"]), Tensor(data["label"].astype(np.int32))
    weights = ms.ParameterTuple(method.trainable_params())
    (loss, _), grads = Gradients(method, weights)(image, label)
    yield "features", error(Call(method, method.classifier.features)(image), data["features"]), case.forward
    yield "logits", error(Call(method, method.classifier)(image), data["logits"]), case.forward
    yield "loss", error(loss, data["loss"]), case.forward
    yield from gradient_findings(case, [w.name for w in weights], grads, from_fastmim)


def train10_fastmim_vit(case: Case) -> Findings:
    data, tolerance = case.data, case.info["tolerance"]
    method = fastmim_vit_model(case, data["image"])
    yield from train10(case, method, GivenNoise(method), ("image", "noise"), from_fastmim, tolerance)


class FirstTwo(nn.Cell):
    """Loss and one more output of a Cell, as a Method returns them."""

    def __init__(self, cell: nn.Cell):
        super().__init__(auto_prefix=False)
        self.cell = cell

    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.cell(*inputs)
        return outputs[0], outputs[1]


def train10(
    case: Case,
    method: Any,
    network: nn.Cell,
    inputs: tuple[str, str],
    rename: Callable[[str], str],
    tolerance: dict[str, float],
) -> Findings:
    """Ten steps with the engine's optimiser and step: losses, gradient norms, rates, final weights."""
    data, schedule, settings = case.data, case.info["schedule"], case.info["optimizer"]
    train = TrainConfig(
        epochs=schedule["epochs"],
        warmup_epochs=schedule["warmup_epochs"],
        min_lr=schedule["min_lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        clip_norm=settings.get("clip_grad") or 0.0,
        decay_tokens=True,
    )
    optimizer = build_optimizer(method, train)
    step = TrainStep(FirstTwo(network), optimizer, train.clip_norm)
    losses, norms, rates = [], [], []
    per_epoch = schedule["steps_per_epoch"]
    for number in range(len(data["loss"])):
        here = position(number // per_epoch, number % per_epoch, per_epoch, 1)
        rates.append(learning_rate(train, schedule["lr"], here))
        values = optimizer.step_values(
            lambda scale, now=here: learning_rate(train, schedule["lr"], now, scale), number + 1
        )
        loss, _, norm = step(values, Tensor(data[inputs[0]]), Tensor(data[inputs[1]][number]))
        losses.append(float(loss))
        norms.append(float(norm))
    yield "lr", error(np.array(rates), data["lr"]), 1e-9
    yield "loss", float(np.abs(np.array(losses) / data["loss"] - 1).max()), tolerance["loss_rel"]
    yield "grad_norm", error(np.array(norms), data["grad_norm"]), case.gradient
    ours = {p.name: p.asnumpy() for p in method.get_parameters()}
    for name, theirs in case.tensors("weights_final").items():
        difference = np.abs(ours[rename(name)].reshape(theirs.shape) - theirs)
        if name.endswith("qkv.bias"):  # the key third has no gradient: Adam turns rounding noise into steps there
            third = len(theirs) // 3
            difference[third : 2 * third] = 0
        yield f"final {name}", float(difference.max()), tolerance["final_weight_abs"]


def fastmim_schedule(path: Path) -> Findings:
    for name, case in json.loads(path.read_text())["cases"].items():
        kind = "step" if case["decay_epoch"] else "cosine"
        train = TrainConfig(
            epochs=case["epochs"],
            warmup_epochs=case["warmup_epochs"],
            min_lr=case["min_lr"],
            schedule=kind,
            decay_epochs=case["decay_epoch"] or 1,
        )
        worst = 0.0
        per_epoch = case["steps_per_epoch"]
        for number, theirs in enumerate(case["lr_used"]):
            here = position(number // per_epoch, number % per_epoch, per_epoch, case["accum_iter"])
            ours = [learning_rate(train, case["lr"], here, scale) for scale in case["layer_scales"]]
            worst = max(worst, float(np.max(np.abs(np.subtract(ours, theirs)) / np.maximum(np.abs(theirs), 1e-30))))
        yield name, worst, 1e-9


def fastmim_vit_groups(path: Path) -> Findings:
    """Every parameter's weight decay, layer and rate factor; parameters of one group stay together."""
    info = json.loads(path.read_text())
    arguments, fine_tune = info["arguments"], info["layer_decay"] is not None
    preset = {
        "vit_base": {"depth": 12, "embed_dim": 768},
        "vit_large": {"depth": 24, "embed_dim": 1024, "num_heads": 16},
    }
    name = next((key for key in preset if key in info["model"]), "")
    arguments = {**preset.get(name, {}), **arguments}
    encoder = vit_config(arguments, position="learned" if fine_tune else "sincos")
    train = TrainConfig(weight_decay=info["weight_decay"], decay_tokens=not fine_tune)
    if fine_tune:
        train = replace(train, layer_decay=info["layer_decay"])
        pool = "mean" if arguments.get("global_pool") else "cls"
        config = ClassifyConfig(num_classes=arguments["num_classes"], pool=pool, fc_norm=pool == "mean")
        method: Any = Classify(build_classifier(encoder, config), 0.1)
    else:
        method = MaskedImageModel(
            build_encoder(encoder), fastmim_config(arguments, 0.75, encoder.stride), encoder.image_size
        )
    yield from group_findings(info, parameter_groups(method, train), from_fastmim)


def group_findings(info: dict[str, Any], groups: list[Any], rename: Callable[[str], str]) -> Findings:
    ours = {p.name: (number, group) for number, group in enumerate(groups) for p in group.parameters}
    columns = info["params_columns"]
    pairing: dict[int, int] = {}
    for row in info["params"]:
        theirs = dict(zip(columns, row, strict=True))
        number, group = ours.pop(rename(theirs["name"]))
        yield f"weight_decay {theirs['name']}", abs(group.weight_decay - theirs["weight_decay"]), 0.0
        if "lr_scale" in theirs:
            yield f"lr_scale {theirs['name']}", abs(group.lr_scale / theirs["lr_scale"] - 1), 1e-9
            yield f"layer_id {theirs['name']}", abs(group.layer - theirs["layer_id"]), 0.0
        same = pairing.setdefault(theirs["group"], number) == number
        yield f"group {theirs['name']}", 0.0 if same else float("inf"), 0.0
    yield f"parameters in no reference group: {sorted(ours)[:3]}", float("inf") if ours else 0.0, 0.0


#: prefix of the case name -> comparison; the longest prefix wins
CASES: dict[str, Callable[[Case], Findings]] = {
    "hog_": hog,
    "fastmim_vit_": fastmim_vit,
    "fastmim_ft_vit": fastmim_ft_vit,
    "train10_fastmim_vit": train10_fastmim_vit,
}
#: folder / prefix of the file name -> comparison of one JSON file
FILES: dict[str, Callable[[Path], Findings]] = {
    "schedules/fastmim": fastmim_schedule,
    "optimizer_groups/fastmim_pretrain_vit": fastmim_vit_groups,
    "optimizer_groups/fastmim_finetune_vit": fastmim_vit_groups,
    "optimizer_groups/fastmim_tiny_pretrain_vit": fastmim_vit_groups,
    "optimizer_groups/fastmim_tiny_finetune_vit": fastmim_vit_groups,
}


def plan(folder: Path) -> Iterator[tuple[str, Callable[[], Findings] | None]]:
    """Every case below a folder with what compares it, None if nothing does."""
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        if (path / "case.json").exists():
            yield path.name, compare_with(CASES, path.name, path, wrap=Case)
        else:
            for file in sorted(path.glob("*.json")):
                name = f"{path.name}/{file.stem}"
                yield name, compare_with(FILES, name, file)


def compare_with(table: dict[str, Any], name: str, path: Path, wrap: Callable[[Path], Any] = Path) -> Any:
    prefixes = [prefix for prefix in table if name.startswith(prefix)]
    if not prefixes:
        return None
    compare = table[max(prefixes, key=len)]
    return lambda: compare(wrap(path))


def check(name: str, compare: Callable[[], Findings]) -> bool:
    """Run one case and print its line."""
    worst = 0.0
    try:
        for array, found, tolerance in compare():
            if not found <= tolerance:
                print(f"FAIL {name} {array} {found:.3g}", flush=True)
                return False
            worst = max(worst, found)
    except Exception as reason:  # a case that cannot run has failed; the other cases still run
        print(f"FAIL {name} {type(reason).__name__}: {' '.join(str(reason).split())[:200]}", flush=True)
        return False
    print(f"PASS {name} {worst:.3g}", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="compare with reference numbers")
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", help="only the cases whose name starts with one of these")
    args = parser.parse_args()
    if not args.folder.is_dir():
        print(f"error: {args.folder} is not a folder of reference cases", file=sys.stderr)
        return 2
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    passed = failed = uncovered = 0
    for name, compare in plan(args.folder):
        if args.cases and not name.startswith(tuple(args.cases)):
            continue
        if compare is None:
            uncovered += 1
            print(f"not covered {name}", flush=True)
        elif check(name, compare):
            passed += 1
        else:
            failed += 1
    print(f"parity: {passed} passed, {failed} failed, {uncovered} not covered")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    raise SystemExit(main())
