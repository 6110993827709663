"""Calls survive the death of dialogd itself: the next one takes them up, from the store, when the carrier asks what now."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from tests.e2e.scrape import scrape
from tests.e2e.site import TAKEN_UP, Site, counting, goes_on, kept, kept_calls, site
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs

CALLS = 20


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as place:
        yield place


@pytest.fixture
async def twilio(here: Site) -> AsyncIterator[Twilio]:
    async with Twilio(here.place) as twilio:
        yield twilio


async def test_twenty_conversations_go_on_when_dialogd_is_killed_and_started_again(here: Site, twilio: Twilio) -> None:
    with here.dialogd() as first:
        async with AsyncExitStack() as stack:
            calls = {
                await stack.enter_async_context(counting(here, twilio, key)): key
                for key in [str(1 + number % 6) for number in range(CALLS)]
            }
            await kept(here, {call: key.encode() for call, key in calls.items()})
            await first.killed()
    with here.dialogd() as second:
        async with trio.open_nursery() as nursery:
            for call, key in calls.items():
                nursery.start_soon(goes_on, second, call, key)
        assert len(second.find(event=TAKEN_UP)) == CALLS
        assert len(second.find(event="call ended")) == CALLS
        assert (await scrape(second)).value("dialog_calls_taken_up_total") == CALLS
        await kept(here, {})


async def test_a_webhook_that_is_sent_twice_takes_a_call_up_once(here: Site, twilio: Twilio) -> None:
    with here.dialogd() as first:
        async with counting(here, twilio) as call:
            await first.killed()
    with here.dialogd() as second:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(call.after)
        await goes_on(second, call)
        assert len(second.find(event=TAKEN_UP)) == 1
        assert len(second.find(event="call begins")) == 1


async def test_a_dialogd_killed_while_it_takes_calls_up_is_followed_by_another(here: Site, twilio: Twilio) -> None:
    with here.dialogd() as first:
        async with counting(here, twilio) as call:
            await first.killed()
    with here.dialogd() as second:
        await call.after()
        await second.killed()  # before or after the worker was forked, whichever it is
    with here.dialogd() as third:
        await call.after()
        async with call.stream():
            await third.step(call.sid, kind="restored")
            await third.killed()
    with here.dialogd() as fourth:
        await goes_on(fourth, call)


async def test_a_call_whose_dialogd_died_too_often_gets_the_fallback(tmp_path: Path) -> None:
    with site(tmp_path, calls={"restarts": 1}) as here, here.dialogd() as first:
        async with Twilio(here.place) as twilio:
            async with counting(here, twilio) as call:
                await first.killed()
            with here.dialogd() as second:
                await call.after()
                await second.killed()
            with here.dialogd() as third:
                assert verbs(await call.after()) == ["Say", "Hangup"]
                await third.logged(event="dialogd has died too often during this call, which gets the fallback")
                assert verbs(await call.after()) == ["Hangup"]


async def test_killed_between_the_webhook_and_the_media_socket_the_call_begins_all_the_same(
    here: Site, twilio: Twilio
) -> None:
    call = PhoneCall(twilio)
    with here.dialogd() as first:
        await call.ring()
        await kept(here, {call: b""})
        await first.killed()
    with here.dialogd() as second:
        await goes_on(second, call, "")


async def test_the_carriers_fallback_url_may_be_the_same_and_takes_the_call_up(here: Site, twilio: Twilio) -> None:
    with here.dialogd() as first:
        async with counting(here, twilio) as call:
            await first.killed()
    with here.dialogd() as second:
        failure = {"CallStatus": "in-progress", "ErrorCode": "11205", "ErrorUrl": f"{twilio.public_url}/twilio/after"}
        assert verbs(await call.ring(**failure)) == ["Connect"]
        await goes_on(second, call)


@pytest.mark.parametrize("how", ["after", "voice", "status"])
async def test_a_call_that_is_over_is_forgotten_however_that_is_told(here: Site, twilio: Twilio, how: str) -> None:
    with here.dialogd() as first:
        async with counting(here, twilio) as call:
            await first.killed()
    with here.dialogd():
        if how == "after":
            assert verbs(await call.after("completed")) == ["Hangup"]
        elif how == "voice":
            assert verbs(await call.ring(CallStatus="completed", ErrorCode="11205")) == ["Hangup"]
        else:
            await call.report("status", CallStatus="completed")
        await kept(here, {})


async def test_what_a_caller_heard_is_known_to_half_a_second(here: Site, twilio: Twilio) -> None:
    with here.dialogd() as first:
        async with counting(here, twilio) as call:
            await call.press("*")  # two seconds of something
            await first.step(call.sid, kind="posted")
            await call.hear()
            heard_from = trio.current_time()
            await trio.sleep(1.2)
            first.signal(signal.SIGKILL)
            heard_ms = 1000 * (trio.current_time() - heard_from)
            await first.killed()
    with here.dialogd() as second:
        await call.after()
        async with call.stream():
            restored = await second.step(call.sid, kind="restored")
            await call.stop()
            await second.ended(call.sid)
    assert heard_ms - 1000 < int(restored["fields"]["sentence"]) < heard_ms + 200


async def test_a_caller_who_waited_for_the_fallback_gets_it_from_the_next(tmp_path: Path) -> None:
    with site(tmp_path, calls={"restarts": 0}) as here, here.dialogd() as first:
        async with Twilio(here.place) as twilio:
            async with counting(here, twilio) as call:
                os.kill((await first.ask(f"/calls/{call.sid}"))["worker_pid"], signal.SIGKILL)
                await call.closed()
                await kept(here, {call: b"fallback"})
                await first.killed()
            with here.dialogd():
                assert verbs(await call.after()) == ["Say", "Hangup"]
                await kept(here, {})


async def test_a_call_is_not_taken_up_where_none_is_taken(tmp_path: Path) -> None:
    with site(tmp_path, calls={"max_calls": 1}) as here, here.dialogd() as first:
        async with Twilio(here.place) as twilio:
            async with counting(here, twilio) as call:
                await first.killed()
            with here.dialogd() as second:
                async with twilio.streaming():
                    assert verbs(await call.after()) == ["Say", "Hangup"]
                assert (await second.ask("/status"))["refused"]["max_calls"] == 1


async def test_a_call_is_taken_up_also_where_the_machine_has_no_room_for_a_new_one(here: Site, twilio: Twilio) -> None:
    with here.dialogd() as first:
        async with counting(here, twilio) as call:
            await first.killed()
    here.configure(calls={"min_free_memory": 1 << 50})
    with here.dialogd() as second:
        assert verbs(await PhoneCall(twilio).ring()) == ["Say", "Hangup"]
        await goes_on(second, call)


async def test_while_dialogd_is_upgraded_its_calls_are_in_the_store_all_the_time(here: Site, twilio: Twilio) -> None:
    with here.dialogd() as first:
        async with counting(here, twilio) as call:
            seen = []
            async with trio.open_nursery() as nursery:

                async def look() -> None:
                    while True:
                        seen.append(kept_calls(here.store))
                        await trio.sleep(0.002)

                nursery.start_soon(look)
                assert (await first.ctl("upgrade")).returncode == 0
                await call.press("2")
                await kept(here, {call: b"5"})
                nursery.cancel_scope.cancel()
            assert all(call.sid in found for found in seen)
            await first.killed()
    with here.dialogd() as second:
        await goes_on(second, call, "5")


async def test_without_a_store_the_caller_is_hung_up_on(tmp_path: Path) -> None:
    with site(tmp_path, store={"enabled": False}) as here, here.dialogd() as first:
        async with Twilio(here.place) as twilio:
            call = PhoneCall(twilio)
            await call.ring()
            await first.killed()
            with here.dialogd() as second:
                assert verbs(await call.after()) == ["Hangup"]
                assert not (await second.ask("/status"))["store"]["enabled"]
        assert not here.store.exists()


@pytest.mark.parametrize("signals", [1, 2])
async def test_a_stopped_dialogd_leaves_no_call_in_the_store(tmp_path: Path, signals: int) -> None:
    with site(tmp_path, calls={"drain_timeout": 0 if signals == 1 else 60}) as here, here.dialogd() as first:
        async with Twilio(here.place) as twilio, counting(here, twilio) as call:
            for _ in range(signals):
                first.signal(signal.SIGTERM)
                await first.logged(event="stopping")
            if signals == 1:
                await call.closed()
                await call.after()
            assert await first.exited() == 0
        assert kept_calls(here.store) == {}
        assert list((tmp_path / "calls.sqlite.owners").iterdir()) == []
