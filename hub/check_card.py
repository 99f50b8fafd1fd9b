"""Check hub cards: python hub/check_card.py CARD.md ...

The first rules are those of mindspore_hub's own checker (mindspore_hub/_utils/check.py); the others are what its loader
takes for granted (load.py, info.py, download.py) and what the hub's guide asks for. Everything is checked without a
network: whether links answer is for the hub to find out. The file of an asset is checked if it lies beside the card.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.config.files import ConfigError

REQUIRED = [
    "backbone-name",
    "module-type",
    "fine-tunable",
    "model-version",
    "author",
    "update-time",
    "repo-link",
    "user-id",
    "used-for",
    "mindspore-version",
    "license",
    "summary",
]
ASSET_KEYS = ("asset-link", "asset-sha256", "file-format")
MODULE_TYPES = ["gnn", "rl", "audio", "cv", "cvtmodel", "nlp", "recommend", "cross", "hpc", "mm", "other"]
USES = ("inference", "extract-feature", "transfer-learning")
BACKENDS = ("cpu", "gpu", "ascend")
FORMATS = ("air", "ckpt", "onnx", "mindir", "mslite")
#: those of the hub's list that hold images with classes
DATASETS = ("imagenet2012", "imagenet", "miniimagenet", "cifar10", "cifar100", "mnist", "none")
SECTIONS = ("Introduction", "Usage", "Recipe", "Preprocessing", "Published results", "Deviations", "Citation")


class CardError(ConfigError):
    """A card that the hub would refuse or could not load; one line for the user."""


@dataclass(frozen=True)
class Card:
    """A card taken apart: its header, its headings, and the models of the project."""

    path: Path
    header: dict[str, Any]
    headings: list[str]
    models: list[str]

    def text(self, key: str) -> str:
        return str(self.header.get(key, ""))

    def link(self, key: str = "repo-link") -> str:
        return self.text(key).strip("<>")


class _UniqueLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_card(path: Path, models: list[str]) -> Card:
    """A card's header and headings.

    Raises:
        CardError: the frame or the YAML is broken.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CardError(f"{path}: cannot be read as text ({type(error).__name__})") from None
    marks = [number for number, line in enumerate(lines) if line.startswith("---")]
    if len(marks) != 2:
        raise CardError(f"{path}: frame: {len(marks)} lines start with ---; write two, around the header")
    try:
        header = yaml.load("\n".join(lines[marks[0] + 1 : marks[1]]), Loader=_UniqueLoader)
    except yaml.YAMLError as error:
        raise CardError(f"{path}: yaml: {getattr(error, 'problem', None) or 'not YAML'}; quote the value") from None
    if not isinstance(header, dict):
        raise CardError(f"{path}: yaml: the header is not a mapping; write key: value lines")
    return Card(path, header, headings_of(lines[: marks[0]] + lines[marks[1] + 1 :]), models)


def headings_of(lines: list[str]) -> list[str]:
    """Texts of the headings outside code blocks, in both of Markdown's forms."""
    found, fenced, before = [], False, ""
    for line in lines:
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and re.match(r"#{1,6} ", line):
            found.append(line.lstrip("#").strip())
        elif not fenced and before.strip() and re.fullmatch(r"=+\s*", line):
            found.append(before.strip())
        before = line
    return found


# --- rules: what is wrong, or nothing ---------------------------------------------------------------------------


def required(card: Card) -> str:
    missing = [key for key in REQUIRED if card.header.get(key) is None]
    return f"{', '.join(missing)} missing" if missing else ""


def module_type(card: Card) -> str:
    parts = card.text("module-type").lower().split("-")
    good = len(parts) <= 2 and parts[0] in MODULE_TYPES
    return "" if good else f"{card.text('module-type')} does not start with one of {', '.join(MODULE_TYPES)}"


def fine_tunable(card: Card) -> str:
    return "" if isinstance(card.header["fine-tunable"], bool) else "write true or false"


def repo_link(card: Card) -> str:
    """What download.py can take apart: host.com/group/repo, or .../tree/branch, or .../tree/branch/path."""
    found = re.fullmatch(r"https?://[\w.-]+\.com/([^:\s]+)", card.link())
    if not found:
        return f"{card.link()} is not one http(s) address on a .com host"
    parts = found[1].split("/", 4)
    good = len(parts) == 2 or (len(parts) in (4, 5) and parts[2] in ("tree", "blob"))
    return "" if good and all(parts) else f"{card.link()} is not group/repo, or group/repo/tree/branch[/path]"


def train_dataset(card: Card) -> str:
    if not card.header.get("train-dataset"):
        return ""
    odd = [part for part in card.text("train-dataset").split("_") if part not in DATASETS]
    return f"{', '.join(odd)} not among {', '.join(DATASETS)}; leave the key out" if odd else ""


def used_for(card: Card) -> str:
    odd = [use for use in card.text("used-for").lower().split("/") if use not in USES]
    return f"{', '.join(odd)} not among {', '.join(USES)}" if odd else ""


def backends(card: Card) -> str:
    named = [b for key in ("train-backend", "infer-backend") if card.text(key) for b in card.text(key).split("/")]
    odd = [backend for backend in named if backend.lower() not in BACKENDS]
    return f"{', '.join(odd)} not among {', '.join(BACKENDS)}" if odd else ""


def input_shape(card: Card) -> str:
    shape = card.header.get("input-shape", [])
    good = isinstance(shape, list) and all(isinstance(side, int | list) for side in shape)
    return "" if good else f"{shape} is not a list of whole numbers"


def accuracy(card: Card) -> str:
    value = card.header.get("accuracy", 0)
    return "" if isinstance(value, int | float) and not isinstance(value, bool) else f"{value!r} is not a number"


def cached(card: Card) -> str:
    return "" if isinstance(card.header.get("allow-cache-ckpt", True), bool) else "write true or false"


def featured_image(card: Card) -> str:
    image = card.header.get("featured-image", "no-image")
    return "" if image == "no-image" else f"{image} is not in the hub's images; write no-image"


def colons(card: Card) -> str:
    free = ("repo-link", "asset", "evaluation")
    odd = [key for key, value in card.header.items() if key not in free and ":" in str(value)]
    return f"a colon in {', '.join(odd)}" if odd else ""


def headings(card: Card) -> str:
    odd = [text for text in card.headings if text.endswith(":")]
    return f"{odd[0]!r} ends in a colon" if odd else ""


def asset(card: Card) -> str:
    if not card.header.get("asset"):
        return ""
    items = card.header["asset"]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return "not a list of assets"
    missing = [key for item in items for key in ASSET_KEYS if not item.get(key)]
    if missing:
        return f"{', '.join(missing)} missing"
    odd = [item["file-format"] for item in items if str(item["file-format"]).lower() not in FORMATS]
    return f"file-format {', '.join(map(str, odd))} not among {', '.join(FORMATS)}" if odd else ""


def one_asset(card: Card) -> str:
    """The loader takes one file and downloads only a few kinds."""
    items = card.header.get("asset") or []
    if len(items) > 1:
        return f"{len(items)} assets, of which the loader takes one; write a card for each"
    return "" if all(item["file-format"] == "ckpt" for item in items) else "the loader reads file-format ckpt only"


def asset_name(card: Card) -> str:
    for item in card.header.get("asset") or []:
        pattern = (
            rf"{re.escape(card.text('model-name'))}_({'|'.join(BACKENDS)})_v\d{{3,4}}_[a-z0-9]+_"
            r"(official|research)_cv_top1acc\d+(\.\d+)?(_top5acc\d+(\.\d+)?)?\.ckpt"
        )
        found = re.fullmatch(pattern, asset_file(item))
        if not found:
            return f"{asset_file(item)} is not MODEL_BACKEND_vVERSION_DATASET_research_cv_top1accNN.NN.ckpt"
        if found[1] not in card.text("train-backend").split("/"):
            return f"{asset_file(item)} says {found[1]}, train-backend {card.text('train-backend') or 'nothing'}"
        if f"_{dataset(card)}_" not in asset_file(item):
            return f"{asset_file(item)} and {card.path.name} name different datasets"
    return ""


def sha256(card: Card) -> str:
    for item in card.header.get("asset") or []:
        if not re.fullmatch("[0-9a-f]{64}", str(item["asset-sha256"])):
            return f"{item['asset-sha256']} is not 64 lower-case hexadecimal digits"
        file = card.path.parent / asset_file(item)
        if file.is_file() and file_hash(file) != item["asset-sha256"]:
            return f"{file.name} has {file_hash(file)}, the card says {item['asset-sha256']}"
    return ""


def model_name(card: Card) -> str:
    """The loader calls create_network(model-name.lower())."""
    name = card.text("model-name")
    return "" if name in card.models else f"{name or 'nothing'} is no model of the project; {', '.join(card.models)}"


def one_backbone(card: Card) -> str:
    name = card.text("backbone-name")
    return "" if re.fullmatch(r"[\w-]+", name) else f"{name} is not one name; write a card for each backbone"


def file_name(card: Card) -> str:
    """The hub cuts names at the first dot and joins MODEL_DATASET."""
    good = (
        re.fullmatch(rf"{re.escape(card.text('model-name'))}_[a-z0-9]+", card.path.stem) and card.path.suffix == ".md"
    )
    stated = card.text("train-dataset")
    if not good:
        return f"{card.path.name} is not {card.text('model-name')}_DATASET.md"
    return "" if not stated or stated == dataset(card) else f"{card.path.name} and train-dataset {stated} differ"


def brackets(card: Card) -> str:
    links = [card.text("repo-link")] + [str(item["asset-link"]) for item in card.header.get("asset") or []]
    odd = [link for link in links if not re.fullmatch(r"<[^<>\s]+>", link)]
    return f"{odd[0]} stands without < >, as links of the hub do" if odd else ""


def version(card: Card) -> str:
    odd = [key for key in ("mindspore-version", "model-version") if not isinstance(card.header[key], str)]
    return f"{odd[0]} {card.header[odd[0]]} is a number, which loses a last zero; quote it" if odd else ""


def user_id(card: Card) -> str:
    return "" if re.fullmatch(r"[a-z0-9-]+", card.text("user-id")) else f"{card.text('user-id')} is a display name"


def sections(card: Card) -> str:
    missing = [name for name in SECTIONS if name not in card.headings]
    return f"no section {', '.join(missing)}" if missing else ""


#: what errors name -> the rule, in the order of checking; the frame and the YAML come before them
RULES: dict[str, Callable[[Card], str]] = {
    "required": required,
    "module-type": module_type,
    "fine-tunable": fine_tunable,
    "repo-link": repo_link,
    "train-dataset": train_dataset,
    "used-for": used_for,
    "backend": backends,
    "input-shape": input_shape,
    "accuracy": accuracy,
    "allow-cache-ckpt": cached,
    "featured-image": featured_image,
    "colon": colons,
    "heading": headings,
    "asset": asset,
    "one asset": one_asset,
    "asset-sha256": sha256,
    "model-name": model_name,
    "backbone-name": one_backbone,
    "file name": file_name,
    "asset-link": asset_name,
    "brackets": brackets,
    "version": version,
    "user-id": user_id,
    "sections": sections,
}


def asset_file(item: dict[str, Any]) -> str:
    """The name the loader looks for beside the card."""
    return unquote(urlparse(str(item["asset-link"]).strip("<>")).path).rsplit("/", 1)[-1]


def dataset(card: Card) -> str:
    return card.path.stem.removeprefix(f"{card.text('model-name')}_")


def file_hash(path: Path) -> str:
    """SHA-256 in lower-case hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def check_card(path: Path, models: list[str]) -> Card:
    """A card that keeps every rule.

    Args:
        path: the card; its asset is checked too if it lies beside it.
        models: names that the project's create_network answers.

    Raises:
        CardError: the first rule it breaks.
    """
    card = read_card(path, models)
    for name, rule in RULES.items():
        wrong = rule(card)
        if wrong:
            raise CardError(f"{path}: {name}: {wrong}")
    return card


def models_of(project: Path) -> list[str]:
    """The models of a project folder."""
    return sorted(path.stem for path in (project / "config" / "_models").glob("*.yaml"))


def main() -> int:
    parser = argparse.ArgumentParser(description="check hub cards")
    parser.add_argument("cards", nargs="+", type=Path, metavar="CARD.md")
    args = parser.parse_args()
    for path in args.cards:
        try:
            card = read_card(path, [])
            beside = path.parent / card.link().rsplit("/", 1)[-1]
            check_card(path, models_of(beside if beside.is_dir() else ROOT))
        except CardError as error:
            sys.stderr.write(f"error: {error}\n")
            return 2
        print(f"{path}: keeps every rule")
    return 0


if __name__ == "__main__":
    sys.exit(main())
