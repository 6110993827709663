"""Recording, transcription, refusals and limits as an emulated carrier has them: a whole call each, with real audio."""

import io
import socket
import wave
from array import array
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import Ended, Played, StreamStarted
from dialog_local.carrier.faults import RestError
from dialog_local.carrier.phonecall import Call
from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import ACCOUNT_SID, AUTH_TOKEN, PUBLIC_URL, RECORDER
from tests.e2e.twilio_client import CALLEE, CALLER

TONE = bytes([0x10, 0x90] * 800)  # 200 ms of a loud one, in mu-law
SILENCE = b"\xff" * 1600


class Desk:
    """A dialogd whose carrier's API will be at a port of its own, for one call after another."""

    def __init__(self, start: StartDialogd, *, agent: str = RECORDER, **sections: Mapping[str, object]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        twilio = {"api_url": f"http://127.0.0.1:{self.port}"}
        self.dialogd = start(agent=agent, twilio=twilio, log={"transcripts": True}, **sections)


@pytest.fixture(scope="module")
def desk(start_shared_dialogd: StartDialogd) -> Desk:
    return Desk(start_shared_dialogd, transfer={"allow": ["+1555*"]})


class Placed:
    """A call under way between the emulated carrier and a dialogd; `steps` are all that happened in it so far."""

    def __init__(self, desk: Desk, company: PhoneCompany, call: Call, steps: list[dict[str, Any]]) -> None:
        self.dialogd, self.company, self.call, self.steps = desk.dialogd, company, call, steps

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the steps of a kind so far."""
        return [step for step in self.steps if step["kind"] == kind]

    async def until(self, kind: str, count: int = 1, **wanted: str) -> dict[str, Any]:
        """Return the last of so many steps of a kind, as soon as there are so many."""
        with trio.fail_after(PATIENCE_S):
            while len(found := [step for step in self.of(kind) if wanted.items() <= step.items()]) < count:  # noqa: ASYNC110
                await trio.sleep(0.01)  # another process tells
        return found[count - 1]

    async def press(self, keys: str, kind: str = "granted") -> dict[str, Any]:
        """Press keys, each after the agent was answered on the one before; return what the last was answered."""
        step: dict[str, Any] = {}
        for key in keys:
            before = len(self.of(kind))
            self.call.caller.press(key)
            step = await self.until(kind, before + 1)
        return step


@asynccontextmanager
async def placed(desk: Desk) -> AsyncIterator[Placed]:
    """Place a call; at the end of the block the caller hangs up, if nobody has."""

    async def ear(audio: bytes) -> str:
        return "a loud tone" if b"\x10" in audio else ""

    company = PhoneCompany(ACCOUNT_SID, AUTH_TOKEN, ear=ear)
    async with company.serve(port=desk.port), trio.open_nursery() as nursery:
        call = company.call(f"{PUBLIC_URL}/twilio/voice", CALLER, CALLEE, via=f"http://127.0.0.1:{desk.dialogd.port}")
        nursery.start_soon(call.run)
        with trio.fail_after(PATIENCE_S):
            async for event in call.log:
                if isinstance(event, StreamStarted):
                    break
        yield Placed(desk, company, call, await nursery.start(desk.dialogd.watch, call.sid))
        call.caller.hang_up()
        await desk.dialogd.ended(call.sid)


def channels(file: Path) -> "list[array[int]]":
    """Return the samples of a WAV file's channels."""
    with wave.open(io.BytesIO(file.read_bytes())) as read:
        assert (read.getframerate(), read.getsampwidth()) == (8000, 2)
        samples, count = array("h", read.readframes(read.getnframes())), read.getnchannels()
    return [samples[channel::count] for channel in range(count)]


def loud_ms(samples: "array[int]") -> int:
    """How long there is sound."""
    return sum(1 for sample in samples if abs(sample) > 1000) // 8


async def test_a_recording_has_what_each_side_said_on_a_channel_of_its_own_and_is_copied_here(desk: Desk) -> None:
    async with placed(desk) as there:
        await there.press("2")
        await there.call.caller.speak(TONE + SILENCE)
        await there.press("5")
        told = await there.until("recording")
    caller, agent = channels(Path(told["text"]))
    assert loud_ms(caller) in range(190, 211)
    assert loud_ms(agent) in range(190, 211)
    assert next(n for n, sample in enumerate(agent) if abs(sample) > 1000) > next(
        n for n, sample in enumerate(caller) if abs(sample) > 1000
    )


async def test_a_recording_goes_on_to_the_calls_end_and_is_told_after_it(desk: Desk) -> None:
    async with placed(desk) as there:
        await there.press("2")
        await there.call.caller.speak(TONE)
        there.call.caller.hang_up()
        told = await there.until("recording")
        ended = await there.dialogd.ended(there.call.sid)
    assert loud_ms(channels(Path(told["text"]))[0]) in range(190, 211)
    assert ended["reason"] == "the carrier stopped the stream"


async def test_a_paused_recording_has_silence_where_it_was_paused(desk: Desk) -> None:
    async with placed(desk) as there:
        await there.press("2")
        await there.call.caller.speak(TONE + SILENCE)
        await there.press("3")
        await there.call.caller.speak(TONE + SILENCE)
        await there.press("4")
        await there.call.caller.speak(TONE + SILENCE)
        await there.press("5")
        told = await there.until("recording")
    caller, _ = channels(Path(told["text"]))
    assert loud_ms(caller) in range(380, 421)
    assert len(caller) / 8 > 1100


async def test_a_removed_recording_is_gone_at_the_carrier(desk: Desk) -> None:
    async with placed(desk) as there:
        await there.press("16")
        begun = await there.until("recording_status")
        path = f"/2010-04-01/Accounts/{ACCOUNT_SID}/Recordings/{begun['fields']['RecordingSid']}.json"
        async with httpx.AsyncClient(auth=(ACCOUNT_SID, AUTH_TOKEN), trust_env=False) as http:
            assert (await http.get(f"http://127.0.0.1:{desk.port}{path}")).status_code == 404


async def test_both_sides_are_transcribed_and_the_agent_is_told_of_drafts_and_the_end(desk: Desk) -> None:
    async with placed(desk) as there:
        await there.press("7")
        await there.call.caller.speak(TONE + SILENCE * 5)
        await there.until("transcript", 4)
        await there.press("8")
        await there.until("transcript_status", text="stopped")
        told = [step for step in there.steps if step["kind"].startswith("transcript")]
    assert [step["text"] for step in told] == ["started", *["a loud tone"] * 4, "stopped"]
    heard = [(step["fields"]["track"], step["fields"]["final"]) for step in told if step["kind"] == "transcript"]
    assert sorted(heard) == [("inbound", "False"), ("inbound", "True"), ("outbound", "False"), ("outbound", "True")]


async def test_what_was_never_recorded_cannot_be_removed(desk: Desk) -> None:
    async with placed(desk) as there:
        failed = await there.press("6", kind="failed")
    assert failed["text"] == "there is no recording of this call to be removed"


DIALLER = '''
from dialog_worker import Agent, VoIP


class Dialler(Agent):
    """Presses keys when a key is pressed."""

    async def on_dtmf(self, dtmf) -> None:
        self.voip.trace("pressed", dtmf.digit)
        if dtmf.digit == "1":
            await self.voip.send_dtmf("1w2#")


def create(voip: VoIP) -> Agent:
    return Dialler(voip=voip)
'''


async def test_keys_go_both_ways_and_the_conversation_goes_on(start_dialogd: StartDialogd) -> None:
    async with placed(await trio.to_thread.run_sync(partial(Desk, start_dialogd, agent=DIALLER))) as there:
        await there.press("1", kind="pressed")
        streams = 0
        with trio.fail_after(PATIENCE_S):
            async for event in there.call.log:
                streams += isinstance(event, StreamStarted)
                if streams == 2:
                    break
        assert (await there.press("5", kind="pressed"))["text"] == "5"
    assert [event.digits for event in there.call.log.history if isinstance(event, Played)] == ["1w2#"]
    assert [event.reason for event in there.call.log.history if isinstance(event, Ended)] == ["the caller hung up"]


# What goes wrong at the carrier: what the agent sees, and the operator


async def refused(there: Placed, key: str = "1") -> dict[str, Any]:
    """Return what the agent is told of a request, which the operator's log has too."""
    failed = await there.press(key, kind="failed")
    logged = await there.dialogd.logged(event="request failed", call=there.call.sid)
    assert logged["reason"] == failed["text"]
    assert str(logged["code"]) == failed["fields"]["code"]
    fields: dict[str, Any] = failed["fields"]
    return fields


async def test_a_carrier_that_is_asked_too_often_is_asked_again(desk: Desk) -> None:
    async with placed(desk) as there:
        there.company.faults.busy = 2
        await there.press("1")
        again = there.dialogd.find(event="Twilio is asked too often; asking again")
    assert len(again) == 2


async def test_an_outage_of_the_carriers_api_costs_the_request_and_not_the_call(desk: Desk) -> None:
    async with placed(desk) as there:
        there.company.faults.out = True
        assert (await refused(there)) == {"kind": "carrier", "code": "20503", "status": "503"}
        there.company.faults.out = False
        await there.press("1")


async def test_a_transfer_that_the_carrier_refuses_leaves_the_caller_with_the_agent(desk: Desk) -> None:
    async with placed(desk) as there:
        there.company.faults.refusals["Calls"] = RestError(400, 21220, "Call is not in-progress. Cannot redirect.")
        assert (await refused(there, "*")) == {"kind": "carrier", "code": "21220", "status": "400"}
        there.company.faults.refusals.clear()
        await there.press("1")


async def test_wrong_credentials_are_told_with_the_carriers_code(desk: Desk) -> None:
    async with placed(desk) as there:
        there.company.faults.refusals["Recordings"] = RestError(401, 20003, "Authenticate")
        assert (await refused(there)) == {"kind": "carrier", "code": "20003", "status": "401"}


async def test_a_call_that_reaches_its_permitted_length_is_announced_and_ended(start_dialogd: StartDialogd) -> None:
    desk = await trio.to_thread.run_sync(partial(Desk, start_dialogd, calls={"max_duration": 1.5, "farewell_time": 1.0}))
    async with placed(desk) as there:
        told = await there.until("time_limit")
        with trio.fail_after(PATIENCE_S):
            ends = [event async for event in there.call.log if isinstance(event, Ended)]
    assert told["text"] == "1.0"
    assert ends[0].reason == "the agent's side hung up with <Hangup>"
    assert 1.3 < ends[0].at < 3.0
