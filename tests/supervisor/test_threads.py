"""What becomes of what runs in threads when the system permits no other: it fails as files fail, and nothing else does."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from dialog_supervisor.confinement.memory import measure_all
from dialog_supervisor.sections import EventsConfig
from dialog_supervisor.store.base import Changes, Fault, StoreFailed
from dialog_supervisor.store.sqlite import SqliteStore
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.telemetry.event_logs import EventLogs
from dialog_supervisor.threads import in_thread
from dialog_supervisor.worker import Worker
from protocol.messages import Dtmf

REFUSED = """
import threading, trio
from dialog_supervisor.threads import in_thread

threading.stack_size(1 << 46)  # which no machine has room for
try:
    trio.run(in_thread, int)
except OSError as error:
    print(error.strerror)
"""


def lost() -> float:
    return metrics.REGISTRY.get_sample_value("dialog_events_lost_total") or 0.0


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread can be started, as where there are as many as TasksMax permits."""

    async def run_sync(work: Callable[..., object], **_: Any) -> object:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


def test_a_thread_that_the_system_refuses_is_an_os_error() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], check=True, capture_output=True, text=True)
    assert done.stdout == "the system permits no other thread; raise TasksMax\n"


async def test_what_the_work_itself_raises_stays_what_it_is() -> None:
    def work() -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        await in_thread(work)


@pytest.mark.usefixtures("no_threads")
async def test_the_store_says_so(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "calls.sqlite")
    with pytest.raises(StoreFailed) as caught:
        await store.write(Changes(0.0, whole=True))
    assert caught.value.fault is Fault.NO_THREAD


@pytest.mark.usefixtures("no_threads")
async def test_event_logs_lose_entries_and_count_them(tmp_path: Path) -> None:
    logs = EventLogs(EventsConfig(directory=tmp_path))
    begun = logs.begin("CA1", "abc.1", {})
    assert begun is not None
    begun.told(Dtmf("5"), 7)
    before = lost()
    with trio.move_on_after(0):
        await logs.run()
    assert (lost() - before, os.listdir(tmp_path)) == (1, [])


@pytest.mark.usefixtures("no_threads")
async def test_the_memory_of_workers_is_unknown() -> None:
    worker = Worker("g", "CA1")
    assert await measure_all([worker]) == [None]
    worker.close()
