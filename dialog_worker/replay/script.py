"""What an event log has to play to an agent: what its caller did, when, and what came of it then. No I/O."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

from msgspec import Struct

from dialog_worker.replay.exchanges import Happening, asked_for, without_bookkeeping
from dialog_worker.stt.base import Final, SpeechEnded, SpeechStarted
from protocol.messages import Dtmf, Event, Failure, Metadata, Request, StreamingStarted
from protocol.record import Entry, event_of

_NOT_PLAYED = {"MessageDispatched", "Restored", "Reply", "Error", "Shutdown"}  # the line tells of these by itself
_REQUESTS = {kind.__name__ for kind in Request.__subclasses__()}
_KEPT_STEPS = {"heard", "saying", "said", "tool", "turn"}

Played: TypeAlias = SpeechStarted | Final | SpeechEnded | Event
Moment: TypeAlias = Literal["calm", "speaking", "cue"]


class Cue(Struct, frozen=True):
    """Something to tell the agent `gap_s` after a moment: when all was said and done, it began to speak, or the last cue."""

    what: Played
    after: Moment
    gap_s: float


class Done(Struct, frozen=True):
    """What a tool did in the call: the requests that it made of the line, as kind and fields, and what it returned."""

    requests: list[tuple[str, dict[str, Any]]]
    result: str


class Script(Struct, frozen=True):
    """What is played, what happened then, how each kind of request was answered, and what each call of a tool did."""

    metadata: Metadata
    cues: list[Cue]
    happened: list[Happening]
    failures: dict[str, list[Failure | None]]
    done: dict[tuple[str, str], list[Done]]


class Progress:
    """Whether answers are still to come, as the happenings tell."""

    def __init__(self) -> None:
        self._asked = 0
        self._turned = 0
        self.saying: set[str] = set()

    def take(self, happening: Happening) -> None:
        """Something happened."""
        uuid = happening.fields.get("uuid", "")
        match happening.kind:
            case "heard":
                self._asked += 1
            case "turn":
                self._turned += 1
            case "saying":
                self.saying.add(uuid)
            case "said":
                self.saying.discard(uuid)

    @property
    def calm(self) -> bool:
        """Whether nothing is being thought or said."""
        return self._asked <= self._turned and not self.saying


def script_of(entries: Sequence[Entry]) -> Script:
    """Return what an event log has to play. Raises `NotARecord` where it has an event that is not known here."""
    happened = [happening for entry in entries if (happening := happening_of(entry)) is not None]
    first = next((event_of(entry) for entry in entries if entry.event == "Metadata"), None)
    metadata = first if isinstance(first, Metadata) else Metadata("", "", "", "")
    return Script(metadata, list(_cues(entries)), happened, _failures(entries), _done(entries))


def _cues(entries: Sequence[Entry]) -> Iterator[Cue]:
    progress = Progress()
    introduced: list[Event] = []
    cue_at = spoke_at = calm_at = 0.0
    for entry in entries:
        what, was_calm = _what(entry), progress.calm
        if isinstance(what, Metadata | StreamingStarted):
            if what in introduced:  # another worker was told of it again
                continue
            introduced.append(what)
        if what is not None:
            after: Moment = "calm" if was_calm else "speaking" if progress.saying and spoke_at >= cue_at else "cue"
            since = {"calm": max(calm_at, cue_at), "speaking": spoke_at, "cue": cue_at}[after]
            yield Cue(what, after, max(0.0, round(entry.t - since, 4)))
            cue_at = entry.t
        if (happening := happening_of(entry)) is not None:
            if happening.kind == "saying" and not progress.saying:
                spoke_at = entry.t
            progress.take(happening)
            if progress.calm and not was_calm:
                calm_at = entry.t


def _what(entry: Entry) -> Played | None:
    """Return what of an entry is to be told to the agent."""
    match entry.step:
        case "heard":
            return Final(entry.text) if entry.text else None
        case "speech_started":
            return SpeechStarted()
        case "speech_ended":
            return SpeechEnded()
    return event_of(entry) if entry.event and entry.event not in _NOT_PLAYED else None


def happening_of(entry: Entry) -> Happening | None:
    """Return what an entry tells of the conversation, if it does."""
    if entry.step in _KEPT_STEPS:
        return Happening(entry.step, entry.text, entry.fields)
    if entry.event == "Dtmf" and isinstance(event := event_of(entry), Dtmf):
        return pressed(event)
    if entry.command in _REQUESTS:
        return Happening("request", asked_for(entry.command, entry.fields))
    return None


def pressed(event: Dtmf) -> Happening:
    """Return how a key that the caller pressed counts."""
    return Happening("pressed", f"(presses {event.digit})")


def _failures(entries: Sequence[Entry]) -> dict[str, list[Failure | None]]:
    """Return for each kind of request how each of them was answered; None stands for success."""
    replies = {}
    for entry in entries:
        if entry.event == "Reply":
            reply = event_of(entry)
            replies[entry.pid, entry.fields["id"]] = getattr(reply, "failure", None)
    answers: dict[str, list[Failure | None]] = defaultdict(list)
    for entry in entries:
        if entry.command in _REQUESTS:
            answers[entry.command].append(replies.get((entry.pid, entry.fields.get("id"))))
    return dict(answers)


def _done(entries: Sequence[Entry]) -> dict[tuple[str, str], list[Done]]:
    """Return what each tool did, by its name and arguments. What was asked of the line since the last tool, it asked."""
    done: dict[tuple[str, str], list[Done]] = defaultdict(list)
    requests: list[tuple[str, dict[str, Any]]] = []
    for entry in entries:
        if entry.command in _REQUESTS:
            requests.append((entry.command, without_bookkeeping(entry.fields)))
        elif entry.step == "tool":
            called = entry.fields.get("name", ""), canonical(entry.fields.get("arguments", ""))
            done[called].append(Done(requests, entry.fields.get("result", "")))
        if entry.step in ("tool", "heard", "turn"):
            requests = []
    return dict(done)


def canonical(arguments: str) -> str:
    """Return a tool's arguments so that the same ones are written in the same way."""
    try:
        return json.dumps(json.loads(arguments or "{}"), sort_keys=True)
    except ValueError:
        return arguments
