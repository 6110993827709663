"""What a caller hears when the model fails, stalls or thinks for long."""

import pytest
import trio

from dialog_worker import STT, TTS, VoIP, tool
from dialog_worker.agent import openai as rooms
from dialog_worker.testing import scripted_call
from protocol.messages import Dispose

from .desk import Desk, Receptionist, spoken
from .model_server import ModelServer, model_server, text, tool_call


class Patient(Receptionist):
    """Says soon that it takes a moment."""

    holding = "One moment."
    patience_s = 0.3

    @tool
    async def look(self) -> str:
        """Look it up, which takes a while."""
        await trio.sleep(1.2)
        return "found"


class PatientDesk(Desk):
    def __init__(self, server: ModelServer) -> None:
        super().__init__(server)
        self._url = server.url

    def __call__(self, voip: VoIP, stt: STT, tts: TTS) -> Patient:
        self.agent = patient = Patient(voip=voip, stt=stt, tts=tts, url=self._url)
        return patient


@pytest.mark.parametrize("status", [429, 500])
async def test_a_model_that_fails_once_is_asked_again_and_the_caller_notices_nothing(status: int) -> None:
    async with model_server() as server:
        server.scripts = [status, text("Yes.")]
        async with scripted_call(Desk(server)) as call:
            await call.caller_says("hello")
            assert await call.next_said() == "Yes."
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [429, 500])
async def test_a_model_that_fails_twice_is_apologised_for_and_asked_again_in_the_next_turn(status: int) -> None:
    async with model_server() as server:
        server.scripts = [status, status, text("Yes.")]
        async with scripted_call(Desk(server)) as call:
            await call.caller_says("hello")
            assert await call.next_said() == "Sorry?"
            await call.caller_says("hello again")
            while await call.next_said() != "Yes.":
                pass
        assert len(server.requests) == 3


@pytest.mark.parametrize("garbage", [b"<html>", b'{"choices": 5}', b'{"choices": [{"delta": 7}]}', b"[]"])
async def test_a_chunk_that_cannot_be_read_is_a_failure_like_others(garbage: bytes) -> None:
    async with model_server() as server:
        server.scripts = [[garbage], text("Yes.")]
        async with scripted_call(Desk(server)) as call:
            await call.caller_says("hello")
            assert await call.next_said() == "Yes."


async def test_after_three_failed_turns_the_caller_is_handed_to_the_fallback() -> None:
    async with model_server() as server:
        server.scripts = [500] * 6
        async with scripted_call(Desk(server)) as call:
            for _ in range(2):
                await call.caller_says("hello")
                while await call.next_said() != "Sorry?":
                    pass
            await call.caller_says("hello")
            request = await call.requested(Dispose)
            assert isinstance(request, Dispose)
            assert request.fallback


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_refusal_that_no_turn_will_mend_hands_the_caller_over_at_once(status: int) -> None:
    async with model_server() as server:
        server.scripts = [status]
        async with scripted_call(Desk(server)) as call:
            await call.caller_says("hello")
            request = await call.requested(Dispose)
            assert isinstance(request, Dispose)
            assert request.fallback
        assert call.said == [""]


async def test_an_answer_that_stalls_is_broken_off_with_an_apology(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "CHUNK_TIMEOUT_S", 0.2)
    async with model_server() as server:
        server.scripts = [text("The first. ", 3.0, "The second.")]
        async with scripted_call(desk := Desk(server)) as call:
            await call.caller_says("hello")
            assert {await call.next_said(), await call.next_said()} == {"The first.", "Sorry?"}
        assert ("assistant", "The first.") in spoken(desk.agent.history)


async def test_a_caller_who_waits_long_for_the_model_is_told_so() -> None:
    async with model_server() as server:
        server.scripts = [text(1.0, "Yes.")]
        async with scripted_call(desk := PatientDesk(server)) as call:
            await call.caller_says("hello")
            assert await call.next_said() == "One moment."
            assert await call.next_said() == "Yes."
        assert spoken(desk.agent.history) == [("user", "hello"), ("assistant", "Yes.")]


async def test_a_caller_who_waits_long_for_a_tool_is_told_so() -> None:
    async with model_server() as server:
        server.scripts = [tool_call("look", "{}"), text("It is there.")]
        async with scripted_call(PatientDesk(server)) as call:
            await call.caller_says("where is it")
            while "It is there." not in call.said:
                await call.next_said()
        assert "One moment." in call.said


async def test_a_quick_answer_needs_no_patience() -> None:
    async with model_server() as server:
        server.scripts = [text("Yes.")]
        async with scripted_call(PatientDesk(server)) as call:
            await call.caller_says("hello")
            assert await call.next_said() == "Yes."
            await trio.sleep(0.5)
        assert call.said == ["Yes."]
