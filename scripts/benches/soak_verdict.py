"""Whether a figure stayed flat: what is known of each figure, and a line fitted to the second half of a run. Pure."""

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct

MEMORY_LIMIT_MB, MEMORY_LIMIT_SHARE = 1.0, 0.01  # the larger of both; an allocator's own steps are about as large
COUNT_LIMIT = 1.0  # half of it would be a half of a descriptor
CERTAINTY = 3.0  # standard errors, beyond which a rise is no chance: figures of calls that come and go fluctuate
_FEWEST = 4  # samples, to tell of a rise at all


class Figure(Struct, frozen=True):
    """One thing that is sampled. `returns`: when there are no calls, it is exactly what it was before there were any.

    PSS is shown and not judged: it also rises when somebody else, who had the same libraries in memory, ends.
    """

    key: str
    title: str
    unit: Literal["MB", ""] = ""
    returns: bool = True
    judged: bool = True
    grows: bool = False  # by design, with the number of calls


FIGURES = (
    Figure("dialogd_pss", "dialogd, memory (PSS)", "MB", returns=False, judged=False),
    Figure("dialogd_rss", "dialogd, memory (RSS)", "MB", returns=False),
    Figure("dialogd_anonymous", "dialogd, memory of no file", "MB", returns=False),
    Figure("template_pss", "template, memory (PSS)", "MB", returns=False, judged=False),
    Figure("template_rss", "template, memory (RSS)", "MB", returns=False),
    Figure("template_anonymous", "template, memory of no file", "MB", returns=False),
    Figure("worker_pss", "a worker, memory (PSS, mean)", "MB", judged=False),
    Figure("worker_rss", "a worker, memory (RSS, mean)", "MB"),
    Figure("worker_private", "a worker, memory of its own (mean)", "MB"),
    Figure("dialogd_fds", "dialogd, descriptors"),
    Figure("template_fds", "template, descriptors"),
    Figure("dialogd_threads", "dialogd, threads", returns=False),  # idle ones stay for a while
    Figure("processes", "processes, all of them"),
    Figure("tasks", "dialogd, tasks of trio"),
    Figure("calls", "calls known"),
    Figure("connections", "connections"),
    Figure("store_rows", "rows in the store"),
    Figure("store_mb", "the store's files", "MB", returns=False),
    Figure("groups", "control groups"),
    Figure("files", "other files in state and runtime directories"),
    Figure("event_logs", "event logs, one for each call", returns=False, grows=True),
)


class Sample(Struct, frozen=True):
    """All figures at one time, in seconds since the run began."""

    at_s: float
    figures: Mapping[str, float]


class Rise(Struct, frozen=True):
    """How much a figure rose from the first of some samples to the last, by a fitted line, and how sure that is."""

    value: float
    error: float  # the standard one


class Row(Struct, frozen=True):
    """One figure of one run. `verdict` is "flat", "grows", "did not come back", or none of these."""

    title: str
    unit: str
    idle: float
    early: float
    late: float
    rise: float
    limit: float
    after: float
    verdict: str

    @property
    def good(self) -> bool:
        """Whether it is as it should be."""
        return self.verdict not in ("grows", "did not come back")


def fit(points: Sequence[tuple[float, float]]) -> Rise:
    """Return the rise of a line fitted by least squares; none where there are too few points."""
    count = len(points)
    if count < _FEWEST:
        return Rise(0.0, 0.0)
    mean_x, mean_y = (sum(values) / count for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    scatter = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points) / (count - 2)
    duration = points[-1][0] - points[0][0]
    return Rise(slope * duration, float((scatter / spread) ** 0.5) * duration)


def judge(figure: Figure, idle: Sample, samples: Sequence[Sample], after: Sample) -> Row:
    """Return how a figure did in a run: `idle` before its calls, `after` them, and all that was seen meanwhile."""
    half = samples[len(samples) // 2 :]
    points = [(sample.at_s, sample.figures[figure.key]) for sample in half]
    before, now = idle.figures[figure.key], after.figures[figure.key]
    early = points[0][1] if points else before
    rise, limit = fit(points), _limit(figure, early)
    if figure.grows:
        verdict = "one a call"
    elif not figure.judged:
        verdict = "-"
    elif rise.value > limit and rise.value > CERTAINTY * rise.error:
        verdict = "grows"
    elif figure.returns and now != before:
        verdict = "did not come back"
    else:
        verdict = "flat"
    late = points[-1][1] if points else now
    return Row(figure.title, figure.unit, before, early, late, rise.value, limit, now, verdict)


def _limit(figure: Figure, early: float) -> float:
    return max(MEMORY_LIMIT_MB, MEMORY_LIMIT_SHARE * early) if figure.unit else COUNT_LIMIT
