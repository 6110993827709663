"""One recogniser takes over from another in mid-call, and the caller's words with it."""

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from dialog_worker.participant import ProviderError
from dialog_worker.stt.base import Final, Interim, Owed, SpeechEnded, SpeechStarted

from .recognisers import RECOGNISERS, Deepgram, Line, Recogniser
from .scripted_provider import ScriptedProvider, events_until, next_event, no_event, scripted_provider
from .telephone import SECOND, silence, speech, texts

SAID = speech(1.5) + silence(0.5)


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.005)  # real seconds, in which loopback is sure to answer


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        yield provider


@pytest.fixture(params=RECOGNISERS)
def kind(request: pytest.FixtureRequest) -> type[Recogniser]:
    chosen: type[Recogniser] = request.param
    return chosen


@pytest.fixture
def line(kind: type[Recogniser], provider: ScriptedProvider, nursery: trio.Nursery) -> Line:
    return Line(kind, provider, nursery)


async def test_an_utterance_just_begun_is_owed_whole(line: Line) -> None:
    recogniser = await line.accept()
    line.stt.post(SAID)
    await recogniser.hear(2)
    await recogniser.begin()
    await recogniser.write("A table")
    await events_until(line.stt, lambda event: event == Interim("A table"))
    assert line.stt.retire() == Owed((SpeechEnded(),), SAID)


async def test_what_is_final_of_an_utterance_is_owed_as_text_and_the_rest_as_audio(
    provider: ScriptedProvider, nursery: trio.Nursery
) -> None:
    line = Line(Deepgram, provider, nursery)
    recogniser = Deepgram((await line.accept()).peer)
    line.stt.post(SAID)
    await recogniser.hear(2)
    await recogniser.settle("A table", 1.0)
    await recogniser.write("for four")
    await events_until(line.stt, lambda event: event == Interim("A table for four"))
    owed = line.stt.retire()
    assert owed.hearings == (Final("A table", 0.9), SpeechEnded())
    assert owed.audio == SAID[SECOND:]


async def test_nothing_is_owed_of_what_was_told(line: Line) -> None:
    recogniser = await line.accept()
    line.stt.post(SAID)
    await recogniser.hear(2)
    await recogniser.say("A table.")
    await events_until(line.stt, lambda event: event == SpeechEnded())
    assert line.stt.retire() == Owed()


async def test_events_that_nobody_has_read_are_owed(line: Line) -> None:
    recogniser = await line.accept()
    line.stt.post(SAID)
    await recogniser.hear(2)
    await recogniser.say("A table.")
    assert await next_event(line.stt) == SpeechStarted()
    await trio.sleep(0.1)  # for the rest to arrive; how long that takes decides nothing else
    owed = line.stt.retire()
    assert texts(list(owed.hearings)) == ["A table."]
    assert owed.hearings[-1] == SpeechEnded()


async def test_who_is_retired_says_nothing_more_and_leaves(line: Line) -> None:
    recogniser = await line.accept()
    line.stt.post(SAID)
    await recogniser.hear(2)
    line.stt.retire()
    with trio.fail_after(2):
        await line.ended.wait()
        await recogniser.peer.ended.wait()
    assert no_event(line.stt)


async def test_audio_posted_before_anything_is_connected_is_owed(kind: type[Recogniser], provider: ScriptedProvider) -> None:
    stt = kind.Adapter("key", url=provider.url)
    stt.post(SAID)
    assert stt.retire() == Owed((), SAID)
    with trio.fail_after(1):
        await stt.run()


async def test_after_a_fatal_error_the_audio_is_owed_as_before(
    line: Line, provider: ScriptedProvider, clock: MockClock
) -> None:
    recogniser = await line.accept()
    line.stt.post(SAID)
    await recogniser.hear(2)
    await recogniser.begin()
    await recogniser.write("A table")
    await events_until(line.stt, lambda event: event == Interim("A table"))
    provider.refusals = [401]
    await recogniser.peer.close()
    events = await events_until(line.stt, lambda event: event == SpeechEnded())
    assert [event.fatal for event in events if isinstance(event, ProviderError)] == [False, True]
    assert texts(events) == []
    line.stt.post(speech(0.5))
    assert line.stt.retire() == Owed((), SAID + speech(0.5))


async def test_a_fatal_error_that_nobody_has_read_is_not_handed_over(line: Line, provider: ScriptedProvider) -> None:
    recogniser = await line.accept()
    provider.refusals = [401]
    await recogniser.peer.close()
    with trio.fail_after(5):
        await line.ended.wait()
    assert [event.code for event in line.stt.retire().hearings if isinstance(event, ProviderError)] == ["1011"]


async def test_the_successor_understands_the_whole_utterance(
    line: Line, kind: type[Recogniser], provider: ScriptedProvider, nursery: trio.Nursery
) -> None:
    recogniser = await line.accept()
    line.stt.post(SAID)
    await recogniser.hear(2)
    await recogniser.begin()
    await events_until(line.stt, lambda event: event == SpeechStarted())
    owed = line.stt.retire()
    other = Line(kind, provider, nursery)
    other.stt.post(owed.audio)
    other.stt.post(SAID)
    successor = await other.accept()
    assert await successor.hear(4) == SAID * 2
    await successor.say("A table for four.")
    assert texts(await events_until(other.stt, lambda event: event == SpeechEnded())) == ["A table for four."]
