"""A worker's CPU time over a sliding minute: when it is warned of, and when it is too much."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dialog_supervisor.confinement.memory import Memory, describe, measure
from dialog_supervisor.confinement.orphans import descendants
from dialog_supervisor.confinement.usage import GOES_ON_S, PASS_S, Budget, Verdict, of_process


def verdicts(budget: Budget, *phases: tuple[float, float], until: float = 0) -> list[tuple[float, Verdict]]:
    """Return when which verdict came. `phases`: from when on which share of a CPU was used."""
    found: list[tuple[float, Verdict]] = []
    now = used = share = 0.0
    while now < until:
        now += PASS_S
        share = max((phase for phase in phases if phase[0] < now), default=(0.0, share))[1]
        used += share * PASS_S
        if verdict := budget.take(now, used):
            found.append((now, verdict))
    return found


def test_a_worker_within_its_budget_is_left_alone() -> None:
    assert verdicts(Budget(30), (0, 0.49), until=600) == []


def test_one_that_computes_without_end_is_warned_of_and_then_killed() -> None:
    (warned_at, first), (killed_at, second), *_ = verdicts(Budget(30), (0, 1.0), until=600)
    assert (first, second) == ("warn", "kill")
    assert 30 <= warned_at <= 30 + 2 * PASS_S
    assert GOES_ON_S <= killed_at - warned_at < GOES_ON_S + PASS_S


def test_one_that_slows_down_after_the_warning_lives_on() -> None:
    assert verdicts(Budget(30), (0, 1.0), (34, 0.1), until=600) == [(32, "warn")]


def test_one_that_goes_on_later_is_killed_without_another_minute() -> None:
    found = verdicts(Budget(30), (0, 1.0), (34, 0.0), (46, 1.0), until=70)
    assert [verdict for _, verdict in found[:2]] == ["warn", "kill"]
    assert found[1][0] < 46 + 2 * GOES_ON_S + PASS_S


def test_several_threads_use_it_up_faster() -> None:
    assert verdicts(Budget(30), (0, 4.0), until=8)[0] == (8, "warn")


def test_what_one_had_before_it_was_looked_at_counts_only_if_it_was_new() -> None:
    assert Budget(30).take(3600, 100.0) == "warn"
    assert Budget(30, new=False).take(3600, 100.0) is None


def test_only_the_last_minute_counts() -> None:
    budget = Budget(30)
    assert verdicts(budget, (0, 0.4), until=1200) == []
    assert budget.used_s == pytest.approx(0.4 * 60, abs=0.4 * PASS_S)


# Real processes

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
SPIN = "import time\nwhile time.process_time() < 0.3: pass"


@contextmanager
def printing(code: str) -> Iterator[int]:
    """Run Python code until the block is left, and give the process's pid when it has printed something."""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_a_process_time_is_its_own_and_that_of_children_that_it_has_waited_for() -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}]); print(flush=True); input()"
    with printing(code) as pid:
        found = of_process(pid)
    assert 0.3 - 4 * TICK_S < found.cpu_s < 5  # user and system time of both, each counted in whole ticks
    assert found.tasks == 1


def test_descendants_are_found_to_the_last() -> None:
    code = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print(flush=True); input()"
    with printing(code) as pid:
        [child] = descendants(pid)
        assert child in set(descendants(os.getpid()))
        os.kill(child, 9)


def test_the_memory_of_a_process_is_its_share_where_that_can_be_seen() -> None:
    kept = bytearray(30 << 20)
    found = measure(os.getpid())
    assert found is not None
    assert found.kind == "pss"
    assert found.bytes > len(kept)
    assert measure(2**22 + 1) is None


def test_what_is_told_of_memory_says_what_was_counted() -> None:
    assert describe([Memory(5, "pss"), None, Memory(7, "pss")]) == {"memory": 12, "memory_kind": "pss"}
    assert describe([Memory(5, "rss"), Memory(7, "pss")]) == {"memory": 12, "memory_kind": "pss+rss"}
    assert describe([None]) == {"memory": None, "memory_kind": None}
