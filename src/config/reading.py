"""Read small text files and YAML within limits, so that no file takes long or much memory, whatever it holds."""

from __future__ import annotations

import os
import re
import stat
from typing import Any

import yaml

LONGEST = 100_000  # characters of a recipe with its bases, and with its aliases written out; ours have 4,000
DEEPEST = 20  # mappings and lists inside each other
LONGEST_WORD = 100  # characters of a key or a number
CORE = "tag:yaml.org,2002:"
TAGS = {CORE + name for name in ("null", "bool", "int", "float", "str", "timestamp", "merge", "seq", "map")}


class Refused(yaml.YAMLError):
    """Text that is no recipe; the error is one line, without the name of its file."""


class NotYaml(Refused):
    """Text that is not YAML at all."""


def read_text(path: str | os.PathLike[str], longest: int) -> str:
    """Return the text of a file without a byte-order mark, reading at most one byte more than `longest`.

    Raises:
        OSError: it cannot be read, is no file, is longer, or is not UTF-8. A pipe is read only if it is open already,
            as `<(...)` is: a named one can block for ever.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 # `path` may be text
    is_open_pipe = stat.S_ISFIFO(mode) and not os.path.exists(os.path.realpath(path))  # noqa: PTH110 # no name
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("it is a folder, not a recipe")
    if not (stat.S_ISREG(mode) or is_open_pipe):
        raise OSError("it is a pipe" if stat.S_ISFIFO(mode) else "it is a device, not a file")
    # some files of the kernel would make a reader wait
    number = os.open(path, os.O_RDONLY | (0 if is_open_pipe else os.O_NONBLOCK))
    with os.fdopen(number, "rb") as file:
        content = file.read(longest + 1) or b""
    if len(content) > longest:
        raise OSError(f"it has more than {longest} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise OSError("it is not UTF-8 text; save it as UTF-8") from None


def available_memory() -> int:
    """Bytes of memory that this machine has left; more than any file where it does not say so."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            sizes = dict(line.split(":") for line in file)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, LookupError):
        return 2**62


def parse_yaml(text: str) -> Any:
    """Return the value that a YAML text describes.

    Raises:
        Refused: it is not YAML, has a key twice, or exceeds the limits of this module.
    """
    if len(text) > LONGEST:
        raise Refused(f"has more than {LONGEST} characters; recipes are small")
    try:
        return yaml.load(text, Loader=_Loader)
    except Refused:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1} " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise NotYaml(f"{line}is not YAML ({problem}); write `key: value` lines") from None
    except RecursionError:
        raise Refused("is nested too deeply for a recipe; write `key: value` lines") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # of a constructor
        reason = " ".join(str(error).split())
        raise Refused(f"has a value that is not what it looks like ({reason}); put it in quotes") from None


class _Loader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys, tags of other programs, and whatever is too large."""

    #: as in YAML, but `=` is text
    yaml_implicit_resolvers = {  # noqa: RUF012 # as in the base class
        start: [(tag, pattern) for tag, pattern in rules if tag != CORE + "value"]
        for start, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        self.extents: dict[int, tuple[int, int]] = {}  # id of a node -> characters and levels, with aliases

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.AliasEvent):
            anchored = self.anchors.get(self.peek_event().anchor)
            if anchored is not None and id(anchored) not in self.extents:
                raise Refused(f"line {line}: *{self.peek_event().anchor} refers to itself; write the value out")
        self.depth += 1
        node = super().compose_node(parent, index) if self.depth <= DEEPEST else None
        self.depth -= 1
        if node is None:
            raise Refused(f"line {line}: is nested too deeply for a recipe, which has at most {DEEPEST} levels")
        if id(node) not in self.extents:
            self.examine(node, line)
            self.extents[id(node)] = self.extent(node, line)
        return node

    def examine(self, node: yaml.Node, line: int) -> None:
        """Check the tag and the characters of a node."""
        if node.tag not in TAGS:
            tag = node.tag.removeprefix(CORE)[:LONGEST_WORD]
            raise Refused(f"line {line}: the tag {tag!r} has no meaning in a recipe; write the value alone")
        if isinstance(node, yaml.MappingNode):
            self.check_keys(node)
        elif isinstance(node, yaml.ScalarNode):
            if node.tag in (CORE + "int", CORE + "float") and len(node.value) > LONGEST_WORD:
                raise Refused(f"line {line}: a number of {len(node.value)} digits; write at most {LONGEST_WORD}")
            wrong = re.search("[\0\ud800-\udfff]", node.value)
            if wrong:
                raise Refused(f"line {line}: has the character {wrong[0]!r}, which no name can have; remove it")

    def check_keys(self, node: yaml.MappingNode) -> None:
        """Check that keys are short words, each once."""
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise Refused(f"line {line}: a key is a word, not a list or mapping; write `key: value` lines")
            if len(key_node.value) > LONGEST_WORD:
                raise Refused(f"line {line}: a key of {len(key_node.value)} characters; recipes have none like it")
            if key_node.tag == CORE + "merge":
                continue
            key = self.construct_object(key_node)
            if key in lines:
                raise Refused(f"{key}: appears in lines {lines[key]} and {line}; remove one of them")
            lines[key] = line

    def extent(self, node: yaml.Node, line: int) -> tuple[int, int]:
        """Characters and levels of a node whose parts are known."""
        if isinstance(node, yaml.ScalarNode):
            return len(node.value) + 1, 0
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        extents = [self.extents[id(part)] for part in parts]
        size, levels = 1 + sum(size for size, _ in extents), 1 + max((levels for _, levels in extents), default=0)
        if size > LONGEST or levels > DEEPEST:
            limit = f"{DEEPEST} levels" if size <= LONGEST else f"{LONGEST} characters"
            raise Refused(f"line {line}: has more than {limit}, with its aliases written out; recipes are small")
        return size, levels
