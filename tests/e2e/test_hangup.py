"""An agent that hangs up: Twilio's API is asked to end the call, after the caller has heard what was said."""

import base64
from collections.abc import Iterator

import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.daemon import ACCOUNT_SID, AUTH_TOKEN, Dialogd
from tests.e2e.twilio_api import TwilioApi, twilio_api
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs


@pytest.fixture(scope="module")
def served() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


@pytest.fixture
def api(served: TwilioApi) -> TwilioApi:
    """Twilio's API as it is when all goes well."""
    fresh = TwilioApi()
    served.status, served.body = fresh.status, fresh.body
    served.asked.clear()
    return served


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd, served: TwilioApi) -> Dialogd:
    return start_shared_dialogd(twilio={"api_url": served.url})


async def test_a_hangup_asks_twilio_to_complete_the_call(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("6")
        assert await call.closed() == 1000
        assert (await dialogd.ended(call.sid))["reason"] == "the agent hung up"
    [asked] = api.asked
    assert (asked.method, asked.path) == ("POST", f"/2010-04-01/Accounts/{ACCOUNT_SID}/Calls/{call.sid}.json")
    assert asked.form == {"Status": "completed"}
    assert asked.authorization == "Basic " + base64.b64encode(f"{ACCOUNT_SID}:{AUTH_TOKEN}".encode()).decode()


async def test_a_hangup_waits_until_the_caller_has_heard_everything(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("5")
        assert len(await call.hear()) == 1600  # 0.2 s
        mark = (await call.receive())["mark"]["name"]
        await trio.sleep(0.4)
        assert api.asked == []
        await call.return_mark(mark)
        assert await call.closed() == 1000
        dispatched = await dialogd.ended(call.sid)
    assert dispatched["reason"] == "the agent hung up"
    assert len(api.asked) == 1


PARTING = """
from dialog_worker import Agent, VoIP


class Parting(Agent):
    async def on_dtmf(self, dtmf) -> None:
        self.nursery.start_soon(self.part)

    async def part(self) -> None:
        await self.voip.hangup(after_playout=False)
        self.voip.trace("granted", "")


def create(voip: VoIP) -> Agent:
    return Parting(voip=voip)
"""


async def test_an_agent_is_told_that_its_hangup_was_granted_though_the_stream_ends_before_twilio_says_so(
    start_dialogd: StartDialogd, api: TwilioApi
) -> None:
    dialogd = start_dialogd(agent=PARTING, twilio={"api_url": api.url})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call, trio.open_nursery() as nursery:
        steps = await nursery.start(dialogd.watch, call.sid)
        api.speaks.clear()
        await call.press("6")
        with trio.fail_after(5):
            while not api.asked:  # noqa: ASYNC110 - another thread
                await trio.sleep(0.01)
        await call.stop()
        await dialogd.step(call.sid, kind="state", text="ending")
        api.speaks.set()
        await dialogd.ended(call.sid)
    assert "granted" in [step["kind"] for step in steps]


async def test_a_refused_hangup_raises_with_twilios_code_and_the_call_goes_on(dialogd: Dialogd, api: TwilioApi) -> None:
    api.fail(400, 21211, "Invalid 'To' Phone Number")
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("6")
        failed = await dialogd.step(call.sid, kind="failed")
        await call.echo()
    assert failed["fields"] == {"kind": "carrier", "code": "21211"}
    assert dialogd.find(event="request failed", request="Hangup", code=21211, call=call.sid)


@pytest.mark.parametrize(("status", "code"), [(404, 20404), (400, 21220)])
async def test_a_call_that_is_over_already_counts_as_hung_up(
    dialogd: Dialogd, api: TwilioApi, status: int, code: int
) -> None:
    api.fail(status, code, "The call is not there")
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("6")
        assert await call.closed() == 1000
        assert (await dialogd.ended(call.sid))["reason"] == "the agent hung up"


@pytest.mark.parametrize("status", [200, 502])
async def test_an_answer_that_is_not_twilios_fails_the_hangup_and_nothing_else(
    dialogd: Dialogd, api: TwilioApi, status: int
) -> None:
    api.status, api.body = status, "<html>a proxy speaks</html>"
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("6")
        failed = await dialogd.step(call.sid, kind="failed")
        await call.echo()
    assert failed["fields"]["kind"] == "carrier"


async def test_an_api_that_cannot_be_reached_fails_the_hangup(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("6")
        failed = await dialogd.step(call.sid, kind="failed")
        await call.echo()
        assert verbs(await call.after("completed")) == ["Hangup"]
    assert failed["fields"] == {"kind": "carrier", "code": "None"}


async def test_a_caller_who_falls_silent_is_asked_after_at_twilio(start_dialogd: StartDialogd, api: TwilioApi) -> None:
    dialogd = start_dialogd(twilio={"api_url": api.url}, calls={"silence_timeout": 0.3})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        assert await call.closed() == 1000
        assert (await dialogd.ended(call.sid))["reason"] == "the carrier stopped the stream"
    assert (api.asked[0].method, api.asked[0].path.rpartition("/")[2]) == ("GET", f"{call.sid}.json")


async def test_a_silent_call_that_lives_at_twilio_goes_on_over_another_media_socket(
    start_dialogd: StartDialogd, api: TwilioApi
) -> None:
    api.body = '{"status": "in-progress"}'
    dialogd = start_dialogd(twilio={"api_url": api.url}, calls={"silence_timeout": 0.5})
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await call.echo()
            assert await call.closed() == 1000
        assert verbs(await call.after()) == ["Connect"]
        async with call.stream():
            await call.echo_again()
        await call.after("completed")


async def test_a_silent_call_of_which_twilio_cannot_say_whether_it_lives_goes_on(
    start_dialogd: StartDialogd, api: TwilioApi
) -> None:
    api.status = 502
    dialogd = start_dialogd(twilio={"api_url": api.url}, calls={"silence_timeout": 0.2})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await dialogd.logged(event="nothing comes from the carrier, and its API does not say why", call=call.sid)
        await call.echo()
