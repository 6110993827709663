"""The table's rows: which provider does what in mid-call, and what the caller shall notice of it."""

from itertools import zip_longest
from typing import Literal, TypeAlias

from msgspec import Struct

Outcome: TypeAlias = Literal["goes on", "apologises", "handed over"]  # the last: to what `[fallback]` says

BOOKING, MENU = "A table for four people at seven thirty, please.", "What is on the menu?"
OPENING, BYE = "When are you open?", "Thank you, bye."

# Seconds after a provider's connection was opened, which is when the call begins. The caller speaks from SPEAKS_AT_S on.
SPEAKS_AT_S = 2.0
IN_QUESTION_S = 3.1  # of the caller's
IN_ANSWER_S = 4.6  # of the waiter, who writes it from about 3.5 s to 5 s
IN_PAUSE_S = 1.6  # after the greeting, and before anything else


class Case(Struct, frozen=True):
    """One row: what the caller `says`, and whether the provider is one of two (`spare`).

    `what`: the fault for people. `faults`: those of the provider's connections, one after another, the last for all that
    follow. `told`: a code of those that the agent is told.
    """

    provider: str
    what: str
    faults: tuple[str, ...]
    says: tuple[str, ...]
    outcome: Outcome = "goes on"
    told: str = ""
    spare: bool = False

    def __str__(self) -> str:
        return f"{self.provider}{' and another' if self.spare else ''}, {self.what}"


def _of_speech(provider: str, at_s: float, first: tuple[str, ...], says: tuple[str, ...], stalled: str) -> list[Case]:
    """What any provider of speech may do; `stalled` is its adapter's word for a stall. In the first it has to go on."""
    code = 1013 if provider in ("openai-realtime", "cartesia") else 1011

    def case(what: str, *faults: str, told: str = "", gone: bool = False, spare: bool = False) -> Case:
        return Case(provider, what, faults, says, "handed over" if gone else "goes on", told, spare)

    return [
        Case(provider, "drops the connection once", (f"drop={at_s}", ""), first, told="1006"),
        case("stalls once", f"stall={at_s}", "", told=stalled),
        case(f"closes once with {code}", f"close={code},{at_s}", "", told=str(code)),
        case("sends garbage between all else", f"garbage={at_s}", told="garbage"),
        case("answers after 1 s", "slow=1"),
        case("drops, then refuses with 503", f"drop={at_s}", "refuse=503", told="503", gone=True),
        case("stalls for ever", f"stall={at_s}", "stall", told=stalled, gone=True),
        case("drops, then refuses with 401", f"drop={at_s}", "refuse=401", told="401", spare=True),
        case("answers after 8 s", f"close=1001,{IN_PAUSE_S}", "slow=8", spare=True),
    ]


def _of_ears(provider: str) -> list[Case]:
    """All of speech, and a short word, which is over long before its stall is noticed."""
    return [
        *_of_speech(provider, IN_QUESTION_S, (BOOKING, BYE), (BOOKING,), "stall"),
        Case(provider, "stalls at a short word", (f"stall={IN_PAUSE_S}", "stall"), (BYE,), told="stall", spare=True),
    ]


def _of_model(what: str, fault: str, outcome: Outcome = "goes on", told: str = "", says: tuple[str, ...] = (BYE,)) -> Case:
    return Case("openai", what, (fault,), says, outcome, told)


CASES = [
    _of_model("stalls for ever", "stall", "apologises", "failed"),  # the longest
    *_of_ears("deepgram"),
    *_of_ears("openai-realtime"),
    Case("openai-realtime", "ends the session (1001)", (f"close=1001,{IN_QUESTION_S}", ""), (BOOKING,)),
    Case(
        "openai-realtime",
        "refuses the session (4000)",
        (f"close=4000,{IN_QUESTION_S},reason=invalid_model",),
        (BOOKING,),
        "handed over",
        "invalid_model",
    ),
    *_of_speech("cartesia", IN_ANSWER_S, (MENU,), (MENU,), "timeout"),
    *_of_speech("elevenlabs", IN_ANSWER_S, (MENU,), (MENU,), "timeout"),
    Case(
        "elevenlabs",
        "has no quota (1008)",
        (f"close=1008,{IN_ANSWER_S},reason=quota_exceeded", "close=1008,0.2,reason=quota_exceeded"),
        (MENU,),
        "handed over",
        "quota_exceeded",
    ),
    _of_model("refuses with 503 for ever", "refuse=503", "handed over", "failed", says=(BYE,) * 3),
    _of_model("stalls once in its answer", "stall=0.25,times=1", told="failed", says=(OPENING, BYE)),
    _of_model("answers after 8 s", "slow=8"),
    _of_model("refuses once with 503", "refuse=503,times=1", told="asked again"),
    _of_model("drops once before its answer", "drop=0.05,times=1", told="asked again"),
    _of_model("sends garbage once", "garbage,times=1", told="asked again"),
    _of_model("answers after 1 s", "slow=1"),
    _of_model("refuses with 401", "refuse=401", "handed over", "failed"),
]


def in_turns() -> list[Case]:
    """Return the cases in an order in which providers and faults alternate, for the sake of the machine."""
    longest, *others = CASES
    names = list({case.provider: None for case in others})
    waiting = [[case for case in others if case.provider == name] for name in names]
    shifted = [cases[2 * place :] + cases[: 2 * place] for place, cases in enumerate(waiting)]
    return [longest, *(case for one_of_each in zip_longest(*shifted) for case in one_of_each if case is not None)]
