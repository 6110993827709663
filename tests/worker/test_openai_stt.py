"""OpenAI's speech-to-text adapter against a real server on loopback."""

import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from dialog_worker.participant import ProviderError
from dialog_worker.provider import ConfigurationError
from dialog_worker.stt.base import Final, Interim, SpeechEnded, SpeechStarted
from dialog_worker.stt.openai import OpenAISTT

from .scripted_provider import Peer, ScriptedProvider, events_until, next_event, no_event, scripted_provider
from .telephone import FRAME, SECOND, SILENT, silence, speech, texts

SERVER_VAD = {"type": "server_vad", "silence_duration_ms": 500}
BUFFER = "input_audio_buffer."
TRANSCRIPTION = "conversation.item.input_audio_transcription."
PROBLEM = ProviderError("OpenAI: no", code="bad")


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


async def test_a_transcript_missing_after_our_own_commit_is_asked_for_again(
    openai: ScriptedProvider, nursery: trio.Nursery
) -> None:
    stt = listen(openai, nursery, finalize_timeout_s=0.5)
    said = speech(0.3) + silence(1)
    stt.post(said)
    audio, _ = await receive_commit(await accept(openai))
    second = await accept(openai)
    assert (await receive_commit(second))[0] == audio
    await commit(second, "a")
    await complete(second, "a", "Hello")
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert [event.code for event in events if isinstance(event, ProviderError)] == ["timeout"]
    assert texts(events) == ["Hello"]


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
    assert texts(events) == []  # its audio is for whoever takes over


async def test_garbage_is_survived(openai: ScriptedProvider, nursery: trio.Nursery) -> None:
    stt = listen(openai, nursery, turn_detection=SERVER_VAD)
    peer = await accept(openai)
    await peer.send("}{")
    await peer.send({"type": TRANSCRIPTION + "delta", "item_id": 7})
    await hear(peer, "a", 0, 500)
    await complete(peer, "a", "Hello")
    events = await events_until(stt, lambda event: event == SpeechEnded())
    assert [event.code for event in events if isinstance(event, ProviderError)] == ["garbage"]


async def test_a_cancelled_call_closes_the_connection(openai: ScriptedProvider) -> None:
    async with trio.open_nursery() as nursery:
        listen(openai, nursery)
        peer = await accept(openai)
        began = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began < 0.5
    with trio.fail_after(1):
        await peer.ended.wait()
