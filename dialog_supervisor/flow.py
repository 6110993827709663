"""How much a worker may say: beyond that its link is read more slowly, and one that goes on regardless is a flood.

And how often it is told what it misses: whoever is behind is not helped by many messages that say so.
"""

import math
from collections.abc import Callable

from protocol.framing import ProtocolError

MESSAGES_PER_S = 2_000  # a voice that is spoken in advance comes as a few hundred; more would keep other callers waiting
FLOOD_S = 5.0  # of as much as is read; whatever a worker may have had to say, it has been said by then
REMIND_EVERY_S = 1.0
_LOOK_EVERY = 200  # messages: the clock costs more than the count, and others wait no longer than these take


class Flood(ProtocolError):
    """A worker sends more than any conversation can need."""


class Flow:
    """Counts one worker's messages. No I/O; `clock` gives the time in seconds."""

    __slots__ = ("_calm_at", "_clock", "_count", "_counted_from")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._count = 0
        self._counted_from = self._calm_at = clock()

    def took(self) -> float:
        """Count a message, and return for how many seconds the next is to wait: 0, as a rule. Raises `Flood`."""
        self._count += 1
        if self._count < _LOOK_EVERY:
            return 0.0
        now, due = self._clock(), self._counted_from + _LOOK_EVERY / MESSAGES_PER_S
        self._count, self._counted_from = 0, max(now, due)
        if now >= due:
            self._calm_at = now
        elif now - self._calm_at >= FLOOD_S:
            raise Flood(f"it has sent {MESSAGES_PER_S} messages a second, and more, for {FLOOD_S:g} s")
        return max(0.0, due - now)


class Reminder:
    """Says when what happens again and again is to be told: at once, and then once a second. No I/O."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due_at = -math.inf

    def due(self) -> bool:
        """Return whether it is time to; the next is counted from now then."""
        now = self._clock()
        if now < self._due_at:
            return False
        self._due_at = now + REMIND_EVERY_S
        return True
