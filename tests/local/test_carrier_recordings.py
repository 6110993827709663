"""The phone company's recordings: what is in them, what is told of them, and what cannot be done with them."""

import io
import wave
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from starlette.websockets import WebSocket
from twilio.base.exceptions import TwilioRestException

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import AgentAudioEnded, RecordingChanged, StreamStarted
from dialog_local.carrier.phonecall import Call
from tests.local.carrier_api import download, twilio_client
from tests.local.customer import LOUD, SID, Customer, events, media, place, run, until

CALLERS = LOUD * 10  # 200 ms that the loudest samples tell from the agent's
AGENTS = bytes([0x90, 0x10]) * 800  # 200 ms, half as loud
CALLERS_LEVEL, AGENTS_LEVEL = 32124, 15996  # ITU-T G.711, of 0x80 and 0x90


class Recorded:
    """A call under way in which the agent speaks when it is told to; `api` is the call at Twilio's package."""

    def __init__(self, call: Call, api: Any, customer: Customer) -> None:
        self.call, self.api, self._customer = call, api, customer
        self.agent_speaks = trio.Event()

    async def start(self, **wishes: Any) -> str:
        """Begin to record; return the recording's sid."""
        url = self._customer.url + "/told"
        recording = await self.api.recordings.create_async(recording_status_callback=url, **wishes)
        return str(recording.sid)

    async def change(self, status: str, sid: str = "Twilio.CURRENT", **how: Any) -> None:
        await self.api.recordings(sid).update_async(status=status, **how)

    async def both_speak(self) -> None:
        """Have the caller speak and then the agent."""
        await self.call.caller.speak(CALLERS)
        self.agent_speaks.set()
        await until(self.call, AgentAudioEnded)

    async def audio(self) -> "list[array[int]]":
        """Return the channels of the recording, when it is told that it is complete."""
        told = await self._customer.told("/told")
        assert told["RecordingStatus"] == "completed"
        with wave.open(io.BytesIO((await download(told["RecordingUrl"] + ".wav")).content)) as file:
            assert (file.getframerate(), file.getsampwidth()) == (8000, 2)
            samples = array("h", file.readframes(file.getnframes()))
            return [samples[channel :: file.getnchannels()] for channel in range(file.getnchannels())]


@asynccontextmanager
async def talking(company: PhoneCompany, customer: Customer) -> AsyncIterator[Recorded]:
    """Have a call with a stream; it is hung up at the end of the block."""
    customer.documents |= {"/voice": customer.stream(), "/told": ""}
    call = place(company, customer)
    async with twilio_client(company) as client:
        there = Recorded(call, client.calls(call.sid), customer)

        async def converse(websocket: WebSocket, sid: str) -> None:
            await there.agent_speaks.wait()
            await websocket.send_text(media(sid, AGENTS))

        customer.converse = converse
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, call)
            await until(call, StreamStarted)
            yield there
            there.agent_speaks.set()
            call.caller.hang_up()


def about(ms: int) -> Any:
    """A frame more or less: so late the line may be on a busy machine."""
    return pytest.approx(ms, abs=20)


def loud_ms(samples: "array[int]") -> int:
    """How long somebody speaks."""
    return sum(1 for sample in samples if abs(sample) > 1000) // 8


# What is in them


async def test_two_channels_have_the_caller_left_and_the_agent_right(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there:
        await there.start(recording_channels="dual")
        await there.both_speak()
        await there.change("stopped")
        left, right = await there.audio()
    assert (max(left), loud_ms(left)) == (CALLERS_LEVEL, about(200))
    assert (max(right), loud_ms(right)) == (AGENTS_LEVEL, about(200))


async def test_one_channel_has_both(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there:
        await there.start()
        await there.both_speak()
        await there.change("stopped")
        [mixed] = await there.audio()
    assert (loud_ms(mixed), {CALLERS_LEVEL, AGENTS_LEVEL} <= set(mixed)) == (about(400), True)


@pytest.mark.parametrize(("track", "heard"), [("inbound", CALLERS_LEVEL), ("outbound", AGENTS_LEVEL)])
async def test_one_side_can_be_recorded(company: PhoneCompany, customer: Customer, track: str, heard: int) -> None:
    async with talking(company, customer) as there:
        await there.start(recording_track=track)
        await there.both_speak()
        await there.change("stopped")
        [samples] = await there.audio()
    assert (loud_ms(samples), max(samples)) == (about(200), heard)


@pytest.mark.parametrize(("pause", "at_least_ms", "below_ms"), [("silence", 800, 1500), ("skip", 400, 700)])
async def test_a_pause_is_silence_or_skipped(
    company: PhoneCompany, customer: Customer, pause: str, at_least_ms: int, below_ms: int
) -> None:
    async with talking(company, customer) as there:
        await there.start()
        await there.call.caller.speak(CALLERS)
        await there.change("paused", pause_behavior=pause)
        await there.call.caller.speak(CALLERS * 2)
        await there.change("in-progress")
        await there.call.caller.speak(CALLERS)
        await there.change("stopped")
        [samples] = await there.audio()
    assert loud_ms(samples) == about(400)
    assert at_least_ms <= len(samples) // 8 < below_ms


async def test_silence_before_and_after_can_be_cut_off(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there:
        await there.start(trim="trim-silence")
        await there.call.caller.speak(b"\xff" * 800 + CALLERS + b"\xff" * 800)
        await there.change("stopped")
        [samples] = await there.audio()
    assert len(samples) == len(CALLERS)


# What is told of them


async def test_a_recording_is_told_from_its_beginning_to_the_calls_end(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there:
        sid = await there.start(
            recording_channels="dual", recording_status_callback_event=["in-progress", "completed", "absent"]
        )
        await there.both_speak()
    begun, completed = customer.reports("/told")
    common = {
        "AccountSid": SID,
        "CallSid": there.call.sid,
        "RecordingSid": sid,
        "RecordingChannels": "2",
        "RecordingSource": "StartCallRecordingAPI",
        "RecordingTrack": "both",
    }
    assert common.items() <= begun.items()
    assert common.items() <= completed.items()
    assert (begun["RecordingStatus"], completed["RecordingStatus"]) == ("in-progress", "completed")
    assert completed["RecordingDuration"] == "1"
    assert completed["RecordingUrl"].endswith(f"/2010-04-01/Accounts/{SID}/Recordings/{sid}")
    assert {"From", "To"}.isdisjoint(completed)
    assert [changed.status for changed in events(there.call, RecordingChanged)] == ["in-progress", "stopped"]


async def test_only_the_completed_recording_is_told_by_default(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there:
        await there.start()
        await there.call.caller.speak(CALLERS)
    assert [told["RecordingStatus"] for told in customer.reports("/told")] == ["completed"]


async def test_what_recorded_nothing_is_told_as_absent(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there:
        sid = await there.start(recording_status_callback_event=["absent"])
        await there.change("stopped", sid)
        told = await customer.told("/told")
    assert (told["RecordingStatus"], "RecordingDuration" in told) == ("absent", False)


# What can and cannot be done with them


async def test_a_removed_recording_is_gone(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there, twilio_client(company) as client:
        sid = await there.start()
        await there.call.caller.speak(CALLERS)
        await there.change("stopped")
        await customer.told("/told")
        assert (await client.recordings(sid).fetch_async()).duration == "1"
        assert await client.recordings(sid).delete_async()
        with pytest.raises(TwilioRestException) as gone:
            await client.recordings(sid).fetch_async()
    assert (gone.value.status, gone.value.code) == (404, 20404)


async def test_a_recording_that_is_removed_before_it_is_complete_is_never_told(
    company: PhoneCompany, customer: Customer
) -> None:
    async with talking(company, customer) as there, twilio_client(company) as client:
        sid = await there.start()
        await there.call.caller.speak(CALLERS)
        await there.change("stopped")
        assert await client.recordings(sid).delete_async()
    assert customer.reports("/told") == []


async def test_a_recording_under_way_cannot_be_removed(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there, twilio_client(company) as client:
        sid = await there.start()
        with pytest.raises(TwilioRestException) as refused:
            await client.recordings(sid).delete_async()
    assert (refused.value.status, refused.value.code) == (400, 21220)


async def test_a_recording_that_is_over_cannot_be_paused(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there:
        sid = await there.start()
        await there.change("stopped")
        with pytest.raises(TwilioRestException) as refused:
            await there.change("paused", sid)
        with pytest.raises(TwilioRestException) as nothing_current:
            await there.change("paused")
    assert [(error.value.status, error.value.code) for error in (refused, nothing_current)] == [(400, 21220), (404, 20404)]


async def test_a_call_that_is_over_cannot_be_recorded(company: PhoneCompany, customer: Customer) -> None:
    customer.documents["/voice"] = "<Hangup/>"
    call = place(company, customer)
    await run(call)
    async with twilio_client(company) as client:
        with pytest.raises(TwilioRestException) as refused:
            await client.calls(call.sid).recordings.create_async()
    assert (refused.value.status, refused.value.code) == (400, 21220)


async def test_an_unknown_wish_is_refused_with_its_name(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there:
        with pytest.raises(TwilioRestException, match="RecordingChannels='quadro' is not one of mono, dual"):
            await there.start(recording_channels="quadro")


async def test_a_stranger_gets_no_recording(company: PhoneCompany, customer: Customer) -> None:
    async with talking(company, customer) as there:
        await there.start()
        await there.call.caller.speak(CALLERS)
        await there.change("stopped")
        url = (await customer.told("/told"))["RecordingUrl"]
        assert (await download(url + ".wav", token="wrong")).status_code == 401
