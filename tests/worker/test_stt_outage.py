"""A provider that stalls, drops, refuses or talks nonsense in mid-call: no word lost, none twice, and never a long silence.

On a virtual clock, against a real server on loopback.
"""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from dialog_worker.participant import ProviderError
from dialog_worker.stt.base import Final, Hearing, SpeechEnded, SpeechStarted

from .recognisers import RECOGNISERS, Deepgram, Line, OpenAI, Recogniser
from .scripted_provider import ScriptedProvider, events_until, next_event, no_event, scripted_provider
from .telephone import silence, speech, texts

SAID = speech(1.5) + silence(0.5)


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.005)  # real seconds, in which loopback is sure to answer


@pytest.fixture
async def provider() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        yield provider


@pytest.fixture(params=RECOGNISERS)
def line(request: pytest.FixtureRequest, provider: ScriptedProvider, nursery: trio.Nursery) -> Line:
    kind: type[Recogniser] = request.param
    return Line(kind, provider, nursery)


async def ended(line: Line) -> list[Any]:
    """Events up to the end of an utterance."""
    return await events_until(line.stt, lambda event: event == SpeechEnded())


def codes(events: list[Hearing]) -> list[str]:
    return [event.code for event in events if isinstance(event, ProviderError)]


async def fatal(line: Line) -> float:
    """When the provider was given up."""
    with trio.fail_after(60):
        async for event in line.stt.events:
            if isinstance(event, ProviderError) and event.fatal:
                break
    return trio.current_time()


# Stalls


async def test_a_stall_is_noticed_although_the_caller_has_fallen_silent(line: Line, clock: MockClock) -> None:
    await line.accept()
    said_at = trio.current_time()
    line.stt.post(SAID)
    error = await next_event(line.stt)
    assert trio.current_time() - said_at == pytest.approx(2.5, abs=0.2)
    assert (error.code, error.fatal) == ("stall", False)
    second = await line.accept()
    assert await second.hear(2) == SAID
    await second.say("A table for four.")
    events = await ended(line)
    assert texts(events) == ["A table for four."]
    assert events.count(SpeechStarted()) == 1


async def test_a_stall_within_an_utterance_costs_no_word(line: Line, clock: MockClock) -> None:
    first = await line.accept()
    line.stt.post(SAID)
    await first.hear(2)
    await first.begin()
    await first.write("A table")
    line.stt.post(SAID)
    with trio.fail_after(6):
        second = await line.accept()
    assert await second.hear(4) == SAID * 2
    await second.say("A table for four.")
    events = await ended(line)
    assert texts(events) == ["A table for four."]
    assert events.count(SpeechStarted()) == 1
    assert codes(events) == ["stall"]


async def test_a_stall_in_the_middle_of_a_sentence_does_not_end_it_there(line: Line, clock: MockClock) -> None:
    first = await line.accept()
    line.stt.post(SAID)
    await first.hear(2)
    await first.begin()
    await first.write("A table")
    await trio.sleep(1.7)
    line.stt.post(SAID)
    second = await line.accept()
    assert await second.hear(4) == SAID * 2
    await second.say("A table for four.")
    assert texts(await ended(line)) == ["A table for four."]


async def test_two_stalls_in_a_row_are_fatal(line: Line, clock: MockClock) -> None:
    await line.accept()
    said_at = trio.current_time()
    line.stt.post(SAID)
    await line.accept()
    assert await fatal(line) - said_at < 6.5


async def test_a_server_that_takes_a_noise_for_no_speech_is_kept(
    line: Line, provider: ScriptedProvider, clock: MockClock
) -> None:
    recogniser = await line.accept()
    line.stt.post(SAID)
    await recogniser.until_asked()
    await recogniser.show_life()
    await trio.sleep(60)
    assert provider.attempts == 1
    assert no_event(line.stt)


async def test_a_quiet_line_needs_no_answer(line: Line, provider: ScriptedProvider, clock: MockClock) -> None:
    await line.accept()
    for _ in range(60):
        line.stt.post(silence(1))
        await trio.sleep(1)
    assert provider.attempts == 1
    assert no_event(line.stt)


async def test_a_line_that_dies_in_a_pause_is_replaced_before_the_next_word(
    line: Line, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await line.accept()
    await trio.sleep(12)  # in which pings are answered
    first.peer.freeze(monkeypatch)
    await trio.sleep(5)
    await line.accept()
    assert codes([await next_event(line.stt)]) == ["stall"]


async def test_a_server_that_has_never_answered_a_ping_may_be_alive(
    line: Line, provider: ScriptedProvider, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (await line.accept()).peer.freeze(monkeypatch)
    await trio.sleep(60)
    assert provider.attempts == 1


# Drops


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 1012])
async def test_a_close_within_an_utterance_costs_no_word(line: Line, code: int, clock: MockClock) -> None:
    first = await line.accept()
    line.stt.post(SAID)
    await first.hear(2)
    await first.begin()
    await first.write("A table")
    await first.peer.close(code)
    second = await line.accept()
    assert await second.hear(2) == SAID
    await second.say("A table for four.")
    events = await ended(line)
    assert texts(events) == ["A table for four."]
    assert events.count(SpeechStarted()) == 1
    assert codes(events) == [str(code)]


async def test_a_connection_that_vanishes_costs_no_word(line: Line, clock: MockClock) -> None:
    first = await line.accept()
    line.stt.post(SAID)
    await first.hear(2)
    await first.peer.vanish()
    line.stt.post(SAID)
    second = await line.accept()
    assert await second.hear(4) == SAID * 2
    await second.say("A table for four.")
    assert texts(await ended(line)) == ["A table for four."]


async def test_what_was_told_is_not_heard_again(line: Line, clock: MockClock) -> None:
    first = await line.accept()
    line.stt.post(SAID)
    await first.hear(2)
    await first.say("A table.")
    await ended(line)
    await first.peer.close()
    line.stt.post(speech(0.1))
    second = await line.accept()
    assert await second.hear(0.1) == speech(0.1)


async def test_a_server_that_drops_every_connection_within_an_utterance_is_given_up(
    line: Line, nursery: trio.Nursery, clock: MockClock
) -> None:
    async def drop() -> None:
        while True:
            recogniser = await line.accept()
            await recogniser.hear(2)
            await recogniser.begin()
            await recogniser.write("A")
            await recogniser.end_speech()
            await trio.sleep(0.5)
            await recogniser.peer.close()

    nursery.start_soon(drop)
    said_at = trio.current_time()
    line.stt.post(SAID)
    assert await fatal(line) - said_at < 5


# Refusals


async def test_a_server_that_refuses_while_somebody_speaks_is_given_up_after_3_s(
    line: Line, provider: ScriptedProvider, clock: MockClock
) -> None:
    first = await line.accept()
    provider.refusals = [503] * 100
    await first.peer.close()
    await trio.sleep(8)
    said_at = trio.current_time()
    line.stt.post(SAID)
    assert await fatal(line) - said_at == pytest.approx(3, abs=0.3)


async def test_a_server_that_comes_back_in_time_hears_everything(
    line: Line, provider: ScriptedProvider, clock: MockClock
) -> None:
    first = await line.accept()
    provider.refusals = [503, 429]
    await first.peer.close()
    line.stt.post(SAID)
    second = await line.accept()
    assert await second.hear(2) == SAID
    await second.say("A table.")
    events = await ended(line)
    assert texts(events) == ["A table."]
    assert codes(events) == ["1011"]


# Garbage


async def test_a_final_result_that_cannot_be_read_is_asked_for_again(
    provider: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    line = Line(Deepgram, provider, nursery)
    first = await line.accept()
    line.stt.post(SAID)
    await first.hear(2)
    await first.peer.send('{"type":"Results","start":0,"duration":2,"is_final":true,"channel":}')
    channel = {"alternatives": [{"transcript": "four.", "words": []}]}
    await first.peer.send({"type": "Results", "start": 2.0, "duration": 1.0, "is_final": True, "channel": channel})
    second = await line.accept()
    assert await second.hear(2) == SAID
    await second.say("A table for four.")
    events = await ended(line)
    assert texts(events) == ["A table for four."]
    assert codes(events) == ["garbage", "garbage"]


async def test_a_server_that_says_nothing_but_garbage_is_left(line: Line, clock: MockClock) -> None:
    first = await line.accept()
    line.stt.post(SAID)
    await first.hear(2)
    await first.peer.send("}{")
    second = await line.accept()
    assert await second.hear(2) == SAID


# Transcripts that do not come


async def test_a_missing_transcript_is_asked_for_on_another_connection(
    provider: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    line = Line(OpenAI, provider, nursery)
    first = await line.accept()
    line.stt.post(SAID)
    await first.hear(2)
    await first.begin()
    await first.end_speech()
    await first.until_asked()
    await first.show_life()
    second = await line.accept()
    assert await second.hear(2) == SAID
    await second.say("A table.")
    events = await ended(line)
    assert codes(events) == ["timeout"]
    assert texts(events) == ["A table."]


async def test_a_transcript_that_is_missing_twice_is_fatal(
    provider: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    line = Line(OpenAI, provider, nursery)
    said_at = trio.current_time()
    line.stt.post(SAID)
    for _ in range(2):
        recogniser = await line.accept()
        await recogniser.hear(2)
        await recogniser.begin()
        await recogniser.end_speech()
        await recogniser.until_asked()
        await recogniser.show_life()
    assert await fatal(line) - said_at < 6.5
    owed = line.stt.retire()
    assert owed.audio == SAID


# Audio beyond what is kept


@pytest.fixture(params=RECOGNISERS)
def forgetful(request: pytest.FixtureRequest, provider: ScriptedProvider, nursery: trio.Nursery) -> Line:
    """A line that keeps one second."""
    kind: type[Recogniser] = request.param
    provider.refusals = [503] * 20
    return Line(kind, provider, nursery, queue_size_limit=8000)


async def test_lost_audio_is_told_when_it_begins_to_be_lost_and_once_an_outage(forgetful: Line, clock: MockClock) -> None:
    assert (await next_event(forgetful.stt)).code == "503"
    forgetful.stt.post(silence(1))
    await trio.sleep(0.5)
    assert no_event(forgetful.stt)
    forgetful.stt.post(silence(0.1))
    error = await next_event(forgetful.stt)
    assert (error.code, error.fatal) == ("audio_lost", False)
    forgetful.stt.post(silence(5))
    await trio.sleep(0.5)
    assert no_event(forgetful.stt)


async def test_the_newest_audio_is_kept(forgetful: Line, provider: ScriptedProvider, clock: MockClock) -> None:
    forgetful.stt.post(silence(5) + speech(1))
    provider.refusals.clear()
    recogniser = await forgetful.accept()
    assert await recogniser.hear(1) == speech(1)
    await recogniser.say("Hello")
    assert isinstance((await ended(forgetful))[-2], Final)
