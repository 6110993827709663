"""`docs/from-dialog.md`, row by row."""

import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "from-dialog.md"
_CODE = re.compile(r"`([^`]+)`")


class Row(Struct, frozen=True):
    """One row: in which section, what was there, and the code that is here."""

    section: str
    there: str
    code: str

    def __str__(self) -> str:
        return self.code


def rows() -> Iterator[Row]:
    """Yield the page's rows. A row without exactly one piece of code in its last column is a mistake."""
    section = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if not line.startswith("|") or line.startswith(("|---", "| there |")):
            continue
        there, _, last = (cell.strip() for cell in line.strip("|").split("|"))
        [code] = _CODE.findall(last)
        yield Row(section, there, code)


def rows_of(section: str) -> list[Row]:
    """Return the rows of a section, of which there are some."""
    found = [row for row in rows() if row.section == section]
    assert found, f"{PAGE} has no table under {section!r}"
    return found
