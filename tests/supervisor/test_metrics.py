"""What is counted as it happens, apart from a running dialogd; `tests/e2e/test_metrics.py` has the rest."""

import signal

import pytest

from dialog_supervisor.telemetry import metrics
from dialog_supervisor.worker import Worker
from protocol.messages import EXIT_WANT_OF_MEMORY, Turn


def value(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


def test_a_turn_s_delay_is_entered_in_seconds() -> None:
    before = value("dialog_turn_seconds_sum", outcome="answered")
    metrics.turn(Turn("answered", 1500, queued_ms=0, thinking_ms=1000, voicing_ms=500))
    assert value("dialog_turn_seconds_sum", outcome="answered") - before == 1.5


def test_what_a_worker_says_cannot_make_a_sum_fall() -> None:
    before = value("dialog_turn_seconds_sum", outcome="failed")
    metrics.turn(Turn("failed", -(2**63)))
    assert value("dialog_turn_seconds_sum", outcome="failed") == before


@pytest.mark.parametrize(
    ("exit_code", "killed_for", "death"),
    [
        (0, None, ("exit", "0")),
        (EXIT_WANT_OF_MEMORY, None, ("memory", "12")),
        (-signal.SIGSEGV, None, ("signal", "SIGSEGV")),
        (-60, None, ("signal", "60")),
        (-signal.SIGKILL, "hang", ("hang", "SIGKILL")),
        (None, None, ("exit", "")),
    ],
)
async def test_a_death_has_a_cause(exit_code: int | None, killed_for: metrics.Cause | None, death: tuple[str, str]) -> None:
    worker = Worker("g", "CA1")
    worker.kill(killed_for)
    worker.exit_code = exit_code
    assert worker.death == death
    worker.close()


async def test_the_first_cause_counts() -> None:
    worker = Worker("g", "CA1")
    worker.kill("protocol")
    worker.kill("hang")
    assert worker.death == ("protocol", "")
    worker.close()
