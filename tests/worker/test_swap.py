"""Ears and voices that are replaced in mid-call, or fail: no word of the caller's is lost, and none of the agent's."""

from collections.abc import Sequence

import trio
from trio.testing import MockClock

from dialog_worker import STT, TTS, Agent, Message, VoIP
from dialog_worker.participant import ProviderError, Word
from dialog_worker.stt.base import Final, Owed, SpeechEnded, SpeechStarted
from dialog_worker.testing import TextSTT, TextTTS, scripted_call
from dialog_worker.tts.base import WordTimings
from protocol.messages import Dispose, Media

TEN_WORDS = "one two three four five six seven eight nine ten"


class Recogniser(TextSTT):
    """Keeps what it is given, as if it understood nothing yet."""

    def __init__(self, owed: Owed | None = None) -> None:
        super().__init__()
        self.audio = b""
        self.running = False
        self._owed = owed

    def post(self, audio: bytes) -> None:
        self.audio += audio

    def retire(self) -> Owed:
        return self._owed or Owed((), self.audio)

    async def run(self) -> None:
        self.running = True
        try:
            await trio.sleep_forever()
        finally:
            self.running = False


class Faltering(TTS):
    """Says the first three words of what it is given, and fails."""

    def __init__(self, *, fatal: bool) -> None:
        super().__init__()
        self.asked: list[Message[str]] = []
        self._fatal = fatal
        self._post, self._posted = trio.open_memory_channel[Message[str]](100)

    def post(self, message: Message[str]) -> None:
        self.asked.append(message)
        self._post.send_nowait(message)

    def abort(self, uuid: str) -> None:
        """Nothing is under way for long."""

    async def run(self) -> None:
        async for message in self._posted:
            words = tuple(Word(word, 100 * n, 100 * n + 100) for n, word in enumerate(message.data.split()[:3]))
            if words:
                await self.emit(WordTimings(message.uuid, words))
                await self.emit(Message(message.uuid, b"\xff" * 2400))
            if message.done:
                if self._fatal:
                    await self.emit(ProviderError("the key was revoked", fatal=True))
                await self.emit(ProviderError("fell silent", code="timeout", uuid=message.uuid))
                await self.emit(Message(message.uuid, b"", done=True))


class Speaker(Agent):
    """Says ten words when asked anything."""

    async def inference(self, message: Message[str]) -> None:
        await self.dispatch_message(Message(message.uuid, TEN_WORDS, done=True))


class Bench:
    """Makes the agent with given ears and voices, and keeps it."""

    def __init__(self, stt: Sequence[STT] = (), tts: Sequence[TTS] = ()) -> None:
        self._stt, self._tts = stt, tts
        self.agent: Speaker

    def __call__(self, voip: VoIP, stt: STT, tts: TTS) -> Agent:
        self.agent = Speaker(voip=voip, stt=self._stt or stt, tts=self._tts or tts)
        return self.agent


async def test_a_new_recogniser_gets_the_audio_that_the_old_one_had_not_understood(autojump_clock: MockClock) -> None:
    old, new = Recogniser(), Recogniser()
    async with scripted_call(bench := Bench([old])) as call:
        await call.tell(Media(0, b"abc"))
        await trio.sleep(0.1)
        bench.agent.set_stt(new)
        await call.tell(Media(20, b"def"))
        await trio.sleep(0.1)
        assert new.audio == b"abcdef"
        assert (old.running, new.running) == (False, True)


async def test_what_the_old_recogniser_had_understood_is_answered(autojump_clock: MockClock) -> None:
    old = Recogniser(Owed((Final("hello"), SpeechEnded()), b"rest"))
    async with scripted_call(bench := Bench([old])) as call:
        bench.agent.set_stt(new := Recogniser())
        assert await call.next_said() == TEN_WORDS
        assert new.audio == b"rest"


async def test_an_old_recogniser_is_heard_no_more(autojump_clock: MockClock) -> None:
    old, new = Recogniser(), Recogniser()
    async with scripted_call(bench := Bench([old])) as call:
        await trio.sleep(0.1)
        bench.agent.set_stt(new)
        await old.emit(Final("too late"))
        await new.emit(Final("in time"))
        assert (await call.until("heard")).text == "in time"


async def test_a_handler_that_replaces_the_recogniser_is_not_cut_short(autojump_clock: MockClock) -> None:
    spare, done = Recogniser(), trio.Event()

    class Careful(Speaker):
        async def on_provider_error(self, error: ProviderError) -> None:
            if error.fatal:
                self.set_stt(spare)
                await trio.sleep(1.0)
                done.set()

    old = Recogniser()
    async with scripted_call(lambda voip, stt, tts: Careful(voip=voip, stt=old, tts=tts)) as call:
        await old.emit(ProviderError("gone", fatal=True))
        await done.wait()
        assert spare.running
        assert call.requests == []


async def test_when_a_recogniser_fails_for_good_the_next_takes_over_with_its_audio(autojump_clock: MockClock) -> None:
    first, second = Recogniser(), Recogniser()
    async with scripted_call(bench := Bench([first, second])) as call:
        await call.tell(Media(0, b"abc"))
        await first.emit(SpeechStarted())
        await first.emit(ProviderError("no credit left", fatal=True))
        await trio.sleep(0.1)
        assert bench.agent.stt is second
        assert second.audio == b"abc"


async def test_without_another_recogniser_the_caller_is_handed_over(autojump_clock: MockClock) -> None:
    first = Recogniser()
    async with scripted_call(Bench([first])) as call:
        await first.emit(ProviderError("no credit left", fatal=True))
        request = await call.requested(Dispose)
        assert isinstance(request, Dispose)
        assert request.fallback


async def test_a_new_voice_takes_the_next_utterance_and_the_old_one_finishes_its_own(autojump_clock: MockClock) -> None:
    old, new = TextTTS(), TextTTS()
    async with scripted_call(bench := Bench(tts=[old])) as call:
        await call.caller_says("first")
        await call.until("saying")
        bench.agent.set_tts(new)
        assert await call.next_said() == TEN_WORDS
        await call.caller_says("second")
        assert await call.next_said() == TEN_WORDS
        assert bench.agent.tts is new


async def test_a_sentence_whose_voice_fails_is_taken_up_by_the_next_where_it_was_cut(autojump_clock: MockClock) -> None:
    first, second = Faltering(fatal=True), TextTTS()
    async with scripted_call(bench := Bench(tts=[first, second])) as call:
        await call.caller_says("hello")
        assert await call.next_said() == TEN_WORDS
        assert bench.agent.tts is second
        assert call.requests == []


async def test_a_voice_that_fails_in_a_sentence_is_tried_once_more_with_the_rest(autojump_clock: MockClock) -> None:
    first, second = Faltering(fatal=False), TextTTS()
    async with scripted_call(Bench(tts=[first, second])) as call:
        await call.caller_says("hello")
        assert await call.next_said() == TEN_WORDS
    assert [message.data for message in first.asked if message.data] == [TEN_WORDS, "four five six seven eight nine ten"]


async def test_the_words_of_a_resumed_sentence_count_from_its_first_sample(autojump_clock: MockClock) -> None:
    first, second = Faltering(fatal=True), TextTTS()
    async with scripted_call(Bench(tts=[first, second])) as call:
        await call.caller_says("hello")
        await trio.sleep(0.3 + 10 / 15)  # three words of the first voice, then ten characters of the second
        await call.caller_speaks()
        assert await call.next_said() == "one two three four five"


async def test_without_another_voice_the_caller_is_handed_over(autojump_clock: MockClock) -> None:
    async with scripted_call(Bench(tts=[Faltering(fatal=False)])) as call:
        await call.caller_says("hello")
        request = await call.requested(Dispose)
        assert isinstance(request, Dispose)
        assert request.fallback


async def test_a_deactivated_agent_hears_and_says_nothing_but_what_it_had_begun(autojump_clock: MockClock) -> None:
    ear = Recogniser()
    async with scripted_call(bench := Bench([ear], [TextTTS()])) as call:
        await ear.emit(Final("hello"))
        await call.until("saying")
        bench.agent.deactivate()
        await trio.sleep(1.0)
        assert not ear.running
        assert bench.agent.stt is None


async def test_an_agent_that_is_activated_again_has_new_ears_and_a_new_voice(autojump_clock: MockClock) -> None:
    ear = Recogniser()
    async with scripted_call(bench := Bench([Recogniser()], [TextTTS()])) as call:
        await trio.sleep(0.1)
        bench.agent.deactivate()
        bench.agent.set_stt(ear)
        bench.agent.set_tts(TextTTS())
        bench.agent.activate()
        await ear.emit(Final("hello"))
        assert await call.next_said() == TEN_WORDS
