"""Publish a network for MindSpore Hub: python hub/publish.py CKPT [--local DIR] [...]

Strips the training state of a fine-tuned checkpoint, names the asset by the zoo's rules, computes its SHA-256, writes
the card and checks both. With --local the folder also contains the project, under the last part of the card's link, so
that this works:

    mindspore_hub.load("DIR/CARD.md", source="local")

With a model name instead of CKPT, the card has no asset (`pretrained=False`). Nothing is overwritten.
`python hub/publish.py --cards` rewrites the cards of this folder.
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
from src.config import ClassifyConfig, DataConfig, Recipe
from src.config.files import dump_recipe, to_tree
from src.engine import checkpoint
from src.tasks.command import TESTED_MINDSPORE, run_command
from src.tasks.export import preprocessing
from src.tasks.networks import classifier_recipe, deployed, fill, model_names, model_recipe, without_drop_path

#: default of --repo-link: the zoo that this project is made for; the project has no address yet
ZOO = "https://gitee.com/mindspore/models"
#: the parts of the project that a hub user needs
PROJECT = ("mindspore_hub_conf.py", "src", "config/_models", "requirements.txt", "LICENSE")
#: name of a data folder -> the hub's data set name
DATASET_NAMES = {"imagenet": "imagenet2012", "imagenet1k": "imagenet2012", "ilsvrc2012": "imagenet2012"}
UNRUN = "As the original authors published it; not run in this project."
AUTHORS = "Of the original authors on ImageNet-1K; not measured in this project.\n\n"
CARD_DATE = datetime.date(2026, 11, 20)  # of the cards in this folder


@dataclass(frozen=True)
class Network:
    """The network of a card: a model of the project, or another one of the user."""

    model: str
    recipe: Recipe
    facts: dict[str, Any]  # title, backbone, summary, published, recipe, deviations, citation
    unlisted: bool  # not in config/_models; its recipe has to be added there


@dataclass(frozen=True)
class Asset:
    """A file of weights on the hub."""

    name: str
    link: str
    sha256: str
    backend: str
    metrics: dict[str, float]
    mindspore: str  # version of the training run


# --- what is published ------------------------------------------------------------------------------------------


def named_network(name: str) -> Network:
    """A model of the project, with its facts from hub/models.yaml."""
    facts = yaml.safe_load((HUB / "models.yaml").read_text(encoding="utf-8"))
    if name not in facts:
        raise CardError(f"hub/models.yaml: {name}: no entry, but config/_models has a network of that name")
    return Network(name, model_recipe(name), facts[name], unlisted=False)


def trained_network(trained: checkpoint.Checkpoint, name: str) -> Network:
    """The model of a checkpoint: a model of the project if the network is the same, else an unlisted one.

    Raises:
        CardError: several models of the project are this network, another model has the name `name`, or the checkpoint
            gives no valid name.
    """
    recipe = classifier_recipe(trained)
    same = [model for model in model_names() if shape_of(model_recipe(model)) == shape_of(recipe)]
    if name in same or (not name and len(same) == 1):
        return replace(named_network(name or same[0]), recipe=recipe)
    if not name and same:
        raise CardError(f"{trained.path}: is the network of {' and '.join(same)}; choose with --name")
    model = name or re.sub(r"\W+", "_", Path(recipe.output).name.lower()).strip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", model):
        raise CardError(f"--name: {model!r} is not valid; write small letters, digits and _")
    if model in model_names():
        raise CardError(f"{trained.path}: is not the network of {model}, but has its name; choose another with --name")
    return Network(model, recipe, default_facts(model, recipe), unlisted=True)


def shape_of(recipe: Recipe) -> dict[str, Any]:
    """All keys that define a network: without the preset name."""
    tree = network_tree(recipe)
    del tree["encoder"]["name"]
    return tree


def network_tree(recipe: Recipe) -> dict[str, Any]:
    """Encoder and classifier of a recipe, without keys that only training uses."""
    tree = {"encoder": to_tree(without_drop_path(recipe.encoder)), "method": to_tree(recipe.method)}
    for part, key in (("encoder", "init"), *(("method", key) for key in ("head_std", *ClassifyConfig.training_only))):
        del tree[part][key]
    return tree


def default_facts(model: str, recipe: Recipe) -> dict[str, Any]:
    """Facts on the card of an unlisted network, from its recipe."""
    train, encoder = recipe.train, recipe.encoder
    return {
        "title": model,
        "backbone": encoder.name,
        "summary": f"{encoder.name} for {count_classes(recipe)} classes at {encoder.image_size[0]} pixels",
        "published": ["none, the network is not from a paper"],
        "recipe": [
            f"{train.epochs} epochs, batch {train.batch_size} x {train.accumulate} per device, AdamW, base rate "
            f"{train.base_lr:g}, layer decay {train.layer_decay:g}, drop path {encoder.drop_path:g}; the whole recipe "
            "is in the asset"
        ],
        "deviations": ["none known"],
        "citation": "none",
    }


def count_classes(recipe: Recipe) -> int:
    assert recipe.method.classifier is not None  # the hub takes classifiers only
    return recipe.method.classifier.num_classes


def dataset_of(recipe: Recipe, given: str) -> str:
    """The hub's name of the data set, or the name of its folder."""
    name = given or re.sub(r"[^a-z0-9]", "", Path(recipe.data.root).name.lower())
    name = DATASET_NAMES.get(name, name)
    if not re.fullmatch(r"[a-z0-9]+", name):
        raise CardError(f"--dataset: {name!r} is not valid; write small letters and digits, such as imagenet2012")
    return name


def backend_of(trained: checkpoint.Checkpoint, recipe: Recipe, given: str) -> str:
    """The device of the training run: `given`, or from the recipe, or from environment.json next to the checkpoint."""
    name = given or ("" if recipe.device == "auto" else recipe.device)
    environment = trained.path.parent / "environment.json"
    if not name and environment.is_file():
        name = json.loads(environment.read_text(encoding="utf-8")).get("device", "")
    if name.lower() not in BACKENDS:
        raise CardError(f"--backend: the device of {trained.path} is unknown; write one of {', '.join(BACKENDS)}")
    return name.lower()


# --- files ------------------------------------------------------------------------------------------------------


def write_asset(trained: checkpoint.Checkpoint, network: Network, folder: Path, name: str) -> None:
    """Write the weights with their recipe, without training state and machine paths."""
    recipe = network.recipe
    data = replace(recipe.data, root=f"data/{Path(recipe.data.root).name}")
    public = replace(recipe, data=data, output="", init_from="")
    meta = {key: value for key, value in trained.meta.items() if key not in ("names", "format")}
    weights = checkpoint.weights_of(fill(deployed(recipe), trained))
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
        "whose": "" if network.unlisted else AUTHORS,
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
    """The recipe of the asset, and that of the original authors."""
    text = points(network.facts["recipe"])
    if network.unlisted:
        return text
    if asset is None:
        return f"{UNRUN}\n\n{text}"
    recipe = points(default_facts(network.model, network.recipe)["recipe"])
    return f"{recipe}\n\nThe original authors' recipe:\n\n{text}"


def measured(dataset: str, asset: Asset | None) -> str:
    """Header lines on data and accuracy; accuracy needs an asset."""
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
    """Sentences on weights, accuracy and link of the card."""
    lines = []
    if asset is None:
        lines.append("No weights are published yet: the network starts from random weights.")
    else:
        lines.append(f"Accuracy on {asset.metrics['count']:.0f} validation images, measured by the training run.")
    if repo_link == ZOO:
        lines.append(
            "The link is the model zoo that this project is made for. The project is not in it yet, so the card loads "
            "from a local folder that contains the project under the last part of the link."
        )
    if network.unlisted and asset:
        lines.append(f"The project needs `config/_models/{network.model}.yaml` with the network below.")
    return " ".join(lines)


def preprocessing_text(recipe: Recipe) -> str:
    """The evaluation transform in words, from the values stored in exports."""
    steps = preprocessing(recipe, [], 0)
    size = steps.get("resize_short_side") or " x ".join(map(str, steps.get("resize", [])))
    height, width = steps["centre_crop"]
    chans = recipe.encoder.in_chans
    colours = {1: "Luminance", 3: "RGB"}.get(chans, f"{chans} bands")
    scale = "divided by 255" if chans in (1, 3) else "unsigned integers divided by their largest value"
    return (
        f"{colours}; short side to {size} pixels, {steps['interpolation']}; centre crop of {height} x {width}; "
        f"{scale}; minus {steps['mean']}, divided by {steps['std']}. "
        f"Input (batch, {steps['input'][1]}, {height}, {width}) float32."
    )


def copy_project(target: Path, network: Network) -> None:
    """Copy the `PROJECT` files, and add the recipe of an unlisted network."""
    for name in PROJECT:
        source, goal = ROOT / name, target / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, goal, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, goal)
    if network.unlisted:
        write_model(target / "config" / "_models", network)


def write_model(folder: Path, network: Network) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tree, data = network_tree(network.recipe), network.recipe.data
    if len(data.mean) != len(DataConfig.mean):  # the default would not fit the network
        tree["data"] = {"mean": list(data.mean), "std": list(data.std)}
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)
    (folder / f"{network.model}.yaml").write_text(text, encoding="utf-8")


# --- publishing -------------------------------------------------------------------------------------------------


def publish(source: str, target: Path, local: bool, args: argparse.Namespace) -> Path:
    """Write the folder of a checkpoint or a model name, and return its card. A failure leaves no folder.

    Raises:
        CardError: the folder is not empty, the checkpoint has no accuracy, or a rule of the hub is broken.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CardError(f"{target}: exists and is not overwritten; name another folder")
    trained = None if source.lower() in model_names() else checkpoint.load(Path(source))
    network = named_network(source.lower()) if trained is None else trained_network(trained, args.name)
    dataset = "imagenet2012" if trained is None else dataset_of(network.recipe, args.dataset)
    repo_link = args.repo_link.rstrip("/")
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.{os.getpid()}")
    building.mkdir()
    try:
        asset = None if trained is None else make_asset(trained, network, dataset, building, target, args)
        card = building / f"{network.model}_{dataset}.md"
        how = "In the folder of this card:"
        card.write_text(render(network, dataset, repo_link, asset, how, datetime.date.today()), encoding="utf-8")
        project = building / repo_link.rsplit("/", 1)[-1] if local else None
        if project is not None:
            copy_project(project, network)
        elif network.unlisted:
            write_model(building, network)
        checked = check_card(card, models_of(project) if project else sorted({*model_names(), network.model}))
        check_weights(checked, built_by(project, network))
        building.replace(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target / card.name


def make_asset(
    trained: checkpoint.Checkpoint,
    network: Network,
    dataset: str,
    folder: Path,
    target: Path,
    args: argparse.Namespace,
) -> Asset:
    """Write the weights under a name by the zoo's rules.

    Raises:
        CardError: the checkpoint has no accuracy.
    """
    metrics = {**trained.meta["metrics"]}
    if not {"top1", "top5", "count"} <= set(metrics):
        raise CardError(f"{trained.path}: has no accuracy, since it was saved between evaluations; publish best.ckpt")
    backend = backend_of(trained, network.recipe, args.backend)
    mindspore = trained.meta["versions"]["mindspore"]
    digits = "".join(mindspore.split(".")[:3])
    name = f"{network.model}_{backend}_v{digits}_{dataset}_research_cv_top1acc{100 * metrics['top1']:.2f}.ckpt"
    write_asset(trained, network, folder, name)
    link = f"{args.asset_url.rstrip('/')}/{name}" if args.asset_url else (target / name).as_uri()
    return Asset(name, link, file_hash(folder / name), backend, metrics, mindspore)


def built_by(project: Path | None, network: Network) -> Any:
    """The network that the hub builds from a project folder; without a folder, that of the recipe."""
    return entry_point(project).create_network(network.model) if project else deployed(network.recipe)


def check_weights(card: Card, built: Any) -> None:
    """Check that the asset has exactly the parameters of the network; the hub does not check that.

    Raises:
        CardError: names that are missing or unknown.
    """
    for item in card.header.get("asset") or []:
        weights = ms.load_checkpoint(str(card.path.parent / asset_file(item)), crc_check=True)
        missing, unknown = ms.load_param_into_net(built, weights)
        unknown = [name for name in unknown if name != "meta"]
        if missing or unknown:
            raise CardError(f"{card.path}: asset: lacks parameters {missing[:3]}, has unknown ones {unknown[:3]}")


def entry_point(project: Path) -> Any:
    """mindspore_hub_conf.py of a project folder."""
    spec = importlib.util.spec_from_file_location("mindspore_hub_conf", project / "mindspore_hub_conf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_cards() -> None:
    """Write the cards of this folder: every model of the project, without an asset."""
    for name in model_names():
        card = HUB / f"{name}_imagenet2012.md"
        card.write_text(card_of(name), encoding="utf-8")
        check_card(card, model_names())
        print(card.relative_to(ROOT))


def card_of(name: str) -> str:
    """The card of a model of the project."""
    how = f"`python hub/publish.py {name} --local DIR` writes a folder with this card and the project. In that folder:"
    return render(named_network(name), "imagenet2012", ZOO, None, how, CARD_DATE)


def main() -> int:
    parser = argparse.ArgumentParser(description="publish a network for MindSpore Hub")
    parser.add_argument("source", nargs="?", metavar="CKPT", help="a fine-tuned checkpoint, or a model name")
    parser.add_argument("--local", default="", metavar="DIR", help="new folder with card, asset and project")
    parser.add_argument("--output", default="", metavar="DIR", help="new folder without the project; default: CKPT_hub")
    parser.add_argument(
        "--name", default="", help="model name; default: the model with its network, or the run's folder"
    )
    parser.add_argument("--dataset", default="", help="data set name; default: from the data folder of the recipe")
    parser.add_argument("--backend", default="", help="device of the training; default: from the run")
    parser.add_argument(
        "--asset-url", default="", metavar="URL", help="address of the uploaded asset; default: the file"
    )
    parser.add_argument("--repo-link", default=ZOO, metavar="URL", help="address of the project's folder")
    parser.add_argument("--cards", action="store_true", help="rewrite the cards of hub/")
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
            print("next: upload the asset, and publish again with --asset-url and --repo-link")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
