"""Whatever happens to the store, calls go on; what is lost is told, and what can be kept again is."""

import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from dialog_supervisor.store.base import Fault
from dialog_supervisor.store.sqlite import files_of
from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import Dialogd
from tests.e2e.site import Site, counting, goes_on, kept, site
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs

NOT_KEPT = "calls are not kept for another dialogd; they go on"
KEPT_AGAIN = "the store is written again"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as place:
        yield place


@contextmanager
def disk_full(dialogd: Dialogd) -> Iterator[None]:
    """Have no file of this process's grow, as if its disk were full."""
    soft, hard = resource.prlimit(dialogd.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(dialogd.pid, resource.RLIMIT_FSIZE, (0, hard))
    yield
    resource.prlimit(dialogd.pid, resource.RLIMIT_FSIZE, (soft, hard))


async def counts_on(dialogd: Dialogd, call: PhoneCall, expected: str) -> None:
    """Have an agent that has counted to 3 count on, and check that it does."""
    await call.press("2")
    await dialogd.step(call.sid, kind="saved", text=expected)


async def test_a_full_disk_is_told_once_and_costs_nothing_but_what_was_not_kept(here: Site) -> None:
    async with Twilio(here.place) as twilio:
        with here.dialogd() as first:
            async with counting(here, twilio) as call:
                with disk_full(first):
                    await counts_on(first, call, "5")
                    assert (await first.logged(event=NOT_KEPT))["remedy"]
                    store = (await first.ask("/status"))["store"]
                    assert not store["ok"]
                    assert store["lost"] > 0
                    async with twilio.streaming() as another:
                        await counts_on(first, another, "2")
                await first.logged(event=KEPT_AGAIN)
                await kept(here, {call: b"5"})
                assert (await first.ask("/status"))["store"]["ok"]
                assert len(first.find(event=NOT_KEPT)) == 1
                await first.killed()
        with here.dialogd() as second:
            await goes_on(second, call, "5")


def delete(store: Path) -> None:
    for path in files_of(store)[:3]:
        path.unlink(missing_ok=True)


def fill_with_garbage(store: Path) -> None:
    delete(store)
    store.write_bytes(b"not a database, " * 500)


@pytest.mark.parametrize("harm", [delete, fill_with_garbage], ids=lambda harm: harm.__name__)
async def test_a_store_that_is_gone_in_mid_call_is_written_anew(here: Site, harm: Callable[[Path], None]) -> None:
    async with Twilio(here.place) as twilio:
        with here.dialogd() as first:
            async with counting(here, twilio) as call:
                harm(here.store)
                await counts_on(first, call, "5")
                await first.logged(event=KEPT_AGAIN)
                await kept(here, {call: b"5"})
                await first.killed()
        with here.dialogd() as second:
            await goes_on(second, call, "5")


async def test_a_store_deleted_while_no_dialogd_runs_costs_its_calls_and_no_others(here: Site) -> None:
    async with Twilio(here.place) as twilio:
        with here.dialogd() as first:
            async with counting(here, twilio) as call:
                await first.killed()
        delete(here.store)
        with here.dialogd():
            assert verbs(await call.after()) == ["Hangup"]
            async with counting(here, twilio) as another:
                await another.stop()


async def test_a_damaged_store_is_moved_aside_at_the_start(here: Site) -> None:
    fill_with_garbage(here.store)
    with here.dialogd() as dialogd:
        assert dialogd.wait_for_log(event=NOT_KEPT)["reason"] == Fault.CORRUPT.value
        dialogd.wait_for_log(event=KEPT_AGAIN)
        async with Twilio(here.place) as twilio, counting(here, twilio) as call:
            await call.stop()
    assert files_of(here.store)[4].exists()


async def test_a_store_that_cannot_be_opened_keeps_no_call_from_being_taken(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with site(tmp_path / "here", tmp_path / "here") as here, here.dialogd() as dialogd:
        assert dialogd.wait_for_log(event=NOT_KEPT)["reason"] == Fault.NO_PLACE.value
        async with Twilio(here.place) as twilio, twilio.streaming() as call:
            await counts_on(dialogd, call, "2")


async def test_a_locked_store_delays_no_new_call(here: Site) -> None:
    async with Twilio(here.place) as twilio:
        with here.dialogd() as dialogd:
            locker = sqlite3.connect(here.store, isolation_level=None)
            locker.execute("BEGIN EXCLUSIVE")
            began_at = trio.current_time()
            async with twilio.streaming() as call:
                assert trio.current_time() - began_at < 1
                await counts_on(dialogd, call, "2")
                await dialogd.logged(event=NOT_KEPT)
                locker.execute("ROLLBACK")
                locker.close()
                await kept(here, {call: b"2"})


async def test_where_there_is_no_place_for_a_store_that_is_said_once(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(environ={"HOME": "", "XDG_STATE_HOME": ""})
    [line] = dialogd.find(event="calls are not kept for another dialogd")
    assert "store.path" in line["remedy"]
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
    assert not (await dialogd.ask("/status"))["store"]["enabled"]


# Several dialogds on one store


def at(twilio: Twilio, call: PhoneCall) -> PhoneCall:
    """Return the same call, whose carrier asks another dialogd."""
    moved = PhoneCall(twilio)
    moved.sid, moved.document = call.sid, call.document
    return moved


async def test_a_call_is_its_owners_while_that_lives_and_anybodys_then(tmp_path: Path) -> None:
    store = tmp_path / "calls.sqlite"
    with site(tmp_path / "one", store) as one, site(tmp_path / "two", store) as two, two.dialogd() as second:
        async with Twilio(one.place) as carrier_of_one, Twilio(two.place) as carrier_of_two:
            with one.dialogd() as first:
                async with counting(one, carrier_of_one) as call:
                    astray = at(carrier_of_two, call)
                    assert verbs(await astray.after()) == ["Pause", "Redirect"]
                    await call.press("#")
                    await first.step(call.sid, kind="count")
                    await first.killed()
            await goes_on(second, astray)


async def test_a_caller_waits_for_a_call_that_is_anothers_only_so_often(tmp_path: Path) -> None:
    store = tmp_path / "calls.sqlite"
    with site(tmp_path / "one", store) as one, site(tmp_path / "two", store) as two, two.dialogd():
        async with Twilio(one.place) as carrier_of_one, Twilio(two.place) as carrier_of_two:
            with one.dialogd():
                async with counting(one, carrier_of_one) as call:
                    answer = await at(carrier_of_two, call).after()
                    for _ in range(9):
                        answer = await carrier_of_two.ask(answer.findtext("Redirect") or "", call.fields())
                    assert verbs(answer) == ["Pause", "Redirect"]
                    answer = await carrier_of_two.ask(answer.findtext("Redirect") or "", call.fields())
                    assert verbs(answer) == ["Say", "Hangup"]
                    await call.stop()


async def test_dialogds_that_share_a_store_take_along_only_their_own_calls(tmp_path: Path) -> None:
    store = tmp_path / "calls.sqlite"
    with site(tmp_path / "one", store) as one, site(tmp_path / "two", store) as two, two.dialogd():
        async with Twilio(two.place) as carrier, counting(two, carrier) as call:
            with one.dialogd():
                pass
            await kept(two, {call: b"3"})
            await call.stop()


# What a killed one leaves behind


async def test_a_killed_dialogds_snapshots_are_gone_when_the_next_has_started(here: Site, tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    with here.dialogd(RUNTIME_DIRECTORY=str(runtime)) as first:
        await first.killed()
    assert len(os.listdir(runtime / "generations")) == 1
    with here.dialogd(RUNTIME_DIRECTORY=str(runtime)):
        assert len(os.listdir(runtime / "generations")) == 1
    assert os.listdir(runtime / "generations") == []


async def test_a_killed_dialogds_lease_is_gone_when_the_next_has_started(here: Site) -> None:
    with here.dialogd() as first:
        await first.killed()
    with here.dialogd():
        with trio.fail_after(PATIENCE_S):
            while len(os.listdir(files_of(here.store)[3])) > 1:  # noqa: ASYNC110 - another process
                await trio.sleep(0.02)
