"""The guard on memory and load: what is read, how it is averaged, and when it keeps a call away."""

import os
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from dialog_supervisor import machine
from dialog_supervisor.machine import LOAD_WINDOW_S, Machine, available_memory, left_in, runnable
from dialog_supervisor.sections import CallsConfig

CPUS = len(os.sched_getaffinity(0))
MEMINFO = "MemTotal:       2000000 kB\nMemFree:          10000 kB\nMemAvailable:    1000000 kB\n"


class Fake:
    """A /proc and a control group whose files say what a test wants."""

    def __init__(self, directory: Path) -> None:
        self.proc, self.group = directory / "proc", directory / "group"
        self.proc.mkdir()
        self.group.mkdir()
        self.says(runnable=0)
        (self.proc / "meminfo").write_text(MEMINFO)

    def says(self, *, runnable: int) -> None:
        """So many tasks run, beside the one that looks."""
        (self.proc / "loadavg").write_text(f"0.20 0.18 0.12 {runnable + 1}/80 11206\n")

    def limits(self, most: str, taken: int, inactive_file: int = 0) -> None:
        """The control group has a limit, and so much of it is taken."""
        (self.group / "memory.max").write_text(f"{most}\n")
        (self.group / "memory.current").write_text(f"{taken}\n")
        (self.group / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\n")

    def machine(self, **config: Any) -> Machine:
        return Machine(CallsConfig(**config), [self.group], self.proc)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def sampled(one: Machine) -> Machine:
    """Return it with one sample taken."""

    async def sample() -> None:
        one.sample()

    trio.run(sample)
    return one


def test_what_linux_tells() -> None:
    assert available_memory(MEMINFO) == 1_024_000_000
    assert runnable("0.20 0.18 0.12 3/80 11206\n") == 2


def test_a_call_is_kept_away_when_less_memory_is_available_than_must_be_left(fake: Fake) -> None:
    assert sampled(fake.machine(min_free_memory=1_024_000_000)).lack is None
    assert sampled(fake.machine(min_free_memory=1_024_000_001)).lack == "memory"


def test_a_control_groups_limit_counts_where_it_is_nearer(fake: Fake) -> None:
    fake.limits("500000000", 450_000_000)
    assert sampled(fake.machine()).free_memory == 50_000_000
    fake.limits("500000000", 450_000_000, inactive_file=300_000_000)
    assert sampled(fake.machine()).free_memory == 350_000_000
    fake.limits("9000000000", 0)
    assert sampled(fake.machine()).free_memory == 1_024_000_000


def test_a_control_group_without_a_limit_has_none(fake: Fake) -> None:
    fake.limits("max", 450_000_000)
    assert left_in(fake.group) is None
    assert sampled(fake.machine()).free_memory == 1_024_000_000


def test_a_group_over_its_limit_has_nothing_left(fake: Fake) -> None:
    fake.limits("500000000", 500_004_096)
    assert sampled(fake.machine()).free_memory == 0


async def test_a_burst_is_not_yet_load_but_what_lasts_is(fake: Fake, autojump_clock: MockClock) -> None:
    one = fake.machine(max_load=2.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(one.run)
        fake.says(runnable=4 * CPUS)
        await trio.sleep(0.3)
        assert one.lack is None
        await trio.sleep(LOAD_WINDOW_S)
        assert one.lack == "load"
        assert one.load == pytest.approx(4 * (1 - 1 / 2.718), abs=0.2)
        fake.says(runnable=0)
        await trio.sleep(LOAD_WINDOW_S)
        assert one.lack is None
        nursery.cancel_scope.cancel()


def test_with_0_the_load_is_not_looked_at(fake: Fake) -> None:
    fake.says(runnable=1000 * CPUS)
    assert sampled(fake.machine(max_load=0)).lack is None
    assert sampled(fake.machine()).lack == "load"


async def test_what_cannot_be_read_is_told_once_and_keeps_nobody_away(
    fake: Fake, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Log:
        def warning(self, event: str, **_: object) -> None:
            told.append(event)

    monkeypatch.setattr(machine, "log", Log())
    for name in ("meminfo", "loadavg"):
        (fake.proc / name).unlink()
    one = fake.machine()
    async with trio.open_nursery() as nursery:
        await nursery.start(one.run)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert told == [
        "the machine's free memory is unknown, and calls are taken whatever it is",
        "the machine's load is unknown, and calls are taken whatever it is",
    ]
    assert one.lack is None
    assert one.describe() == {"free_memory": None, "load": None}
