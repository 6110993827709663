"""ElevenLabs's adapter against a real server on loopback; what it has in common with others is in test_tts_*."""

from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from dialog_worker.participant import ProviderError, Word
from dialog_worker.provider import ConfigurationError
from dialog_worker.tts.base import Speaking, WordTimings
from dialog_worker.tts.elevenlabs import ElevenLabsTTS
from protocol.messages import Message

from .scripted_provider import Peer, ScriptedProvider, events_until, next_event, no_event, scripted_provider

KEEP_ALIVE = {"text": ""}


# Options


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ELEVENLABS_API_KEY", "ELEVEN_LABS_API_KEY", "ELEVENLABS_URL"):
        monkeypatch.delenv(name, raising=False)


def test_a_missing_key_is_told_at_once() -> None:
    with pytest.raises(ConfigurationError, match="ELEVENLABS_API_KEY"):
        ElevenLabsTTS("voice")


def test_what_cannot_be_spoken_is_told_at_once() -> None:
    with pytest.raises(ConfigurationError, match="voice_id"):
        ElevenLabsTTS("", "key")
    with pytest.raises(ConfigurationError, match="mp3_44100"):
        ElevenLabsTTS("voice", "key", output_format="mp3_44100")
    with pytest.raises(ConfigurationError, match="opus"):
        ElevenLabsTTS("voice", "key", query={"output_format": "opus_48000_32"})
    with pytest.raises(ConfigurationError, match="eleven_v3"):
        ElevenLabsTTS("voice", "key", model_id="eleven_v3")


# The socket


@pytest.fixture
def clock() -> MockClock:
    return MockClock(autojump_threshold=0.003)  # real seconds, in which loopback is sure to answer


@pytest.fixture
async def elevenlabs() -> AsyncIterator[ScriptedProvider]:
    async with scripted_provider() as provider:
        provider.url = provider.url.removesuffix("/speech")
        yield provider


def speak(elevenlabs: ScriptedProvider, nursery: trio.Nursery, **options: Any) -> ElevenLabsTTS:
    tts = ElevenLabsTTS("voice", **{"api_key": "key", "url": elevenlabs.url, **options})
    nursery.start_soon(tts.run)
    return tts


async def chunk(peer: Peer, context_id: str, audio: bytes, **fields: Any) -> None:
    await peer.send({"audio": b64encode(audio).decode(), "isFinal": None, "contextId": context_id, **fields})


async def final(peer: Peer, context_id: str) -> None:
    await peer.send({"isFinal": True, "contextId": context_id})


async def fail(peer: Peer, code: str, **fields: Any) -> None:
    await peer.send({"message": "No.", "error": code, "code": 1008, **fields})
    await peer.close(1008, code)


async def frames_until_close(peer: Peer) -> list[dict[str, Any]]:
    frames = [await peer.receive_json()]
    while "close_context" not in frames[-1]:
        frames.append(await peer.receive_json())
    return frames


async def begin(tts: ElevenLabsTTS, peer: Peer, uuid: str, text: str = "Hi") -> str:
    """Post a whole utterance and return the context that it got."""
    tts.post(Message(uuid, text, True))
    context_id: str = (await frames_until_close(peer))[0]["context_id"]
    return context_id


def is_last(event: Speaking) -> bool:
    return isinstance(event, Message) and event.done


async def test_the_socket_is_opened_at_once_with_its_options(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    speak(elevenlabs, nursery, query={"auto_mode": None, "seed": 7}, language_code="en", headers={"x-extra": "1"})
    peer = await elevenlabs.accept()
    assert (peer.headers["xi-api-key"], peer.headers["x-extra"]) == ("key", "1")
    assert urlsplit(peer.path).path == "/v1/text-to-speech/voice/multi-stream-input"
    assert parse_qs(urlsplit(peer.path).query) == {
        "model_id": ["eleven_flash_v2_5"],
        "output_format": ["ulaw_8000"],
        "inactivity_timeout": ["180"],
        "sync_alignment": ["true"],
        "language_code": ["en"],
        "seed": ["7"],
    }


async def test_key_and_whole_url_may_come_from_the_environment(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELEVEN_LABS_API_KEY", "old-name")
    monkeypatch.setenv("ELEVENLABS_URL", f"{elevenlabs.url}/speech?enable_logging=false")
    speak(elevenlabs, nursery, api_key=None, url=None)
    peer = await elevenlabs.accept()
    assert peer.headers["xi-api-key"] == "old-name"
    assert peer.path.startswith("/speech?enable_logging=false&model_id=")


async def test_audio_and_words_are_emitted_as_they_arrive(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(elevenlabs, nursery, voice_settings={"speed": 1.1})
    peer = await elevenlabs.accept()
    tts.post(Message("u", "Hi you", True))
    assert await frames_until_close(peer) == [
        {"text": " ", "context_id": "u-1", "voice_settings": {"speed": 1.1}},
        {"text": "Hi you ", "context_id": "u-1"},
        {"context_id": "u-1", "flush": True},
        {"context_id": "u-1", "close_context": True},
    ]
    times = {"chars": ["H", "i", " "], "charStartTimesMs": [0, 20, 40]}
    await chunk(peer, "u-1", bytes(800), alignment={**times, "charDurationsMs": [20, 20, 20]})
    assert await next_event(tts) == Message("u", bytes(800))
    assert await next_event(tts) == WordTimings("u", (Word("Hi", 0, 40),))
    audio = b64encode(bytes(400)).decode()
    second = {"context_id": "u-1", "audio": audio, "alignment": {**times, "charsDurationsMs": [30, 30, 30]}}
    await peer.send(second)  # as older servers spell it
    assert await next_event(tts) == Message("u", bytes(400))
    assert await next_event(tts) == WordTimings("u", (Word("Hi", 100, 150),))
    await final(peer, "u-1")
    assert await next_event(tts) == Message("u", b"", True)


async def test_a_fifth_context_waits_until_one_is_final(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(elevenlabs, nursery)
    peer = await elevenlabs.accept()
    for uuid in "abc":
        await begin(tts, peer, uuid)
        tts.abort(uuid)
    tts.post(Message("d", "One moment. "))
    assert [(await peer.receive_json())["context_id"] for _ in range(2)] == ["d-1", "d-1"]
    tts.post(Message("e", "Hi", True))
    await trio.testing.wait_all_tasks_blocked()
    tts.post(Message("d", "Nearly there. "))
    assert await peer.receive_json() == {"text": "Nearly there. ", "context_id": "d-1"}
    await final(peer, "b-1")
    assert (await frames_until_close(peer))[0]["context_id"] == "e-1"


async def test_a_socket_full_of_aborted_contexts_is_replaced_in_silence(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dialog_worker.tts.streaming.FREEING_S", 0.1)
    tts = speak(elevenlabs, nursery)
    peer = await elevenlabs.accept()
    for uuid in "abcd":
        await begin(tts, peer, uuid)
        tts.abort(uuid)
    tts.post(Message("e", "Hi", True))
    assert (await frames_until_close(await elevenlabs.accept()))[0]["context_id"] == "e-1"
    assert no_event(tts)


async def test_only_contexts_that_wait_for_text_are_kept_alive(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dialog_worker.tts.elevenlabs.KEEP_ALIVE_S", 0.1)
    tts = speak(elevenlabs, nursery)
    peer = await elevenlabs.accept()
    assert await peer.receive_json() == KEEP_ALIVE
    tts.post(Message("u", "One moment. "))
    tts.post(Message("v", "Hi", True))
    while "close_context" not in (await peer.receive_json()):
        pass
    frames = [await peer.receive_json() for _ in range(6)]
    assert {(frame["text"], frame.get("context_id", "")) for frame in frames} == {("", ""), ("", "u-1")}


async def test_without_auto_mode_a_sentence_is_not_waited_for_until_the_text_is_complete(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(elevenlabs, nursery, query={"auto_mode": None})
    await elevenlabs.accept()
    tts.post(Message("u", "Hi. "))
    await trio.sleep(60)
    assert no_event(tts)
    tts.post(Message("u", "", True))
    assert (await next_event(tts)).code == "timeout"


async def test_an_error_names_its_utterance(elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock) -> None:
    tts = speak(elevenlabs, nursery)
    peer = await elevenlabs.accept()
    await begin(tts, peer, "u")
    await fail(peer, "quota_exceeded")
    assert await next_event(tts) == ProviderError("ElevenLabs: No.", "quota_exceeded", "u")
    assert await next_event(tts) == Message("u", b"", True)
    await elevenlabs.accept()
    assert no_event(tts)


async def test_an_error_of_one_context_leaves_the_others(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(elevenlabs, nursery)
    peer = await elevenlabs.accept()
    await begin(tts, peer, "u")
    await begin(tts, peer, "v")
    await peer.send({"message": "No.", "error": "odd", "code": 1008, "contextId": "u-1"})
    await chunk(peer, "v-1", b"2")
    assert await next_event(tts) == ProviderError("ElevenLabs: No.", "odd", "u")
    assert [await next_event(tts) for _ in range(2)] == [Message("u", b"", True), Message("v", b"2")]


@pytest.mark.parametrize("code", ["max_active_conversations", "input_timeout_exceeded"])
async def test_a_socket_closed_for_its_limits_costs_nothing_unheard(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock, code: str
) -> None:
    tts = speak(elevenlabs, nursery)
    first = await elevenlabs.accept()
    await begin(tts, first, "u")
    await fail(first, code)
    second = await elevenlabs.accept()
    again = await frames_until_close(second)
    assert (again[0]["context_id"], again[1]["text"]) == ("u-2", "Hi ")
    await chunk(second, "u-2", b"one")
    await final(second, "u-2")
    error, *rest = await events_until(tts, is_last)
    assert (error.code, error.uuid, error.fatal) == (code, "", False)
    assert rest == [Message("u", b"one"), Message("u", b"", True)]


@pytest.mark.parametrize("in_words", [True, False])
async def test_an_idle_socket_that_times_out_is_replaced_in_silence(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock, in_words: bool
) -> None:
    tts = speak(elevenlabs, nursery)
    peer = await elevenlabs.accept()
    if in_words:
        await fail(peer, "input_timeout_exceeded")
    else:
        await peer.close(1008, "Have not received a new text input within the timeout of 20 seconds.")
    await begin(tts, await elevenlabs.accept(), "u")
    assert no_event(tts)


async def test_a_close_with_1008_is_told_and_mended(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(elevenlabs, nursery)
    first = await elevenlabs.accept()
    await begin(tts, first, "u")
    await first.close(1008, "max_active_conversations")
    assert (await frames_until_close(await elevenlabs.accept()))[1]["text"] == "Hi "
    error = await next_event(tts)
    assert (error.code, error.fatal) == ("1008", False)
    assert "max_active_conversations" in error.message


async def test_after_a_refused_key_every_utterance_ends_at_once(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    elevenlabs.refusals = [401]
    tts = speak(elevenlabs, nursery)
    fatal = await next_event(tts)
    assert fatal.fatal
    assert "ELEVENLABS_API_KEY" in fatal.message
    tts.post(Message("u", "Hi", True))
    error, last = await events_until(tts, is_last)
    assert (error.code, error.uuid) == ("401", "u")
    assert last == Message("u", b"", True)


@pytest.mark.parametrize("in_words", [True, False])
async def test_a_key_may_also_be_refused_on_the_open_socket(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock, in_words: bool
) -> None:
    tts = speak(elevenlabs, nursery)
    peer = await elevenlabs.accept()
    await (fail(peer, "invalid_api_key") if in_words else peer.close(1008, "invalid_api_key"))
    fatal = await next_event(tts)
    assert (fatal.code, fatal.fatal) == ("invalid_api_key", True)
    tts.post(Message("u", "Hi", True))
    assert (await events_until(tts, is_last))[-1] == Message("u", b"", True)
    assert elevenlabs.attempts == 1


async def test_a_service_that_answers_every_connection_with_an_error_is_given_up(
    elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock
) -> None:
    tts = speak(elevenlabs, nursery, give_up_s=0.3)

    async def refuse_all() -> None:
        while True:
            await fail(await elevenlabs.accept(), "quota_exceeded")

    nursery.start_soon(refuse_all)
    events = await events_until(tts, lambda event: event.fatal)
    assert events[-1].code == "quota_exceeded"
    assert elevenlabs.attempts < 10


async def test_garbage_is_survived(elevenlabs: ScriptedProvider, nursery: trio.Nursery, clock: MockClock) -> None:
    tts = speak(elevenlabs, nursery)
    peer = await elevenlabs.accept()
    await begin(tts, peer, "u")
    await peer.send('{"audio":"not base64!","contextId":"u-1"}')
    await peer.send({"type": "flush_done", "contextId": "u-1"})
    await chunk(peer, "u-1", b"one", alignment={"chars": ["a", "b"], "charStartTimesMs": [0], "charDurationsMs": None})
    assert (await next_event(tts)).code == "garbage"
    assert await next_event(tts) == Message("u", b"one")


async def test_the_server_is_told_when_the_call_is_over(elevenlabs: ScriptedProvider) -> None:
    async with trio.open_nursery() as call:
        speak(elevenlabs, call)
        peer = await elevenlabs.accept()
        call.cancel_scope.cancel()
    assert await peer.receive_json() == {"close_socket": True}
