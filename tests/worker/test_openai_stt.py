"""OpenAI's speech-to-text adapter: turns and the voice gate without I/O, the rest against a real server on loopback."""

import base64
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from dialog_worker.participant import ProviderError
from dialog_worker.provider import ConfigurationError
from dialog_worker.stt.base import Final, Hearing, Interim, SpeechEnded, SpeechStarted
from dialog_worker.stt.openai import OpenAISTT
from dialog_worker.stt.openai_turn import Completed, LogProb, Turns, merged
from dialog_worker.stt.voice import Began, Ended, VoiceGate

from .scripted_provider import Peer, ScriptedProvider, events_until, next_event, no_event, scripted_provider

SILENT = b"\xff"  # mu-law
FRAME = 160  # bytes in 20 ms
SECOND = 8000
SERVER_VAD = {"type": "server_vad", "silence_duration_ms": 500}
BUFFER = "input_audio_buffer."
TRANSCRIPTION = "conversation.item.input_audio_transcription."
PROBLEM = ProviderError("OpenAI: no", code="bad")


def speech(seconds: float, loudness: int = 0x20) -> bytes:
    """Noise as loud as speech: mu-law codes of both signs around a magnitude; 0x20 is about -17 dB of full scale."""
    chance = random.Random(7)
    return bytes(loudness + chance.randrange(16) + chance.choice((0, 128)) for _ in range(int(seconds * SECOND)))


def silence(seconds: float) -> bytes:
    return SILENT * int(seconds * SECOND)


def texts(events: list[Hearing]) -> list[str]:
    return [event.text for event in events if isinstance(event, Final)]


# Turns


def test_an_item_becomes_a_turn() -> None:
    turns = Turns(3)
    assert list(turns.began(1.0, "a")) == [SpeechStarted()]
    assert list(turns.delta("a", "Hello ", 0)) == [Interim("Hello")]
    assert list(turns.delta("a", "there", 0)) == [Interim("Hello there")]
    turns.stopped(2.0, 0, "a")
    assert list(turns.committed("a", 0)) == []
    assert list(turns.completed("a", "Hello there.", 0.9)) == [Final("Hello there.", 0.9), SpeechEnded()]
    assert turns.idle


def test_transcripts_are_told_in_the_order_of_speech() -> None:
    turns = Turns(3)
    assert list(turns.began(1.0, "a")) == [SpeechStarted()]
    turns.stopped(2.0, 0, "a")
    assert list(turns.began(3.0, "b")) == []
    assert list(turns.completed("b", "second", None)) == []
    told = list(turns.completed("a", "first", None))
    assert told == [Final("first"), SpeechEnded(), SpeechStarted(), Final("second"), SpeechEnded()]


def test_an_empty_transcript_ends_without_a_final() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    assert list(turns.completed("a", " ", None)) == [SpeechEnded()]


def test_the_beginning_of_speech_is_told_once() -> None:
    turns = Turns(3)
    assert list(turns.began(1.0, "a")) == [SpeechStarted()]
    assert list(turns.began(1.0, "a")) == []


def test_speech_that_was_not_announced_begins_with_its_first_news() -> None:
    assert list(Turns(3).delta("a", "Hi", 0)) == [SpeechStarted(), Interim("Hi")]


def test_an_item_found_on_our_side_gets_the_id_of_the_first_news() -> None:
    turns = Turns(3)
    list(turns.began(1.0))
    assert list(turns.delta("a", "Hi", 0)) == [Interim("Hi")]
    turns.stopped(2.0, 0)
    assert list(turns.committed("a", 0)) == []
    assert texts(list(turns.completed("a", "Hi.", None))) == ["Hi."]


def test_a_late_transcript_is_replaced_by_its_deltas_and_then_ignored() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    list(turns.delta("a", "Hello", 0))
    turns.stopped(2.0, 10, "a")
    assert turns.due_at == 13
    assert list(turns.expire(12.9)) == []
    assert list(turns.expire(13)) == [Final("Hello"), SpeechEnded()]
    assert list(turns.completed("a", "Hello.", None)) == []


def test_a_transcript_that_never_comes_is_an_error() -> None:
    turns = Turns(3)
    list(turns.began(1.0))
    turns.stopped(2.0, 0)
    error, ended = turns.expire(3)
    assert isinstance(error, ProviderError)
    assert error.code == "timeout"
    assert ended == SpeechEnded()


def test_news_of_an_item_given_up_before_it_had_an_id_are_not_taken_for_the_next() -> None:
    turns = Turns(3)
    list(turns.began(1.0))
    turns.stopped(2.0, 0)
    list(turns.expire(3))
    list(turns.began(5.0))
    assert list(turns.completed("late", "One", None)) == []
    turns.stopped(6.0, 5)
    assert texts(list(turns.completed("next", "Two", None))) == ["Two"]


def test_news_give_an_overdue_transcript_more_time() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    turns.stopped(2.0, 0, "a")
    list(turns.delta("a", "Well", 2))
    assert turns.due_at == 5


def test_a_failed_item_keeps_what_was_understood() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    list(turns.delta("a", "Hello", 0))
    assert list(turns.failed("a", PROBLEM)) == [PROBLEM, Final("Hello"), SpeechEnded()]


def test_a_refused_commit_ends_its_turn() -> None:
    turns = Turns(3)
    list(turns.began(1.0))
    serial = turns.stopped(2.0, 0)
    assert list(turns.refused(serial, PROBLEM)) == [PROBLEM, SpeechEnded()]
    list(turns.began(3.0))
    assert texts(list(turns.completed("b", "Two", None))) == ["Two"]


def test_a_turn_goes_on_over_a_new_connection() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    list(turns.delta("a", "Hello th", 0))
    turns.reconnected(0)
    assert turns.settled_s(10) == 0
    assert list(turns.began(0.3, "b")) == []
    assert list(turns.delta("b", "Hello", 0)) == [Interim("Hello")]
    assert texts(list(turns.completed("b", "Hello there.", None))) == ["Hello there."]


def test_speech_that_a_new_connection_does_not_hear_ends_with_what_was_understood() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    list(turns.delta("a", "Hello", 0))
    turns.reconnected(10)
    assert list(turns.expire(13)) == [Final("Hello"), SpeechEnded()]


def test_a_transcript_that_waited_for_its_turn_is_heard_anew_on_a_new_connection() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    list(turns.began(3.0, "b"))
    list(turns.completed("b", "second", None))
    turns.reconnected(0)
    list(turns.began(1.0, "c"))
    assert texts(list(turns.completed("c", "first", None))) == ["first"]
    assert turns.idle


def test_audio_is_kept_from_the_first_open_item_on() -> None:
    turns = Turns(3)
    assert turns.settled_s(10) == 7
    list(turns.began(8.0, "a"))
    assert turns.settled_s(10) == 8
    turns.stopped(9.5, 0, "a")
    list(turns.completed("a", "Hi", None))
    assert turns.settled_s(10) == 9.5


def test_confidence_is_the_tokens_mean_probability() -> None:
    assert Completed("a", "Hi", (LogProb(0.0), LogProb(0.0))).confidence == 1.0
    assert Completed("a", "Hi", (LogProb(-1.0), LogProb(-3.0))).confidence == pytest.approx(0.1353, abs=1e-4)
    assert Completed("a", "Hi").confidence is None


def test_settings_are_merged_object_by_object() -> None:
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": None}, "d": 3}) == {"a": {"b": 1, "c": None}, "d": 3}


# Voice


def gate(audio: bytes, encoding: str = "mulaw", silence_s: float = 0.5) -> list[Began | Ended]:
    voice = VoiceGate(encoding, SECOND, silence_s)
    passing = [piece for start in range(0, len(audio), 100) for piece in voice.feed(audio[start : start + 100])]
    return [piece for piece in passing if not isinstance(piece, bytes)]


def test_a_stretch_of_speech_passes_with_what_comes_before_and_after() -> None:
    began, audio, ended = VoiceGate("mulaw", SECOND, 0.5).feed(silence(1) + speech(1) + silence(1))
    assert isinstance(began, Began)
    assert began.at_s == pytest.approx(0.66, abs=0.03)
    assert ended == Ended(2.5)
    assert isinstance(audio, bytes)
    assert len(audio) / SECOND == pytest.approx(2.5 - began.at_s)


@pytest.mark.parametrize("loudness", [0x10, 0x30, 0x40])  # down to about -35 dB of full scale
def test_a_voice_is_noticed_within_120_ms(loudness: int) -> None:
    voice = VoiceGate("mulaw", SECOND, 0.5)
    voice.feed(silence(1))
    assert voice.feed(speech(0.06, loudness)) == []
    assert any(isinstance(piece, Began) for piece in voice.feed(speech(0.06, loudness)))


def test_a_pause_within_speech_does_not_end_it() -> None:
    assert len(gate(speech(0.5) + silence(0.4) + speech(0.5) + silence(1))) == 2
    assert len(gate(speech(0.5) + silence(0.4) + speech(0.5) + silence(1), silence_s=0.3)) == 4


def test_clicks_and_the_lines_noise_are_no_speech() -> None:
    assert gate(silence(1) + speech(0.04) + silence(1)) == []
    assert gate(speech(3, 0x70)) == []


def test_a_steady_hum_is_learnt() -> None:
    hum = speech(12, 0x58)  # louder than the line's silence by 10 dB
    assert len(gate(hum)) == 2


def test_a_voice_above_the_noise_is_speech() -> None:
    noise = speech(12, 0x58)
    assert len(gate(noise)) == 2
    assert len(gate(noise + speech(1, 0x28) + noise[:SECOND])) == 4


def test_a_law_is_understood() -> None:
    assert gate(b"\xd5" * SECOND, "alaw") == []
    assert len(gate(b"\xd5" * SECOND + speech(1) + b"\xd5" * SECOND, "alaw")) == 2


def test_endless_speech_is_cut_before_it_is_longer_than_what_is_kept() -> None:
    assert [piece.at_s for piece in gate(speech(30)) if isinstance(piece, Ended)] == [28.0]


# Options


def test_a_missing_key_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        OpenAISTT()


def test_an_encoding_that_telephones_do_not_have_is_told_at_once() -> None:
    with pytest.raises(ConfigurationError, match="linear16"):
        OpenAISTT("key", encoding="linear16")


# The socket


@pytest.fixture
async def openai() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        yield provider


def listen(openai: ScriptedProvider, nursery: trio.Nursery, **options: Any) -> OpenAISTT:
    stt = OpenAISTT("key", url=openai.url, **options)
    nursery.start_soon(stt.run)
    return stt


async def accept(openai: ScriptedProvider, **session: Any) -> Peer:
    """A connection whose session is set up."""
    peer = await openai.accept()
    await peer.send({"type": "session.created", "event_id": "e", "session": {"type": "transcription", **session}})
    assert (await peer.receive_json())["type"] == "session.update"
    await peer.send({"type": "session.updated", "event_id": "e", "session": {"type": "transcription"}})
    return peer


async def receive_audio(peer: Peer, size: int) -> bytes:
    audio = b""
    while len(audio) < size:
        event = await peer.receive_json()
        assert event["type"] == "input_audio_buffer.append"
        audio += base64.b64decode(event["audio"])
    return audio


async def receive_commit(peer: Peer) -> tuple[bytes, dict[str, Any]]:
    """What was appended before the next commit, and the commit."""
    audio = b""
    while (event := await peer.receive_json())["type"] != "input_audio_buffer.commit":
        audio += base64.b64decode(event["audio"])
    return audio, event


async def commit(peer: Peer, item_id: str) -> None:
    await peer.send({"type": BUFFER + "committed", "item_id": item_id, "previous_item_id": None})


async def hear(peer: Peer, item_id: str, start_ms: float, end_ms: float) -> None:
    await peer.send({"type": BUFFER + "speech_started", "item_id": item_id, "audio_start_ms": start_ms})
    await peer.send({"type": BUFFER + "speech_stopped", "item_id": item_id, "audio_end_ms": end_ms})
    await commit(peer, item_id)


async def write(peer: Peer, item_id: str, text: str) -> None:
    await peer.send({"type": TRANSCRIPTION + "delta", "item_id": item_id, "content_index": 0, "delta": text})


async def complete(peer: Peer, item_id: str, text: str) -> None:
    await peer.send({"type": TRANSCRIPTION + "completed", "item_id": item_id, "content_index": 0, "transcript": text})


async def test_the_session_is_asked_for_in_its_current_shape(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    options = {"prompt": "pizza", "noise_reduction": {"type": "near_field"}, "turn_detection": SERVER_VAD}
    session = {"audio": {"input": {"transcription": {"keywords": ["Bella's"]}}}}
    listen(openai, nursery, model="gpt-transcribe", include_logprobs=True, session=session, **options)
    peer = await openai.accept()
    assert peer.headers["authorization"] == "Bearer key"
    assert "openai-beta" not in peer.headers
    await peer.send({"type": "session.created", "session": {}})
    assert (await peer.receive_json())["session"] == {
        "type": "transcription",
        "audio": {
            "input": {
                "format": {"type": "audio/pcmu"},
                "noise_reduction": {"type": "near_field"},
                "transcription": {
                    "model": "gpt-transcribe",
                    "language": "en",
                    "prompt": "pizza",
                    "keywords": ["Bella's"],
                },
                "turn_detection": SERVER_VAD,
            }
        },
        "include": ["item.input_audio_transcription.logprobs"],
    }


async def test_audio_waits_for_the_session_and_goes_in_pieces_of_100_ms(
    openai: ScriptedProvider, nursery: trio.Nursery
) -> None:
    stt = listen(openai, nursery, turn_detection=SERVER_VAD)
    for _ in range(12):
        stt.post(SILENT * FRAME)
    peer = await accept(openai)
    assert [len(base64.b64decode((await peer.receive_json())["audio"])) for _ in range(3)] == [800, 800, 320]


async def test_what_the_server_hears_becomes_events_in_order(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, turn_detection=SERVER_VAD)
    peer = await accept(openai)
    await peer.send({"type": "rate_limits.updated", "greeting": "unknown types are ignored"})
    await hear(peer, "a", 100, 900)
    await write(peer, "a", "Hel")
    await write(peer, "a", "lo.")
    await complete(peer, "a", "Hello.")
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert events == [SpeechStarted(), Interim("Hel"), Interim("Hello."), Final("Hello."), SpeechEnded()]


async def test_without_turn_detection_speech_is_found_here_and_committed(
    openai: ScriptedProvider, nursery: trio.Nursery
) -> None:
    stt = listen(openai, nursery)
    peer = await accept(openai)
    said = speech(1)
    stt.post(silence(2) + said + silence(1))
    assert await next_event(stt) == SpeechStarted()
    audio, event = await receive_commit(peer)
    assert said in audio
    assert len(audio) / SECOND == pytest.approx(1.8, abs=0.1)  # with what comes before and after, but not all the silence
    await commit(peer, "a")
    await complete(peer, "a", "Hello.")
    assert texts(await events_until(stt, lambda event: event == SpeechEnded())) == ["Hello."]
    assert event["event_id"]


async def test_a_commit_that_is_refused_ends_the_turn(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery)
    peer = await accept(openai)
    stt.post(speech(0.2) + silence(1))
    _, event = await receive_commit(peer)
    error = {"type": "invalid_request_error", "code": "empty", "message": "too little", "event_id": event["event_id"]}
    await peer.send({"type": "error", "error": error})
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert events == [SpeechStarted(), ProviderError("OpenAI: too little", code="empty"), SpeechEnded()]


@pytest.mark.parametrize("vad", [SERVER_VAD, None])
async def test_speech_without_a_transcript_is_sent_again_on_a_new_connection(
    openai: ScriptedProvider, nursery: trio.Nursery, vad: dict[str, Any] | None
) -> None:
    stt = listen(openai, nursery, turn_detection=vad)
    first = await accept(openai)
    one, two = speech(1), speech(1.5)[SECOND // 2 :]
    for said in (one, two):
        stt.post(silence(0.5) + said + silence(0.5))
        if vad is None:
            await receive_commit(first)
        else:
            await receive_audio(first, SECOND)
    await (hear(first, "a", 200, 2000) if vad else commit(first, "a"))
    await (hear(first, "b", 2200, 4000) if vad else commit(first, "b"))
    await complete(first, "a", "One")
    assert texts(await events_until(stt, lambda event: event == SpeechEnded())) == ["One"]
    await first.close()
    events = await events_until(stt, lambda event: isinstance(event, ProviderError))
    assert events[0] == SpeechStarted()
    second = await accept(openai)
    audio = (await receive_commit(second))[0] if vad is None else await receive_audio(second, len(two) + SECOND // 2)
    assert two in audio
    assert one not in audio
    await (hear(second, "c", 200, 2000) if vad else commit(second, "c"))
    await complete(second, "c", "Two")
    assert await events_until(stt, lambda event: event == SpeechEnded()) == [Final("Two"), SpeechEnded()]


async def test_lost_audio_is_told_once(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = OpenAISTT("key", url=openai.url, turn_detection=SERVER_VAD)
    stt.post(silence(32))
    nursery.start_soon(stt.run)
    peer = await accept(openai)
    error = await next_event(stt)
    assert (error.code, error.fatal) == ("audio_lost", False)
    assert "2.0 s" in error.message
    await receive_audio(peer, 8000 * 30)
    assert no_event(stt)


async def test_an_old_session_is_followed_by_another_in_a_pause(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, session_s=1.0, turn_detection=SERVER_VAD)
    first = await accept(openai)
    stt.post(silence(1))
    await receive_audio(first, SECOND)
    second = await accept(openai)
    stt.post(speech(0.1))
    assert (await receive_audio(second, SECOND + 800)).endswith(speech(0.1))
    assert no_event(stt)


async def test_a_turn_outlives_an_old_session(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, session_s=1.0, turn_detection=SERVER_VAD)
    first = await accept(openai)
    said = speech(1)
    stt.post(said)
    await receive_audio(first, SECOND)
    await first.send({"type": BUFFER + "speech_started", "item_id": "a", "audio_start_ms": 0})
    second = await accept(openai)
    assert await receive_audio(second, SECOND) == said
    await hear(second, "b", 0, 900)
    await complete(second, "b", "Hello")
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert events == [SpeechStarted(), Final("Hello"), SpeechEnded()]


async def test_what_was_told_is_not_sent_again_when_the_session_ends_right_after_it(
    openai: ScriptedProvider, nursery: trio.Nursery
) -> None:
    stt = listen(openai, nursery, turn_detection=SERVER_VAD)
    first = await accept(openai)
    stt.post(speech(0.5) + silence(0.5))
    await receive_audio(first, SECOND)
    await hear(first, "a", 0, 900)
    await complete(first, "a", "Hello")
    await first.send({"type": "error", "error": {"type": "invalid_request_error", "code": "session_expired"}})
    second = await accept(openai)
    assert await receive_audio(second, SECOND // 10) == silence(0.1)
    assert texts(await events_until(stt, lambda event: event == SpeechEnded())) == ["Hello"]


async def test_the_servers_time_of_expiry_is_believed(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    listen(openai, nursery, session_s=2.0)
    began = time.monotonic()
    await accept(openai, expires_at=time.time() + 1.4)
    await accept(openai)
    assert time.monotonic() - began < 1.7  # instead of nine tenths of two seconds


async def test_an_impossible_time_of_expiry_is_not_believed(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    listen(openai, nursery)
    peer = await accept(openai, expires_at=1)
    with trio.move_on_after(0.3):
        await peer.ended.wait()
    assert openai.attempts == 1


async def test_a_session_that_expired_is_followed_by_another_without_a_word(
    openai: ScriptedProvider, nursery: trio.Nursery
) -> None:
    stt = listen(openai, nursery)
    first = await accept(openai)
    await first.send({"type": "error", "error": {"type": "invalid_request_error", "code": "session_expired"}})
    await accept(openai)
    assert no_event(stt)


async def test_a_close_for_age_is_no_error(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, session_s=0.4)
    first = await accept(openai)
    await trio.sleep(0.25)  # past half of the session's life; one that closes sooner was not old
    await first.close(1001, "maximum duration of 60 minutes")
    await accept(openai)
    assert no_event(stt)


async def test_an_early_close_is_an_error(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery)
    await (await accept(openai)).close(1001, "going away")
    await accept(openai)
    assert (await next_event(stt)).code == "1001"


async def test_a_missing_transcript_is_replaced_by_its_deltas(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, turn_detection=SERVER_VAD, finalize_timeout_s=0.05)
    peer = await accept(openai)
    await hear(peer, "a", 0, 500)
    await write(peer, "a", "Hello")
    assert texts(await events_until(stt, lambda event: event == SpeechEnded())) == ["Hello"]


async def test_a_transcript_missing_after_our_own_commit_is_an_error(
    openai: ScriptedProvider, nursery: trio.Nursery
) -> None:
    stt = listen(openai, nursery, finalize_timeout_s=0.05)
    peer = await accept(openai)
    stt.post(speech(0.3) + silence(1))
    await receive_commit(peer)
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert [event.code for event in events if isinstance(event, ProviderError)] == ["timeout"]


async def test_an_item_that_fails_is_told(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, turn_detection=SERVER_VAD)
    peer = await accept(openai)
    await hear(peer, "a", 0, 500)
    await peer.send({"type": TRANSCRIPTION + "failed", "item_id": "a", "error": {"code": "bad", "message": "no"}})
    assert await events_until(stt, lambda event: event == SpeechEnded()) == [SpeechStarted(), PROBLEM, SpeechEnded()]


async def test_an_error_is_told_and_the_session_goes_on(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, turn_detection=SERVER_VAD)
    peer = await accept(openai)
    await peer.send({"type": "error", "error": {"type": "server_error", "code": "bad", "message": "no"}})
    assert await next_event(stt) == PROBLEM
    stt.post(SILENT * FRAME)
    assert await receive_audio(peer, FRAME)


async def test_a_refused_key_is_fatal_and_ends_run(openai: ScriptedProvider) -> None:
    openai.refusals = [401]
    stt = OpenAISTT("key", url=openai.url)
    with trio.fail_after(5):
        await stt.run()
    error = await next_event(stt)
    assert error.fatal
    assert "OPENAI_API_KEY" in error.message


async def test_refused_settings_are_fatal_and_end_run(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, turn_detection=SERVER_VAD)
    peer = await openai.accept()
    await peer.send({"type": "session.created", "session": {}})
    event_id = (await peer.receive_json())["event_id"]
    message = "Turn detection is not supported for this transcription model"
    error = {"type": "invalid_request_error", "code": "invalid_value", "message": message, "event_id": event_id}
    await peer.send({"type": "error", "error": error})
    assert await next_event(stt) == ProviderError(f"OpenAI: {message}", code="invalid_value", fatal=True)
    with trio.fail_after(5):
        await peer.ended.wait()


async def test_a_connection_that_openai_will_not_serve_is_fatal(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery)
    await (await openai.accept()).close(4000, "invalid_request_error.invalid_model")
    error = await next_event(stt)
    assert (error.fatal, error.code) == (True, "4000")
    assert "invalid_model" in error.message


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_server_is_asked_again(openai: ScriptedProvider, nursery: trio.Nursery, status: int) -> None:
    openai.refusals = [status, status]
    stt = listen(openai, nursery)
    await accept(openai)
    error = await next_event(stt)
    assert (error.code, error.fatal) == (str(status), False)
    assert no_event(stt)


async def test_a_session_that_is_not_set_up_is_tried_again_but_not_for_ever(
    openai: ScriptedProvider, nursery: trio.Nursery
) -> None:
    stt = listen(openai, nursery, give_up_s=0.2)

    async def be_in_trouble() -> None:
        while True:
            peer = await openai.accept()
            await peer.send({"type": "error", "error": {"type": "server_error", "message": "try later"}})

    nursery.start_soon(be_in_trouble)
    events = await events_until(stt, lambda event: event.fatal)
    assert {event.code for event in events} == {"server_error"}
    assert 2 <= len(events) <= 8
    nursery.cancel_scope.cancel()


async def test_a_turn_cut_off_for_good_is_ended(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, turn_detection=SERVER_VAD)
    peer = await accept(openai)
    await peer.send({"type": BUFFER + "speech_started", "item_id": "a", "audio_start_ms": 0})
    await write(peer, "a", "Hello")
    await events_until(stt, lambda event: event == Interim("Hello"))
    openai.refusals = [401]
    await peer.close()
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert [event.fatal for event in events if isinstance(event, ProviderError)] == [False, True]
    assert texts(events) == ["Hello"]


async def test_garbage_is_survived(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, turn_detection=SERVER_VAD)
    peer = await accept(openai)
    await peer.send("}{")
    await peer.send({"type": TRANSCRIPTION + "delta", "item_id": 7})
    await hear(peer, "a", 0, 500)
    await complete(peer, "a", "Hello")
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert [event.code for event in events if isinstance(event, ProviderError)] == ["garbage"]


async def test_a_silent_server_is_asked_for_a_sign_of_life_and_then_left(
    openai: ScriptedProvider, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dialog_worker.stt.openai.PROBE_AFTER_S", 0.1)
    monkeypatch.setattr("dialog_worker.stt.openai.PROBE_ANSWER_S", 0.1)
    stt = listen(openai, nursery)
    peer = await accept(openai)
    for _ in range(3):
        probe = await peer.receive_json()
        error = {"type": "invalid_request_error", "code": "item_not_found", "event_id": probe["event_id"]}
        await peer.send({"type": "error", "error": error})
    assert (await peer.receive_json())["type"] == "conversation.item.retrieve"
    assert no_event(stt)
    assert (await next_event(stt)).code == "stall"
    await accept(openai)


async def test_a_cancelled_call_closes_the_connection(openai: ScriptedProvider) -> None:
    async with trio.open_nursery() as nursery:
        listen(openai, nursery)
        peer = await accept(openai)
        began = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began < 0.5
    with trio.fail_after(1):
        await peer.ended.wait()
