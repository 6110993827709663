"""Cartesia's adapter: the queue of utterances without I/O, the rest against a real server on loopback."""

from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from dialog_worker.participant import ProviderError, Word
from dialog_worker.provider import ConfigurationError
from dialog_worker.tts.base import Speaking, WordTimings
from dialog_worker.tts.cartesia import CartesiaTTS
from dialog_worker.tts.contexts import Cancel, Contexts, Line
from protocol.messages import Message

from .scripted_provider import Peer, ScriptedProvider, events_until, next_event, no_event, scripted_provider


def new_contexts() -> Contexts:
    return Contexts("Acme", 8000, timeout_s=5, idle_s=0.7)


def drain(contexts: Contexts, now: float) -> list[Speaking]:
    events = []
    while event := contexts.next_event(now):
        events.append(event)
    return events


def say(contexts: Contexts, uuid: str, text: str, now: float, *, done: bool = False) -> Line | Cancel | None:
    contexts.post(Message(uuid, text, done), now)
    return contexts.due(now)


# The queue of utterances


def test_pieces_share_a_context_and_the_last_closes_it() -> None:
    contexts = new_contexts()
    assert say(contexts, "u", "Hello, ", 0) == Line("u-1", "Hello, ", last=False)
    assert say(contexts, "u", "you.", 0) == Line("u-1", "you.", last=False)
    assert say(contexts, "u", "", 0, done=True) == Line("u-1", "", last=True)
    assert contexts.due(0) is None


def test_pieces_that_wait_are_sent_as_one() -> None:
    contexts = new_contexts()
    contexts.post(Message("u", "Hello, "), 0)
    contexts.post(Message("u", "you.", True), 0)
    assert contexts.due(0) == Line("u-1", "Hello, you.", last=True)


def test_an_utterance_ends_when_its_context_does() -> None:
    contexts = new_contexts()
    say(contexts, "u", "Hi", 0, done=True)
    contexts.audio("u-1", b"aa", 0.1)
    assert drain(contexts, 0.1) == [Message("u", b"aa")]
    contexts.done("u-1")
    assert drain(contexts, 0.2) == [Message("u", b"", True)]
    assert not contexts.busy


def test_an_utterance_without_text_ends_at_once() -> None:
    contexts = new_contexts()
    assert say(contexts, "u", " ", 0, done=True) is None
    assert drain(contexts, 0) == [Message("u", b"", True)]


def test_a_piece_after_a_pause_gets_a_context_of_its_own() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One moment. ", 0)
    contexts.audio("u-1", bytes(4000), 0.1)
    assert say(contexts, "u", "Done.", 2, done=True) == Line("u-2", "Done.", last=True)
    contexts.audio("u-2", bytes(800), 2.1)
    contexts.words("u-2", [("Done.", 0.0, 0.1)])
    contexts.audio("u-1", b"late", 2.2)
    contexts.done("u-2")
    events = drain(contexts, 3)
    assert WordTimings("u", (Word("Done.", 500, 600),)) in events
    assert b"".join(event.data for event in events if isinstance(event, Message)) == bytes(4800)
    assert events[-1] == Message("u", b"", True)


def test_a_context_that_the_provider_ended_is_not_used_again() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One moment. ", 0)
    contexts.audio("u-1", b"a", 0.1)
    contexts.done("u-1")
    assert say(contexts, "u", "Done.", 0.2) == Line("u-2", "Done.", last=False)


def test_a_context_awaiting_audio_is_not_idle() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One. ", 0)
    contexts.audio("u-1", b"a", 0.1)
    say(contexts, "u", "Two. ", 0.2)
    assert say(contexts, "u", "Three.", 3) == Line("u-1", "Three.", last=False)


def test_the_end_of_a_paused_utterance_waits_only_shortly() -> None:
    contexts = new_contexts()
    say(contexts, "u", "Bye.", 0)
    contexts.audio("u-1", b"a", 0.1)
    assert say(contexts, "u", "", 2, done=True) == Line("u-1", "", last=True)
    assert drain(contexts, 2) == [Message("u", b"a")]
    assert contexts.deadline() == 3
    assert drain(contexts, 3) == [Message("u", b"", True)]


def test_an_error_for_closing_a_context_that_was_over_is_no_error() -> None:
    contexts = new_contexts()
    say(contexts, "u", "Bye.", 0)
    contexts.audio("u-1", b"a", 0.1)
    say(contexts, "u", "", 2, done=True)
    assert contexts.failed("u-1", "no such context", "expired") is None
    assert drain(contexts, 2) == [Message("u", b"a"), Message("u", b"", True)]


def test_the_second_utterance_is_held_until_the_first_is_done() -> None:
    contexts = new_contexts()
    assert say(contexts, "u", "One", 0, done=True) == Line("u-1", "One", last=True)
    assert say(contexts, "v", "Two", 0, done=True) == Line("v-1", "Two", last=True)
    contexts.audio("v-1", b"2", 0.1)
    contexts.done("v-1")
    contexts.audio("u-1", b"1", 0.2)
    assert drain(contexts, 0.2) == [Message("u", b"1")]
    contexts.done("u-1")
    assert drain(contexts, 0.3) == [Message("u", b"", True), Message("v", b"2"), Message("v", b"", True)]


def test_no_more_than_two_utterances_are_generated_at_a_time() -> None:
    contexts = new_contexts()
    for uuid in "uvw":
        contexts.post(Message(uuid, uuid, True), 0)
    assert [contexts.due(0) for _ in range(3)] == [Line("u-1", "u", True), Line("v-1", "v", True), None]
    contexts.done("u-1")
    drain(contexts, 1)
    assert contexts.due(1) == Line("w-1", "w", True)


def test_nothing_follows_an_abort() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0)
    contexts.audio("u-1", b"1", 0.1)
    contexts.abort("u", 0.2)
    assert contexts.due(0.2) == Cancel("u-1")
    contexts.audio("u-1", b"late", 0.3)
    contexts.words("u-1", [("late", 0, 1)])
    assert say(contexts, "u", "more", 0.4) is None
    assert say(contexts, "u", "", 0.4, done=True) is None
    assert drain(contexts, 10) == []


def test_unknown_utterances_may_be_aborted() -> None:
    contexts = new_contexts()
    contexts.abort("who", 0)
    assert say(contexts, "who", "me", 0) == Line("who-1", "me", last=False)


def test_the_next_utterance_is_heard_after_an_abort() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    say(contexts, "v", "Two", 0, done=True)
    contexts.audio("v-1", b"2", 4)
    contexts.abort("u", 8)
    assert drain(contexts, 8) == [Message("v", b"2")]
    assert contexts.deadline() == 13


def test_silence_of_a_complete_utterance_ends_it() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    contexts.audio("u-1", b"1", 1)
    assert drain(contexts, 5.9) == [Message("u", b"1")]
    error, last = drain(contexts, 6)
    assert isinstance(error, ProviderError)
    assert (error.code, error.uuid) == ("timeout", "u")
    assert last == Message("u", b"", True)
    assert contexts.due(6) == Cancel("u-1")


def test_an_incomplete_utterance_may_be_silent() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0)
    assert drain(contexts, 60) == []


def test_an_error_ends_its_utterance_when_the_text_is_complete() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0)
    assert contexts.failed("u-1", "Acme: bad", "bad") is None
    assert drain(contexts, 0) == [ProviderError("Acme: bad", "bad", "u")]
    assert say(contexts, "u", "Two", 1, done=True) is None
    assert drain(contexts, 1) == [Message("u", b"", True)]


def test_an_error_without_a_context_ends_the_only_one() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    assert contexts.failed(None, "Acme: bad", "bad") is None
    assert drain(contexts, 0) == [ProviderError("Acme: bad", "bad", "u"), Message("u", b"", True)]


def test_an_error_that_might_be_of_two_contexts_is_told_without_a_uuid() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    say(contexts, "v", "Two", 0, done=True)
    assert contexts.failed(None, "Acme: bad", "bad") == ProviderError("Acme: bad", "bad")
    assert drain(contexts, 0) == []


def test_after_a_drop_what_had_not_begun_is_said_again() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One ", 0)
    say(contexts, "u", "two", 0, done=True)
    contexts.disconnected(1)
    assert contexts.due(1) == Line("u-2", "One two", last=True)


def test_after_a_drop_what_was_cut_off_ends() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    contexts.audio("u-1", b"1", 0.1)
    contexts.disconnected(0.2)
    assert contexts.due(1) is None
    chunk, error, last = drain(contexts, 1)
    assert chunk == Message("u", b"1")
    assert isinstance(error, ProviderError)
    assert error.code == "cut_off"
    assert last == Message("u", b"", True)


def test_a_drop_in_a_pause_costs_nothing() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One moment. ", 0)
    contexts.audio("u-1", b"1", 0.1)
    contexts.disconnected(2)
    assert say(contexts, "u", "Done.", 3, done=True) == Line("u-2", "Done.", last=True)


def test_a_drop_in_a_continuation_says_only_that_again() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One moment. ", 0)
    contexts.audio("u-1", b"1", 0.1)
    say(contexts, "u", "Done.", 3, done=True)
    contexts.disconnected(3.1)
    assert contexts.due(3.2) == Line("u-3", "Done.", last=True)


# Options


def test_a_missing_key_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARTESIA_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="CARTESIA_API_KEY"):
        CartesiaTTS("voice")


def test_a_missing_voice_and_an_unknown_encoding_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError, match="voice"):
        CartesiaTTS("", "key")
    with pytest.raises(ConfigurationError, match="mp3"):
        CartesiaTTS("voice", "key", encoding="mp3")


# The socket


@pytest.fixture
async def cartesia() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        yield provider


def speak(cartesia: ScriptedProvider, nursery: trio.Nursery, **options: Any) -> CartesiaTTS:
    tts = CartesiaTTS("voice", "key", url=cartesia.url, **options)
    nursery.start_soon(tts.run)
    return tts


async def chunk(peer: Peer, context_id: str, audio: bytes) -> None:
    data = b64encode(audio).decode()
    await peer.send(
        {"type": "chunk", "context_id": context_id, "data": data, "done": False, "status_code": 206, "step_time": 1.0}
    )


async def done(peer: Peer, context_id: str) -> None:
    await peer.send({"type": "done", "context_id": context_id, "done": True, "status_code": 200})


def is_last(event: Speaking) -> bool:
    return isinstance(event, Message) and event.done


async def test_a_request_has_the_shape_of_its_version(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    tts = speak(cartesia, nursery, speed=1.1, emotion="calm")
    peer = await cartesia.accept()
    assert peer.headers["authorization"] == "Bearer key"
    assert peer.headers["cartesia-version"] == "2026-08-14"
    tts.post(Message("u", "Hello. "))
    assert await peer.receive_json() == {
        "context_id": "u-1",
        "model_id": "sonic-3.5",
        "transcript": "Hello. ",
        "voice": {"id": "voice"},
        "language": "en",
        "output_format": {"container": "raw", "encoding": "pcm_mulaw", "sample_rate": 8000},
        "continue": True,
        "max_buffer_delay_ms": 0,
        "add_timestamps": True,
        "generation_config": {"speed": 1.1, "emotion": "calm"},
    }
    tts.post(Message("u", "", True))
    last = await peer.receive_json()
    assert (last["transcript"], last["continue"]) == ("", False)


async def test_an_older_version_has_the_older_voice(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    tts = speak(cartesia, nursery, version="2026-03-01")
    tts.post(Message("u", "Hi", True))
    assert (await (await cartesia.accept()).receive_json())["voice"] == {"mode": "id", "id": "voice"}


async def test_audio_and_words_are_emitted_as_they_arrive(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    tts = speak(cartesia, nursery)
    peer = await cartesia.accept()
    tts.post(Message("u", "Hi you", True))
    await peer.receive_json()
    await chunk(peer, "u-1", b"one")
    assert await next_event(tts) == Message("u", b"one")
    words = {"words": ["Hi", "you"], "start": [0.0, 0.25], "end": [0.2, 0.5]}
    await peer.send({"type": "timestamps", "context_id": "u-1", "word_timestamps": words})
    assert await next_event(tts) == WordTimings("u", (Word("Hi", 0, 200), Word("you", 250, 500)))
    await peer.send({"type": "flush_done", "context_id": "u-1", "flush_done": True})
    await done(peer, "u-1")
    assert await next_event(tts) == Message("u", b"", True)


async def test_an_abort_is_cancelled_there_and_late_frames_are_dropped(
    cartesia: ScriptedProvider, nursery: trio.Nursery
) -> None:
    tts = speak(cartesia, nursery)
    peer = await cartesia.accept()
    tts.post(Message("u", "Long story", True))
    await peer.receive_json()
    tts.abort("u")
    assert await peer.receive_json() == {"context_id": "u-1", "cancel": True}
    tts.post(Message("v", "Short", True))
    await peer.receive_json()
    await chunk(peer, "u-1", b"late")
    await done(peer, "u-1")
    await chunk(peer, "v-1", b"new")
    assert await next_event(tts) == Message("v", b"new")


async def test_silence_ends_an_utterance(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    tts = speak(cartesia, nursery, timeout_s=0.05)
    await cartesia.accept()
    tts.post(Message("u", "Hi", True))
    error, last = await events_until(tts, is_last)
    assert (error.code, error.uuid, error.fatal) == ("timeout", "u", False)
    assert last == Message("u", b"", True)


async def test_an_error_names_its_utterance(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    tts = speak(cartesia, nursery)
    peer = await cartesia.accept()
    tts.post(Message("u", "Hi", True))
    await peer.receive_json()
    error = {"error_code": "concurrency_limited", "title": "Limit", "message": "Too many", "status_code": 429}
    await peer.send({"type": "error", "context_id": "u-1", "done": True, **error})
    assert await next_event(tts) == ProviderError("Cartesia: Too many", "concurrency_limited", "u")
    assert await next_event(tts) == Message("u", b"", True)


async def test_an_error_of_nothing_in_particular_is_told(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    tts = speak(cartesia, nursery)
    await (await cartesia.accept()).send({"type": "error", "error": "odd", "status_code": 500})
    assert await next_event(tts) == ProviderError("Cartesia: odd", "500")


async def test_a_drop_before_the_first_audio_is_not_heard(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    tts = speak(cartesia, nursery)
    first = await cartesia.accept()
    tts.post(Message("u", "Hi", True))
    await first.receive_json()
    await first.close()
    second = await cartesia.accept()
    again = await second.receive_json()
    assert again["transcript"] == "Hi"
    await chunk(second, again["context_id"], b"one")
    await done(second, again["context_id"])
    error, *rest = await events_until(tts, is_last)
    assert (error.code, error.uuid) == ("1011", "")
    assert rest == [Message("u", b"one"), Message("u", b"", True)]


async def test_a_drop_in_the_middle_ends_the_utterance(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    tts = speak(cartesia, nursery)
    first = await cartesia.accept()
    tts.post(Message("u", "Hi", True))
    await first.receive_json()
    await chunk(first, "u-1", b"one")
    assert await next_event(tts) == Message("u", b"one")
    await first.close()
    errors = await events_until(tts, is_last)
    assert "cut_off" in [error.code for error in errors if isinstance(error, ProviderError)]
    assert (await cartesia.accept()).unread() == []


async def test_an_idle_close_is_mended_at_once_and_silently(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    tts = speak(cartesia, nursery)
    await (await cartesia.accept()).close(1000, "idle")
    peer = await cartesia.accept()
    tts.post(Message("u", "Hi", True))
    await peer.receive_json()
    assert no_event(tts)


async def test_after_a_refused_key_every_utterance_ends_at_once(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    cartesia.refusals = [401]
    tts = speak(cartesia, nursery)
    fatal = await next_event(tts)
    assert fatal.fatal
    assert "CARTESIA_API_KEY" in fatal.message
    tts.post(Message("u", "Hi", True))
    error, last = await events_until(tts, is_last)
    assert (error.code, error.uuid) == ("401", "u")
    assert last == Message("u", b"", True)


async def test_too_many_requests_are_retried(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    cartesia.refusals = [429]
    tts = speak(cartesia, nursery)
    tts.post(Message("u", "Hi", True))
    assert (await (await cartesia.accept()).receive_json())["transcript"] == "Hi"
    assert (await next_event(tts)).code == "429"


async def test_garbage_is_survived(cartesia: ScriptedProvider, nursery: trio.Nursery) -> None:
    tts = speak(cartesia, nursery)
    peer = await cartesia.accept()
    tts.post(Message("u", "Hi", True))
    await peer.receive_json()
    await peer.send('{"type":"chunk","context_id":"u-1","data":"not base64!"}')
    await peer.send("<html>")
    await peer.send({"type": "phoneme_timestamps", "context_id": "u-1"})
    await chunk(peer, "u-1", b"one")
    assert (await next_event(tts)).code == "garbage"
    assert await next_event(tts) == Message("u", b"one")
