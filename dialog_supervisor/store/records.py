"""What the store has of a call, and what of it holds when the dialogd that wrote it has died. No I/O.

Times are on the clock of the process that wrote them, and are only ever subtracted from one another: whatever the next
process's clock says, or the machine's does meanwhile, makes no difference.
"""

from collections.abc import Iterable, Iterator

from msgspec import Struct
from msgspec.structs import replace

from dialog_supervisor.carriers.base import Unsettled
from dialog_supervisor.carriers.playout import OnTheWay
from dialog_supervisor.recovery import CallState
from protocol.messages import MessageDispatched


class Record(Struct, frozen=True, kw_only=True):
    """A call as it was at `at`: what its next worker has to know, on which code it ran, and for how long it had lasted.

    `fallback`: its conversation is over, but its caller has yet to be given the fallback.
    """

    at: float
    state: CallState
    generation: str
    age_s: float
    unsettled: Unsettled = Unsettled()
    fallback: bool = False


class Line(Struct, frozen=True):
    """What a caller was still to hear at `at`, in the order in which the carrier plays it, unless there was no stream."""

    at: float
    on_the_way: tuple[OnTheWay, ...] = ()
    open: bool = True


def outlived(record: Record, line: Line, alive_at: float) -> Record:
    """Return a call as its supervisor left it, which was last known to be alive at `alive_at`.

    What the caller was hearing broke off then, and is told as it is when a line is lost.
    """
    passed_s = max(0.0, alive_at - record.at)
    heard_ms = round(1000 * max(0.0, alive_at - line.at)) if line.open else 0
    known = {report.uuid for report in record.state.reports}
    broken_off = tuple(report for report in _broken_off(line.on_the_way, heard_ms) if report.uuid not in known)
    state = replace(
        record.state,
        reports=record.state.reports + broken_off,
        deaths=tuple(ago + passed_s for ago in record.state.deaths),
    )
    return replace(record, at=record.at + passed_s, state=state, age_s=record.age_s + passed_s)


def _broken_off(on_the_way: Iterable[OnTheWay], heard_ms: int) -> Iterator[MessageDispatched]:
    for utterance in on_the_way:
        more = min(heard_ms, utterance.total_ms - utterance.played_ms)
        heard_ms -= more
        played_ms = utterance.played_ms + more
        whole = utterance.done and played_ms >= utterance.total_ms
        yield MessageDispatched(utterance.uuid, played_ms, utterance.total_ms, interrupted=not whole)


def resumed(record: Record, at: float) -> Record:
    """Return what is to be kept of a call while it is taken up, at `at`, in case that goes wrong too: one death more."""
    return replace(record, at=at, state=replace(record.state, deaths=(*record.state.deaths, 0.0)))
