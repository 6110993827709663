"""A page of the documentation, taken apart: its sections, its code, its tables."""

import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"^`(\w+\.py)`(?:[^\n]+\n)+\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(Struct, frozen=True):
    """A fenced block: in which section it is, and in which language."""

    section: str
    language: str
    text: str


def sections(name: str) -> dict[str, str]:
    """Return a page's text by its headings of the second level."""
    _, *parts = re.split(r"^## ", (DOCS / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {heading: text for heading, _, text in (part.partition("\n") for part in parts)}


def blocks(name: str) -> list[Block]:
    """Return a page's fenced blocks."""
    found = sections(name).items()
    return [Block(heading, *match.groups()) for heading, text in found for match in _BLOCK.finditer(text)]


def modules(name: str) -> dict[str, str]:
    """Return a page's Python modules: blocks whose file is named in the line above."""
    return dict(_NAMED.findall((DOCS / name).read_text(encoding="utf-8")))


def tables(text: str) -> Iterator[list[list[str]]]:
    """Yield a text's tables as rows of cells, each with its header first."""
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
        elif rows:
            yield [row for row in rows if set("".join(row)) != {"-"}]
            rows = []
