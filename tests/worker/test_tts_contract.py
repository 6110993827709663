"""What an agent may rely on, whoever speaks for it."""

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from dialog_worker.participant import ProviderError
from dialog_worker.provider import ConfigurationError
from protocol.messages import Message

from .scripted_provider import ScriptedProvider, next_event, no_event, scripted_provider
from .voices import VOICES, WORD, Stage, Voice, audio_of, spaced, words_of


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


async def test_text_becomes_audio_and_words_and_one_end(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.post("u", "Good evening. ", done=False)
    stage.post("u", "How are you?")
    context_id, text = await voice.whole()
    assert text == "Good evening. How are you?"
    await voice.say(context_id, text)
    await voice.finish(context_id)
    events = await stage.until_done()
    assert audio_of(events) == WORD * 5
    assert words_of(events) == spaced(text)
    assert {getattr(event, "uuid", "") for event in events} == {"u"}
    await trio.sleep(60)
    assert no_event(stage.tts)


async def test_words_follow_their_audio(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.post("u", "Good evening.")
    context_id, text = await voice.whole()
    await voice.say(context_id, text)
    heard_ms = 0
    for event in await stage.until_told("evening."):
        heard_ms += len(event.data) // 8 if isinstance(event, Message) else 0
        assert all(word.end_ms <= heard_ms for word in words_of([event]))


async def test_an_utterance_that_pauses_goes_on_counting(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.post("u", "One moment. ", done=False)
    context_id, _ = await voice.text()
    await voice.say(context_id, "One moment.")
    before = await stage.until_told("moment.")
    await trio.sleep(30)
    stage.post("u", "Here you are.")
    context_id, text = await voice.whole()
    await voice.say(context_id, text)
    await voice.finish(context_id)
    events = before + await stage.until_done()
    assert words_of(events) == spaced("One moment. Here you are.")
    assert not any(isinstance(event, ProviderError) for event in events)


async def test_nothing_follows_an_abort_but_the_next_utterance(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.post("u", "A long story. ", done=False)
    context_id, _ = await voice.text()
    stage.tts.abort("u")
    assert await voice.end() == context_id
    stage.post("u", "And more.")
    stage.post("v", "Short.")
    following, text = await voice.whole()
    await voice.say(context_id, "A long story.")
    await voice.finish(context_id)
    await voice.say(following, text)
    await voice.finish(following)
    events = await stage.until_done()
    assert text == "Short."
    assert words_of(events) == spaced("Short.")
    assert {getattr(event, "uuid", "") for event in events} == {"v"}


async def test_an_unknown_utterance_may_be_aborted(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.tts.abort("nobody's")
    stage.post("u", "Hi.")
    assert (await voice.whole())[1] == "Hi."


async def test_many_utterances_are_said_in_their_order(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    for uuid in "abcdef":
        stage.post(uuid, f"{uuid}.")
    events = []
    for _ in "abcdef":
        context_id, text = await voice.whole()
        await voice.say(context_id, text)
        await voice.finish(context_id)
        events += await stage.until_done()
    assert [word.text for word in words_of(events)] == ["a.", "b.", "c.", "d.", "e.", "f."]


async def test_the_end_of_one_utterance_is_the_beginning_of_the_next_but_one(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    for uuid in "abc":
        stage.post(uuid, f"{uuid}.")
    first, second = await voice.whole(), await voice.whole()
    for context_id, text in (second, first):
        await voice.say(context_id, text)
        await voice.finish(context_id)
    assert (await voice.whole())[1] == "c."
    assert not any(isinstance(event, ProviderError) for event in await stage.until_done())


async def test_an_error_comes_before_the_end_of_its_utterance(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.post("u", "Good evening.")
    context_id, _ = await voice.whole()
    await voice.say(context_id, "Good")
    await voice.fail(context_id, "odd")
    *said, error, last = await stage.until_done()
    assert (audio_of(said), words_of(said)) == (WORD, spaced("Good"))
    assert error == ProviderError(f"{stage.kind.__name__}: No.", "odd", "u")
    assert last == Message("u", b"", True)


async def test_an_utterance_that_failed_is_over_although_its_text_still_comes(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.post("u", "Good evening. ", done=False)
    context_id, _ = await voice.text()
    await voice.fail(context_id, "odd")
    assert (await stage.until_done())[-1] == Message("u", b"", True)
    stage.post("u", "Hello? ", done=False)
    stage.post("u~1", "Again.")
    stage.post("u", "Hello?")
    assert (await voice.whole())[1] == "Again."
    await trio.testing.wait_all_tasks_blocked()
    assert no_event(stage.tts)


async def test_a_fatal_error_comes_first_and_then_each_utterance_s_own(stage: Stage, clock: MockClock) -> None:
    voice = await stage.begin()
    stage.post("u", "Good evening.")
    stage.post("v", "Hello. ", done=False)
    context_id, _ = await voice.whole()
    await voice.say(context_id, "Good")
    said = await stage.until_told("Good")
    stage.provider.refusals = [401]
    await voice.peer.close()
    assert audio_of(said) == WORD
    lost, fatal = await next_event(stage.tts), await next_event(stage.tts)
    assert (lost.code, lost.uuid, lost.fatal) == ("1011", "", False)
    assert (fatal.code, fatal.uuid, fatal.fatal) == ("401", "", True)
    for uuid in ("u", "v"):
        assert await next_event(stage.tts) == ProviderError(fatal.message, "401", uuid)
        assert await next_event(stage.tts) == Message(uuid, b"", True)


async def test_after_a_fatal_error_every_utterance_ends_at_once(stage: Stage, clock: MockClock) -> None:
    stage.provider.refusals = [401]
    stage.run()
    fatal = await next_event(stage.tts)
    assert fatal.fatal
    stage.post("u", "Good evening. ", done=False)
    assert await stage.until_done() == [ProviderError(fatal.message, "401", "u"), Message("u", b"", True)]


@pytest.mark.parametrize("limit", [{"timeout_s": 0}, {"queue_size_limit": 0}])
async def test_limits_that_let_nothing_be_said_are_told_at_once(stage: Stage, limit: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(limit))):
        stage.open(**limit)


async def test_a_piece_beyond_the_limit_ends_its_utterance_alone(stage: Stage, clock: MockClock) -> None:
    stage.open(queue_size_limit=3)
    voice = await stage.begin()
    stage.post("u", "One. ", done=False)
    stage.post("u", "Two.")
    stage.post("v", "Three. ", done=False)
    stage.post("v", "Four.")
    context_id, text = await voice.whole()
    assert text == "One. Two."
    await voice.say(context_id, text)
    await voice.finish(context_id)
    assert words_of(await stage.until_done()) == spaced(text)
    error, last = await stage.until_done()
    assert isinstance(error, ProviderError)
    assert (error.code, error.uuid, error.fatal) == ("queue_full", "v", False)
    assert last == Message("v", b"", True)


async def test_what_is_spoken_makes_room(stage: Stage, clock: MockClock) -> None:
    stage.open(queue_size_limit=2)
    voice = await stage.begin()
    for text in ("One. ", "Two. ", "Three. ", "Four. "):
        stage.post("u", text, done=False)
        context_id, said = await voice.text()
        await voice.say(context_id, said)
        events = await stage.until_told(said)
        assert not any(isinstance(event, ProviderError) for event in events)
