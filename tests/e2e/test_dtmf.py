"""An agent that presses keys: Twilio plays them, and the same call comes back on a new stream."""

from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_api import TwilioApi, twilio_api
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs


@pytest.fixture
def api() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


@pytest.fixture
def dialogd(start_dialogd: StartDialogd, api: TwilioApi) -> Dialogd:
    return start_dialogd(twilio={"api_url": api.url})


async def test_keys_are_played_and_the_call_goes_on_with_the_same_worker(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await call.echo()
            await call.press("A")
            await dialogd.step(call.sid, kind="granted")
            pid = (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]
            [asked] = api.asked
            document = ElementTree.fromstring(asked.form["Twiml"])
            assert verbs(document) == ["Play", "Connect"]
            assert document[0].get("digits") == "1w2#"
            await call.stop()
            assert await call.closed() == 1000
        call.document = document
        async with call.stream():
            await call.echo_again()
            assert (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"] == pid
            await call.press("0")
            assert (await dialogd.step(call.sid, kind="alive"))["fields"] == {"started": "1"}  # it heard of one stream only
        await call.after("completed")
        assert (await dialogd.ended(call.sid))["reason"] == "the caller hung up"


async def test_the_new_stream_may_be_there_before_the_old_one_has_ended(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio:
        call, again = PhoneCall(twilio), PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await call.press("A")
            await dialogd.step(call.sid, kind="granted")
            again.sid, again.document = call.sid, ElementTree.fromstring(api.asked[0].form["Twiml"])
            async with again.stream():
                assert await call.closed() == 1000
                await again.echo()
                await again.stop()  # the caller hangs up: no third stream is to follow
                assert (await dialogd.ended(call.sid))["reason"] == "the carrier stopped the stream"


async def test_what_is_no_key_is_refused_and_the_call_goes_on(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("B")
        failed = await dialogd.step(call.sid, kind="failed")
        await call.echo()
    assert "call me" not in failed["text"]  # keys may be a secret of the caller's
    assert api.asked == []
