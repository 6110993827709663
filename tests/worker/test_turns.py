"""What the supervisor is told of each turn: how it ended, and how long the caller waited for what."""

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from dialog_worker import STT, TTS, Agent, Message, VoIP
from dialog_worker.testing import scripted_call
from protocol.messages import Turn

from .desk import Desk
from .model_server import model_server

LONG = "one two three four five six seven eight nine ten " * 3


class Thoughtful(Agent):
    """Thinks for a second before each of its answers."""

    answer = "Quite so."

    def __init__(self, voip: VoIP, stt: STT, tts: TTS) -> None:
        super().__init__(voip=voip, stt=stt, tts=tts)

    async def inference(self, message: Message[str]) -> None:
        async def pieces() -> AsyncIterator[str]:
            await trio.sleep(1.0)
            yield self.answer

        await self.dispatch_text(message.uuid, pieces())


async def test_a_turn_tells_what_the_caller_waited_and_for_what(autojump_clock: MockClock) -> None:
    async with scripted_call(Thoughtful) as call:
        await call.caller_says("hello")
        assert await call.turned() == [Turn("answered", 1000, queued_ms=0, thinking_ms=1000, voicing_ms=0)]


async def test_a_question_that_waits_for_another_s_turn_waits_longer(autojump_clock: MockClock) -> None:
    class Unhurried(Thoughtful):
        async def inference(self, message: Message[str]) -> None:
            with self.uninterrupted():
                await super().inference(message)

    async with scripted_call(Unhurried) as call:
        await call.caller_says("hello")
        await trio.sleep(0.5)
        await call.caller_says("and another thing")
        first, second = await call.turned(2)
    assert first.outcome == "interrupted"
    assert second.outcome == "answered"
    assert second.queued_ms is not None
    assert second.delay_ms == second.queued_ms + 1000


async def test_a_caller_who_speaks_again_interrupts_the_turn(autojump_clock: MockClock) -> None:
    class Talkative(Thoughtful):
        answer = LONG

    async with scripted_call(Talkative) as call:
        await call.caller_says("hello")
        await trio.sleep(3.0)
        await call.caller_speaks()
        assert await call.turned() == [Turn("interrupted", 1000, queued_ms=0, thinking_ms=1000, voicing_ms=0)]


async def test_a_caller_who_hangs_up_before_the_answer_interrupts_the_turn(autojump_clock: MockClock) -> None:
    async with scripted_call(Thoughtful) as call:
        await call.caller_says("hello")
        await trio.sleep(0.5)
    assert call.turns == [Turn("interrupted", None, queued_ms=0)]


async def test_a_caller_who_hangs_up_during_the_answer_was_answered(autojump_clock: MockClock) -> None:
    async with scripted_call(Thoughtful) as call:
        await call.caller_says("hello")
        await trio.sleep(1.2)
    assert [turn.outcome for turn in call.turns] == ["answered"]


async def test_an_inference_that_raises_is_a_failed_turn(autojump_clock: MockClock) -> None:
    class Broken(Thoughtful):
        async def inference(self, message: Message[str]) -> None:
            raise RuntimeError("the agent's own mistake")

    with pytest.RaisesGroup(pytest.RaisesGroup(pytest.RaisesGroup(RuntimeError))):
        async with scripted_call(Broken) as call:
            await call.caller_says("hello")
            await trio.sleep_forever()
    assert [turn.outcome for turn in call.turns] == ["failed"]


async def test_an_apology_is_no_answer() -> None:
    async with model_server() as server:
        server.scripts = [500, 500]
        async with scripted_call(Desk(server)) as call:
            await call.caller_says("hello")
            assert await call.next_said() == "Sorry?"
            assert [turn.outcome for turn in await call.turned()] == ["failed"]
