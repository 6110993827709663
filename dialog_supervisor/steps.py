"""A call's steps, one by one, for whoever watches it: those that begin late are told the last of what was."""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import trio
from msgspec import Struct

from protocol.messages import Command, Event, Trace

STEPS_KEPT = 512  # of the conversation's steps, for whoever begins to watch later
TEXT_KEPT = 256 << 10  # characters of all of them: a worker's traces must not fill the supervisor's memory
OWN_STEPS = {"state", "worker", "request", "turn", "log", "media", "lost"}  # dialogd's kinds, with no speech in their texts
_WATCHER_STEPS = 1024  # not yet read by a watcher, who then loses the call
_NOT_SHOWN = ("event", "call", "timestamp", "exc_info")  # of a line of the log: it has these otherwise


class Step(Struct, frozen=True):
    """Something that happened in a call, for whoever watches it. `t` is in seconds since the call began."""

    t: float
    kind: str
    text: str
    fields: dict[str, str] = {}


class EventLog(Protocol):
    """What outlives the call: its event log."""

    def begin_at(self, began_at: float) -> None:
        """Count times from then, and all else from now."""

    def step(self, step: Step) -> None:
        """Take a step."""

    def told(self, event: Event, pid: int) -> None:
        """Take an event that a worker is told."""

    def asked(self, command: Command, pid: int) -> None:
        """Take a command of a worker's."""

    def close(self) -> None:
        """The call has ended."""


class Steps:
    """What happened in a call, and who is being told: watchers, and the event log if there is one."""

    def __init__(self) -> None:
        self._log: EventLog | None = None
        self._began_at = trio.current_time()
        self._kept: deque[Step] = deque()
        self._kept_size = 0
        self._watchers: set[trio.MemorySendChannel[Step]] = set()

    @property
    def kept(self) -> tuple[Step, ...]:
        """The last steps, for whoever comes later."""
        return tuple(self._kept)

    def keep_in(self, log: EventLog | None) -> None:
        """Have the call's event log told too, if it has one, by the same clock."""
        self._log = log
        if log is not None:
            log.begin_at(self._began_at)

    def take_over(self, began_at: float, kept: Iterable[Step]) -> None:
        """Go on with a call that began then in another process, where its last steps were these."""
        self._began_at = began_at
        self.keep_in(self._log)
        self._kept.clear()
        self._kept_size = 0
        for step in kept:
            self._keep(step)

    def add(self, kind: str, text: str = "", fields: dict[str, str] | None = None) -> None:
        """Enter a step and tell every watcher; one who does not read is told no more."""
        step = Step(round(trio.current_time() - self._began_at, 4), kind, text, fields or {})
        self._keep(step)
        if self._log is not None:
            self._log.step(step)
        for watcher in tuple(self._watchers):
            try:
                watcher.send_nowait(step)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._watchers.discard(watcher)
                watcher.close()

    def _keep(self, step: Step) -> None:
        self._kept.append(step)
        self._kept_size += _size(step)
        while len(self._kept) > STEPS_KEPT or (self._kept_size > TEXT_KEPT and len(self._kept) > 1):
            self._kept_size -= _size(self._kept.popleft())

    def traced(self, trace: Trace) -> None:
        """Enter what an agent tells, which does not pass for what dialogd tells."""
        kind = f"agent.{trace.kind}" if trace.kind in OWN_STEPS else trace.kind
        self.add(kind, trace.text, trace.fields)

    def logged(self, line: Mapping[str, Any]) -> None:
        """Enter a line of the process's log that is about this call; what agents log and print is there too."""
        fields = {name: str(value) for name, value in line.items() if name not in _NOT_SHOWN}
        self.add("log", str(line.get("event", "")), fields)

    def told(self, event: Event, pid: int) -> None:
        """A worker is told an event; only the event log wants to know."""
        if self._log is not None:
            self._log.told(event, pid)

    def asked(self, command: Command, pid: int) -> None:
        """A worker has sent a command; only the event log wants to know."""
        if self._log is not None:
            self._log.asked(command, pid)

    def watch(self, *, follow: bool = True) -> trio.MemoryReceiveChannel[Step]:
        """Return a channel of the steps, from those still remembered on; it ends with the call, or with those."""
        watcher, steps = trio.open_memory_channel[Step](_WATCHER_STEPS)
        for step in self._kept:
            watcher.send_nowait(step)
        if follow:
            self._watchers.add(watcher)
        else:
            watcher.close()
        return steps

    def close(self) -> None:
        """The call has ended."""
        for watcher in self._watchers:
            watcher.close()
        if self._log is not None:
            self._log.close()


def _size(step: Step) -> int:
    return len(step.text) + sum(len(name) + len(value) for name, value in step.fields.items())
