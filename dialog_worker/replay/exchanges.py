"""A conversation as exchanges, and how two of them compare: the caller's words, and all that came of them. No I/O."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from msgspec import Struct

OPENING = "(the call begins)"
_BOOKKEEPING = ("id", "timeout_s")  # of a request, no part of what is asked for
_WORD = re.compile(r"\w+")


class Happening(Struct, frozen=True):
    """Something that was done: `kind` is heard, pressed, saying, said, turn, tool or request."""

    kind: str
    text: str = ""
    fields: dict[str, str] = {}


class Exchange(Struct):
    """What the caller said or pressed, and what came of it until the next: words, tools, requests. `cut`: interrupted."""

    caller: str
    answers: list[str] = []
    cut: bool = False


class Compared(Struct, frozen=True):
    """An exchange then and now."""

    caller: str
    then: list[str]
    now: list[str]
    same: bool


def asked_for(request: str, fields: Mapping[str, Any]) -> str:
    """Return a request as an answer."""
    listed = ", ".join(f"{name}={value}" for name, value in without_bookkeeping(fields).items())
    return f"[{request}({listed})]"


def without_bookkeeping(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request asks for."""
    return {name: value for name, value in fields.items() if name not in _BOOKKEEPING}


def exchanges_of(happened: Iterable[Happening], asides: Collection[str]) -> list[Exchange]:
    """Return a conversation's exchanges. `asides` are said whenever an answer takes long, and are no answer."""
    found = [Exchange(OPENING)]
    places: dict[str, tuple[Exchange, int]] = {}  # of utterances, where they began
    for one in happened:
        uuid = one.fields.get("uuid", "")
        match one.kind:
            case "heard" | "pressed":
                found.append(Exchange(one.text))
            case "saying" if uuid not in places:
                places[uuid] = found[-1], len(found[-1].answers)
                found[-1].answers.append(one.text)
            case "saying":
                exchange, index = places[uuid]
                exchange.answers[index] += f" {one.text}"
            case "said" if uuid in places:
                exchange, index = places[uuid]
                exchange.answers[index] = one.fields.get("total", one.text)
                exchange.cut |= one.fields.get("interrupted") == "true"
            case "tool":
                found[-1].answers.append(f"[{one.fields.get('name', '')}({one.fields.get('arguments', '')})]")
            case "request":
                found[-1].answers.append(one.text)
    for exchange in found:
        exchange.answers = [answer for answer in exchange.answers if answer and answer not in asides]
    return found


def compare(then: Sequence[Exchange], now: Sequence[Exchange]) -> Iterator[Compared]:
    """Yield each exchange then and now; one that did not come about now is another."""
    for before, after in zip_longest(then, now):
        if before is not None and after is not None:
            yield Compared(before.caller, before.answers, after.answers, same=same(before, after))
        elif before is not None:
            yield Compared(before.caller, before.answers, [], same=not before.answers)
        elif after is not None:
            yield Compared(after.caller, [], after.answers, same=False)


def same(one: Exchange, other: Exchange) -> bool:
    """Whether the answers are the same but for case and punctuation; of one that was cut, as far as it came."""
    mine, others = _words(one.answers), _words(other.answers)
    if one.cut and len(mine) <= len(others):
        return others[: len(mine)] == mine
    if other.cut and len(others) <= len(mine):
        return mine[: len(others)] == others
    return mine == others


def _words(answers: Iterable[str]) -> list[str]:
    return _WORD.findall(" ".join(answers).casefold())
