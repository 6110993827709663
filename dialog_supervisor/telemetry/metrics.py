"""The figures that are counted as things happen, for Prometheus; `figures.py` has those that are read off the calls.

No label has values without bound: no call's id, no number, no generation's name. All of it is this process's; a worker sends
what it knows over its pipe.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import prometheus_client
import trio
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

from dialog_supervisor.carriers.twilio import addresses
from dialog_supervisor.rhythm import next_beat
from protocol.messages import Turn

Party = Literal["caller", "agent", "operator", "dialogd"]
Cause = Literal["exit", "signal", "memory", "cpu", "processes", "hang", "protocol", "unread"]
Closed = Literal["max_connections", "descriptors"]
SwapResult = Literal["done", "failed"]
TrialVerdict = Literal["promoted", "rolled_back"]

_MS = 1000
_TURN_BUCKETS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0)
_WEBHOOK_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_FORK_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_PATHS = {addresses.VOICE_PATH, addresses.AFTER_PATH, *addresses.CALLBACK_PATHS, "/healthz", "/readyz"}
_CALL_BUCKETS = (5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_200.0, 1_800.0, 3_600.0, 7_200.0, 14_400.0)

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody reads

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

CALLS_BEGUN = Counter("dialog_calls_begun", "Calls that were taken.", registry=REGISTRY)
CALLS_TAKEN_UP = Counter("dialog_calls_taken_up", "Calls that a dialogd that died has left.", registry=REGISTRY)
CALLS_ENDED = Counter(
    "dialog_calls_ended",
    "Calls that are over: who ended them (the line's own end is the caller's), and whether the caller got the fallback.",
    ["by", "fallback"],
    registry=REGISTRY,
)
CALLS_FORCED = Counter("dialog_calls_forced", "Calls that a stop of dialogd had to end.", registry=REGISTRY)
CALL_SECONDS = Histogram(
    "dialog_call_seconds", "How long calls lasted, to the last trace of them.", buckets=_CALL_BUCKETS, registry=REGISTRY
)
WORKER_DEATHS = Counter(
    "dialog_worker_deaths",
    "Workers that died in mid-call: why, and the exit code or signal.",
    ["cause", "code"],
    registry=REGISTRY,
)
WORKER_RESTARTS = Counter(
    "dialog_worker_restarts", "Workers that took over from one that died, by its cause.", ["cause"], registry=REGISTRY
)
FORK_SECONDS = Histogram(
    "dialog_fork_seconds",
    "From asking the template for a worker until its process exists.",
    buckets=_FORK_BUCKETS,
    registry=REGISTRY,
)
FORKS_FAILED = Counter("dialog_forks_failed", "Workers that could not be forked.", registry=REGISTRY)
TURNS = Counter("dialog_turns", "Turns that agents have finished, by outcome.", ["outcome"], registry=REGISTRY)
TURN_SECONDS = Histogram(
    "dialog_turn_seconds",
    "From the end of the caller's speech, as the agent knows it, to the first audio of the answer.",
    ["outcome"],
    buckets=_TURN_BUCKETS,
    registry=REGISTRY,
)
TURN_PART_SECONDS = Histogram(
    "dialog_turn_part_seconds",
    "What that time is made of: until the turn begins, to the first words, to their first audio.",
    ["part"],
    buckets=_TURN_BUCKETS,
    registry=REGISTRY,
)
WEBHOOK_SECONDS = Histogram(
    "dialog_webhook_seconds",
    "From a complete request to its answer, by what was asked for.",
    ["path", "status"],
    buckets=_WEBHOOK_BUCKETS,
    registry=REGISTRY,
)
REQUESTS_REFUSED = Counter(
    "dialog_requests_refused", "Requests that were not well-formed, too large or too slow.", ["status"], registry=REGISTRY
)
CONNECTIONS_REFUSED = Counter(
    "dialog_connections_refused",
    "Connections that were not let in, by what there were too many or too few of.",
    ["reason"],
    registry=REGISTRY,
)
MEDIA_LOST = Counter("dialog_media_sockets_lost", "Media sockets that broke during a call.", registry=REGISTRY)
MEDIA_RESUMED = Counter(
    "dialog_media_sockets_resumed", "Calls that went on with another media socket after that.", registry=REGISTRY
)
SWAPS = Counter(
    "dialog_reloads",
    "Reloads, rollbacks and promotions of the agent's code, by result.",
    ["kind", "result"],
    registry=REGISTRY,
)
TRIALS = Counter("dialog_trials", "Canaries that were judged by their calls, by verdict.", ["verdict"], registry=REGISTRY)
EVENTS_LOST = Counter("dialog_events_lost", "Entries that are missing in calls' event logs.", registry=REGISTRY)
LOOP_LAG_SECONDS = Histogram(
    "dialog_loop_lag_seconds", "How late dialogd's event loop wakes up.", buckets=_LAG_BUCKETS, registry=REGISTRY
)


def _begin_at_zero() -> None:
    """Have every series that there will be from the start: a rate needs a value before the first event."""
    for by in get_args(Party):
        for fallback in ("no", "yes"):
            CALLS_ENDED.labels(by, fallback)
    for reason in get_args(Closed):
        CONNECTIONS_REFUSED.labels(reason)
    for cause in get_args(Cause):
        WORKER_RESTARTS.labels(cause)
    for outcome in get_args(Turn.__annotations__["outcome"]):
        TURNS.labels(outcome)
        TURN_SECONDS.labels(outcome)
    for part in ("queued", "thinking", "voicing"):
        TURN_PART_SECONDS.labels(part)
    for kind in ("reload", "rollback", "promotion"):
        for result in get_args(SwapResult):
            SWAPS.labels(kind, result)
    for verdict in get_args(TrialVerdict):
        TRIALS.labels(verdict)


_begin_at_zero()


def turn(told: Turn) -> None:
    """A worker has finished a turn."""
    TURNS.labels(told.outcome).inc()
    if told.delay_ms is not None:
        TURN_SECONDS.labels(told.outcome).observe(_seconds(told.delay_ms))
    for part, ms in (("queued", told.queued_ms), ("thinking", told.thinking_ms), ("voicing", told.voicing_ms)):
        if ms is not None:
            TURN_PART_SECONDS.labels(part).observe(_seconds(ms))


def _seconds(ms: int) -> float:
    """Return what a worker says, which may be anything, as a time for a sum: one that falls is taken for a restart."""
    return max(0, ms) / _MS


@contextmanager
def webhook(path: str) -> Iterator[Callable[[int], None]]:
    """Enter how long the answer to a request took. Yields what is to be told its status; untold, it is 500."""
    began_at, status = trio.current_time(), 500

    def answered(with_status: int) -> None:
        nonlocal status
        status = with_status

    try:
        yield answered
    finally:
        WEBHOOK_SECONDS.labels(_route(path), status).observe(trio.current_time() - began_at)


def _route(path: str) -> str:
    """Return a path as a label may have it: one of a few, whatever was asked for."""
    if path.startswith(addresses.MEDIA_PREFIX):
        return addresses.MEDIA_PREFIX
    return path if path in _PATHS else "other"


@contextmanager
def forking() -> Iterator[None]:
    """Enter how long a fork took, or that it failed."""
    began_at = trio.current_time()
    try:
        yield
    except Exception:
        FORKS_FAILED.inc()
        raise
    FORK_SECONDS.observe(trio.current_time() - began_at)


async def watch_loop() -> None:
    """Enter how late the event loop is, until cancelled."""
    while True:
        due = next_beat()
        await trio.sleep_until(due)
        LOOP_LAG_SECONDS.observe(trio.current_time() - due)
