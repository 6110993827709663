"""The figures that are read off the calls themselves when Prometheus asks, so that they are right by construction."""

import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from dialog_supervisor.call import Call
from dialog_supervisor.telemetry import metrics

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_FRAMES = {"frames_in": "in", "frames_out": "out"}  # of a leg's counts, what is no oddity
_DROPPED = "dropped"  # for want of a worker that reads
_NO_GENERATIONS = {"current": 0, "canary": 0, "retiring": 0, "previous": 0, "starting": 0}


class Observed(Protocol):
    """What the figures are read off: the supervisor."""

    def status(self) -> dict[str, Any]:
        """Return dialogd's state in figures, as `dialogctl status` shows it."""

    def calls(self) -> Sequence[Call]:
        """Return the calls that have not ended."""


class Figures:
    """All figures of one dialogd. Of a call that has ended, its counts stay in the sums."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed
        self._past: Counter[str] = Counter()

    def ended(self, call: Call) -> None:
        """A call is over, and is not among the supervisor's any more."""
        self._past.update(_counts(call))
        metrics.CALLS_ENDED.labels(call.ended_by, "yes" if call.fallback else "no").inc()
        metrics.CALL_SECONDS.observe(call.seconds)

    def render(self) -> str:
        """Return everything in Prometheus' text format."""
        return generate_latest(self).decode()

    def collect(self) -> Iterator[Metric]:
        """Yield every family, as a registry of Prometheus' client does."""
        yield from metrics.REGISTRY.collect()
        status = self._observed.status()
        yield from self._now(status)
        yield from self._counted(status)

    def _now(self, status: Mapping[str, Any]) -> Iterator[Metric]:
        yield _gauges("dialog_calls", "Calls, by state.", "state", status["states"])
        generations = _NO_GENERATIONS | Counter(one["state"] for one in status["generations"])
        yield _gauges("dialog_generations", "Versions of the agent's code, by state.", "state", generations)
        yield _gauge("dialog_workers", "Worker processes alive.", status["workers"])
        yield _gauge("dialog_connections", "Connections to the public listener.", status["connections"])
        yield _gauge("dialog_tasks", "Tasks of dialogd's event loop.", status["tasks"])
        yield _gauge("dialog_accepting", "1 while calls are taken.", int(status["accepting"]))
        yield _gauge("dialog_store_ok", "1 while calls can be kept for another dialogd.", int(status["store"]["ok"]))
        yield _gauge("dialog_max_calls", "Calls that there may be at a time (calls.max_calls).", status["max_calls"])
        waiting = max((call.worker.link.waiting_bytes for call in self._observed.calls()), default=0)
        yield _gauge("dialog_pipe_outbox_bytes", "What waits to be read by the worker that is most behind.", waiting)
        build = GaugeMetricFamily("dialog_build_info", "What runs here.", labels=["version", "python"])
        build.add_metric([status["version"], platform.python_version()], 1)
        yield build

    def _counted(self, status: Mapping[str, Any]) -> Iterator[Metric]:
        counts = self._past.copy()
        for call in self._observed.calls():
            counts.update(_counts(call))
        frames = {direction: counts.pop(name, 0) for name, direction in _FRAMES.items()}
        yield _counters("dialog_frames", "Pieces of audio from callers and to them.", "direction", frames)
        dropped = counts.pop(_DROPPED, 0)
        yield CounterMetricFamily("dialog_frames_dropped", "Callers' audio that a worker was too slow for.", dropped)
        yield _counters(
            "dialog_media_oddities", "What was odd on media sockets, as a call's counts have it.", "kind", counts
        )
        lost = status["store"]["lost"]
        yield CounterMetricFamily("dialog_store_lost", "Changes of calls that the store could not take.", lost)
        yield _counters("dialog_calls_refused", "Calls that were not taken, by reason.", "reason", status["refused"])


def _counts(call: Call) -> Counter[str]:
    return Counter(call.leg.counts) + Counter({_DROPPED: call.worker_leg.media_dropped})


def _gauge(name: str, meaning: str, value: int) -> Metric:
    return GaugeMetricFamily(name, meaning, value)


def _gauges(name: str, meaning: str, label: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _counters(name: str, meaning: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, meaning, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
