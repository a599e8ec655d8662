"""Markdown pages of the repository: their links, headings and fenced blocks."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.ranks import REPOSITORY

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.*)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: the language after its first fence, and its text."""

    language: str
    text: str


def pages() -> list[Path]:
    """The Markdown files for readers, and the notebooks."""
    places = ("*.md", "ds_configs/*.md", "docs/**/*.md", "docs/**/*.ipynb")
    return sorted(path for place in places for path in REPOSITORY.glob(place))


def text_of(page: Path) -> str:
    """A page's Markdown; for a notebook that of its Markdown cells."""
    text = page.read_text()
    if page.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def outputs_of(cell: dict[str, Any]) -> str:
    """The stored output of a notebook's cell, with its value on the last line."""
    texts = [out.get("text") or out["data"]["text/plain"] for out in cell.get("outputs", [])]
    return "\n".join("".join(text).rstrip() for text in texts)


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*found.groups()) for found in _FENCE.finditer(text)]


def prose(text: str) -> str:
    """A page without its code: indented, fenced or inline."""
    text = re.sub(r"^    .*$", "", _FENCE.sub("", text), flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def links(text: str) -> Iterator[tuple[str, str]]:
    """(path, anchor) of each relative link of a page; either may be empty."""
    for target in _LINK.findall(prose(text)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and Sphinx make them."""
    plain = _FENCE.sub("", text)
    words = (re.sub(r"[^\w\- ]", "", title.lower()) for title in _HEADING.findall(plain))
    return {title.strip().replace(" ", "-") for title in words}
