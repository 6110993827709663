"""An agent that transfers its caller: where the operator allows, and nowhere else."""

from collections.abc import Iterator

import pytest

from tests.conftest import StartDialogd
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_api import TwilioApi, twilio_api
from tests.e2e.twilio_client import Twilio


@pytest.fixture
def api() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


@pytest.fixture
def dialogd(start_dialogd: StartDialogd, api: TwilioApi) -> Dialogd:
    return start_dialogd(twilio={"api_url": api.url}, transfer={"allow": ["+1555*"]})


async def test_an_allowed_number_is_dialled_by_twilio(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("*")
        assert await call.closed() == 1000
        assert (await dialogd.ended(call.sid))["reason"] == "the agent transferred the caller"
    [asked] = api.asked
    assert asked.path.endswith(f"/Calls/{call.sid}.json")
    assert "<Dial><Number>+15557654321</Number></Dial>" in asked.form["Twiml"]


async def test_any_other_number_is_refused_and_the_call_goes_on(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("#")
        failed = await dialogd.step(call.sid, kind="failed")
        await call.echo()
    assert failed["fields"]["kind"] == "refused"
    assert "[transfer] allow" in failed["text"]
    assert api.asked == []


async def test_without_a_list_every_transfer_is_refused(start_dialogd: StartDialogd, api: TwilioApi) -> None:
    dialogd = start_dialogd(twilio={"api_url": api.url})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("*")
        failed = await dialogd.step(call.sid, kind="failed")
    assert failed["fields"]["kind"] == "refused"
    assert api.asked == []


async def test_twilios_refusal_reaches_the_agent_with_its_code(dialogd: Dialogd, api: TwilioApi) -> None:
    api.fail(400, 21220, "Call is not in-progress. Cannot redirect.")
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("*")
        failed = await dialogd.step(call.sid, kind="failed")
        await call.echo()
    assert failed["fields"] == {"kind": "carrier", "code": "21220"}
