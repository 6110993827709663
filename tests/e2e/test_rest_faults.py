"""Twilio's REST API out of order: what the agent sees of it, what the operator sees, and that the call goes on."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.conftest import StartDialogd
from tests.e2e.daemon import NOWHERE, RECORDER, Dialogd
from tests.e2e.twilio_api import Answer, TwilioApi, refusal, twilio_api
from tests.e2e.twilio_client import PhoneCall, Twilio


@pytest.fixture(scope="module")
def served() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


@pytest.fixture
def api(served: TwilioApi) -> Iterator[TwilioApi]:
    """Twilio's API as it is when all goes well."""
    served.asked.clear()
    served.answers.clear()
    yield served
    served.speaks.set()


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd, served: TwilioApi) -> Dialogd:
    limits = {"api_url": served.url, "timeout": 0.5}
    return start_shared_dialogd(agent=RECORDER, twilio=limits, transfer={"allow": ["+1555*"]}, calls={"shutdown_grace": 1})


@dataclass(frozen=True)
class Fault:
    """What Twilio answers, and what is seen of it: the failure's code and status, and words of its reason."""

    answers: tuple[Answer, ...]
    code: int | None
    status: int | None
    reason: str


FAULTS = {
    "too many requests": Fault(
        (refusal(429, 20429, "Too Many Requests", retry_after="0"),) * 5, 20429, 429, "Twilio answered 429: "
    ),
    "an outage": Fault((refusal(503, 20503, "Service Unavailable"),), 20503, 503, "Twilio answered 503: "),
    "a proxy's page": Fault((Answer(503, "<html>"),), None, 503, "Twilio answered 503: "),
    "wrong credentials": Fault((refusal(401, 20003, "Authenticate"),), 20003, 401, "Authenticate"),
    "a page in place of an answer": Fault((Answer(200, "<html>"),), None, None, "something else than a JSON object"),
    "a wait that is too long": Fault((refusal(429, 20429, "Too Many", retry_after="9"),), 20429, 429, "Too Many"),
}
REQUESTS = {"1": "StartRecording", "7": "StartTranscript", "9": "Hangup", "*": "TransferTo"}


@pytest.mark.parametrize("key", REQUESTS, ids=REQUESTS.values())
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_request_that_fails_is_the_agents_to_handle(
    dialogd: Dialogd, api: TwilioApi, fault: Fault, key: str
) -> None:
    api.answers += fault.answers
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press(key)
        await _seen(dialogd, call, REQUESTS[key], fault)
        await call.echo()
    assert len(api.asked) == len(fault.answers)


async def _seen(dialogd: Dialogd, call: PhoneCall, request: str, fault: Fault) -> None:
    """Check what agent and operator see of a request that failed."""
    failed = await dialogd.step(call.sid, kind="failed")
    assert failed["fields"] == {"kind": "carrier", "code": str(fault.code), "status": str(fault.status)}
    assert fault.reason in failed["text"]
    line = await dialogd.logged(event="request failed", request=request, call=call.sid)
    assert (line["level"], line["kind"], line["code"]) == ("warning", "carrier", fault.code)
    assert fault.reason in line["reason"]


async def test_a_silent_api_fails_a_request_at_twilios_timeout(dialogd: Dialogd, api: TwilioApi) -> None:
    api.speaks.clear()
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("1")
        await _seen(dialogd, call, "StartRecording", Fault((), None, None, "cannot be reached: ReadTimeout"))
        await call.echo()


async def test_an_api_that_is_not_there_fails_a_request(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(agent=RECORDER)
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("1")
        await _seen(dialogd, call, "StartRecording", Fault((), None, None, f"Twilio's API at {NOWHERE} cannot be reached"))
        await call.echo()


async def test_a_request_that_came_too_often_is_granted_in_the_end(dialogd: Dialogd, api: TwilioApi) -> None:
    api.answers += [refusal(429, 20429, "Too Many Requests", retry_after="0")] * 2
    api.answers.append(Answer(201, '{"sid": "RE1"}'))
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("1")
        assert await dialogd.step(call.sid, kind="granted")
        await call.report("recording", RecordingSid="RE1", RecordingStatus="absent")
    for attempt in (1, 2):
        assert await dialogd.logged(event="Twilio is asked too often; asking again", call=call.sid, attempt=attempt)


async def test_a_recording_that_cannot_be_copied_is_told_as_what_it_is(dialogd: Dialogd, api: TwilioApi) -> None:
    api.answers += [Answer(201, '{"sid": "RE1"}'), refusal(401, 20003, "Authenticate")]
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("2")
        await dialogd.step(call.sid, kind="granted")
        url = f"{api.url}/2010-04-01/Accounts/AC1/Recordings/RE1"
        await call.report("recording", RecordingSid="RE1", RecordingStatus="completed", RecordingUrl=url)
        error, told = await dialogd.step(call.sid, kind="error"), await dialogd.step(call.sid, kind="recording")
        await call.echo()
    assert (error["text"], told["text"], told["fields"]["url"]) == ("recording_not_copied", "", url)
    line = await dialogd.logged(event="recording is not copied; it is still at the carrier", call=call.sid)
    assert (line["level"], line["reason"]) == ("error", "Twilio answered 401 for the recording")
