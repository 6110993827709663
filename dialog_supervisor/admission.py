"""Whether another call is taken, and how many were not: what an operator wishes, and what there is room for."""

from collections import Counter
from typing import Any, Literal, get_args

_REFUSALS_KEPT = 1_000  # refused calls that are remembered, so that a webhook that is sent again counts once

Objection = Literal["draining", "max_calls", "memory", "load", "system"]  # the last: dialogd has no descriptors left
REMEDIES: dict[Objection, str] = {
    "draining": "dialogctl undrain, or wait until dialogd runs again",
    "max_calls": "raise calls.max_calls, or have another dialogd take calls too",
    "memory": "give the machine more memory, or have it do less beside; calls.min_free_memory is what must be left",
    "load": "give the machine more CPUs, or have it do less beside; calls.max_load is what it may have to do for each",
}


class Admission:
    """Decides whether another call is taken, by an operator's wish and by number, and counts those that are not."""

    def __init__(self, max_calls: int) -> None:
        self.started = False
        self.draining = False  # by dialogctl drain
        self.stopping = False
        self.refused: Counter[Objection] = Counter()
        self._max_calls = max_calls
        self._refusals: dict[str, None] = {}  # ids of calls, the oldest first

    @property
    def open(self) -> bool:
        """Whether calls are taken as long as there are not too many."""
        return self.started and not self.draining and not self.stopping

    def objection(self, calls: int) -> Objection | None:
        """Return why no other call is taken beside this many, or None when one is."""
        if not self.open:
            return "draining"
        return "max_calls" if calls >= self._max_calls else None

    def refuse(self, call_id: str, why: Objection) -> bool:
        """Count a refused call. Return False if it was refused before: carriers send a webhook again."""
        if call_id in self._refusals:
            return False
        self._refusals[call_id] = None
        if len(self._refusals) > _REFUSALS_KEPT:
            del self._refusals[next(iter(self._refusals))]
        self.refused[why] += 1
        return True

    def describe(self) -> dict[str, Any]:
        """Return it for `dialogctl status`."""
        return {
            "accepting": self.open,
            "draining": self.draining,
            "stopping": self.stopping,
            "max_calls": self._max_calls,
            "refused": {why: self.refused[why] for why in get_args(Objection)},
        }
