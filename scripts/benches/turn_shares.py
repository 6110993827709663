"""What is measured of a turn: our own shares of it, each from one date to another, both taken outside of dialogd. No I/O."""

import math
from collections.abc import Hashable, Sequence
from enum import Enum

from msgspec import Struct


class Share(Enum):
    """A way through our processes, how many milliseconds it may take at p99, and from where to where it leads."""

    REQUEST = (3.0, "final transcript from the ear -> request at the model, its last byte")
    SENTENCE = (3.0, "first sentence from the model -> its text at the voice")
    AUDIO = (3.0, "audio from the voice -> the carrier's socket")
    CLEAR = (5.0, "caller's speech from the ear -> `clear` at the carrier")

    def __init__(self, goal_ms: float, meaning: str) -> None:
        self.goal_ms = goal_ms
        self.meaning = meaning


class Figure(Struct, frozen=True):
    """Percentiles in milliseconds of `count` measurements; NaN of none."""

    count: int
    p50: float
    p95: float
    p99: float
    worst: float


def figure(seconds: Sequence[float]) -> Figure:
    """Sum measurements up. A percentile is a measured value: so many per cent are not above it."""
    ordered = sorted(seconds) or [math.nan]
    p50, p95, p99, worst = (
        round(ordered[max(0, math.ceil(len(ordered) * share) - 1)] * 1000, 3) for share in (0.5, 0.95, 0.99, 1.0)
    )
    return Figure(len(seconds), p50, p95, p99, worst)


class Shares:
    """Pairs the dates of what left the providers with the dates of what came of it."""

    def __init__(self) -> None:
        self._begun: dict[tuple[Share, Hashable], float] = {}
        self._ambiguous: set[tuple[Share, Hashable]] = set()
        self.taken: dict[Share, list[float]] = {share: [] for share in Share}

    def begin(self, share: Share, key: Hashable, at: float) -> None:
        """Something left for us. What begins twice under a key that nothing came of cannot be told apart, and counts not."""
        if (share, key) in self._begun:
            self._ambiguous.add((share, key))
        self._begun[share, key] = at

    def end(self, share: Share, key: Hashable, at: float) -> bool:
        """What came of it has arrived. Return False when nothing had begun under this key."""
        began_at = self._begun.pop((share, key), None)
        if began_at is None:
            return False
        if (share, key) in self._ambiguous:
            self._ambiguous.discard((share, key))
            return False
        self.taken[share].append(at - began_at)
        return True

    def forget(self, share: Share, key: Hashable) -> None:
        """Nothing need come of it any more, as the caller interrupted."""
        self._begun.pop((share, key), None)

    def missing(self, share: Share) -> int:
        """Return how many have begun of which nothing came."""
        return sum(1 for one, _ in self._begun if one is share)

    def figure(self, share: Share) -> Figure:
        """Sum a share up."""
        return figure(self.taken[share])
