"""Read the project's pages: fenced blocks, commands, tables, headings, links."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers import ROOT

#: the pages that people read, relative to the project folder
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder, depth in (("", "*"), ("docs", "*"), ("config", "*/*"))
    for path in (ROOT / folder).glob(f"{depth}.md")
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(page: str, kind: str = r"\w*") -> list[str]:
    """The contents of a page's fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", read(page), re.S | re.M)


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.S | re.M)


def code_spans(text: str) -> list[str]:
    """What stands between backticks; a line end in it is a space."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def without_comment(line: str) -> str:
    return re.sub(r"(^|\s+)# .*$", "", line)


def tables(page: str) -> list[list[str]]:
    """The rows of each table."""
    return [block.strip().splitlines() for block in re.findall(r"(?:^\|.*\|$\n?)+", prose(page), re.M)]


def links(text: str) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(<?([^)\s>]+)>?\)", text)


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = found[slug] = found.get(slug, -1) + 1
        names.add(f"{slug}-{number}" if number else slug)
    return names


def folder_of(page: str) -> Path:
    return (ROOT / page).parent
