"""Deepgram's adapter: turns from results and the audio's buffer without I/O, the rest against a real server on loopback."""

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
import trio

from dialog_worker.participant import ProviderError, Word
from dialog_worker.provider import ConfigurationError
from dialog_worker.stt.base import Final, Hearing, Interim, SpeechEnded, SpeechStarted
from dialog_worker.stt.buffer import AudioBuffer, is_voiced
from dialog_worker.stt.deepgram import DeepgramSTT, with_query
from dialog_worker.stt.deepgram_turn import Results, Turn

from .scripted_provider import ScriptedProvider, events_until, next_event, no_event, scripted_provider

LOUD, SILENT = b"\x00", b"\xff"  # mu-law
FRAME = 160  # bytes in 20 ms


def results(text: str = "", start: float = 0.0, duration: float = 1.0, **flags: bool) -> dict[str, Any]:
    """A result as Deepgram sends it, its words spread evenly."""
    words = text.split()
    step = duration / max(1, len(words))
    timed = [
        {"word": word.lower(), "start": start + step * n, "end": start + step * (n + 1), "punctuated_word": word}
        for n, word in enumerate(words)
    ]
    alternative = {"transcript": text, "confidence": 0.9, "words": timed}
    channel = {"alternatives": [alternative]}
    return {"type": "Results", "start": start, "duration": duration, "channel": channel, **flags}


def hear(turn: Turn, message: dict[str, Any], offset_s: float = 0.0) -> list[Hearing]:
    return list(turn.results(msgspec.convert(message, Results), offset_s))


def texts(events: list[Hearing]) -> list[str]:
    return [event.text for event in events if isinstance(event, Final)]


# Turns


def test_final_parts_are_joined_until_speech_final() -> None:
    turn = Turn()
    assert hear(turn, results("I would", 0, 1)) == [SpeechStarted(), Interim("I would")]
    assert hear(turn, results("I would like", 0, 1.5, is_final=True)) == [Interim("I would like")]
    assert hear(turn, results("a", 1.5, 0.5)) == [Interim("I would like a")]
    heard = hear(turn, results("a table.", 1.5, 1, is_final=True, speech_final=True))
    assert texts(heard) == ["I would like a table."]
    assert heard[-1] == SpeechEnded()


def test_words_are_timed_in_the_streams_milliseconds() -> None:
    heard = hear(Turn(), results("Yes please", 1, 1, is_final=True, speech_final=True), 10.0)
    assert heard[1] == Final("Yes please", 0.9, (Word("Yes", 11000, 11500), Word("please", 11500, 12000)))


def test_an_empty_speech_final_ends_the_turn() -> None:
    turn = Turn()
    hear(turn, results("Hello", 0, 1, is_final=True))
    assert texts(hear(turn, results("", 1, 1, is_final=True, speech_final=True))) == ["Hello"]


def test_a_voice_that_says_nothing_ends_without_a_final() -> None:
    turn = Turn()
    assert list(turn.voice_detected(0.5)) == [SpeechStarted()]
    assert hear(turn, results("", 0, 2, is_final=True, speech_final=True)) == [SpeechEnded()]


def test_the_beginning_of_speech_is_told_once() -> None:
    turn = Turn()
    assert list(turn.voice_detected(0.5)) == [SpeechStarted()]
    assert list(turn.voice_detected(0.6)) == []
    assert hear(turn, results("Hi", 0.5, 1)) == [Interim("Hi")]


def test_silence_is_no_speech() -> None:
    assert hear(Turn(), results("", 0, 3, is_final=True)) == []
    assert hear(Turn(), {"type": "Results", "channel": {"alternatives": []}}) == []


def test_a_late_voice_of_the_last_turn_begins_no_new_one() -> None:
    turn = Turn()
    hear(turn, results("Hi there", 0, 1, is_final=True, speech_final=True))
    assert list(turn.voice_detected(0.1)) == []
    assert list(turn.voice_detected(1.5)) == [SpeechStarted()]


def test_the_end_of_an_utterance_ends_the_turn() -> None:
    turn = Turn()
    hear(turn, results("Hello there", 0, 1, is_final=True))
    assert texts(list(turn.utterance_end(1.0))) == ["Hello there"]
    assert list(turn.utterance_end(1.0)) == []


def test_the_end_of_the_last_utterance_does_not_end_the_next() -> None:
    turn = Turn()
    hear(turn, results("Hello", 0, 1, is_final=True, speech_final=True))
    list(turn.voice_detected(1.5))
    assert list(turn.utterance_end(1.0)) == []
    assert turn.is_open


def test_a_draft_that_is_not_final_yet_outlives_the_end_of_the_utterance() -> None:
    turn = Turn()
    hear(turn, results("Hello", 0, 1))
    assert list(turn.utterance_end(1.0)) == []
    assert texts(hear(turn, results("Hello.", 0, 1, is_final=True, speech_final=True))) == ["Hello."]


def test_a_forced_end_takes_the_draft_and_hears_it_only_once() -> None:
    turn = Turn()
    hear(turn, results("one two", 0, 1, is_final=True))
    hear(turn, results("three four", 1, 1))
    assert texts(list(turn.end(forced=True))) == ["one two three four"]
    late = hear(turn, results("three four five", 1, 1.5, is_final=True, speech_final=True))
    assert texts(late) == ["five"]


# Audio


def test_audio_is_taken_in_frames_of_20_to_250_ms() -> None:
    audio = AudioBuffer("mulaw", 8000)
    audio.append(bytes(159))
    assert audio.take() == b""
    audio.append(bytes(1))
    assert len(audio.take()) == 160
    audio.append(bytes(4500))
    assert [len(audio.take()) for _ in range(4)] == [2000, 2000, 500, 0]


def test_samples_are_not_cut_in_two() -> None:
    audio = AudioBuffer("linear16", 8000)
    audio.append(bytes(401))
    assert len(audio.take()) == 400


def test_what_is_not_settled_is_taken_again() -> None:
    audio = AudioBuffer("mulaw", 8000)
    audio.append(b"a" * 1600 + b"b" * 1600)
    audio.take()
    audio.take()
    audio.settle(0.2)
    assert audio.rewind() == 0
    assert audio.offset_s == 0.2
    assert audio.take() == b"b" * 1600


def test_the_oldest_audio_beyond_the_limit_is_lost_and_counted_once() -> None:
    audio = AudioBuffer("mulaw", 8000, limit=8000)
    audio.append(b"a" * 4000 + b"b" * 8000)
    assert audio.rewind() == 0.5
    assert audio.rewind() == 0
    assert audio.take() == b"b" * 2000
    assert audio.offset_s == 0.5


def test_audio_that_a_connection_never_got_does_not_count_on_its_clock() -> None:
    audio = AudioBuffer("mulaw", 8000, limit=8000)
    audio.append(bytes(2000))
    audio.take()
    audio.append(bytes(10000))
    assert audio.offset_s == 2000 / 8000
    assert audio.rewind() == 0.5


@pytest.mark.parametrize(
    ("encoding", "quiet", "loud"),
    [("mulaw", b"\xff\x7f", b"\x00\x80"), ("alaw", b"\xd5\x55", b"\x2a\xaa"), ("linear16", b"\x01\x00", b"\x00\x40")],
)
def test_a_voice_is_told_from_silence(encoding: str, quiet: bytes, loud: bytes) -> None:
    assert not is_voiced(quiet * 80, encoding)
    assert is_voiced(loud * 80, encoding)


# Options


def test_the_query_says_what_telephony_needs() -> None:
    url = with_query("ws://x/v1/listen?tag=a", {"smart_format": True, "keyterm": ["Bella's", "Ana"], "language": None})
    assert parse_qs(urlsplit(url).query) == {"tag": ["a"], "smart_format": ["true"], "keyterm": ["Bella's", "Ana"]}


def test_a_missing_key_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPGRAM_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="DEEPGRAM_API_KEY"):
        DeepgramSTT()


def test_an_unknown_encoding_is_told_at_once() -> None:
    with pytest.raises(ConfigurationError, match="opus"):
        DeepgramSTT("key", encoding="opus")


# The socket


@pytest.fixture
async def deepgram() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        yield provider


def listen(deepgram: ScriptedProvider, nursery: trio.Nursery, **options: Any) -> DeepgramSTT:
    stt = DeepgramSTT("key", url=deepgram.url, **options)
    nursery.start_soon(stt.run)
    return stt


async def test_the_connection_is_asked_for_with_options_and_key(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    listen(deepgram, nursery, keyterms=["Bella's"], endpointing_ms=None, options={"numerals": True, "smart_format": None})
    peer = await deepgram.accept()
    assert peer.headers["authorization"] == "Token key"
    assert parse_qs(urlsplit(peer.path).query) == {
        "model": ["nova-3"],
        "language": ["en"],
        "encoding": ["mulaw"],
        "sample_rate": ["8000"],
        "channels": ["1"],
        "interim_results": ["true"],
        "endpointing": ["false"],
        "utterance_end_ms": ["1000"],
        "vad_events": ["true"],
        "keyterm": ["Bella's"],
        "numerals": ["true"],
    }


async def test_speech_becomes_events_in_order(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(deepgram, nursery)
    peer = await deepgram.accept()
    stt.post(LOUD * FRAME)
    assert await peer.receive() == LOUD * FRAME
    await peer.send({"type": "SpeechStarted", "channel": [0], "timestamp": 0.1})
    await peer.send({"type": "Holiday", "greeting": "unknown types are ignored"})
    await peer.send(results("Hel"))
    await peer.send(results("Hello.", is_final=True))
    await peer.send({"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": 1.0})
    events = await events_until(stt, lambda event: isinstance(event, SpeechEnded))
    assert [type(event) for event in events] == [SpeechStarted, Interim, Interim, Final, SpeechEnded]
    assert texts(events) == ["Hello."]


async def test_queued_audio_is_coalesced(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(deepgram, nursery)
    for _ in range(20):
        stt.post(SILENT * FRAME)
    peer = await deepgram.accept()
    assert [len(await peer.receive()) for _ in range(2)] == [2000, 1200]


async def test_a_silent_line_is_kept_alive_by_text(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    listen(deepgram, nursery, keep_alive_s=0.02)
    peer = await deepgram.accept()
    assert await peer.receive() == '{"type":"KeepAlive"}'
    assert await peer.receive() == '{"type":"KeepAlive"}'


async def test_audio_not_yet_final_is_sent_again_and_no_text_is_doubled(
    deepgram: ScriptedProvider, nursery: trio.Nursery
) -> None:
    stt = listen(deepgram, nursery)
    first = await deepgram.accept()
    stt.post(b"\x01" * 8000 + b"\x02" * 8000)
    await first.receive_audio(16000)
    await first.send(results("One", 0, 1, is_final=True))
    await first.send(results("two", 1, 1))
    await events_until(stt, lambda event: event == Interim("One two"))
    await first.close()
    assert (await next_event(stt)).code == "1011"
    stt.post(b"\x03" * 800)
    second = await deepgram.accept()
    assert await second.receive_audio(8800) == b"\x02" * 8000 + b"\x03" * 800
    await second.send(results("two", 0, 1, is_final=True, speech_final=True))
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert texts(events) == ["One two"]
    assert events[0].words[1] == Word("two", 1000, 2000)


async def test_lost_audio_is_told_once(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = DeepgramSTT("key", url=deepgram.url)
    stt.post(SILENT * 8000 * 32)
    nursery.start_soon(stt.run)
    error = await next_event(stt)
    assert (error.code, error.fatal) == ("audio_lost", False)
    assert "2.0 s" in error.message
    peer = await deepgram.accept()
    await peer.receive_audio(8000 * 30)
    assert no_event(stt)


async def test_an_open_turn_without_news_is_finalized(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(deepgram, nursery, finalize_timeout_s=0.05)
    peer = await deepgram.accept()
    await peer.send(results("Hello", is_final=True))
    assert await peer.receive_json() == {"type": "Finalize"}
    await peer.send(results("there", 1, 1, is_final=True, from_finalize=True))
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert texts(events) == ["Hello there"]


async def test_an_unanswered_finalize_emits_what_there_is(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(deepgram, nursery, finalize_timeout_s=0.05)
    peer = await deepgram.accept()
    await peer.send(results("Hello", is_final=True))
    assert texts(await events_until(stt, lambda event: event == SpeechEnded())) == ["Hello"]


async def test_a_server_that_ignores_a_voice_is_left(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(deepgram, nursery, stall_s=0.1)

    async def talk() -> None:
        while True:
            stt.post(LOUD * FRAME)
            await trio.sleep(0.02)

    nursery.start_soon(talk)
    await deepgram.accept()
    second = await deepgram.accept()
    assert (await next_event(stt)).code == "stall"
    assert await second.receive_audio(FRAME)


async def test_a_server_may_ignore_silence(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(deepgram, nursery, stall_s=0.05)
    peer = await deepgram.accept()
    for _ in range(8):
        stt.post(SILENT * FRAME)
        await peer.receive()
        await trio.sleep(0.02)
    assert deepgram.attempts == 1


async def test_a_refused_key_is_fatal_and_ends_run(deepgram: ScriptedProvider) -> None:
    deepgram.refusals = [401]
    stt = DeepgramSTT("key", url=deepgram.url)
    with trio.fail_after(5):
        await stt.run()
    error = await next_event(stt)
    assert error.fatal
    assert "DEEPGRAM_API_KEY" in error.message


async def test_too_many_requests_are_retried(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    deepgram.refusals = [429, 429]
    stt = listen(deepgram, nursery)
    await deepgram.accept()
    error = await next_event(stt)
    assert (error.code, error.fatal) == ("429", False)
    assert no_event(stt)


async def test_a_turn_cut_off_for_good_is_ended(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(deepgram, nursery)
    peer = await deepgram.accept()
    await peer.send(results("Hello", is_final=True))
    await events_until(stt, lambda event: event == Interim("Hello"))
    deepgram.refusals = [401]
    await peer.close()
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert [event.fatal for event in events if isinstance(event, ProviderError)] == [False, True]
    assert texts(events) == ["Hello"]


async def test_garbage_is_survived(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(deepgram, nursery)
    peer = await deepgram.accept()
    await peer.send("}{")
    await peer.send({"type": "Results", "start": "soon"})
    await peer.send(results("Hello", is_final=True, speech_final=True))
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert [event.code for event in events if isinstance(event, ProviderError)] == ["garbage"]


async def test_an_error_of_deepgrams_is_told(deepgram: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(deepgram, nursery)
    peer = await deepgram.accept()
    await peer.send({"type": "Error", "variant": "SchemaError", "description": "bad JSON"})
    assert await next_event(stt) == ProviderError("Deepgram: bad JSON", code="SchemaError")


async def test_a_cancelled_call_closes_the_stream(deepgram: ScriptedProvider) -> None:
    async with trio.open_nursery() as nursery:
        stt = listen(deepgram, nursery)
        peer = await deepgram.accept()
        stt.post(SILENT * FRAME)
        await peer.receive()
        began = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began < 0.5
    assert await peer.receive_json() == {"type": "CloseStream"}
