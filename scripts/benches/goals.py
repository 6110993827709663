"""What is asked of the figures, and whether they give it."""

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum

from msgspec import Struct

from scripts.benches.results import Figures


class Goal(Struct, frozen=True):
    """A figure must not be above this; of a load, at this number of calls."""

    figure: str
    at_most: float
    calls: int = 0

    def __str__(self) -> str:
        at = f" at {self.calls}" if self.calls else ""
        return f"{self.at_most:g}{at}"


class Verdict(Enum):
    """Whether a goal is met."""

    MET = "✓"
    MISSED = "✗"


LOAD = (
    Goal("echo_ms.p50", 2, 40),
    Goal("echo_ms.p99", 6, 40),
    Goal("echo_ms.p99", 40, 100),
    Goal("frames_lost", 0, 40),
    Goal("frames_lost", 0, 100),
    Goal("failed", 0, 40),
    Goal("failed", 0, 100),
    Goal("webhook_ms.p99", 10, 40),
    Goal("first_echo_ms.p50", 8, 40),
    Goal("first_echo_ms.p99", 20, 40),
    Goal("cost.per_call_mb", 4.5, 40),
)
ONCE = (
    Goal("growth", 1.05),  # the cost of a call must not grow with their number; the twentieth is what runs differ by
    Goal("hello_ms.p50", 10),
    Goal("burst.failed", 0),
    Goal("burst.webhook_ms.max", 1000),
    Goal("idle.mb", 90),
    Goal("idle.core_percent", 0.5),
    Goal("openai.per_call_mb", 8),
)


def verdict(goal: Goal, found: Figures) -> Verdict | None:
    """Return whether a goal is met, or None when its figure was not measured."""
    if goal.figure not in found:
        return None
    return Verdict.MET if found[goal.figure] <= goal.at_most else Verdict.MISSED


def of_load(figure: str) -> list[Goal]:
    """Return what is asked of a figure of a load."""
    return [goal for goal in LOAD if goal.figure == figure]


def of_once(figure: str) -> Goal | None:
    """Return what is asked of a figure that does not depend on the number of calls."""
    return next((goal for goal in ONCE if goal.figure == figure), None)


def judged(loads: Mapping[int, Figures], once: Figures) -> Iterator[tuple[Goal, float, Verdict]]:
    """Yield every goal whose figure was measured, with the figure."""
    for goal, found in _with_figures(loads, once):
        if (answer := verdict(goal, found)) is not None:
            yield goal, found[goal.figure], answer


def _with_figures(loads: Mapping[int, Figures], once: Figures) -> Iterable[tuple[Goal, Figures]]:
    return [*((goal, loads.get(goal.calls, {})) for goal in LOAD), *((goal, once) for goal in ONCE)]


def growth(loads: Mapping[int, Figures], from_calls: int = 10) -> float | None:
    """Return the CPU for each call at the most calls, as a multiple of that at ten; None when they were not measured."""
    most, cost = max(loads, default=0), "cost.tree_cpu_ms"
    if most <= from_calls or not loads.get(from_calls, {}).get(cost) or cost not in loads[most]:
        return None
    return round(loads[most][cost] / loads[from_calls][cost], 2)
