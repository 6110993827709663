"""Taking no more calls, for a while or on the way out: those under way go on, as long as they are given."""

import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.daemon import PROBE, PUBLIC_URL, RECORDER, Dialogd, write_agent
from tests.e2e.twilio_api import Answer, TwilioApi, twilio_api
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs

SOON_S = 6.0  # well over what stopping takes, well under every time limit that it must not wait for


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    """A dialogd that goes on running; every test leaves it taking calls."""
    return start_shared_dialogd()


@pytest.fixture
def api() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


async def health(twilio: Twilio) -> tuple[int, str]:
    """Return what a load balancer is told."""
    told = {(await twilio.request("GET", f"{PUBLIC_URL}/{path}", headers={})).status_code for path in ("healthz", "readyz")}
    answer = await twilio.request("GET", f"{PUBLIC_URL}/healthz", headers={})
    assert told == {answer.status_code}
    return answer.status_code, answer.text


@asynccontextmanager
async def talking(twilio: Twilio) -> AsyncIterator[PhoneCall]:
    """Place a call whose end is left to the test, and to dialogd, which may be gone by then."""
    call = PhoneCall(twilio)
    await call.ring()
    async with call.stream():
        yield call


async def terminate(dialogd: Dialogd) -> None:
    """Send SIGTERM and return when dialogd has noticed."""
    dialogd.signal(signal.SIGTERM)
    await dialogd.logged(event="stopping", signal="SIGTERM")


async def exits(dialogd: Dialogd) -> None:
    """Wait until it has ended well, which must be soon."""
    with trio.fail_after(SOON_S):
        assert await dialogd.exited() == 0


# On the way out


async def test_a_call_under_way_goes_on_after_sigterm_until_it_ends_by_itself(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(fallback={"dial": "+14155550111"})
    async with Twilio(dialogd) as twilio, talking(twilio) as call:
        await call.echo()
        await terminate(dialogd)
        await call.echo()
        assert await health(twilio) == (503, "stopping\n")
        assert verbs(await PhoneCall(twilio).ring()) == ["Dial"]
        await call.stop()
        assert await call.closed() == 1000
    await exits(dialogd)
    assert (await dialogd.ended(call.sid))["reason"] == "the carrier stopped the stream"
    assert not dialogd.find(event="call is forced to end")


async def test_what_a_call_needs_is_still_there_after_sigterm(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        await terminate(dialogd)
        async with call.stream():
            await call.echo()
            os.kill((await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"], signal.SIGKILL)
            await dialogd.logged(event="worker died in mid-call, and another takes over", call=call.sid)
            await call.echo()
        assert verbs(await call.after()) == ["Connect"]  # the socket was lost
        async with call.stream():
            await call.echo_again()
        await call.after("completed")
        await exits(dialogd)


async def test_a_call_that_outlasts_the_drain_is_forced_to_end_and_logged_so(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"drain_timeout": 0.3})
    async with Twilio(dialogd) as twilio:
        async with talking(twilio) as call:
            await call.echo()
            await terminate(dialogd)
            assert await call.closed() == 1000
        assert verbs(await call.after()) == ["Say", "Hangup"]
        await exits(dialogd)
    [forced] = dialogd.find(event="call is forced to end", call=call.sid, level="warning")
    assert (forced["state"], forced["drain_timeout"]) == ("streaming", 0.3)
    assert (await dialogd.ended(call.sid))["reason"] == "dialogd is stopping"


async def test_the_last_reports_on_a_call_are_heard_after_sigterm(start_dialogd: StartDialogd, api: TwilioApi) -> None:
    dialogd = start_dialogd(agent=RECORDER, twilio={"api_url": api.url})
    async with Twilio(dialogd) as twilio, talking(twilio) as call:
        await _record(dialogd, call, api)
        await terminate(dialogd)
        await call.stop()
        await dialogd.step(call.sid, kind="state", text="ending")
        await call.report("recording", RecordingSid="RE1", RecordingStatus="completed")
    await exits(dialogd)
    assert not dialogd.find(event="the carrier's last reports are not waited for")


async def test_reports_that_do_not_come_hold_up_no_stop(start_dialogd: StartDialogd, api: TwilioApi) -> None:
    calls = {"drain_timeout": 0.2, "ending_timeout": 0.3, "callbacks_timeout": 120}
    dialogd = start_dialogd(agent=RECORDER, twilio={"api_url": api.url}, calls=calls)
    async with Twilio(dialogd) as twilio, talking(twilio) as call:
        await _record(dialogd, call, api)
        await call.stop()
        await dialogd.step(call.sid, kind="state", text="ending")
    await terminate(dialogd)
    await exits(dialogd)
    assert not dialogd.find(event="call is forced to end")
    assert dialogd.find(event="the carrier's last reports are not waited for", call=call.sid, missing=["RE1"])


async def _record(dialogd: Dialogd, call: PhoneCall, api: TwilioApi) -> None:
    api.answers.append(Answer(201, '{"sid": "RE1"}'))
    await call.press("1")
    await dialogd.step(call.sid, kind="granted")


async def test_a_dialogd_that_stops_takes_no_order_but_to_stop(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    async with Twilio(dialogd) as twilio, talking(twilio) as call:
        await call.echo()
        await terminate(dialogd)
        undrain = await dialogd.ctl("undrain")
        assert (undrain.returncode, undrain.stdout) == (1, "")
        assert undrain.stderr == "dialogctl: dialogd is stopping, and takes no calls any more; start another\n"
        for order in ("reload", "rollback"):
            with pytest.raises(httpx.HTTPStatusError, match="409"):
                await dialogd.ask(f"/{order}", "POST")
        assert (await dialogd.ask("/drain", "POST"))["stopping"]
        assert "not taking calls: stopping\n" in (await dialogd.ctl("status")).stdout
        await call.stop()
    await exits(dialogd)


# For a while


async def test_a_drained_dialogd_refuses_calls_until_it_is_undrained(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio:
        await dialogd.ask("/drain", "POST")
        await dialogd.ask("/drain", "POST")  # a second time changes nothing
        assert verbs(await PhoneCall(twilio).ring()) == ["Say", "Hangup"]
        assert await health(twilio) == (503, "draining\n")
        await dialogd.ask("/undrain", "POST")
        assert await health(twilio) == (200, "ok\n")
        async with twilio.streaming() as call:
            await call.echo()


async def test_calls_under_way_notice_nothing_of_a_drain(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        assert (await dialogd.ask("/drain", "POST"))["calls"] >= 1
        await call.echo()
        assert verbs(await call.ring()) == ["Connect"]  # its webhook, sent again
        await dialogd.ask("/undrain", "POST")


async def test_dialogctl_drains_and_undrains_and_says_how_it_is_now(dialogd: Dialogd) -> None:
    said = [await dialogd.ctl(*words) for words in (["drain"], ["status"], ["undrain"], ["undrain", "--json"])]
    assert [one.returncode for one in said] == [0] * 4
    assert said[0].stdout.startswith("not taking calls: draining; ")
    assert "not taking calls: draining\n" in said[1].stdout
    assert said[2].stdout.startswith("taking calls; ")
    shown = json.loads(said[3].stdout)
    assert (shown["accepting"], shown["draining"], shown["stopping"]) == (True, False, False)


async def test_new_code_is_taken_while_no_calls_are(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    first = (await dialogd.ask("/drain", "POST")) and (await dialogd.ask("/status"))["generation"]
    write_agent(dialogd.directory / "agent", PROBE + "\n# newer\n")
    assert (await dialogd.ask("/reload", "POST"))["previous"] == first
    assert (await dialogd.ask("/rollback", "POST"))["generation"] == first
    assert (await dialogd.ask("/status"))["draining"]
