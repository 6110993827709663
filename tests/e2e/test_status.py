"""Twilio's reports on a call: authentic or refused, told to the agent, and waited for when the conversation is over."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import StreamStarted
from dialog_local.carrier.phonecall import Call
from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import ACCOUNT_SID, AUTH_TOKEN, PUBLIC_URL, RECORDER, Dialogd
from tests.e2e.twilio_api import Answer, TwilioApi, twilio_api
from tests.e2e.twilio_client import CALLEE, CALLER, FORM, PhoneCall, Twilio, sign

ABOUT = ["recording", "transcript", "stream", "status"]


@pytest.fixture(scope="module")
def served() -> Iterator[TwilioApi]:
    with twilio_api() as api:
        yield api


@pytest.fixture
def api(served: TwilioApi) -> TwilioApi:
    """Twilio's API as it is when all goes well."""
    served.asked.clear()
    served.answers.clear()
    return served


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd, served: TwilioApi) -> Dialogd:
    return start_shared_dialogd(agent=RECORDER, twilio={"api_url": served.url}, calls={"shutdown_grace": 1})


async def record(call: PhoneCall, dialogd: Dialogd, api: TwilioApi, *, download: bool = False) -> None:
    """Have the agent start a recording, RE1."""
    api.answers.append(Answer(201, '{"sid": "RE1"}'))
    await call.press("2" if download else "1")
    await dialogd.step(call.sid, kind="granted")


async def in_state(dialogd: Dialogd, call: PhoneCall, state: str) -> dict[str, object]:
    """Wait until a call is in a state and return what `dialogctl call` says of it."""
    with trio.fail_after(PATIENCE_S):
        await dialogd.step(call.sid, kind="state", text=state)
    shown: dict[str, object] = await dialogd.ask(f"/calls/{call.sid}")
    assert shown["state"] == state
    return shown


# Authentic or refused


@pytest.mark.parametrize("about", ABOUT)
async def test_a_report_that_is_not_twilios_is_refused_as_every_webhook_is(dialogd: Dialogd, about: str) -> None:
    url = f"{PUBLIC_URL}/twilio/{about}"
    form, signed = {"Content-Type": FORM}, {"X-Twilio-Signature": sign(url, {"CallSid": "CA1"})}
    async with Twilio(dialogd) as twilio:
        answers = [
            await twilio.request("POST", url, headers=form, content=b"CallSid=CA1"),
            await twilio.request("POST", url, headers=form | {"X-Twilio-Signature": "no"}, content=b"CallSid=CA1"),
            await twilio.request("POST", url, headers=form | signed, content=b"CallSid=CA2"),
            await twilio.request("GET", url, headers=signed),
            await twilio.request("POST", url, headers=signed | {"Content-Type": "application/json"}, content=b"{}"),
        ]
    assert [answer.status_code for answer in answers] == [400, 403, 403, 405, 415]


@pytest.mark.parametrize("about", ABOUT)
async def test_a_report_on_an_unknown_call_is_taken_and_logged(dialogd: Dialogd, about: str) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        assert (await call.report(about)).status_code == 204
    assert await dialogd.logged(event="a report on a call that is over", call=call.sid, about=about, level="info")


@pytest.mark.parametrize("about", ABOUT)
async def test_a_report_that_says_nothing_is_taken_and_logged_and_the_call_goes_on(dialogd: Dialogd, about: str) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        assert (await call.report(about)).status_code == 204
        await call.echo()
    assert await dialogd.logged(event="a report cannot be read", call=call.sid, about=about, level="warning")


async def test_twilio_is_told_where_to_report_on_the_stream(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        stream = call.document.find("Connect/Stream")
    assert stream is not None
    assert stream.attrib["statusCallback"] == f"{PUBLIC_URL}/twilio/stream"
    assert stream.attrib["statusCallbackMethod"] == "POST"


# Told to the agent


@pytest.mark.parametrize(
    ("about", "fields", "step"),
    [
        ("status", {"CallStatus": "in-progress"}, {"kind": "call_status", "text": "in-progress"}),
        ("stream", {"StreamEvent": "stream-started"}, {"kind": "stream_status", "text": "started"}),
        ("recording", {"RecordingSid": "RE1", "RecordingStatus": "completed"}, {"kind": "recording"}),
        (
            "transcript",
            {"TranscriptionEvent": "transcription-content", "TranscriptionData": '{"transcript": "Zoë"}'},
            {"kind": "transcript", "text": "Zoë"},
        ),
    ],
)
async def test_a_report_reaches_the_agent(
    dialogd: Dialogd, about: str, fields: dict[str, str], step: dict[str, str]
) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        assert (await call.report(about, **fields)).status_code == 204
        assert await dialogd.step(call.sid, **step)


async def test_an_error_of_the_stream_is_logged_for_the_operator(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.report("stream", StreamEvent="stream-error", StreamSid=call.stream_sid, StreamError="31924")
        told = await dialogd.step(call.sid, kind="stream_status")
    assert told["fields"] == {"message": "31924"}
    assert await dialogd.logged(event="Twilio reports an error of the media stream", call=call.sid, reason="31924")


# The call's end


@pytest.mark.parametrize("status", ["completed", "busy", "failed", "no-answer", "canceled"])
async def test_a_report_that_the_call_is_over_ends_it(dialogd: Dialogd, status: str) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.report("status", CallStatus=status)
        assert await call.closed() == 1000
        assert (await dialogd.ended(call.sid))["reason"] == "the caller hung up"


async def test_an_end_that_the_agent_asked_for_is_its_own_though_twilio_reports_it_first(
    dialogd: Dialogd, api: TwilioApi
) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        api.speaks.clear()
        await call.press("9")
        with trio.fail_after(PATIENCE_S):
            while not api.asked:  # noqa: ASYNC110 - a server in a thread
                await trio.sleep(0.01)
        await call.report("status", CallStatus="completed")
        api.speaks.set()
        assert (await dialogd.ended(call.sid))["reason"] == "the agent hung up"


# What is owed when the conversation is over


async def test_a_call_lives_on_for_its_recording_and_the_agent_hears_of_it_before_the_shutdown(
    dialogd: Dialogd, api: TwilioApi
) -> None:
    async with Twilio(dialogd) as twilio:
        async with twilio.streaming() as call:
            await record(call, dialogd, api)
            await call.stop()
            await call.closed()
        pid = (await in_state(dialogd, call, "ending"))["worker_pid"]
        async with trio.open_nursery() as nursery:
            steps = await nursery.start(dialogd.watch, call.sid)
            os.kill(int(str(pid)), 0)
            await call.report(
                "recording", RecordingSid="RE1", RecordingStatus="completed", RecordingUrl="https://x.test/RE1"
            )
    kinds = [step["kind"] for step in steps if step["kind"] != "log"]
    assert kinds[-5:] == ["streaming_stopped", "recording_status", "recording", "shutdown", "state"]


async def test_what_was_said_last_is_heard_by_an_agent_whose_call_is_over(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio:
        async with twilio.streaming() as call:
            api.answers.append(Answer(201, '{"sid": "GT1"}'))
            await call.press("7")
            await dialogd.step(call.sid, kind="granted")
        await in_state(dialogd, call, "ending")
        async with trio.open_nursery() as nursery:
            steps = await nursery.start(dialogd.watch, call.sid)
            said = {"TranscriptionEvent": "transcription-content", "TranscriptionData": '{"transcript": "Bye"}'}
            await call.report("transcript", TranscriptionSid="GT1", Track="inbound_track", **said)
            await call.report("transcript", TranscriptionSid="GT1", TranscriptionEvent="transcription-stopped")
    told = [(step["kind"], step["text"]) for step in steps if step["kind"].startswith(("transcript", "shutdown"))]
    assert told == [("transcript", "Bye"), ("transcript_status", "stopped"), ("shutdown", "the caller hung up")]


async def test_a_call_that_owes_nothing_ends_at_once(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await record(call, dialogd, api)
        await call.report("recording", RecordingSid="RE1", RecordingStatus="completed")
        await call.stop()
        assert (await dialogd.ended(call.sid))["seconds"] < 5


async def test_what_never_comes_is_waited_for_as_long_as_configured(
    start_dialogd: StartDialogd, served: TwilioApi, api: TwilioApi
) -> None:
    dialogd = start_dialogd(agent=RECORDER, twilio={"api_url": served.url}, calls={"callbacks_timeout": 0.3})
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await record(call, dialogd, api)
        await call.stop()
        await dialogd.ended(call.sid)
    warning = await dialogd.logged(
        event="the carrier has not told the end of every recording and transcription", call=call.sid
    )
    assert (warning["missing"], warning["timeout_s"]) == (["RE1"], 0.3)


async def test_a_worker_that_was_killed_does_not_cost_its_caller_the_recording(dialogd: Dialogd, api: TwilioApi) -> None:
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await record(call, dialogd, api, download=True)
            pid = (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]
            os.kill(pid, signal.SIGKILL)
            await dialogd.logged(event="worker died in mid-call, and another takes over", call=call.sid)
            await call.stop()
            await call.closed()
        api.answers.append(Answer(200, b"RIFF and so on"))
        url = f"{api.url}/2010-04-01/Accounts/AC1/Recordings/RE1"
        await call.report("recording", RecordingSid="RE1", RecordingStatus="completed", RecordingUrl=url)
        await dialogd.ended(call.sid)
    kept = dialogd.directory / "recordings" / f"{call.sid}-RE1.wav"
    assert kept.read_bytes() == b"RIFF and so on"
    assert await dialogd.logged(event="recording is kept", path=str(kept))


# As the emulated carrier sends them


@asynccontextmanager
async def emulated(start_dialogd: StartDialogd) -> AsyncIterator[tuple[Dialogd, Call]]:
    """Have a call under way between the emulated carrier and a dialogd, with reports on its status."""
    company = PhoneCompany(ACCOUNT_SID, AUTH_TOKEN)
    async with company.serve() as api_url, trio.open_nursery() as nursery:
        start = partial(start_dialogd, agent=RECORDER, twilio={"api_url": api_url}, calls={"shutdown_grace": 1})
        dialogd: Dialogd = await trio.to_thread.run_sync(start)
        voice_url, status_url = f"{PUBLIC_URL}/twilio/voice", f"{PUBLIC_URL}/twilio/status"
        via = f"http://127.0.0.1:{dialogd.port}"
        call = company.call(voice_url, CALLER, CALLEE, via=via, status_url=status_url)
        nursery.start_soon(call.run)
        with trio.fail_after(PATIENCE_S):
            async for event in call.log:
                if isinstance(event, StreamStarted):
                    break
        yield dialogd, call
        await dialogd.ended(call.sid)
        nursery.cancel_scope.cancel()


async def test_a_caller_who_hangs_up_at_the_emulated_carrier_ends_the_call(start_dialogd: StartDialogd) -> None:
    async with emulated(start_dialogd) as (dialogd, call):
        assert await dialogd.step(call.sid, kind="stream_status", text="started")
        call.caller.hang_up()
        ended = await dialogd.ended(call.sid)
    assert ended["reason"] in {"the carrier stopped the stream", "the caller hung up"}  # whichever report is first
    assert ended["seconds"] < 5


async def test_an_agent_that_hangs_up_at_the_emulated_carrier_is_known_to_have(start_dialogd: StartDialogd) -> None:
    async with emulated(start_dialogd) as (dialogd, call):
        call.caller.press("9")
        ended = await dialogd.ended(call.sid)
    assert ended["reason"] == "the agent hung up"
    assert call.status == "completed"


async def test_what_the_emulated_carrier_refuses_is_the_agents_to_handle(start_dialogd: StartDialogd) -> None:
    async with emulated(start_dialogd) as (dialogd, call):
        call.caller.press("*")
        failed = await dialogd.step(call.sid, kind="failed")
        call.caller.hang_up()
    assert failed["fields"]["kind"] == "refused"
