"""Publish a network for MindSpore Hub: python hub/publish.py CKPT [--local DIR] [...]

Strips the training state of a fine-tuned checkpoint, names the asset as the zoo does, computes its SHA-256, writes the
card and checks both. With --local the folder also holds the project under the name the card's link ends in, so that

    mindspore_hub.load("DIR/CARD.md", source="local")

works. A model name in place of CKPT lays out its card without an asset (`pretrained=False`). Nothing is overwritten.
`python hub/publish.py --cards` writes the cards of this folder anew.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

HUB = Path(__file__).resolve().parent
ROOT = HUB.parent
sys.path.insert(0, str(ROOT))

import mindspore as ms
import yaml
from mindspore.nn.utils import no_init_parameters

from hub.check_card import BACKENDS, DATASETS, Card, CardError, asset_file, check_card, file_hash, models_of
from src.config import ClassifyConfig, Recipe
from src.config.files import dump_recipe, to_tree
from src.engine import checkpoint
from src.tasks.command import TESTED_MINDSPORE, run_command
from src.tasks.export import preprocessing
from src.tasks.networks import classifier_recipe, deployed, fill, model_names, model_recipe, without_drop_path

#: the zoo this project is laid out for; it has no address of its own yet, --repo-link names one
ZOO = "https://gitee.com/mindspore/models"
#: what a hub user needs of the project
PROJECT = ("mindspore_hub_conf.py", "src", "config/_models", "requirements.txt", "LICENSE")
#: name of a data folder -> the hub's
DATASET_NAMES = {"imagenet": "imagenet2012", "imagenet1k": "imagenet2012", "ilsvrc2012": "imagenet2012"}
UNRUN = "As the original authors published it; not run in this project."
AUTHORS = "Of the original authors on ImageNet-1K; not measured in this project.\n\n"
CARD_DATE = datetime.date(2026, 11, 20)  # of the cards in this folder


@dataclass(frozen=True)
class Network:
    """What a card describes: a model of the project, or one of the user's own."""

    model: str
    recipe: Recipe
    facts: dict[str, Any]  # title, backbone, summary, published, recipe, deviations, citation
    own: bool  # not in config/_models: its recipe has to go there


@dataclass(frozen=True)
class Asset:
    """Weights as the hub serves them."""

    name: str
    link: str
    sha256: str
    backend: str
    metrics: dict[str, float]
    mindspore: str  # version trained with


# --- what is published ------------------------------------------------------------------------------------------


def named_network(name: str) -> Network:
    """A model of the project with what hub/models.yaml says about it."""
    facts = yaml.safe_load((HUB / "models.yaml").read_text(encoding="utf-8"))
    if name not in facts:
        raise CardError(f"hub/models.yaml: {name}: no entry, but config/_models has a network of that name")
    return Network(name, model_recipe(name), facts[name], own=False)


def trained_network(found: checkpoint.Checkpoint, name: str) -> Network:
    """The model a checkpoint holds: the one of the project whose network it is, else one of its own.

    Raises:
        CardError: several models are this network, or `name` is taken by another, or no name can be made.
    """
    recipe = classifier_recipe(found)
    same = [model for model in model_names() if shape_of(model_recipe(model)) == shape_of(recipe)]
    if name in same or (not name and len(same) == 1):
        return replace(named_network(name or same[0]), recipe=recipe)
    if not name and same:
        raise CardError(f"{found.path}: is the network of {' and '.join(same)}; choose with --name")
    model = name or re.sub(r"\W+", "_", Path(recipe.output).name.lower()).strip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", model):
        raise CardError(f"--name: {model!r} is not a word of small letters, digits and _")
    if model in model_names():
        raise CardError(f"{found.path}: is not the network of {model}, whose name it would have; choose with --name")
    return Network(model, recipe, own_facts(model, recipe), own=True)


def shape_of(recipe: Recipe) -> dict[str, Any]:
    """What makes two networks the same: all but preset names."""
    tree = network_tree(recipe)
    del tree["encoder"]["name"]
    return tree


def network_tree(recipe: Recipe) -> dict[str, Any]:
    """Encoder and classifier of a recipe without what only training uses."""
    tree = {"encoder": to_tree(without_drop_path(recipe.encoder)), "method": to_tree(recipe.method)}
    for part, key in (("encoder", "init"), *(("method", key) for key in ("head_std", *ClassifyConfig.training_only))):
        del tree[part][key]
    return tree


def own_facts(model: str, recipe: Recipe) -> dict[str, Any]:
    """What a card can say about a network that is in no paper."""
    train, encoder = recipe.train, recipe.encoder
    return {
        "title": model,
        "backbone": encoder.name,
        "summary": f"{encoder.name} for {count_classes(recipe)} classes at {encoder.image_size[0]} pixels",
        "published": ["none, this network is the publisher's own"],
        "recipe": [
            f"{train.epochs} epochs, batch {train.batch_size} x {train.accumulate} per device, AdamW, base rate "
            f"{train.base_lr:g}, layer decay {train.layer_decay:g}, drop path {encoder.drop_path:g}; the asset "
            "holds the whole recipe"
        ],
        "deviations": ["none known"],
        "citation": "none",
    }


def count_classes(recipe: Recipe) -> int:
    assert recipe.method.classifier is not None  # the hub holds classifiers
    return recipe.method.classifier.num_classes


def dataset_of(recipe: Recipe, given: str) -> str:
    """The hub's name of the data, or that of its folder."""
    name = given or re.sub(r"[^a-z0-9]", "", Path(recipe.data.root).name.lower())
    name = DATASET_NAMES.get(name, name)
    if not re.fullmatch(r"[a-z0-9]+", name):
        raise CardError(f"--dataset: {name!r} is not a word of small letters and digits, such as imagenet2012")
    return name


def backend_of(found: checkpoint.Checkpoint, recipe: Recipe, given: str) -> str:
    """The device trained on: the recipe says it, or the run beside the checkpoint."""
    name = given or ("" if recipe.device == "auto" else recipe.device)
    environment = found.path.parent / "environment.json"
    if not name and environment.is_file():
        name = json.loads(environment.read_text(encoding="utf-8")).get("device", "")
    if name.lower() not in BACKENDS:
        raise CardError(f"--backend: nothing says what {found.path} was trained on; write one of {', '.join(BACKENDS)}")
    return name.lower()


# --- files ------------------------------------------------------------------------------------------------------


def write_asset(found: checkpoint.Checkpoint, network: Network, folder: Path, name: str) -> None:
    """The weights with their recipe, without training state and without the paths of the machine."""
    recipe = network.recipe
    data = replace(recipe.data, root=f"data/{Path(recipe.data.root).name}")
    public = replace(recipe, data=data, output="", init_from="")
    meta = {key: value for key, value in found.meta.items() if key not in ("names", "format")}
    weights = checkpoint.weights_of(fill(deployed(recipe), found))
    checkpoint.save(folder / name, weights, {}, {**meta, "recipe": dump_recipe(public)})


def render(network: Network, dataset: str, repo_link: str, asset: Asset | None, how: str, date: datetime.date) -> str:
    """The text of a card."""
    recipe, facts = network.recipe, network.facts
    height, width = recipe.encoder.image_size
    chans = recipe.encoder.in_chans
    with no_init_parameters():
        size = sum(math.prod(p.shape) for p in checkpoint.weights_of(deployed(recipe)).values())
    card = f"{network.model}_{dataset}.md"
    values = {
        **{key: facts[key] for key in ("title", "backbone", "summary", "citation")},
        **{key: points(facts[key]) for key in ("published", "deviations")},
        "recipe": recipe_text(network, asset),
        "model": network.model,
        "input_shape": [chans, height, width],
        "measured": measured(dataset, asset),
        "date": date.isoformat(),
        "repo_link": repo_link,
        "mindspore": ".".join((asset.mindspore if asset else TESTED_MINDSPORE).split(".")[:2]),
        "asset": asset_lines(asset),
        "state": state(network, repo_link, asset),
        "whose": "" if network.own else AUTHORS,
        "how": how,
        "card": card,
        "pretrained": "" if asset else ", pretrained=False",
        "image": f"(1, {chans}, {height}, {width})",
        "classes": f"(1, {count_classes(recipe)})",
        "parameters": f"{size / 1e6:.2f}",
        "network": yaml.safe_dump(network_tree(recipe), sort_keys=False, default_flow_style=None, width=110).strip(),
        "preprocessing": preprocessing_text(recipe),
    }
    return Template((HUB / "card.md").read_text(encoding="utf-8")).substitute(values)


def points(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def recipe_text(network: Network, asset: Asset | None) -> str:
    """How the asset was trained, and how the authors trained theirs."""
    text = points(network.facts["recipe"])
    if network.own:
        return text
    if asset is None:
        return f"{UNRUN}\n\n{text}"
    return f"{points(own_facts(network.model, network.recipe)['recipe'])}\n\nThe original authors' recipe:\n\n{text}"


def measured(dataset: str, asset: Asset | None) -> str:
    """The header's lines on data and accuracy; without an asset there is nothing measured."""
    lines = [f"train-dataset: {dataset}\n"] if dataset in DATASETS else []
    if asset:
        top1, top5 = (100 * asset.metrics[key] for key in ("top1", "top5"))
        lines += [f"accuracy: {top1:.2f}\n", f"evaluation: top1acc{top1:.2f} | top5acc{top5:.2f}\n"]
        lines += [f"train-backend: {asset.backend}\n"]
    return "\n".join(lines)


def asset_lines(asset: Asset | None) -> str:
    if asset is None:
        return ""
    return f'asset:\n- file-format: ckpt\n  asset-link: <{asset.link}>\n  asset-sha256: "{asset.sha256}"\n'


def state(network: Network, repo_link: str, asset: Asset | None) -> str:
    """Where things stand, in words."""
    lines = []
    if asset is None:
        lines.append("No weights are published yet: the network starts from random weights.")
    else:
        lines.append(f"Accuracy on {asset.metrics['count']:.0f} validation images, measured by the training run.")
    if repo_link == ZOO:
        lines.append(
            "The link names the model zoo this project is laid out for; the project is not part of it yet, so the card "
            "loads from a local folder that holds the project under the last word of the link."
        )
    if network.own and asset:
        lines.append(f"The project needs `config/_models/{network.model}.yaml` with the network below.")
    return " ".join(lines)


def preprocessing_text(recipe: Recipe) -> str:
    """The evaluation transform in words, from the numbers that exports carry."""
    found = preprocessing(recipe, [], 0)
    size = found.get("resize_short_side") or " x ".join(map(str, found.get("resize", [])))
    height, width = found["centre_crop"]
    return (
        f"RGB; short side to {size} pixels, {found['interpolation']}; centre crop of {height} x {width}; divided by "
        f"255; minus {found['mean']}, divided by {found['std']}. "
        f"Input (batch, {found['input'][1]}, {height}, {width}) float32."
    )


def copy_project(target: Path, network: Network) -> None:
    """What a hub user needs of this project, with the recipe of a network of the user's own."""
    for name in PROJECT:
        source, goal = ROOT / name, target / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, goal, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, goal)
    if network.own:
        write_model(target / "config" / "_models", network)


def write_model(folder: Path, network: Network) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(network_tree(network.recipe), sort_keys=False, default_flow_style=None, width=110)
    (folder / f"{network.model}.yaml").write_text(text, encoding="utf-8")


# --- publishing -------------------------------------------------------------------------------------------------


def publish(source: str, target: Path, local: bool, args: argparse.Namespace) -> Path:
    """Lay out a folder for a checkpoint or a model name; returns the card. All of it is there, or nothing.

    Raises:
        CardError: the folder holds something, the checkpoint says no accuracy, or a rule of the hub is broken.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CardError(f"{target}: is there already and is not overwritten; name another folder")
    found = None if source.lower() in model_names() else checkpoint.load(Path(source))
    network = named_network(source.lower()) if found is None else trained_network(found, args.name)
    dataset = "imagenet2012" if found is None else dataset_of(network.recipe, args.dataset)
    repo_link = args.repo_link.rstrip("/")
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.{os.getpid()}")
    building.mkdir()
    try:
        asset = None if found is None else make_asset(found, network, dataset, building, target, args)
        card = building / f"{network.model}_{dataset}.md"
        how = "In the folder of this card:"
        card.write_text(render(network, dataset, repo_link, asset, how, datetime.date.today()), encoding="utf-8")
        project = building / repo_link.rsplit("/", 1)[-1] if local else None
        if project is not None:
            copy_project(project, network)
        elif network.own:
            write_model(building, network)
        checked = check_card(card, models_of(project) if project else sorted({*model_names(), network.model}))
        check_weights(checked, built_by(project, network))
        building.replace(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target / card.name


def make_asset(
    found: checkpoint.Checkpoint,
    network: Network,
    dataset: str,
    folder: Path,
    target: Path,
    args: argparse.Namespace,
) -> Asset:
    """Write the weights under the zoo's name."""
    metrics = {**found.meta["metrics"]}
    if not {"top1", "top5", "count"} <= set(metrics):
        raise CardError(f"{found.path}: says no accuracy, it was saved between evaluations; publish best.ckpt")
    backend = backend_of(found, network.recipe, args.backend)
    mindspore = found.meta["versions"]["mindspore"]
    digits = "".join(mindspore.split(".")[:3])
    name = f"{network.model}_{backend}_v{digits}_{dataset}_research_cv_top1acc{100 * metrics['top1']:.2f}.ckpt"
    write_asset(found, network, folder, name)
    link = f"{args.asset_url.rstrip('/')}/{name}" if args.asset_url else (target / name).as_uri()
    return Asset(name, link, file_hash(folder / name), backend, metrics, mindspore)


def built_by(project: Path | None, network: Network) -> Any:
    """The network as the hub builds it from a project folder; without one, as its recipe says."""
    return entry_point(project).create_network(network.model) if project else deployed(network.recipe)


def check_weights(card: Card, built: Any) -> None:
    """The asset fills the network that the hub will build, name by name; the hub itself would not notice a gap."""
    for item in card.header.get("asset") or []:
        weights = ms.load_checkpoint(str(card.path.parent / asset_file(item)), crc_check=True)
        missing, unknown = ms.load_param_into_net(built, weights)
        unknown = [name for name in unknown if name != "meta"]
        if missing or unknown:
            raise CardError(f"{card.path}: the asset leaves {missing[:3]} empty and has no place for {unknown[:3]}")


def entry_point(project: Path) -> Any:
    """mindspore_hub_conf.py of a project folder."""
    spec = importlib.util.spec_from_file_location("mindspore_hub_conf", project / "mindspore_hub_conf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_cards() -> None:
    """The cards of this folder: every model of the project, without an asset."""
    for name in model_names():
        card = HUB / f"{name}_imagenet2012.md"
        card.write_text(card_of(name), encoding="utf-8")
        check_card(card, model_names())
        print(card.relative_to(ROOT))


def card_of(name: str) -> str:
    """The card of a model of the project."""
    how = f"`python hub/publish.py {name} --local DIR` lays out a folder with this card and the project; there:"
    return render(named_network(name), "imagenet2012", ZOO, None, how, CARD_DATE)


def main() -> int:
    parser = argparse.ArgumentParser(description="lay out a network for MindSpore Hub")
    parser.add_argument("source", nargs="?", metavar="CKPT", help="a fine-tuned checkpoint, or a model name")
    parser.add_argument("--local", default="", metavar="DIR", help="new folder with card, asset and project")
    parser.add_argument("--output", default="", metavar="DIR", help="new folder without the project; default: CKPT_hub")
    parser.add_argument("--name", default="", help="model name; default: found by its network, else the run's folder")
    parser.add_argument("--dataset", default="", help="default: the hub's name of the recipe's data, or its folder's")
    parser.add_argument("--backend", default="", help="what it was trained on; default: as the run says")
    parser.add_argument("--asset-url", default="", metavar="URL", help="where the asset is uploaded; default: the file")
    parser.add_argument("--repo-link", default=ZOO, metavar="URL", help="address of the project's folder")
    parser.add_argument("--cards", action="store_true", help="write the cards of hub/ anew")
    args = parser.parse_args()
    if bool(args.source) == args.cards:
        parser.error("name a checkpoint or a model, or --cards")
    if args.cards:
        return run_command(write_cards)
    default = args.output or f"{Path(args.source).with_suffix('')}_hub"

    def command() -> None:
        card = publish(args.source, Path(args.local or default), bool(args.local), args)
        print(f"{card.parent}: {', '.join(sorted(path.name for path in card.parent.iterdir()))}")
        pretrained = "" if args.source.lower() not in model_names() else ", pretrained=False"
        if args.local:
            print(f'mindspore_hub.load("{card}", source="local"{pretrained})')
        elif not args.asset_url:
            print("next: upload the asset, and publish again with --asset-url and --repo-link of where things are")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
