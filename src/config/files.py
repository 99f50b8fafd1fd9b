"""Recipes in and out: YAML files with `base:` inheritance, `key=value` overrides, typed building, printing.

Files and overrides take one path: plain nested dictionaries are merged (child over base, overrides last), then built
into the dataclasses of this package with every key and type checked. Each error is one line: file, dotted key, cause,
what is legal.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ..errors import UserError
from .checks import FieldError
from .paths import expanded
from .recipe import PRESETS, Recipe

OVERRIDE = "command line"
MANY = 10_000  # keys that no recipe has
#: keys of a recipe that hold further keys
SECTIONS = ("encoder", "method", "data", "train", "stages", "target", "decoder", "teacher_encoder")
#: fields that resolved recipes of earlier versions do not have: section, field, and its value there by the section
ADDED: tuple[tuple[str, str, Callable[[dict[str, Any]], Any]], ...] = (
    # until 0.1.0 `corrupt` decided the rounding
    ("method", "mask_rounding", lambda method: {"token": "ceil_masked"}.get(method.get("corrupt", ""))),
)


class ConfigError(UserError):
    """A recipe that cannot be used; the text is one line made for the person who wrote it."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key=value` overrides and build the typed recipe.

    Raises:
        ConfigError: with one line that names file, dotted key, cause and remedy.
    """
    path = Path(expanded(str(path), "--config"))
    tree, origins = _read_tree(path, ())
    for text in overrides:
        _apply_override(tree, origins, text)
    recipe = _build(Recipe, tree, _Place(str(path), origins))
    return recipe if recipe.output else replace(recipe, output=f"runs/{path.stem}")


def parse_recipe(text: str, source: str) -> Recipe:
    """Build a recipe from YAML text without inheritance, as checkpoints carry it; `source` names it in errors.

    Text of earlier versions, whose fields `ADDED` tells of, gives what it gave then.
    """
    tree = _parse_yaml(text, source)
    for section, field, before in ADDED:
        part = tree.get(section)
        if isinstance(part, dict) and field not in part:
            value = before(part)
            if value is not None:
                part[field] = value
    return _build(Recipe, tree, _Place(source, {}, expands=False))


def override(recipe: Recipe, overrides: Sequence[str], source: str) -> Recipe:
    """The recipe with `key=value` changes, checked like a file; `source` names the recipe in errors."""
    tree = to_tree(recipe)
    origins: dict[str, str] = {}
    for text in overrides:
        _apply_override(tree, origins, text)
    return _build(Recipe, tree, _Place(source, origins))


def change(config: Any, values: dict[str, Any], source: str) -> Any:
    """One dataclass of a recipe with some fields changed, checked like a file; `source` names it in errors."""
    return _build(type(config), values, _Place(source, {}), config)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; reading it back gives an equal recipe."""
    return yaml.safe_dump(to_tree(recipe), sort_keys=False, default_flow_style=None, width=110)


def to_tree(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries and lists."""
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


def _read_tree(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The merged dictionary of a file and its bases, and the file that set each dotted key."""
    where = str(chain[-1]) if chain else str(path)
    if path.resolve() in [p.resolve() for p in chain]:
        cycle = " -> ".join(str(p) for p in (*chain, path))
        raise ConfigError(f"{where}: base: files inherit from each other in a circle ({cycle}); remove one of them")
    try:
        text = _read_text(path)
    except (OSError, ValueError) as error:  # ValueError: not text, or a NUL character in the name
        reason = "no such file" if isinstance(error, FileNotFoundError) else _one_line(error)
        key = "base: " if chain else ""
        near = _nearby_files(path)
        raise ConfigError(f"{where}: {key}cannot read {path} ({reason}){near}") from None
    own = _parse_yaml(text, str(path))
    bases = own.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{path}: base: must be a file name or a list of file names, not {bases!r}")
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for base in bases:
        base_tree, base_origins = _read_tree(path.parent / expanded(base, f"{path}: base"), (*chain, path))
        _merge(tree, base_tree)
        origins.update(base_origins)
    _merge(tree, own)
    origins.update(dict.fromkeys(_dotted_keys(own, str(path)), str(path)))
    return tree, origins


def _read_text(path: Path) -> str:
    """The text of a recipe; a byte-order mark is dropped."""
    if path.is_dir():
        raise IsADirectoryError("it is a folder, not a recipe")
    if path.is_fifo() and Path("/dev") not in path.parents:  # reading one waits for whoever writes; <(...) does write
        raise OSError("it is a pipe")
    return path.read_text(encoding="utf-8-sig")


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=_Loader)
    except _TwiceError as error:
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply for a recipe; write `key: value` lines") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or _one_line(error)
        raise ConfigError(f"{source}:{line} is not YAML ({problem}); write `key: value` lines") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: must be a mapping of keys, not {type(tree).__name__}; write `key: value` lines")
    return tree


class _TwiceError(yaml.YAMLError):
    """A key that stands twice in a mapping; the later one would hide the other."""


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once in its mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in lines:
                raise _TwiceError(f"{key}: is there twice, in lines {lines[key]} and {line}; remove one of them")
            lines[key] = line
        return super().construct_mapping(node, deep)


def _nearby_files(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    there = folder.rglob("*.yaml") if path.is_dir() else folder.glob("*.yaml")
    found = (p.relative_to(folder) for p in there)
    names = sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"; did you mean {folder / close[0]}?"
    if not names:
        return "; no .yaml file in that folder" if folder.is_dir() else f"; there is no folder {folder}"
    shown = 8 if folder == path.parent else 60  # a folder is asked for its recipes
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"; there is: {', '.join(names[:shown])}{more}"


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Deep merge; naming a preset of another class, or a preset as a plain string, replaces what stood there."""
    for key, value in new.items():
        old = into.get(key)
        if value is None and key in SECTIONS:  # a section whose lines are all comments says nothing
            continue
        if isinstance(old, str) and key in PRESETS:
            old = into[key] = {"name": old}
        if isinstance(value, dict) and isinstance(old, dict) and not _other_class(key, old, value.get("name")):
            _merge(old, value)
        else:
            into[key] = value


def _other_class(key: str, old: dict[str, Any], name: Any) -> bool:
    presets = PRESETS.get(key, {})
    if not isinstance(name, str) or not isinstance(old.get("name"), str):
        return False
    return name in presets and old["name"] in presets and type(presets[name]) is not type(presets[old["name"]])


def _dotted_keys(tree: dict[str, Any], source: str) -> list[str]:
    """Keys of all mappings, joined by dots."""
    keys: list[str] = []
    waiting = [("", tree)]
    while waiting:
        prefix, part = waiting.pop()
        for key, value in part.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                waiting.append((f"{prefix}{key}.", value))
        if len(keys) > MANY:  # aliases within aliases
            raise ConfigError(f"{source}: has more than {MANY} keys; a recipe has some hundred at the most")
    return keys


def split_override(text: str) -> tuple[str, str]:
    """Key and value of a `key=value` argument.

    Raises:
        ConfigError: it is none.
    """
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"{OVERRIDE}: {text!r} is not key=value; write for example train.epochs=10")
    return key, value


def _apply_override(tree: dict[str, Any], origins: dict[str, str], text: str) -> None:
    key, value = split_override(text)
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        raise ConfigError(f"{OVERRIDE}: {key}: {value!r} is not a YAML value") from None
    said = _Typed(parsed, value) if not isinstance(parsed, dict | list) else parsed
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        child = node.get(part)
        if isinstance(child, str) and part in PRESETS:
            child = {"name": child}
        if not isinstance(child, dict):
            child = {}
        if last == "name" and part == parents[-1] and _other_class(part, child, parsed):
            child = {}
        node[part] = child
        node = child
    if isinstance(parsed, dict):
        _merge(node, {last: parsed})
        origins.update(dict.fromkeys((f"{key}.{inner}" for inner in _dotted_keys(parsed, OVERRIDE)), OVERRIDE))
    else:
        node[last] = said
    origins[key] = OVERRIDE


@dataclass(frozen=True)
class _Typed:
    """A value of the command line: as YAML reads it, and as it was typed, which is what a text is."""

    value: Any
    text: str


def _plain_value(value: Any) -> Any:
    return value.value if isinstance(value, _Typed) else value


# --- building typed values --------------------------------------------------------------------------------------


class _Place:
    """Where in which recipe a value stands, for error messages."""

    def __init__(self, source: str, origins: dict[str, str], key: str = "", expands: bool = True):
        self.source, self.origins, self.key, self.expands = source, origins, key, expands

    def at(self, key: str) -> _Place:
        return _Place(self.source, self.origins, f"{self.key}.{key}" if self.key else key, self.expands)

    def where(self) -> str:
        """The file or command line and the key."""
        source = self.origins.get(self.key, self.source)
        return f"{source}: {self.key}" if self.key else source

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.where()}: {message}")


def _build(cls: type, tree: Any, place: _Place, preset: Any = None) -> Any:
    """One dataclass from a mapping, starting from a preset or from the class defaults."""
    if not isinstance(tree, dict):
        raise place.error(f"must be a mapping of keys, not {tree!r}; valid keys: {_field_names(cls)}")
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in tree.items():
        here = place.at(str(key))
        if key not in hints and isinstance(key, str) and key.split(".")[0] in hints:
            section, _, rest = key.partition(".")
            raise here.error(f"dots join keys on the command line alone; write {section}: {{{rest}: ...}}")
        if key not in hints:
            raise here.error(f"unknown key of {cls.__name__}; {did_you_mean(key, hints)}valid: {_field_names(cls)}")
        current = getattr(preset, key) if preset is not None else _default(cls, key)
        values[key] = _value(hints[key], value, here, key, current)
    try:
        return replace(preset, **values) if preset is not None else cls(**values)
    except FieldError as error:
        raise place.at(error.key).error(str(error)) from None


def _default(cls: type, key: str) -> Any:
    for item in fields(cls):
        if item.name == key:
            return item.default_factory() if item.default_factory is not MISSING else item.default
    raise AssertionError(key)


def _field_names(cls: type) -> str:
    return ", ".join(item.name for item in fields(cls))


def _value(hint: Any, value: Any, place: _Place, key: str, current: Any) -> Any:
    """One field: a preset or dataclass, a choice, a tuple, or a plain value."""
    if get_origin(hint) is Annotated:
        text = _plain(str, value, place)
        try:
            return expanded(text, place.where()) if place.expands else text
        except UserError as error:
            raise ConfigError(str(error)) from None
    if hint is str:
        return _plain(str, value, place)
    value = _plain_value(value)
    if key in PRESETS:
        return _named(PRESETS[key], value, place, current)
    if is_dataclass(hint):
        return _build(typing.cast(type, hint), value, place)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise place.error(f"{value!r} is not one of {', '.join(map(str, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        return _tuple(hint, value, place)
    if get_origin(hint) in (typing.Union, UnionType):
        raise AssertionError(f"{place.key}: a union needs presets")
    return _plain(hint, value, place)


def _named(presets: dict[str, Any], value: Any, place: _Place, current: Any) -> Any:
    """A preset with single fields changed; without `name` the default's class stays."""
    tree = {"name": value} if isinstance(value, str) else value
    if not isinstance(tree, dict):
        raise place.error(f"must name a preset, not {value!r}; valid: {', '.join(presets)}")
    name = _plain_value(tree.get("name", current.name))
    if not isinstance(name, str) or name not in presets:
        hint = did_you_mean(name, presets)
        raise place.at("name").error(f"unknown preset {name!r}; {hint}valid: {', '.join(presets)}")
    # without a name of its own the value keeps what the enclosing preset chose
    preset = current if "name" not in tree else replace(presets[name], name=name)
    return _build(type(preset), {**tree, "name": name} if "name" in tree else tree, place, preset)


def _tuple(hint: Any, value: Any, place: _Place) -> tuple[Any, ...]:
    args = get_args(hint)
    if len(args) == 2 and args[1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise place.error(f"must be a list of {_type_name(args[0])}, not {value!r}")
        return tuple(
            _value(args[0], v, place.at(str(i)) if is_dataclass(args[0]) else place, "", None)
            for i, v in enumerate(value)
        )
    if place.key.endswith("image_size") and not isinstance(value, list | tuple):
        value = [value] * 2
    if not isinstance(value, list | tuple) or len(value) != len(args):
        raise place.error(f"must be a list of {len(args)} x {_type_name(args[0])}, not {value!r}")
    return tuple(_plain(arg, v, place) for arg, v in zip(args, value, strict=True))


def _plain(hint: type, value: Any, place: _Place) -> Any:
    """int, float, bool or str; numbers written like 1e-3, which YAML reads as text, are floats here."""
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if number == number and abs(number) != float("inf"):
            return number
    elif hint is str and isinstance(value, _Typed):
        return "" if value.value is None else _unquoted(value)
    elif type(value) is hint or (hint is str and value is None):
        return "" if value is None else value
    quotes = "; put it in quotes" if hint is str and not isinstance(value, dict | list) else ""
    raise place.error(f"must be {_type_name(hint)}, not {value!r}{quotes}")


def _unquoted(typed: _Typed) -> str:
    """Text of the command line: YAML takes off quotes and spaces, and leaves words such as `no` and 2012 alone."""
    return typed.value if isinstance(typed.value, str) else typed.text.strip()


def _type_name(hint: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, "mappings of keys")


def did_you_mean(wrong: Any, names: Iterable[str]) -> str:
    """`did you mean X? ` for an error message; empty if no name is near."""
    close = difflib.get_close_matches(str(wrong), list(names), n=1)
    return f"did you mean {close[0]}? " if close else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m src.config", description="print the resolved recipe")
    parser.add_argument("file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    try:
        sys.stdout.write(dump_recipe(load_recipe(args.file, args.overrides)))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
