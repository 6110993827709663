"""An agent that has its call transcribed by Twilio: what it asks for, and what it is told."""

import json
from collections.abc import Iterator

import pytest

from tests.conftest import StartDialogd
from tests.e2e.daemon import PUBLIC_URL, RECORDER, Dialogd
from tests.e2e.twilio_api import Answer, TwilioApi, refusal, twilio_api
from tests.e2e.twilio_client import PhoneCall, Twilio


@pytest.fixture(scope="module")
def served() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


@pytest.fixture
def api(served: TwilioApi) -> TwilioApi:
    """Twilio's API, which will begin the transcription GT1."""
    served.asked.clear()
    served.answers[:] = [Answer(201, '{"sid": "GT1"}')]
    return served


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd, served: TwilioApi) -> Dialogd:
    return start_shared_dialogd(agent=RECORDER, twilio={"api_url": served.url})


async def report(call: PhoneCall, event: str, **fields: str) -> None:
    """Have Twilio report on the transcription."""
    told = {"TranscriptionSid": "GT1", "TranscriptionEvent": f"transcription-{event}"} | fields
    assert (await call.report("transcript", **told)).status_code == 204


async def content(call: PhoneCall, text: str, *, final: bool, track: str = "inbound_track") -> None:
    """Have Twilio report what was said."""
    data = {"transcript": text} | ({"confidence": 0.9} if final else {})
    await report(call, "content", TranscriptionData=json.dumps(data), Final=str(final).lower(), Track=track)


async def begin(call: PhoneCall, dialogd: Dialogd) -> None:
    """Have the agent ask for a transcription, and Twilio begin it."""
    await call.press("7")
    await dialogd.step(call.sid, kind="granted", text="7")
    await report(call, "started")


async def test_both_sides_are_transcribed_and_reported_here(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await begin(call, dialogd)
        await report(call, "stopped")
    [asked] = api.asked
    assert asked.path.endswith(f"/Calls/{call.sid}/Transcriptions.json")
    assert (asked.form["Track"], asked.form["PartialResults"]) == ("both_tracks", "true")
    assert asked.form["StatusCallbackUrl"] == f"{PUBLIC_URL}/twilio/transcript"


async def test_the_agent_is_told_of_drafts_and_of_what_was_said_by_whom(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await begin(call, dialogd)
        await content(call, "When are", final=False)
        await content(call, "When are you open?", final=True)
        await content(call, "From nine to five.", final=True, track="outbound_track")
        await report(call, "stopped")
        told = await dialogd.steps(call.sid, 3, kind="transcript")
    assert [(step["text"], step["fields"]) for step in told] == [
        ("When are", {"track": "inbound", "final": "False"}),
        ("When are you open?", {"track": "inbound", "final": "True"}),
        ("From nine to five.", {"track": "outbound", "final": "True"}),
    ]


async def test_what_was_said_is_not_logged(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await begin(call, dialogd)
        await content(call, "My card number is a secret.", final=True)
        await report(call, "stopped")
        await dialogd.step(call.sid, kind="transcript")
    assert "card number" not in dialogd.text


async def test_the_agent_stops_it(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await begin(call, dialogd)
        api.answers.append(Answer(200, "{}"))
        await call.press("8")
        await dialogd.step(call.sid, kind="granted", text="8")
        await report(call, "stopped")
        assert await dialogd.step(call.sid, kind="transcript_status", text="stopped")
    assert api.asked[1].path.endswith("/Transcriptions/GT1.json")
    assert api.asked[1].form == {"Status": "stopped"}


async def test_an_engine_that_fails_is_told_and_logged_and_the_call_goes_on(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await begin(call, dialogd)
        await report(call, "error", ErrorCode="32650", ErrorMessage="Invalid engine")
        failed = await dialogd.step(call.sid, kind="transcript_status", text="failed")
        await call.echo()
    assert failed["fields"] == {"code": "32650"}
    assert await dialogd.logged(
        event="transcription failed", call=call.sid, code=32650, reason="Invalid engine", level="warning"
    )


async def test_an_engine_that_twilio_does_not_have_fails_the_request(dialogd: Dialogd, api: TwilioApi) -> None:
    api.answers[:] = [refusal(400, 32650, "Invalid TranscriptionEngine")]
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("7")
        failed = await dialogd.step(call.sid, kind="failed")
        await call.echo()
    assert failed["fields"] == {"kind": "carrier", "code": "32650", "status": "400"}
