"""The canary's rules, without I/O: which calls new code gets while it is on trial, and when it is promoted or rolled back.

New code is compared with the old over the same time, by calls that crashed and by turns that failed. It is rolled back when
its rate of either exceeds the old code's by the margin, and this is neither one call's doing nor likely to be chance:

- the bad events are of at least `CALLS_BELIEVED` calls: one caller may have met a fault that the old code has too;
- so many of them would be seen with a probability under `IMPROBABLE`, if the new code were worse by the margin and no more
  (the upper tail of the binomial distribution). Two calls of two that crash are enough beside an old generation without a
  fault, or without a call; beside one that crashes as often itself, nothing is.

It is promoted when enough calls of it went well, and both rates are within the margin. A rate above it that may still be
chance delays this: the next calls decide.
"""

import math
from collections.abc import Iterator
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from dialog_supervisor.tally import Figures

CALLS_BELIEVED = 2
IMPROBABLE = 0.01  # the figures are looked at after each event, which makes a false alarm a few times as probable
_NEGLIGIBLE = 1e-6  # of a sum


class Rules(Struct, frozen=True):
    """How code is tried: the `canary` keys of `[agent]`."""

    share: int
    calls: int
    margin: float


class Trial(Struct):
    """What has to be known of a generation on trial beside the tallies. `before`: the old one's figures to count from."""

    generation: str
    rules: Rules
    before: Figures = Figures()
    due: int = 0  # in hundredths of a call

    def takes_next(self) -> bool:
        """Whether the next call is the canary's: `share` of a hundred are, as evenly spread as they can be."""
        self.due += self.rules.share
        if self.due < 100:
            return False
        self.due -= 100
        return True

    def verdict(self, new: Figures, old: Figures) -> "Verdict | None":
        """Return how the trial ends, or None when it goes on."""
        return judge(new, old.since(self.before), self.rules)

    def describe(self, new: Figures, old: Figures) -> dict[str, Any]:
        """Return the rules, and the figures of both generations since the trial began."""
        return asdict(self.rules) | {"new": asdict(new), "old": asdict(old.since(self.before))}


class Verdict(Struct, frozen=True):
    """The trial is over."""

    promoted: bool
    reason: str


class _Rate(Struct, frozen=True):
    """How often something bad happened: `bad` times `of` so many, in so many `calls`."""

    what: str
    bad: int
    of: int
    calls: int

    @property
    def value(self) -> float:
        return self.bad / self.of if self.of else 0.0

    def __str__(self) -> str:
        return f"{self.bad} of {self.of} {self.what}"


def judge(new: Figures, old: Figures, rules: Rules) -> Verdict | None:
    """Return how the trial ends, or None when it goes on. `new` and `old` are of the same time."""
    within = True
    for mine, theirs in zip(_rates(new), _rates(old), strict=True):
        tolerated = theirs.value + rules.margin / 100
        if mine.value > tolerated:
            if mine.calls >= CALLS_BELIEVED and chance(mine.bad, mine.of, tolerated) < IMPROBABLE:
                return Verdict(False, f"{mine}, and {theirs} on the old code (agent.canary_margin = {rules.margin:g})")
            within = False
    if within and new.well >= rules.calls:
        return Verdict(True, f"{new.well} calls of it went well (agent.canary_calls = {rules.calls})")
    return None


def _rates(figures: Figures) -> Iterator[_Rate]:
    yield _Rate("calls crashed", figures.crashed, figures.begun, figures.crashed)
    yield _Rate("turns failed", figures.failed_turns, figures.turns, figures.failing)


def chance(bad: int, of: int, rate: float) -> float:
    """Return how probable it is that at least `bad` of so many are bad, when each is at this rate, lower than `bad / of`."""
    if not 0 < rate < 1:
        return float(rate >= 1 or bad == 0)
    ways = math.lgamma(of + 1) - math.lgamma(bad + 1) - math.lgamma(of - bad + 1)
    term = total = math.exp(ways + bad * math.log(rate) + (of - bad) * math.log1p(-rate))
    for count in range(bad, of):
        term *= (of - count) / (count + 1) * rate / (1 - rate)
        total += term
        if term < total * _NEGLIGIBLE:
            break
    return min(total, 1.0)
