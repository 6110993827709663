"""A call's steps, one by one, for whoever watches it: those that begin late are told the last of what was."""

from collections import deque

import trio
from msgspec import Struct

STEPS_KEPT = 512  # of the conversation's steps, for whoever begins to watch later
TEXT_KEPT = 256 << 10  # characters of all of them: a worker's traces must not fill the supervisor's memory
_WATCHER_STEPS = 1024  # not yet read by a watcher, who then loses the call


class Step(Struct, frozen=True):
    """Something that happened in a call, for whoever watches it. `t` is in seconds since the call began."""

    t: float
    kind: str
    text: str
    fields: dict[str, str] = {}


class Steps:
    """What happened in a call, and who is being told."""

    def __init__(self) -> None:
        self._began_at = trio.current_time()
        self._kept: deque[Step] = deque()
        self._kept_size = 0
        self._watchers: set[trio.MemorySendChannel[Step]] = set()

    def add(self, kind: str, text: str = "", fields: dict[str, str] | None = None) -> None:
        """Enter a step and tell every watcher; one who does not read is told no more."""
        step = Step(round(trio.current_time() - self._began_at, 4), kind, text, fields or {})
        self._keep(step)
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

    def watch(self) -> trio.MemoryReceiveChannel[Step]:
        """Return a channel of the steps, from those still remembered on; it ends with the call."""
        watcher, steps = trio.open_memory_channel[Step](_WATCHER_STEPS)
        for step in self._kept:
            watcher.send_nowait(step)
        self._watchers.add(watcher)
        return steps

    def close(self) -> None:
        """The call has ended."""
        for watcher in self._watchers:
            watcher.close()


def _size(step: Step) -> int:
    return len(step.text) + sum(len(name) + len(value) for name, value in step.fields.items())
