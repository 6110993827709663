"""What an agent may rely on, whoever recognises the caller's speech."""

import math
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from dialog_worker import DeepgramSTT, OpenAISTT
from dialog_worker.stt.base import Final, Interim, SpeechEnded, SpeechStarted

from .recognisers import RECOGNISERS, Line, Recogniser
from .scripted_provider import ScriptedProvider, events_until, scripted_provider
from .telephone import silence, speech


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        yield provider


@pytest.fixture(params=RECOGNISERS)
def line(request: pytest.FixtureRequest, provider: ScriptedProvider, nursery: trio.Nursery) -> Line:
    kind: type[Recogniser] = request.param
    return Line(kind, provider, nursery)


async def test_an_utterance_has_a_beginning_drafts_a_text_and_an_end(line: Line) -> None:
    recogniser = await line.accept()
    line.stt.post(speech(1) + silence(0.5))
    await recogniser.hear(1.5)
    await recogniser.begin()
    await recogniser.write("A table")
    await recogniser.write("for four.")
    await recogniser.finish()
    events = await events_until(line.stt, lambda event: event == SpeechEnded())
    assert [type(event) for event in events] == [SpeechStarted, Interim, Interim, Final, SpeechEnded]
    assert [event.text for event in events[1:4]] == ["A table", "A table for four.", "A table for four."]


async def test_a_voice_without_words_has_a_beginning_and_an_end(line: Line) -> None:
    recogniser = await line.accept()
    line.stt.post(speech(1) + silence(0.5))
    await recogniser.hear(1.5)
    await recogniser.begin()
    await recogniser.finish()
    events = await events_until(line.stt, lambda event: event == SpeechEnded())
    assert events == [SpeechStarted(), SpeechEnded()]


async def test_one_utterance_ends_before_the_next_begins(line: Line) -> None:
    recogniser = await line.accept()
    for text in ("One.", "Two."):
        line.stt.post(speech(1) + silence(0.5))
        await recogniser.hear(1.5)
        await recogniser.say(text)
        events = await events_until(line.stt, lambda event: event == SpeechEnded())
        assert [type(event) for event in events] == [SpeechStarted, Interim, Final, SpeechEnded]


@pytest.mark.parametrize("kind", [DeepgramSTT, OpenAISTT])
async def test_what_was_said_while_the_recogniser_is_away_is_unanswered(
    kind: type[DeepgramSTT | OpenAISTT], autojump_clock: MockClock
) -> None:
    stt = kind("key", url="ws://127.0.0.1:9/")
    stt.post(silence(1))
    assert stt.unanswered_since == math.inf
    await trio.sleep(5)
    stt.post(speech(1))
    assert stt.unanswered_since == trio.current_time()
