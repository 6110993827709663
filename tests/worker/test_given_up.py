"""An agent that cannot go on hands its caller over, once, whatever it was about to do."""

import trio
from trio.testing import MockClock

from dialog_worker import STT, TTS, Agent, Message, VoIP
from dialog_worker.participant import ProviderError
from dialog_worker.testing import ScriptedCall, scripted_call
from protocol.messages import Dispose

from .test_swap import TEN_WORDS, Faltering


class Polite(Agent):
    """Says ten words when asked anything, and hangs up."""

    def __init__(self, voip: VoIP, stt: STT, tts: TTS) -> None:
        super().__init__(voip=voip, stt=stt, tts=[Faltering(fatal=True)])
        self.told: list[str] = []

    async def on_provider_error(self, error: ProviderError) -> None:
        self.told.append(error.message)

    async def inference(self, message: Message[str]) -> None:
        await self.dispatch_message(Message(message.uuid, TEN_WORDS, done=True))
        await self.hangup()
        await self.transfer_to("+15550001111")
        self.voip.trace("done", "")


async def _asked(call: ScriptedCall) -> None:
    await call.caller_says("hello")
    await call.until("done")


async def test_what_an_agent_wants_of_the_line_after_it_gave_up_does_not_cut_the_fallback_short(
    autojump_clock: MockClock,
) -> None:
    async with scripted_call(Polite) as call:
        await _asked(call)
        assert [type(request) for request in call.requests] == [Dispose]


async def test_the_end_of_the_last_voice_is_told_once(autojump_clock: MockClock) -> None:
    agents: list[Polite] = []

    def create(voip: VoIP, stt: STT, tts: TTS) -> Polite:
        agents.append(Polite(voip, stt, tts))
        return agents[0]

    async with scripted_call(create) as call:
        await _asked(call)
    assert agents[0].told == ["the key was revoked"]


async def test_what_the_last_voice_did_not_say_is_not_held_to_have_been_heard(autojump_clock: MockClock) -> None:
    async with scripted_call(Polite) as call:
        await _asked(call)
        await trio.sleep(1.0)
        assert "four" not in " ".join(call.said)
