"""Check hub cards: python hub/check_card.py CARD.md ...

The first rules are those of mindspore_hub's checker (mindspore_hub/_utils/check.py). The others are assumptions of its
loader (load.py, info.py, download.py) and requirements of the hub's guide. Links are not opened. The file of an asset
is checked if it is in the folder of the card.
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
from src.errors import one_line

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
#: the hub's names of image classification data sets
DATASETS = ("imagenet2012", "imagenet", "miniimagenet", "cifar10", "cifar100", "mnist", "none")
SECTIONS = ("Introduction", "Usage", "Recipe", "Preprocessing", "Published results", "Deviations", "Citation")


class CardError(ConfigError):
    """A card that the hub refuses or cannot load; one line for the user."""


@dataclass(frozen=True)
class Card:
    """The header and headings of a card, and the models of the project."""

    path: Path
    header: dict[str, Any]
    headings: list[str]
    models: list[str]

    def text(self, key: str) -> str:
        return str(self.header.get(key, ""))

    def link(self, key: str = "repo-link") -> str:
        return self.text(key).strip("<>")


class _UniqueLoader(yaml.SafeLoader):
    """YAML that refuses duplicate keys; PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_card(path: Path, models: list[str]) -> Card:
    """A card's header and headings.

    Raises:
        CardError: the frame or the YAML is invalid.
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
    """Texts of the headings outside code blocks, in both forms of Markdown."""
    texts, fenced, before = [], False, ""
    for line in lines:
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and re.match(r"#{1,6} ", line):
            texts.append(line.lstrip("#").strip())
        elif not fenced and before.strip() and re.fullmatch(r"=+\s*", line):
            texts.append(before.strip())
        before = line
    return texts


# --- rules: each returns what is wrong, or an empty text --------------------------------------------------------


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
    """The forms that download.py reads: host.com/group/repo, .../tree/branch and .../tree/branch/path."""
    match = re.fullmatch(r"https?://[\w.-]+\.com/([^:\s]+)", card.link())
    if not match:
        return f"{card.link()} is not one http(s) address on a .com host"
    parts = match[1].split("/", 4)
    good = len(parts) == 2 or (len(parts) in (4, 5) and parts[2] in ("tree", "blob"))
    return "" if good and all(parts) else f"{card.link()} is not group/repo, or group/repo/tree/branch[/path]"


def train_dataset(card: Card) -> str:
    if not card.header.get("train-dataset"):
        return ""
    unknown = [part for part in card.text("train-dataset").split("_") if part not in DATASETS]
    return f"{', '.join(unknown)} is not one of {', '.join(DATASETS)}; omit the key" if unknown else ""


def used_for(card: Card) -> str:
    unknown = [use for use in card.text("used-for").lower().split("/") if use not in USES]
    return f"{', '.join(unknown)} is not one of {', '.join(USES)}" if unknown else ""


def backends(card: Card) -> str:
    named = [b for key in ("train-backend", "infer-backend") if card.text(key) for b in card.text(key).split("/")]
    unknown = [backend for backend in named if backend.lower() not in BACKENDS]
    return f"{', '.join(unknown)} is not one of {', '.join(BACKENDS)}" if unknown else ""


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
    return "" if image == "no-image" else f"{image} is not one of the hub's images; write no-image"


def colons(card: Card) -> str:
    free = ("repo-link", "asset", "evaluation")
    keys = [key for key, value in card.header.items() if key not in free and ":" in str(value)]
    return f"a colon in {', '.join(keys)}" if keys else ""


def headings(card: Card) -> str:
    wrong = [text for text in card.headings if text.endswith(":")]
    return f"{wrong[0]!r} ends in a colon" if wrong else ""


def asset(card: Card) -> str:
    if not card.header.get("asset"):
        return ""
    items = card.header["asset"]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return "not a list of assets"
    missing = [key for item in items for key in ASSET_KEYS if not item.get(key)]
    if missing:
        return f"{', '.join(missing)} missing"
    unknown = [item["file-format"] for item in items if str(item["file-format"]).lower() not in FORMATS]
    return f"file-format {', '.join(map(str, unknown))} is not one of {', '.join(FORMATS)}" if unknown else ""


def one_asset(card: Card) -> str:
    """The loader reads one file, of few formats."""
    items = card.header.get("asset") or []
    if len(items) > 1:
        return f"{len(items)} assets, but the loader reads one; write a card for each"
    return "" if all(item["file-format"] == "ckpt" for item in items) else "the loader reads file-format ckpt only"


def asset_name(card: Card) -> str:
    for item in card.header.get("asset") or []:
        pattern = (
            rf"{re.escape(card.text('model-name'))}_({'|'.join(BACKENDS)})_v\d{{3,4}}_[a-z0-9]+_"
            r"(official|research)_cv_top1acc\d+(\.\d+)?(_top5acc\d+(\.\d+)?)?\.ckpt"
        )
        match = re.fullmatch(pattern, asset_file(item))
        if not match:
            return f"{asset_file(item)} is not MODEL_BACKEND_vVERSION_DATASET_research_cv_top1accNN.NN.ckpt"
        if match[1] not in card.text("train-backend").split("/"):
            return f"{asset_file(item)} names {match[1]}, train-backend is {card.text('train-backend') or 'missing'}"
        if f"_{dataset(card)}_" not in asset_file(item):
            return f"{asset_file(item)} and {card.path.name} name different datasets"
    return ""


def sha256(card: Card) -> str:
    for item in card.header.get("asset") or []:
        if not re.fullmatch("[0-9a-f]{64}", str(item["asset-sha256"])):
            return f"{item['asset-sha256']} is not 64 lower-case hexadecimal digits"
        file = card.path.parent / asset_file(item)
        if file.is_file() and file_hash(file) != item["asset-sha256"]:
            return f"{file.name} has {file_hash(file)}, the card {item['asset-sha256']}"
    return ""


def model_name(card: Card) -> str:
    """The loader calls create_network(model-name.lower())."""
    name = card.text("model-name")
    return "" if name in card.models else f"{name or 'nothing'} is not a model; write one of {', '.join(card.models)}"


def one_backbone(card: Card) -> str:
    name = card.text("backbone-name")
    return "" if re.fullmatch(r"[\w-]+", name) else f"{name} is not one name; write a card for each backbone"


def file_name(card: Card) -> str:
    """The hub cuts file names at the first dot and expects MODEL_DATASET."""
    good = (
        re.fullmatch(rf"{re.escape(card.text('model-name'))}_[a-z0-9]+", card.path.stem) and card.path.suffix == ".md"
    )
    stated = card.text("train-dataset")
    if not good:
        return f"{card.path.name} is not {card.text('model-name')}_DATASET.md"
    return "" if not stated or stated == dataset(card) else f"{card.path.name} and train-dataset {stated} differ"


def brackets(card: Card) -> str:
    links = [card.text("repo-link")] + [str(item["asset-link"]) for item in card.header.get("asset") or []]
    bare = [link for link in links if not re.fullmatch(r"<[^<>\s]+>", link)]
    return f"{bare[0]} is not in angle brackets; write <{bare[0].strip('<>')}>" if bare else ""


def version(card: Card) -> str:
    keys = [key for key in ("mindspore-version", "model-version") if not isinstance(card.header[key], str)]
    return f"{keys[0]} {card.header[keys[0]]} is a number, which loses a final zero; quote it" if keys else ""


def user_id(card: Card) -> str:
    return "" if re.fullmatch(r"[a-z0-9-]+", card.text("user-id")) else f"{card.text('user-id')} is a display name"


def sections(card: Card) -> str:
    missing = [name for name in SECTIONS if name not in card.headings]
    return f"no section {', '.join(missing)}" if missing else ""


#: name in errors -> rule, in the order of checking; frame and YAML are checked before
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
    """Name of the file that the loader looks for in the folder of the card."""
    return unquote(urlparse(str(item["asset-link"]).strip("<>")).path).rsplit("/", 1)[-1]


def dataset(card: Card) -> str:
    return card.path.stem.removeprefix(f"{card.text('model-name')}_")


def file_hash(path: Path) -> str:
    """SHA-256 in lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_card(path: Path, models: list[str]) -> Card:
    """Read a card and check all rules.

    Args:
        path: the card; its asset is checked too if it is in the same folder.
        models: names that the project's create_network knows.

    Raises:
        CardError: the first rule that is broken.
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
            project = path.parent / card.link().rsplit("/", 1)[-1]
            check_card(path, models_of(project if project.is_dir() else ROOT))
        except CardError as error:
            sys.stderr.write(f"error: {one_line(str(error))}\n")
            return 2
        print(one_line(f"{path}: passes all rules"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
