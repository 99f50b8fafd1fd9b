"""Read and write recipes: YAML files with `base:` inheritance, `key=value` overrides, typed building, printing.

Files and overrides are handled alike: nested dictionaries are merged (child over base, overrides last), then built into
the dataclasses of this package with every key and type checked. Each error is one line: file, dotted key, cause, valid
values.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ..errors import UserError, one_line
from .checks import MOST_VALUES, FieldError, shown
from .paths import expanded
from .reading import LONGEST, LONGEST_WORD, NotYaml, Refused, parse_yaml, read_text
from .recipe import PRESETS, Recipe
from .training import Precision, PrecisionConfig

OVERRIDE = "command line"
LEAST = LONGEST // 100  # characters that a base counts at least, so that there are at most 100
LARGEST = 2**32 - 1  # of whole numbers
MOST_FILES = 2000  # that are looked at for the names of recipes
#: keys of a recipe that contain further keys
SECTIONS = ("encoder", "method", "data", "train", "stages", "target", "decoder", "teacher_encoder", "precision")
#: fields missing from resolved recipes of earlier versions: section, field, and a function of the section that returns
#: the field's value in that version
ADDED: tuple[tuple[str, str, Callable[[dict[str, Any]], Any]], ...] = (
    # up to version 0.1.0 `corrupt` decided the rounding
    ("method", "mask_rounding", lambda method: {"token": "ceil_masked"}.get(method.get("corrupt", ""))),
)


class ConfigError(UserError):
    """An invalid recipe; the text is one line for the user."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key=value` overrides and build the typed recipe.

    Raises:
        ConfigError: one line with file, dotted key, cause and remedy.
    """
    path = Path(expanded(str(path), "--config"))
    tree, set_by = _read_tree(path, (), _Allowance())
    for text in overrides:
        _apply_override(tree, set_by, text)
    recipe = _build(Recipe, tree, _KeyPath(str(path), set_by))
    return recipe if recipe.output else replace(recipe, output=f"runs/{path.stem}")


def parse_recipe(text: str, source: str) -> Recipe:
    """Build a recipe from YAML text without inheritance, as stored in checkpoints; `source` names it in errors.

    A recipe of an earlier version keeps its meaning: missing fields get their values from `ADDED`.
    """
    tree = _parse_yaml(text, source)
    for section, field, former_value in ADDED:
        part = tree.get(section)
        if isinstance(part, dict) and field not in part:
            value = former_value(part)
            if value is not None:
                part[field] = value
    return _build(Recipe, tree, _KeyPath(source, {}, expands=False))


def override(recipe: Recipe, overrides: Sequence[str], source: str) -> Recipe:
    """Apply `key=value` overrides to a recipe, checked like a file; `source` names the recipe in errors."""
    tree = to_tree(recipe)
    set_by: dict[str, str] = {}
    for text in overrides:
        _apply_override(tree, set_by, text)
    return _build(Recipe, tree, _KeyPath(source, set_by))


def change(config: Any, values: dict[str, Any], source: str) -> Any:
    """Change fields of one dataclass of a recipe, checked like a file; `source` names it in errors."""
    return _build(type(config), values, _KeyPath(source, {}), config)


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; reading it back gives an equal recipe."""
    return yaml.safe_dump(to_tree(recipe), sort_keys=False, default_flow_style=None, width=110)


def to_tree(config: Any) -> dict[str, Any]:
    """Convert a dataclass to nested dictionaries and lists."""
    tree = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            value = to_tree(value)
        elif isinstance(value, tuple):
            value = [to_tree(part) if is_dataclass(part) else part for part in value]
        tree[item.name] = value
    return tree


# --- reading and merging ----------------------------------------------------------------------------------------


@dataclass
class _Allowance:
    """How many characters the files of a recipe may still have."""

    left: int = LONGEST

    def read(self, path: Path) -> str:
        text = read_text(path, LONGEST)
        self.left -= max(len(text), LEAST)
        if self.left < 0:
            raise OSError(f"the bases of this recipe have more than {LONGEST} characters or 100 files together")
        return text


def _read_tree(path: Path, chain: tuple[Path, ...], allowance: _Allowance) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the merged dictionary of a file and its bases, and for each dotted key the file that set it."""
    where = str(chain[-1]) if chain else str(path)
    try:
        circle = os.path.realpath(path) in map(os.path.realpath, chain)
        text = "" if circle else allowance.read(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = "no such file" if isinstance(error, FileNotFoundError) else _one_line(error)
        key = "base: " if chain else ""
        hint = _nearby_files(path) if isinstance(error, FileNotFoundError | IsADirectoryError) else ""
        raise ConfigError(f"{where}: {key}cannot read {path} ({reason}){hint}") from None
    if circle:
        cycle = " -> ".join(str(p) for p in (*chain, path))
        raise ConfigError(f"{where}: base: files inherit from each other in a circle ({cycle}); remove one of them")
    child = _parse_yaml(text, str(path))
    bases = child.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{path}: base: must be a file name or a list of file names, not {shown(bases)}")
    tree: dict[str, Any] = {}
    set_by: dict[str, str] = {}
    for base in bases:
        base_path = path.parent / expanded(base, f"{path}: base")
        base_tree, base_set_by = _read_tree(base_path, (*chain, path), allowance)
        _merge(tree, base_tree)
        set_by.update(base_set_by)
    _merge(tree, child)
    set_by.update(dict.fromkeys(_dotted_keys(child), str(path)))
    return tree, set_by


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except Refused as error:
        raise ConfigError(f"{source}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: must be a mapping of keys, not {type(tree).__name__}; write `key: value` lines")
    return tree


def _nearby_files(path: Path) -> str:
    """Return a hint for an error: the closest file name, or the recipes in the folder."""
    is_folder = _is_folder(path)
    folder = path if is_folder else path.parent
    names = sorted(itertools.islice(_recipes_in(folder, below=is_folder), 200))
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"; did you mean {folder / close[0]}?"
    if not names:
        return "; no .yaml file in that folder" if _is_folder(folder) else f"; there is no folder {folder}"
    shown = 8 if not is_folder else 60  # a folder given as --config lists its recipes
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"; the folder has: {', '.join(names[:shown])}{more}"


def _recipes_in(folder: Path, below: bool) -> Iterator[str]:
    """Names of the recipes in a folder, and `below` it; only its first files are looked at."""
    seen = 0
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if below and not name.startswith("."))
        seen += len(folders) + len(files)
        relative = Path(place).relative_to(folder)
        yield from (str(relative / name) for name in files if name.endswith(".yaml") and not name.startswith("."))
        if seen > MOST_FILES:
            return


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 # never raises


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Merge deeply. A preset of another class, or a preset given as a plain string, replaces the old value."""
    for key, value in new.items():
        old = into.get(key)
        if value is None and key in SECTIONS:  # a section with comments only changes nothing
            continue
        if isinstance(value, dict):
            old = into[key] = _spelled_out(key, old)
        if isinstance(value, dict) and isinstance(old, dict) and not _other_class(key, old, value.get("name")):
            _merge(old, value)
        else:
            into[key] = value


def _spelled_out(key: str, value: Any) -> Any:
    """Return the mapping that a word stands for: the name of a preset, or the precision of all devices."""
    word = _plain_value(value)
    if not isinstance(word, str):
        return value
    if key == "precision":
        return dict.fromkeys((item.name for item in fields(PrecisionConfig)), word)
    return {"name": word} if key in PRESETS else value


def _other_class(key: str, old: dict[str, Any], name: Any) -> bool:
    presets = PRESETS.get(key, {})
    if not isinstance(name, str) or not isinstance(old.get("name"), str):
        return False
    return name in presets and old["name"] in presets and type(presets[name]) is not type(presets[old["name"]])


def _dotted_keys(tree: dict[str, Any]) -> list[str]:
    """Return the keys of all nested mappings, joined by dots."""
    keys: list[str] = []
    pending = [("", tree)]
    while pending:
        prefix, part = pending.pop()
        for key, value in part.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                pending.append((f"{prefix}{key}.", value))
    return keys


def split_override(text: str) -> tuple[str, str]:
    """Split a `key=value` argument.

    Raises:
        ConfigError: the argument has another form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"{OVERRIDE}: {shown(text)} is not key=value; write for example train.epochs=10")
    if len(key) > LONGEST_WORD:
        raise ConfigError(f"{OVERRIDE}: {shown(key)} is no key of a recipe; write for example train.epochs=10")
    return key, value


def _apply_override(tree: dict[str, Any], set_by: dict[str, str], text: str) -> None:
    key, value = split_override(text)
    try:
        parsed = parse_yaml(value)
    except NotYaml:
        raise ConfigError(f"{OVERRIDE}: {key}: {shown(value)} is not a YAML value") from None
    except Refused as error:
        raise ConfigError(f"{OVERRIDE}: {key}: {error}") from None
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        child = _spelled_out(part, node.get(part))
        if not isinstance(child, dict):
            child = {}
        if last == "name" and part == parents[-1] and _other_class(part, child, parsed):
            child = {}
        node[part] = child
        node = child
    if isinstance(parsed, dict):
        _merge(node, {last: parsed})
        set_by.update(dict.fromkeys((f"{key}.{inner}" for inner in _dotted_keys(parsed)), OVERRIDE))
    else:
        node[last] = parsed if isinstance(parsed, list) else _CommandLineValue(parsed, value)
    set_by[key] = OVERRIDE


@dataclass(frozen=True)
class _CommandLineValue:
    """A value from the command line: parsed as YAML, and the typed text, which text fields use."""

    value: Any
    text: str


def _plain_value(value: Any) -> Any:
    return value.value if isinstance(value, _CommandLineValue) else value


# --- building typed values --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _KeyPath:
    """The dotted key of a value in a recipe and the file that set it, for error messages.

    Attributes:
        source: name of the recipe, for keys that `set_by` does not list.
        set_by: dotted key -> file (or command line) that set it.
        key: dotted key; empty for the recipe itself.
        expands: whether `~` and variables in paths are replaced.
    """

    source: str
    set_by: dict[str, str]
    key: str = ""
    expands: bool = True

    def child(self, key: str) -> _KeyPath:
        return replace(self, key=f"{self.key}.{key}" if self.key else key)

    def label(self) -> str:
        """The file or command line, and the key."""
        source = self.set_by.get(self.key, self.source)
        return f"{source}: {self.key}" if self.key else source

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.label()}: {message}")


def _build(cls: type, tree: Any, key_path: _KeyPath, preset: Any = None) -> Any:
    """Build one dataclass from a mapping, starting from a preset or from the class defaults."""
    if not isinstance(tree, dict):
        if cls is PrecisionConfig:
            return _one_precision(tree, key_path)
        raise key_path.error(f"must be a mapping of keys, not {shown(tree)}; valid keys: {_field_names(cls)}")
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in tree.items():
        child = key_path.child(str(key))
        if key not in hints and isinstance(key, str) and key.split(".")[0] in hints:
            section, _, rest = key.partition(".")
            raise child.error(f"dotted keys are for the command line only; write {section}: {{{rest}: ...}}")
        if key not in hints:
            raise child.error(f"unknown key of {cls.__name__}; {did_you_mean(key, hints)}valid: {_field_names(cls)}")
        current = getattr(preset, key) if preset is not None else _default(cls, key)
        values[key] = _value(hints[key], value, child, key, current)
    try:
        return replace(preset, **values) if preset is not None else cls(**values)
    except FieldError as error:
        raise key_path.child(error.key).error(str(error)) from None


def _default(cls: type, key: str) -> Any:
    for item in fields(cls):
        if item.name == key:
            return item.default_factory() if item.default_factory is not MISSING else item.default
    raise AssertionError(key)


def _field_names(cls: type) -> str:
    return ", ".join(item.name for item in fields(cls))


def _value(hint: Any, value: Any, key_path: _KeyPath, key: str, current: Any) -> Any:
    """Build one field: a preset or dataclass, a choice, a tuple, or a plain value."""
    if get_origin(hint) is Annotated:
        text = _plain(str, value, key_path)
        try:
            return expanded(text, key_path.label()) if key_path.expands and text else text
        except UserError as error:
            raise ConfigError(str(error)) from None
    if hint is str:
        return _plain(str, value, key_path)
    value = _plain_value(value)
    if key in PRESETS:
        return _from_preset(PRESETS[key], value, key_path, current)
    if is_dataclass(hint):
        return _build(typing.cast(type, hint), value, key_path)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise key_path.error(f"{shown(value)} is not one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        return _tuple(hint, value, key_path)
    if get_origin(hint) in (typing.Union, UnionType):
        raise AssertionError(f"{key_path.key}: a union needs presets")
    return _plain(hint, value, key_path)


def _one_precision(word: Any, key_path: _KeyPath) -> PrecisionConfig:
    """Build the precision of all devices from one word."""
    precision = _value(Precision, word, key_path, "", None)
    return PrecisionConfig(CPU=precision, GPU=precision, Ascend=precision)


def _from_preset(presets: dict[str, Any], value: Any, key_path: _KeyPath, current: Any) -> Any:
    """Build a preset with single fields changed; without `name`, `current` is changed."""
    tree = {"name": value} if isinstance(value, str) else value
    if not isinstance(tree, dict):
        raise key_path.error(f"must name a preset, not {shown(value)}; valid: {', '.join(presets)}")
    name = _plain_value(tree.get("name", current.name))
    if not isinstance(name, str) or name not in presets:
        hint = did_you_mean(name, presets)
        raise key_path.child("name").error(f"unknown preset {shown(name)}; {hint}valid: {', '.join(presets)}")
    # without a name the value of the enclosing preset stays
    preset = current if "name" not in tree else replace(presets[name], name=name)
    return _build(type(preset), {**tree, "name": name} if "name" in tree else tree, key_path, preset)


def _tuple(hint: Any, value: Any, key_path: _KeyPath) -> tuple[Any, ...]:
    args = get_args(hint)
    if isinstance(value, list | tuple) and len(value) > MOST_VALUES:
        raise key_path.error(f"has {len(value)} values; write at most {MOST_VALUES}")
    if len(args) == 2 and args[1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise key_path.error(f"must be a list of {_plural_name(args[0])}, not {shown(value)}")
        return tuple(
            _value(args[0], v, key_path.child(str(i)) if is_dataclass(args[0]) else key_path, "", None)
            for i, v in enumerate(value)
        )
    if key_path.key.endswith("image_size") and not isinstance(value, list | tuple):
        value = [value] * 2
    if not isinstance(value, list | tuple) or len(value) != len(args):
        raise key_path.error(f"must be a list of {len(args)} {_plural_name(args[0])}, not {shown(value)}")
    return tuple(_plain(arg, v, key_path) for arg, v in zip(args, value, strict=True))


def _plain(hint: type, value: Any, key_path: _KeyPath) -> Any:
    """Check an int, float, bool or str. YAML reads numbers like 1e-3 as text; they become floats here."""
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if number == number and abs(number) != float("inf"):
            return number
    elif hint is str and isinstance(value, _CommandLineValue):
        return "" if value.value is None else _unquoted(value)
    elif hint is int and type(value) is int and abs(value) > LARGEST:
        raise key_path.error(f"{value} is larger than any number here; write at most {LARGEST}")
    elif type(value) is hint or (hint is str and value is None):
        return "" if value is None else value
    quotes = "; put it in quotes" if hint is str and not isinstance(value, dict | list) else ""
    raise key_path.error(f"must be {_type_name(hint)}, not {shown(value)}{quotes}")


def _unquoted(value: _CommandLineValue) -> str:
    """Return text from the command line: without quotes and outer spaces; words such as `no` and 2012 stay text."""
    return value.value if isinstance(value.value, str) else value.text.strip()


def _type_name(hint: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _plural_name(hint: type) -> str:
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(hint, "mappings of keys")


def did_you_mean(wrong: Any, names: Iterable[str]) -> str:
    """Return `did you mean X? ` for an error message; empty if no name is similar."""
    close = difflib.get_close_matches(str(wrong)[:LONGEST_WORD], list(names), n=1)
    return f"did you mean {close[0]}? " if close else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m src.config", description="print the resolved recipe")
    parser.add_argument("file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    try:
        text = dump_recipe(load_recipe(args.file, args.overrides))
        sys.stdout.write(text)
        sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        return 2
    except OSError as error:  # a full disk, a reader that has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at the end would fail too
        if isinstance(error, BrokenPipeError):
            return 141
        sys.stderr.write(f"error: stdout: {error.strerror}; print to another place\n")
        return 2
    return 0
