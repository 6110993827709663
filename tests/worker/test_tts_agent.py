"""What a caller hears when the agent's voice misbehaves in the middle of an answer: all of it, each word once, in time."""

from collections.abc import AsyncIterator, Callable

import pytest
import trio
from trio.testing import MockClock

from dialog_worker import STT, TTS, Agent, Message, VoIP
from dialog_worker.testing import scripted_call

from .scripted_provider import ScriptedProvider, scripted_provider
from .voices import VOICES, Stage, Voice

ANSWER = "We have a table for four at seven, near the window."
SAID = "We have a table"
REST = "for four at seven, near the window."


class Speaker(Agent):
    """Says one thing when asked anything."""

    async def inference(self, message: Message[str]) -> None:
        await self.dispatch_message(Message(message.uuid, ANSWER, done=True))


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.003)  # real seconds, in which loopback is sure to answer


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        yield provider


@pytest.fixture(params=VOICES)
def stage(request: pytest.FixtureRequest, provider: ScriptedProvider, nursery: trio.Nursery) -> Stage:
    kind: type[Voice] = request.param
    return Stage(kind, provider, nursery)


def speaker(*ttss: TTS) -> Callable[[VoIP, STT, TTS], Agent]:
    def make(voip: VoIP, stt: STT, tts: TTS) -> Agent:
        return Speaker(voip=voip, stt=stt, tts=ttss)

    return make


@pytest.mark.parametrize("misbehaviour", ["stall", "drop", "error"])
async def test_what_is_left_is_said_within_5_s(stage: Stage, clock: MockClock, misbehaviour: str) -> None:
    async with scripted_call(speaker(stage.tts)) as call:
        voice = await stage.accept()
        await call.caller_says("Have you a table?")
        context_id, _ = await voice.whole()
        await voice.say(context_id, SAID)
        began = trio.current_time()
        if misbehaviour == "drop":
            await voice.peer.vanish()
        if misbehaviour == "error":
            await voice.fail(context_id, "odd")
        if misbehaviour != "error":
            voice = await stage.accept()
        context_id, rest = await voice.whole()
        assert trio.current_time() - began < 3
        assert rest == REST
        await voice.say(context_id, rest)
        await voice.finish(context_id)
        assert await call.next_said() == ANSWER


async def test_a_voice_that_stays_silent_hands_over_within_5_s(stage: Stage, clock: MockClock) -> None:
    first = stage.tts
    async with scripted_call(speaker(first, stage.open())) as call:
        voice = await stage.accept()
        await call.caller_says("Have you a table?")
        await voice.whole()
        began = trio.current_time()
        await (await stage.accept()).whole()  # the same voice's second chance
        voice = await stage.accept()
        context_id, rest = await voice.whole()
        assert trio.current_time() - began < 5
        assert rest == ANSWER
        await voice.say(context_id, rest)
        await voice.finish(context_id)
        assert await call.next_said() == ANSWER
