"""What is written of which call, when, and what happens while the store does not take it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from dialog_supervisor.carriers.base import Unsettled
from dialog_supervisor.carriers.playout import OnTheWay
from dialog_supervisor.recovery import CallState
from dialog_supervisor.store.base import Changes, Elsewhere, Fault, StoreFailed
from dialog_supervisor.store.keeper import ALIVE_INTERVAL_S, Keeper, Missing
from dialog_supervisor.store.records import Record
from protocol.messages import Metadata

NOT_KEPT = "calls are not kept for another dialogd; they go on"


class Paper:
    """A store that writes down what it is told, in the time that `act` takes."""

    def __init__(self) -> None:
        self.written: list[Changes] = []
        self.forgotten: list[str] = []
        self.found: Record | Elsewhere | None = None
        self.faults: list[Fault] = []  # to come
        self.stalls = False
        self.closed = False

    async def _act(self) -> None:
        if self.stalls:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        if self.faults:
            raise StoreFailed(self.faults.pop(0), "calls.sqlite")

    async def write(self, changes: Changes) -> None:
        await self._act()
        self.written.append(changes)

    async def take(self, call_id: str, at: float) -> Record | Elsewhere | None:
        await self._act()
        return self.found

    def hand_over(self) -> None:
        """It has nothing to prove."""

    async def forget(self, call_id: str) -> None:
        await self._act()
        self.forgotten.append(call_id)

    async def tidy(self, max_age_s: float) -> int:
        await trio.lowlevel.checkpoint()
        return 0

    async def close(self) -> None:
        await self._act()
        self.closed = True


class PaperLeg:
    """As much of a line as is written down."""

    def __init__(self) -> None:
        self.counts = {"frames_out": 0}
        self.open = True
        self.owed: tuple[str, ...] = ()

    def still_to_hear(self) -> tuple[OnTheWay, ...]:
        return (OnTheWay("u1", 0, 1000, done=True),)

    def unsettled(self) -> Unsettled:
        return Unsettled(owed=self.owed)


class PaperCall:
    """As much of a call as is written down."""

    generation = "g.1"

    def __init__(self, call_id: str) -> None:
        self.metadata = Metadata(call_id, "twilio", "+14155550123", "+14155550199")
        self.started_at = trio.current_time()
        self.over = False
        self.owes_fallback = False
        self.checkpoint = b""
        self.leg = PaperLeg()

    @property
    def worker_leg(self) -> "PaperCall":
        return self

    def recovery_state(self, *, audio: bool) -> CallState:
        assert not audio
        return CallState(metadata=self.metadata, checkpoint=self.checkpoint)


class Desk:
    """A keeper, its store, and calls."""

    def __init__(self) -> None:
        self.store = Paper()
        self.calls: dict[str, Any] = {}
        self.keeper = Keeper(self.store, self.calls, max_age_s=3600)

    def begin(self, call_id: str) -> PaperCall:
        call = self.calls[call_id] = PaperCall(call_id)
        self.keeper.note(call_id)
        return call

    async def after(self, seconds: float) -> list[Changes]:
        """Let time pass, and return what is written meanwhile."""
        before = len(self.store.written)
        await trio.sleep(seconds)
        await wait_all_tasks_blocked()
        return self.store.written[before:]


@asynccontextmanager
async def at_work() -> AsyncIterator[Desk]:
    desk = Desk()
    async with trio.open_nursery() as nursery:
        await nursery.start(desk.keeper.run)
        await desk.after(1)
        yield desk
        nursery.cancel_scope.cancel()


@pytest.fixture
async def desk(autojump_clock: MockClock) -> AsyncIterator[Desk]:
    async with at_work() as desk:
        yield desk


async def test_nothing_is_written_while_there_is_no_call(desk: Desk, autojump_clock: MockClock) -> None:
    assert await desk.after(60) == []


async def test_a_call_is_written_when_it_begins(desk: Desk, autojump_clock: MockClock) -> None:
    desk.begin("CA1")
    [changes] = await desk.after(0.1)
    assert list(changes.records) == ["CA1"]
    assert list(changes.lines) == ["CA1"]


async def test_only_what_has_changed_is_written_and_several_changes_are_one(desk: Desk, autojump_clock: MockClock) -> None:
    call = desk.begin("CA1")
    desk.begin("CA2")
    await desk.after(0.1)
    for number in range(100):
        call.checkpoint = b"%d" % number
        desk.keeper.note("CA1")
    [changes] = await desk.after(0.1)
    assert {name: record.state.checkpoint for name, record in changes.records.items()} == {"CA1": b"99"}


async def test_while_there_are_calls_the_store_is_shown_that_their_owner_lives(
    desk: Desk, autojump_clock: MockClock
) -> None:
    desk.begin("CA1")
    await desk.after(0.1)
    beats = await desk.after(10)
    assert 10 / ALIVE_INTERVAL_S * 0.8 < len(beats) < 10 / ALIVE_INTERVAL_S * 1.2
    assert all(not beat.records for beat in beats)


async def test_a_caller_who_is_sent_audio_has_the_line_written(desk: Desk, autojump_clock: MockClock) -> None:
    call = desk.begin("CA1")
    await desk.after(0.1)
    call.leg.counts["frames_out"] += 1
    written = await desk.after(2)
    assert [list(changes.lines) for changes in written if changes.lines] == [["CA1"]]


async def test_a_caller_whose_line_is_lost_has_that_written(desk: Desk, autojump_clock: MockClock) -> None:
    call = desk.begin("CA1")
    await desk.after(0.1)
    call.leg.open = False
    written = await desk.after(2)
    assert [changes.lines["CA1"].open for changes in written if changes.lines] == [False]


async def test_what_the_carrier_owes_is_written_when_it_changes(desk: Desk, autojump_clock: MockClock) -> None:
    call = desk.begin("CA1")
    await desk.after(0.1)
    call.leg.owed = ("RE1",)
    written = await desk.after(2)
    assert [changes.records["CA1"].unsettled.owed for changes in written if changes.records] == [("RE1",)]


async def test_a_call_that_is_over_is_deleted(desk: Desk, autojump_clock: MockClock) -> None:
    call = desk.begin("CA1")
    await desk.after(0.1)
    call.over = True
    desk.keeper.note("CA1")
    assert [changes.gone for changes in await desk.after(0.1)] == [{"CA1"}]
    del desk.calls["CA1"]
    desk.keeper.ended("CA1")
    assert [changes.gone for changes in await desk.after(0.1)] == [{"CA1"}]


async def test_a_caller_who_waits_for_the_fallback_is_kept_without_the_conversation(
    desk: Desk, autojump_clock: MockClock
) -> None:
    call = desk.begin("CA1")
    call.checkpoint = b"what was said"
    call.over = call.owes_fallback = True
    [changes] = await desk.after(0.1)
    assert changes.records["CA1"].fallback
    assert changes.records["CA1"].state == CallState(metadata=call.metadata)


async def test_what_is_not_taken_is_told_once_and_written_whole_as_soon_as_it_can_be(
    desk: Desk, autojump_clock: MockClock
) -> None:
    desk.begin("CA1")
    await desk.after(0.1)
    with capture_logs() as lines:
        desk.store.faults = [Fault.FULL] * 3
        desk.begin("CA2")
        await desk.after(0.1)
        assert desk.keeper.describe() == {"enabled": True, "ok": False, "lost": 1}
        written = await desk.after(10)
    assert written[0].whole
    assert sorted(written[0].records) == ["CA1", "CA2"]
    assert [line["event"] for line in lines] == [NOT_KEPT, "the store is written again"]
    assert lines[0]["reason"] == "the disk is full"
    assert "store.path" in lines[0]["remedy"]
    assert desk.keeper.describe()["ok"]


async def test_another_kind_of_failure_is_told_too(desk: Desk, autojump_clock: MockClock) -> None:
    desk.store.faults = [Fault.FULL, Fault.FULL, Fault.READ_ONLY, Fault.FULL]
    with capture_logs() as lines:
        desk.begin("CA1")
        await desk.after(30)
    assert [line["reason"] for line in lines if line["event"] == NOT_KEPT] == [Fault.FULL.value, Fault.READ_ONLY.value]


async def test_a_file_begun_anew_is_written_whole_at_once(desk: Desk, autojump_clock: MockClock) -> None:
    desk.begin("CA1")
    await desk.after(0.1)
    desk.store.faults = [Fault.REPLACED]
    desk.begin("CA2")
    written = await desk.after(0.1)
    assert sorted(written[0].records) == ["CA1", "CA2"]
    assert desk.keeper.describe() == {"enabled": True, "ok": True, "lost": 0}


async def test_a_store_that_recovers_does_so_without_a_call(desk: Desk, autojump_clock: MockClock) -> None:
    call = desk.begin("CA1")
    desk.store.faults = [Fault.FULL] * 4
    await desk.after(0.1)
    del desk.calls[call.metadata.call_id]
    desk.keeper.ended("CA1")
    await desk.after(30)
    assert desk.keeper.describe()["ok"]


async def test_ended_calls_do_not_pile_up_while_nothing_is_written(desk: Desk, autojump_clock: MockClock) -> None:
    desk.store.stalls = True
    desk.begin("CA1")
    await desk.after(1)
    for number in range(25_000):
        desk.keeper.ended(f"CB{number}")
    desk.store.stalls = False
    assert len(desk.keeper._gone) <= 10_000


async def test_a_stalled_store_keeps_no_dialogd_from_starting_or_stopping(autojump_clock: MockClock) -> None:
    desk = Desk()
    desk.store.stalls = True
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(desk.keeper.run)
            await desk.keeper.close()
            nursery.cancel_scope.cancel()


async def test_closing_closes_the_store(desk: Desk, autojump_clock: MockClock) -> None:
    await desk.keeper.close()
    assert desk.store.closed


async def test_whoever_asks_a_store_that_was_left_is_not_told_of_a_fault(desk: Desk, autojump_clock: MockClock) -> None:
    await desk.keeper.close()
    desk.store.faults = [Fault.LEFT]
    with capture_logs() as log:
        assert await desk.keeper.take("CA1", 1.0) is Missing.UNREADABLE
    assert log == []


# Taking up


async def test_a_call_that_a_dead_dialogd_left_is_taken_up(desk: Desk, autojump_clock: MockClock) -> None:
    desk.store.found = Record(at=1.0, state=PaperCall("CA1").recovery_state(audio=False), generation="g.1", age_s=1.0)
    assert await desk.keeper.take("CA1", 1.0) == desk.store.found


async def test_why_a_call_is_not_taken_up(desk: Desk, autojump_clock: MockClock) -> None:
    assert await desk.keeper.take("CA1", 1.0) is Missing.UNKNOWN
    desk.store.found = Elsewhere()
    assert await desk.keeper.take("CA1", 1.0) is Missing.ELSEWHERE
    desk.store.faults = [Fault.LOCKED]
    assert await desk.keeper.take("CA1", 1.0) is Missing.UNREADABLE
    desk.store.stalls = True
    assert await desk.keeper.take("CA1", 1.0) is Missing.UNREADABLE


async def test_a_store_that_is_only_busy_is_no_fault(desk: Desk, autojump_clock: MockClock) -> None:
    desk.begin("CA1")
    desk.store.stalls = True
    with capture_logs() as logs:
        await trio.sleep(0.5)
        assert await desk.keeper.take("CA2", 0.25) is Missing.UNREADABLE
    assert (logs, desk.keeper.describe()["ok"]) == ([], True)


async def test_a_store_that_answers_no_write_for_seconds_is_told_of_by_the_next_call(
    desk: Desk, autojump_clock: MockClock
) -> None:
    desk.begin("CA1")
    desk.store.stalls = True
    with capture_logs() as logs:
        await trio.sleep(3)
        assert await desk.keeper.take("CA2", 0.25) is Missing.UNREADABLE
    assert [(line["event"], line["reason"]) for line in logs] == [(NOT_KEPT, Fault.SLOW.value)]


async def test_a_question_that_waits_long_is_told_of(desk: Desk, autojump_clock: MockClock) -> None:
    desk.store.stalls = True
    with capture_logs() as logs:
        assert await desk.keeper.take("CA2", 5.0) is Missing.UNREADABLE
    assert [(line["event"], line["reason"]) for line in logs] == [(NOT_KEPT, Fault.SLOW.value)]


async def test_without_a_store_there_is_never_a_call_to_be_taken_up(autojump_clock: MockClock) -> None:
    keeper = Keeper(None, {}, 3600)
    async with trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
    keeper.note("CA1")
    keeper.ended("CA1")
    await keeper.forget("CA1")
    await keeper.close()
    assert await keeper.take("CA1", 1.0) is Missing.UNKNOWN
    assert keeper.describe() == {"enabled": False, "ok": True, "lost": 0}
