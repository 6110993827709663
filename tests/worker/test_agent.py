"""How an agent takes its turns: one at a time, stopping when interrupted, remembering what was heard."""

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from dialog_worker import STT, TTS, Agent, Message, VoIP
from dialog_worker.participant import ProviderError
from dialog_worker.testing import scripted_call
from protocol.messages import Dispose, Dtmf, MessageDispatched, StreamingStarted

TEN_SECONDS = "one two three four five six seven eight nine ten " * 3


class Scripted(Agent):
    """Answers with the words that it was given, and notes what came of them."""

    answers: tuple[str, ...] = ("You said that.",)

    def __init__(self, voip: VoIP, stt: STT, tts: TTS) -> None:
        super().__init__(voip=voip, stt=stt, tts=tts)
        self.heard_answers: list[str] = []

    async def inference(self, message: Message[str]) -> None:
        for number, answer in enumerate(self.answers):
            self.heard_answers.append(await self.dispatch_message(Message(f"{message.uuid}/{number}", answer, done=True)))


async def test_an_utterance_is_answered(autojump_clock: MockClock) -> None:
    async with scripted_call(Scripted) as call:
        await call.caller_says("hello")
        assert await call.next_said() == "You said that."


async def test_an_interruption_leaves_what_was_heard(autojump_clock: MockClock) -> None:
    class Talkative(Scripted):
        answers = (TEN_SECONDS,)

    async with scripted_call(Talkative) as call:
        await call.caller_says("hello")
        await trio.sleep(2.0)
        await call.caller_speaks()
        heard = await call.next_said()
    assert heard.startswith("one two three")
    assert 20 < len(heard) < 40  # two seconds at fifteen characters a second


async def test_after_an_interruption_the_same_turn_says_nothing_more(autojump_clock: MockClock) -> None:
    class Repeating(Scripted):
        answers = (TEN_SECONDS, "And another thing.")

    agents: list[Repeating] = []

    def make(voip: VoIP, stt: STT, tts: TTS) -> Agent:
        agents.append(Repeating(voip, stt, tts))
        return agents[0]

    async with scripted_call(make) as call:
        await call.caller_says("hello")
        await trio.sleep(2.0)
        await call.caller_speaks()
        await trio.sleep(5.0)
    assert len(agents[0].heard_answers) == 2
    assert agents[0].heard_answers[1] == ""


async def test_what_must_not_be_interrupted_is_heard_whole(autojump_clock: MockClock) -> None:
    class Firm(Agent):
        async def on_streaming_started(self, started: StreamingStarted) -> None:
            await self.dispatch_message(Message("g", TEN_SECONDS, done=True), allow_interrupt=False)

    async with scripted_call(lambda voip, stt, tts: Firm(voip=voip, stt=stt, tts=tts)) as call:
        await trio.sleep(1.0)
        await call.caller_speaks()
        assert await call.next_said() == TEN_SECONDS.strip()


async def test_a_turn_that_still_thinks_is_given_up_when_the_caller_goes_on(autojump_clock: MockClock) -> None:
    begun: list[str] = []

    class Slow(Scripted):
        async def inference(self, message: Message[str]) -> None:
            begun.append(message.data)
            await trio.sleep(3.0)
            await super().inference(message)

    async with scripted_call(Slow) as call:
        await call.caller_says("a table")
        await trio.sleep(1.0)
        await call.caller_says("for four")
        assert await call.next_said() == "You said that."
    assert begun == ["a table", "for four"]
    assert len(call.said) == 1


async def test_what_is_uninterrupted_is_brought_to_its_end(autojump_clock: MockClock) -> None:
    done: list[bool] = []

    class Booking(Agent):
        async def inference(self, message: Message[str]) -> None:
            with self.uninterrupted():
                await trio.sleep(3.0)
                done.append(self.interrupted)

    async with scripted_call(lambda voip, stt, tts: Booking(voip=voip, stt=stt, tts=tts)) as call:
        await call.caller_says("book it")
        await trio.sleep(1.0)
        await call.caller_speaks()
        await trio.sleep(5.0)
    assert done == [True]


async def test_pieces_are_said_as_they_come(autojump_clock: MockClock) -> None:
    class Streaming(Agent):
        async def inference(self, message: Message[str]) -> None:
            async def pieces() -> AsyncIterator[str]:
                yield "The first. "
                await trio.sleep(1.0)
                yield "The second."

            await self.dispatch_text(message.uuid, pieces())

    async with scripted_call(lambda voip, stt, tts: Streaming(voip=voip, stt=stt, tts=tts)) as call:
        await call.caller_says("hello")
        begun = await call.until("saying")
        assert begun.text == "The first."
        assert await call.next_said() == "The first. The second."


async def test_a_handler_may_speak_while_others_wait_for_it(autojump_clock: MockClock) -> None:
    keys: list[str] = []

    class Menu(Agent):
        async def on_dtmf(self, dtmf: Dtmf) -> None:
            await self.dispatch_message(Message(f"m{dtmf.digit}", f"You pressed {dtmf.digit}.", done=True))
            keys.append(dtmf.digit)

    async with scripted_call(lambda voip, stt, tts: Menu(voip=voip, stt=stt, tts=tts)) as call:
        await call.tell(Dtmf("1"))
        await call.tell(Dtmf("2"))
        assert await call.next_said() == "You pressed 1."
        assert await call.next_said() == "You pressed 2."
    assert keys == ["1", "2"]


async def test_after_a_fatal_provider_error_the_caller_is_handed_to_the_fallback(autojump_clock: MockClock) -> None:
    async with scripted_call(Scripted) as call:
        await call.stt.emit(ProviderError("no such key", fatal=True))
        await trio.sleep(1.0)
    [request] = call.requests
    assert isinstance(request, Dispose)
    assert request.fallback


async def test_an_error_in_a_turn_ends_the_agent(autojump_clock: MockClock) -> None:
    class Broken(Agent):
        async def inference(self, message: Message[str]) -> None:
            raise LookupError("a mistake of the author's")

    with pytest.RaisesGroup(LookupError, flatten_subgroups=True):
        async with scripted_call(lambda voip, stt, tts: Broken(voip=voip, stt=stt, tts=tts)) as call:
            await call.caller_says("hello")
            await trio.sleep(1.0)


async def test_hanging_up_waits_for_the_last_words(autojump_clock: MockClock) -> None:
    dispatched: list[MessageDispatched] = []

    class Polite(Agent):
        async def inference(self, message: Message[str]) -> None:
            self.utter("bye").say("Goodbye, and thank you.")
            await self.hangup()

        async def on_message_dispatched(self, dispatched_: MessageDispatched) -> None:
            dispatched.append(dispatched_)

    async with scripted_call(lambda voip, stt, tts: Polite(voip=voip, stt=stt, tts=tts)) as call:
        await call.caller_says("that is all")
        await trio.sleep(10.0)
    assert [type(request).__name__ for request in call.requests] == ["Hangup"]
    assert [one.interrupted for one in dispatched] == [False]
