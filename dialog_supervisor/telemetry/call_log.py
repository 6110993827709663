"""One call's event log: what it takes, what it leaves out, and how much. No I/O: `event_logs.py` writes."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio

from dialog_supervisor.steps import Step
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.telemetry.discretion import discreet, discreet_step
from protocol.messages import Command, Event, Heartbeat, Media, Post, Trace, Turn
from protocol.record import Entry, Header, plain

WAITING_BYTES = 256 << 10  # of one call, until they are written; a second of a busy one takes less than 10 kB
_TEXT_CHARACTERS = 16_384  # of one value; a whole conversation may be in one
_NOT_LOGGED = (Media, Post, Heartbeat, Trace, Turn)  # audio and pulse; what an agent tells is a step

_encoder = msgspec.json.Encoder()


class CallLog:
    """What happened in one call, as lines that wait to be written; those that do not fit are lost, and counted.

    `counts` are the line's, of which the frames are told once a second; `filled` is called when there is something to write.
    """

    def __init__(
        self,
        file: Path,
        header: Header,
        counts: Mapping[str, int],
        filled: Callable[[], None],
        *,
        size_limit: int,
    ) -> None:
        self.file = file  # begins with `header`, whenever it is empty
        self.closed = False
        self._gap = 0  # entries lost since the last that was written
        self._full = False
        self._transcripts = header.transcripts
        self._counts = counts
        self._told: Counter[str] = Counter()
        self._filled = filled
        self._left = size_limit
        self._began_at = trio.current_time()
        self._waiting = bytearray()
        self._entries = 0  # that wait
        self.header = _encoder.encode(header) + b"\n"

    def begin_at(self, began_at: float) -> None:
        """Count times from when the call began; what was counted of its audio until now is no news."""
        self._began_at = began_at
        self._told.update(self._counts)

    def step(self, step: Step) -> None:
        """Take a step of the call's."""
        text, fields = step.text, dict[str, Any](step.fields)
        if not self._transcripts:
            text, fields = discreet_step(step.kind, text, step.fields)
        self._enter(Entry(step.t, step=step.kind, text=text, fields=fields))

    def told(self, event: Event, pid: int) -> None:
        """Take an event that a worker is told; audio is left out."""
        if not isinstance(event, _NOT_LOGGED):
            self._enter(Entry(self._now(), pid, event=type(event).__name__, fields=self._fields(event)))

    def asked(self, command: Command, pid: int) -> None:
        """Take a command of a worker's; audio and heartbeats are left out, and what is a step."""
        if not isinstance(command, _NOT_LOGGED):
            self._enter(Entry(self._now(), pid, command=type(command).__name__, fields=self._fields(command)))

    def tick(self) -> None:
        """Tell how many frames there were since the last time, and what was lost."""
        frames = {name: self._counts.get(name, 0) - self._told[name] for name in ("frames_in", "frames_out")}
        if any(frames.values()):
            self._told.update(frames)
            self._enter(
                Entry(self._now(), step="media", fields={name.removeprefix("frames_"): n for name, n in frames.items()})
            )

    def close(self) -> None:
        """The call has ended."""
        self.tick()
        self.closed = True
        self._filled()

    def take(self) -> tuple[bytes, int]:
        """Return what is to be written next, and how many entries that is; it is kept no longer."""
        if self._gap:
            self._put(_encoder.encode(Entry(self._now(), step="lost", text=f"{self._gap} entries, which came too fast")))
            self._gap = 0
        waiting, entries = bytes(self._waiting), self._entries
        self._waiting, self._entries = bytearray(), 0
        return waiting, entries

    def _now(self) -> float:
        return round(trio.current_time() - self._began_at, 4)

    def _fields(self, message: Event | Command) -> dict[str, Any]:
        fields: dict[str, Any] = plain(message)
        return fields if self._transcripts else discreet(fields)

    def _enter(self, entry: Entry) -> None:
        line = _encoder.encode(msgspec.structs.replace(entry, text=_clipped(entry.text), fields=_clipped(entry.fields)))
        if self._full or len(line) >= self._left:
            metrics.EVENTS_LOST.inc()
            self._fill_up()
        elif len(self._waiting) + len(line) >= WAITING_BYTES:
            metrics.EVENTS_LOST.inc()
            self._gap += 1
        else:
            self._put(line)

    def _fill_up(self) -> None:
        if not self._full:
            self._full = True
            self._put(
                _encoder.encode(Entry(self._now(), step="lost", text="all that follows: events.size_limit is reached"))
            )

    def _put(self, line: bytes) -> None:
        self._waiting += line + b"\n"
        self._left -= len(line) + 1
        self._entries += 1


def _clipped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _clipped(held) for name, held in value.items()}
    if isinstance(value, str) and len(value) > _TEXT_CHARACTERS:
        return value[:_TEXT_CHARACTERS] + "…"
    return value
