"""Convert checkpoints of other implementations to this project's format, and back.

    python scripts/convert_weights.py IN.pth|IN.safetensors OUT.ckpt [key=value ...]
    python scripts/convert_weights.py IN.ckpt OUT.pth|OUT.safetensors --to torch

Reads checkpoints of SimMIM, FastMIM, MAE, timm (ViT, DeiT, CaiT, Swin) and Hugging Face (ViT, ViTMAE, Swin, Swin V2).
It needs no PyTorch and never runs pickled code. The network is derived from names and shapes, and from a config in the
file or next to it; an error names the option to set if that is not enough. OUT contains a recipe, so it works with
`train.py --init-from OUT`, and with `eval.py --ckpt OUT` if it has a classifier; key=value changes that recipe
(`data.mean=[0.5,0.5,0.5]`).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOG_v", "4")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.config import ENCODERS
from src.config.paths import existing_file, expanded
from src.tasks.command import check_overrides, line, run_command
from src.weights import WeightsError
from src.weights.names import SOURCES

WRITTEN = (".pth", ".pt", ".bin", ".safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description="convert checkpoints to this project's format, and back")
    parser.add_argument("input", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--to", choices=("ours", "torch"), default="ours")
    parser.add_argument("--source", choices=SOURCES, default="", help="implementation, if several have these names")
    parser.add_argument("--key", default="", help="entry of the file with the tensors, such as model_ema")
    parser.add_argument("--encoder", choices=sorted(ENCODERS), default="", metavar="PRESET", help="the network")
    parser.add_argument("--num-heads", type=int, metavar="N", help="attention heads of a ViT")
    parser.add_argument("--image-size", default="", metavar="PIXELS", help="side of a square image, or HEIGHTxWIDTH")
    parser.add_argument("--window-size", type=int, metavar="TOKENS", help="of a Swin V2; its shapes do not show it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe in OUT")
    args = parser.parse_intermixed_args()
    return run_command(lambda: convert(args))


def convert(args: argparse.Namespace) -> None:
    """Convert; arguments are checked before slow imports."""
    args.input, args.output = (Path(expanded(str(path), "command line")) for path in (args.input, args.output))
    if args.to == "torch":
        convert_to_torch(args)
    else:
        convert_to_ours(args)


def convert_to_ours(args: argparse.Namespace) -> None:
    sides = args.image_size.split("x") if args.image_size else []
    if len(sides) > 2 or not all(re.fullmatch("[0-9]{1,6}", side) and int(side) for side in sides):
        raise WeightsError(
            f"--image-size: {args.image_size[:99]} is neither PIXELS nor HEIGHTxWIDTH; write for example 224 or 192x256"
        )
    check_output(args, (".ckpt",))
    existing_file(str(args.input), "IN")
    check_overrides(args.overrides)

    from src.weights import foreign
    from src.weights.derive import Hints

    image = (int(sides[0]), int(sides[-1])) if sides else None
    hints = Hints(num_heads=args.num_heads, image_size=image, window_size=args.window_size, preset=args.encoder)
    original = foreign.open_foreign(args.input, args.key)
    done = foreign.to_ours(original, args.source, hints)
    for text in (*save_ours(args.output, done, original, args.overrides), f"wrote {args.output}"):
        line(text)


def save_ours(path: Path, done: Any, original: Any, overrides: list[str]) -> list[str]:
    """Write a converted checkpoint with its recipe.

    Args:
        path: OUT.
        done: result of `foreign.to_ours`.
        original: result of `foreign.open_foreign`.
        overrides: changes to the recipe.

    Returns:
        The lines to print.
    """
    from mindspore import Tensor
    from mindspore.nn.utils import no_init_parameters

    from src.config import DataConfig, FieldError, Recipe
    from src.config.files import dump_recipe, override
    from src.engine import checkpoint
    from src.methods import build_method
    from src.models import build_encoder
    from src.tasks.networks import BareEncoder
    from src.weights.derive import placeholder

    chans = done.encoder.in_chans
    is_rgb = chans == len(DataConfig().mean)
    mean = original.hints.mean or (DataConfig().mean if is_rgb else (0.5,) * chans)
    std = original.hints.std or (DataConfig().std if is_rgb else (0.5,) * chans)
    try:
        recipe = Recipe(
            encoder=done.encoder,
            method=done.method or placeholder(done.encoder),
            data=DataConfig(mean=mean, std=std, eval_crop=original.hints.eval_crop or DataConfig().eval_crop),
            output=f"runs/{path.stem}",
        )
    except FieldError as reason:
        raise WeightsError(f"{original.path}: {reason.key}: {reason}") from None
    except WeightsError as reason:
        raise WeightsError(f"{original.path}: {reason}") from None
    recipe = override(recipe, overrides, str(original.path)) if overrides else recipe
    with no_init_parameters():  # names and shapes only
        network = build_method(recipe) if done.method else BareEncoder(build_encoder(recipe.encoder))
    check_fit(original.path, done.weights, {n: tuple(p.shape) for n, p in checkpoint.weights_of(network).items()})
    meta = {
        "recipe": dump_recipe(recipe),
        "method": recipe.method.name if done.method else "",
        "classes": [],
        "epoch": 0,
        "step": 0,
        "best": None,
        "metrics": {},
        "origins": done.sources,
        "torch": done.note,
    }
    unused = {
        checkpoint.UNUSED + name: Tensor(value.reshape(value.shape or (1,))) for name, value in done.unused.items()
    }
    try:
        checkpoint.save(path, {name: Tensor(value) for name, value in done.weights.items()}, unused, meta)
    except (OSError, RuntimeError) as reason:
        raise WeightsError(f"{path}: cannot be written ({' '.join(str(reason).split())[:120]})") from None
    size = sum(value.size for value in done.weights.values()) / 1e6
    return [
        f"{original.path}: {', '.join(done.remarks)}",
        f"{len(done.weights)} tensors, {size:.2f} M numbers; {len(done.unused)} unused, stored for the way back",
        *recipe_lines(recipe),
    ]


def recipe_lines(recipe: Any) -> list[str]:
    """Return the derived parts of the recipe as lines for the user to check."""
    import yaml

    from src.config.files import to_tree

    parts = {part: to_tree(getattr(recipe, part)) for part in ("encoder", "method")}
    return yaml.safe_dump(parts, sort_keys=False, default_flow_style=None, width=110).splitlines()


def check_fit(source: Path, weights: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that the derived network has exactly these parameters.

    Raises:
        WeightsError: names or shapes differ.
    """
    for name, value in weights.items():
        if name not in shapes:
            raise WeightsError(f"{source}: {name} is no parameter of the derived network")
        if value.shape != shapes[name]:
            raise WeightsError(
                f"{source}: {name} has shape {list(value.shape)}, the network derived from the other names has "
                f"{list(shapes[name])}"
            )
    missing = sorted(set(shapes) - set(weights))
    if missing:
        raise WeightsError(f"{source}: lacks {len(missing)} parameters of its network ({', '.join(missing[:3])})")


def convert_to_torch(args: argparse.Namespace) -> None:
    check_output(args, WRITTEN)
    existing_file(str(args.input), "IN")

    from src.engine import checkpoint
    from src.weights import foreign

    loaded = checkpoint.load(args.input)
    note = loaded.meta.get("torch")
    origins = loaded.meta.get("origins", [])
    source = args.source or (origins[0] if note is None and len(origins) == 1 else "")
    if note is None and not source:
        raise WeightsError(
            f"{args.input}: the implementation to convert to is unknown; write --source {' or --source '.join(SOURCES)}"
        )
    try:
        tensors, key = foreign.to_theirs(loaded.weights, loaded.unused, note, source)
    except WeightsError as reason:
        raise WeightsError(f"{args.input}: {reason}" + (f" (--source {source})" if source else "")) from None
    foreign.write_foreign(args.output, tensors, args.key or key)
    line(f"wrote {args.output}: {len(tensors)} tensors" + (f" below {args.key or key!r}" if args.key or key else ""))


def check_output(args: argparse.Namespace, suffixes: tuple[str, ...]) -> None:
    """Check that OUT has a valid suffix, that its folder exists, and that it does not exist yet."""
    if args.output.suffix not in suffixes:
        raise WeightsError(f"{args.output}: --to {args.to} writes {', '.join(suffixes)} files; name OUT accordingly")
    if not os.path.isdir(args.output.parent):  # noqa: PTH112 # never raises
        raise WeightsError(f"{args.output}: its folder does not exist; create it first")
    if os.path.lexists(args.output):  # a link too
        raise WeightsError(f"{args.output}: already exists; remove it or write another name")


if __name__ == "__main__":
    sys.exit(main())
