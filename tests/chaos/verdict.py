"""Whether a call went on as it should, and whether it was disturbed by what struck another. No I/O."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import Struct

from dialog_local.brain.understanding import weekday
from tests.chaos.caller import TWICE, Exchange
from tests.chaos.days import GREETING, answer

CONCERNED = 2  # exchanges: the one that the fault struck in, and the next
SILENCE_LIMIT_S = 4.0  # of a call that nothing struck, on a machine that ten callers keep busy
TAKES_OVER = "worker died in mid-call, and another takes over"
HANDED_OVER_S = 10.0  # until a caller whose agent cannot go on is told so
FALLBACK = "Please call again later."
HUNG_UP = "the caller hung up"

LogLine = dict[str, Any]


class Record(Struct, frozen=True):
    """A call as its caller, the carrier and dialogd's log have it. `struck_at`: when the fault struck, in its seconds."""

    exchanges: Sequence[Exchange]
    ended: str
    log: Sequence[LogLine] = ()
    struck_at: float = math.inf
    may_log: tuple[str, ...] = ()
    may_repeat: bool = False
    carrier_said: tuple[str, ...] = ()

    @property
    def concerned(self) -> Sequence[Exchange]:
        """The exchanges that the fault may show in."""
        since = [one for one in self.exchanges if one.answered_at is None or one.answered_at >= self.struck_at]
        return since[:CONCERNED] if self.struck_at < math.inf else ()

    @property
    def others(self) -> Sequence[Exchange]:
        """The exchanges that it must not show in."""
        return [one for one in self.exchanges if one not in self.concerned]

    @property
    def silence_s(self) -> float:
        """How long the caller heard nothing at most, while the fault could be noticed."""
        return max((one.silence_s for one in self.concerned), default=0.0)


def broken(record: Record) -> list[str]:
    """Return what did not go on as before in a call that was struck; nothing, when its conversation went on."""
    complaints = [complaint for one in record.concerned for complaint in _wrong(one, may_repeat=record.may_repeat)]
    if len(record.concerned) < CONCERNED:
        complaints.append(f"only {len(record.concerned)} questions could be asked from the fault on")
    if record.ended != HUNG_UP:
        complaints.append(f"the call ended: {record.ended}")
    return complaints + list(_forgotten(record))


def handed_over(record: Record) -> list[str]:
    """Return what is wrong with a call that could not go on, and whose caller was to be told so soon."""
    complaints = [] if record.carrier_said == (FALLBACK,) else [f"the carrier said {record.carrier_said}"]
    if record.silence_s > HANDED_OVER_S:
        complaints.append(f"{record.silence_s:.1f} s of silence")
    return complaints


def disturbed(record: Record) -> list[str]:
    """Return what was noticed in a call apart from what struck it."""
    complaints = [complaint for one in record.others for complaint in _wrong(one, may_repeat=False)]
    complaints += [f"{one.silence_s:.1f} s of silence" for one in record.others if one.silence_s > SILENCE_LIMIT_S]
    return complaints + list(_unexpected(record))


def _wrong(one: Exchange, *, may_repeat: bool) -> Iterator[str]:
    if one.answered_at is None:
        yield f"{one.day} was not answered ({one.heard_s:.1f} s heard of {one.expected_s:.1f})"
    elif one.heard_s > TWICE * one.expected_s:
        yield f"too much was said of {one.day} ({one.heard_s:.1f} s instead of {one.expected_s:.1f})"
    if one.times > 1 and not may_repeat:
        yield f"{one.day} had to be asked {one.times} times"


def _forgotten(record: Record) -> Iterator[str]:
    """Compare the agent's memory with what was said: each question and each answer once, in order."""
    told = [line["text"] for line in record.log if line["event"] == "history"]
    if not told:
        yield "the agent left no history"
        return
    history = json.loads(told[-1])
    once = _without_repetitions if record.may_repeat else list
    asked = [weekday(entry["content"]) for entry in history if entry["role"] == "user"]
    said = [entry["content"] for entry in history if entry["role"] == "assistant" and entry.get("content")]
    if once(asked) != (days := [one.day for one in record.exchanges]):
        yield f"it remembers the questions {asked} instead of {days}"
    if once(said) != (right := [GREETING, *map(answer, days)]):
        yield f"it remembers to have said {said} instead of {right}"


def _without_repetitions(told: Sequence[str | None]) -> list[str | None]:
    """Leave out what is the same as what was before it: a question that was asked again may have been heard both times."""
    return [one for one, before in zip(told, (object(), *told), strict=False) if one != before]


def _unexpected(record: Record) -> Iterator[str]:
    """Yield what the log warns of in this call and should not."""
    yield from unexpected(record.log, record.may_log)
    dropped = sum(line.get("media_dropped", 0) for line in record.log if line["event"] == "call ended")
    if dropped and "worker is behind" not in record.may_log:
        yield f"{dropped} frames were dropped"
    restarts = sum(line["event"] == TAKES_OVER for line in record.log)
    if restarts and TAKES_OVER not in record.may_log:
        yield f"{restarts} workers were replaced"


def unexpected(log: Sequence[LogLine], permitted: tuple[str, ...]) -> Iterator[str]:
    """Yield the warnings and errors in a log that do not begin as is permitted."""
    for line in log:
        if line.get("level") in ("warning", "error") and not line["event"].startswith(permitted or ("\0",)):
            yield f"logged: {line['event']}"
