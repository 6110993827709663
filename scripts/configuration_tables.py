"""What `scripts/configuration` runs: the tables of docs/configuration.md, made from the Structs that read dialog.toml."""

import ast
import inspect
import json
import sys
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from dialog_supervisor.sections import Secret, Section, Tables

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN = "<!-- begin: written by scripts/configuration -->\n"
END = "<!-- end: written by scripts/configuration -->\n"
COMMAND = "scripts/configuration"
_WORDS: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "whole number",
    float: "number",
    Path: "path",
    Secret: "secret",
}


def main(arguments: list[str]) -> int:
    """Write the page's tables, or with --check only compare them; return the exit code."""
    if arguments not in ([], ["--check"]):
        print(f"usage: {COMMAND} [--check]", file=sys.stderr)
        return 2
    written = PAGE.read_text(encoding="utf-8")
    wanted = renewed(written)
    if written == wanted:
        return 0
    if arguments:
        print(f"{PAGE} is not what dialog_supervisor/sections.py says; run {COMMAND}", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


def renewed(page: str) -> str:
    """Return the page with the tables as they should be. Raises `ValueError` when it has no place for them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} has no lines {BEGIN!r} and {END!r} for the tables to stand between")
    return f"{before}{begin}\n{tables()}\n{end}{after}"


def tables() -> str:
    """Return a heading, a sentence and a table for each section of dialog.toml."""
    return "\n".join(_section(field.name, field.type) for field in msgspec.structs.fields(Tables))


def _section(name: str, section: type[Section]) -> str:
    meaning = inspect.cleandoc(section.__doc__ or "").partition(": ")[2]
    lines = [f"### `[{name}]`", "", f"{meaning[:1].upper()}{meaning[1:]}", ""]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    hints, meanings = get_type_hints(section, include_extras=True), attribute_docstrings(section)
    for field in msgspec.structs.fields(section):
        cells = (f"`{field.name}`", in_words(hints[field.name]), _default(field), meanings.get(field.name, ""))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def attribute_docstrings(section: type[Struct]) -> dict[str, str]:
    """Return the string below each field of a class, joined to one line."""
    [definition] = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    return dict(_documented(definition.body))


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


def in_words(hint: Any) -> str:
    """Say a field's type, and what is required of its values, as a reader of dialog.toml understands it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return in_words(arguments[0]) + "".join(_constraint(meta) for meta in arguments[1:])
    if origin is Literal:
        *others, last = (f"`{json.dumps(value)}`" for value in arguments)
        return f"{', '.join(others)} or {last}"
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(one) for one in arguments if one is not types.NoneType)
    if origin is tuple:
        return f"list of {in_words(arguments[0])}s"
    if origin is dict:
        return f"table of {in_words(arguments[1])}s by name"
    return _WORDS[hint]


def _constraint(meta: Meta) -> str:
    said = [
        f" above {meta.gt:g}" if meta.gt is not None else "",
        f", at least {meta.ge}" if meta.ge is not None else "",
        f", at most {meta.le}" if meta.le is not None else "",
        f" of the form `{meta.pattern}`" if meta.pattern is not None else "",
    ]
    return "".join(said)


def _default(field: msgspec.structs.FieldInfo) -> str:
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if default is msgspec.NODEFAULT:
        return "required"
    if default is None or default == Path():
        return "–"
    if isinstance(default, tuple | dict):
        return f"`{json.dumps(default)}`"
    return f"`{json.dumps(default, ensure_ascii=False)}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
