"""The phone company's real-time transcriptions: who is heard, what is told in which order, and what ends them."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from starlette.websockets import WebSocket
from twilio.base.exceptions import TwilioRestException

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import AgentAudioEnded, StreamStarted, Transcribed, TranscriptionChanged
from dialog_local.carrier.phonecall import Call
from dialog_local.carrier.transcriptions import Deaf
from tests.local.carrier_api import twilio_client
from tests.local.customer import LOUD, SID, TOKEN, Customer, events, media, place, run, until

AGENTS = bytes([0x90, 0x10]) * 800  # 200 ms


async def ear(audio: bytes) -> str:
    """Tell the parties apart by how loud they are."""
    return "the caller speaks" if b"\x80\x00" in audio else "the agent speaks"


@asynccontextmanager
async def talking(
    customer: Customer, ear: Callable[[bytes], Awaitable[str]] | None = ear
) -> AsyncIterator[tuple[Call, Any]]:
    """Have a call in which the agent echoes a key with a sound; give it, and its transcriptions at Twilio's package."""
    company = PhoneCompany(SID, TOKEN, ear=ear)
    customer.documents |= {"/voice": customer.stream(), "/told": ""}

    async def converse(websocket: WebSocket, sid: str) -> None:
        while json.loads(await websocket.receive_text())["event"] != "dtmf":
            pass
        await websocket.send_text(media(sid, AGENTS))

    customer.converse = converse
    call = place(company, customer)
    async with twilio_client(company) as client, trio.open_nursery() as nursery:
        nursery.start_soon(run, call)
        await until(call, StreamStarted)
        yield call, client.calls(call.sid).transcriptions
        call.caller.hang_up()


async def both_speak(call: Call) -> None:
    await call.caller.speak(LOUD * 10)
    call.caller.press("1")
    await until(call, AgentAudioEnded)


async def test_both_sides_are_heard_each_on_its_track(customer: Customer) -> None:
    async with talking(customer) as (call, transcriptions):
        made = await transcriptions.create_async(status_callback_url=customer.url + "/told")
        await both_speak(call)
        await customer.told("/told", 3)
        await transcriptions(made.sid).update_async(status="stopped")
        await customer.told("/told", 4)
    started, *contents, stopped = customer.reports("/told")
    assert [told["TranscriptionEvent"] for told in (started, *contents, stopped)] == [
        "transcription-started",
        "transcription-content",
        "transcription-content",
        "transcription-stopped",
    ]
    assert [told["SequenceId"] for told in (started, *contents, stopped)] == ["1", "2", "3", "4"]
    assert {(told["CallSid"], told["TranscriptionSid"]) for told in (started, *contents, stopped)} == {(call.sid, made.sid)}
    heard = {told["Track"]: json.loads(told["TranscriptionData"]) for told in contents}
    assert heard["inbound_track"]["transcript"] == "the caller speaks"
    assert heard["outbound_track"]["transcript"] == "the agent speaks"
    assert {told["Final"] for told in contents} == {"true"}
    assert {said.text for said in events(call, Transcribed)} == {"the caller speaks", "the agent speaks"}
    assert [changed.status for changed in events(call, TranscriptionChanged)] == ["in-progress", "stopped"]


async def test_a_draft_without_confidence_comes_before_what_is_final(customer: Customer) -> None:
    async with talking(customer) as (call, transcriptions):
        await transcriptions.create_async(status_callback_url=customer.url + "/told", partial_results=True)
        await call.caller.speak(LOUD * 10)
    _, draft, final, _ = customer.reports("/told")
    assert (draft["Final"], final["Final"]) == ("false", "true")
    assert json.loads(draft["TranscriptionData"]) == {"transcript": "the caller speaks"}
    assert "Stability" in draft
    assert "confidence" in json.loads(final["TranscriptionData"])
    assert "Stability" not in final


async def test_one_track_can_be_chosen(customer: Customer) -> None:
    async with talking(customer) as (call, transcriptions):
        await transcriptions.create_async(status_callback_url=customer.url + "/told", track="outbound_track")
        await both_speak(call)
    assert [told["Track"] for told in customer.reports("/told")[1:-1]] == ["outbound_track"]


async def test_what_is_being_said_when_the_call_ends_is_told_before_the_end(customer: Customer) -> None:
    async with talking(customer) as (call, transcriptions):
        await transcriptions.create_async(status_callback_url=customer.url + "/told")
        await call.caller.speak(LOUD * 10)
    told = [each["TranscriptionEvent"].removeprefix("transcription-") for each in customer.reports("/told")]
    assert told == ["started", "content", "stopped"]


async def test_what_was_said_before_is_not_transcribed(customer: Customer) -> None:
    async with talking(customer) as (call, transcriptions):
        await call.caller.speak(LOUD * 10 + b"\xff" * 8000)
        await transcriptions.create_async(status_callback_url=customer.url + "/told")
    told = [each["TranscriptionEvent"].removeprefix("transcription-") for each in customer.reports("/told")]
    assert told == ["started", "stopped"]


async def test_an_ear_that_fails_is_told_as_an_error_and_ends_the_transcription(customer: Customer) -> None:
    async def deaf(_audio: bytes) -> str:
        raise Deaf("the speech server is gone")

    async with talking(customer, deaf) as (call, transcriptions):
        made = await transcriptions.create_async(status_callback_url=customer.url + "/told")
        await call.caller.speak(LOUD * 10 + b"\xff" * 8000)
        await customer.told("/told", 3)
        with pytest.raises(TwilioRestException) as over:
            await transcriptions(made.sid).update_async(status="stopped")
    _, error, stopped = customer.reports("/told")
    assert (error["ErrorCode"], error["ErrorMessage"]) == ("32650", "the speech server is gone")
    assert stopped["TranscriptionEvent"] == "transcription-stopped"
    assert (over.value.status, over.value.code) == (400, 21220)


@pytest.mark.parametrize(("engine", "given"), [("google", None), ("parrot", ear)])
async def test_without_an_ear_or_with_an_unknown_engine_nothing_is_transcribed(
    customer: Customer, engine: str, given: Callable[[bytes], Awaitable[str]] | None
) -> None:
    async with talking(customer, given) as (_, transcriptions):
        with pytest.raises(TwilioRestException, match=engine) as refused:
            await transcriptions.create_async(transcription_engine=engine)
    assert (refused.value.status, refused.value.code) == (400, 32650)
