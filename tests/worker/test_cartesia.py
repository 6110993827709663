"""Cartesia's adapter against a real server on loopback; what it has in common with others is in test_tts_*."""

from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from dialog_worker.participant import ProviderError
from dialog_worker.provider import ConfigurationError
from dialog_worker.tts.base import Speaking
from dialog_worker.tts.cartesia import CartesiaTTS
from protocol.messages import Message

from .scripted_provider import Peer, ScriptedProvider, events_until, next_event, no_event, scripted_provider

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
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.003)  # real seconds, in which loopback is sure to answer


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


async def test_a_request_has_the_shape_of_its_version(
    cartesia: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
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


async def test_an_older_version_has_the_older_voice(
    cartesia: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(cartesia, nursery, version="2026-03-01")
    tts.post(Message("u", "Hi", True))
    assert (await (await cartesia.accept()).receive_json())["voice"] == {"mode": "id", "id": "voice"}


async def test_an_error_of_nothing_in_particular_is_told(
    cartesia: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(cartesia, nursery)
    await (await cartesia.accept()).send({"type": "error", "error": "odd", "status_code": 500})
    assert await next_event(tts) == ProviderError("Cartesia: odd", "500")


async def test_an_idle_close_is_mended_at_once_and_silently(
    cartesia: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(cartesia, nursery)
    await (await cartesia.accept()).close(1000, "idle")
    peer = await cartesia.accept()
    tts.post(Message("u", "Hi", True))
    await peer.receive_json()
    assert no_event(tts)


async def test_after_a_refused_key_every_utterance_ends_at_once(
    cartesia: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    cartesia.refusals = [401]
    tts = speak(cartesia, nursery)
    fatal = await next_event(tts)
    assert fatal.fatal
    assert "CARTESIA_API_KEY" in fatal.message
    tts.post(Message("u", "Hi", True))
    error, last = await events_until(tts, is_last)
    assert (error.code, error.uuid) == ("401", "u")
    assert last == Message("u", b"", True)


async def test_too_many_requests_are_retried(cartesia: ScriptedProvider, nursery: trio.Nursery, clock: MockClock) -> None:
    cartesia.refusals = [429]
    tts = speak(cartesia, nursery)
    tts.post(Message("u", "Hi", True))
    assert (await (await cartesia.accept()).receive_json())["transcript"] == "Hi"
    assert (await next_event(tts)).code == "429"


async def test_garbage_is_survived(cartesia: ScriptedProvider, nursery: trio.Nursery, clock: MockClock) -> None:
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


CROWDED = {"error_code": "concurrency_limited", "title": "Limit", "message": "Too many", "status_code": 429}


async def test_a_context_refused_for_concurrency_is_asked_for_again(
    cartesia: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(cartesia, nursery)
    peer = await cartesia.accept()
    tts.post(Message("u", "Hi", True))
    for number in (1, 2):
        assert (await peer.receive_json())["context_id"] == f"u-{number}"
        await peer.send({"type": "error", "context_id": f"u-{number}", "done": True, **CROWDED})
    again = await peer.receive_json()
    assert (again["context_id"], again["transcript"]) == ("u-3", "Hi")
    await chunk(peer, "u-3", b"one")
    assert await next_event(tts) == Message("u", b"one")


async def test_a_context_refused_for_concurrency_for_a_second_ends_its_utterance(
    cartesia: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(cartesia, nursery)
    peer = await cartesia.accept()

    async def refuse_all() -> None:
        while True:
            context_id = (await peer.receive_json())["context_id"]
            await peer.send({"type": "error", "context_id": context_id, "done": True, **CROWDED})

    nursery.start_soon(refuse_all)
    began = trio.current_time()
    tts.post(Message("u", "Hi", True))
    assert await next_event(tts) == ProviderError("Cartesia: Too many", "concurrency_limited", "u")
    assert await next_event(tts) == Message("u", b"", True)
    assert trio.current_time() - began == pytest.approx(1, abs=0.1)
