"""ElevenLabs's protocol over real sockets, with the real voice behind it, and our own adapter against it."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection

from dialog_local.speech.elevenlabs import characters
from dialog_local.speech.models import Timing
from dialog_worker.participant import ProviderError
from dialog_worker.tts.base import Speaking, WordTimings
from dialog_worker.tts.elevenlabs import ElevenLabsTTS
from protocol.messages import Message
from tests.local.sockets import connected, rejection

PATH = "/v1/text-to-speech/joe/multi-stream-input"
QUERY = "model_id=eleven_flash_v2_5&output_format=ulaw_8000&sync_alignment=true"
KEY = {"xi-api-key": "any-key"}


@asynccontextmanager
async def speaking(server: str, query: str = QUERY) -> AsyncIterator[WebSocketConnection]:
    async with connected(server, f"{PATH}?{query}", KEY) as socket:
        yield socket


async def send(socket: WebSocketConnection, context_id: str = "c", **fields: Any) -> None:
    await socket.send_message(json.dumps({"context_id": context_id, **fields}))


async def say(socket: WebSocketConnection, text: str, context_id: str = "c") -> None:
    await send(socket, context_id, text=" ")
    await send(socket, context_id, text=f"{text} ")
    await send(socket, context_id, flush=True)
    await send(socket, context_id, close_context=True)


async def receive(socket: WebSocketConnection) -> dict[str, Any]:
    with trio.fail_after(10):
        frame: dict[str, Any] = json.loads(await socket.get_message())
    return frame


async def until_final(socket: WebSocketConnection) -> list[dict[str, Any]]:
    frames = [await receive(socket)]
    while not frames[-1]["isFinal"]:
        frames.append(await receive(socket))
    return frames


async def error_and_close(socket: WebSocketConnection) -> tuple[str, int]:
    """The error that the server sends, and the code that it closes with."""
    frame = await receive(socket)
    assert (frame["code"], bool(frame["message"])) == (1008, True)
    with pytest.raises(ConnectionClosed) as closed:
        await receive(socket)
    assert closed.value.reason is not None
    return frame["error"], closed.value.reason.code


def audio_of(frames: list[dict[str, Any]]) -> bytes:
    return b"".join(base64.b64decode(frame["audio"]) for frame in frames if "audio" in frame)


async def test_a_closed_context_is_spoken_and_final(server: str) -> None:
    async with speaking(server) as socket:
        await say(socket, "Good evening. How can I help?")
        frames = await until_final(socket)
    assert frames[-1] == {"isFinal": True, "contextId": "c"}
    assert {frame["contextId"] for frame in frames} == {"c"}
    assert 1.5 < len(audio_of(frames)) / 8000 < 4


@pytest.mark.parametrize(("output_format", "width"), [("pcm_16000", 32000), ("pcm_8000", 16000)])
async def test_other_formats_have_the_same_duration(server: str, output_format: str, width: int) -> None:
    async with speaking(server, f"output_format={output_format}") as socket:
        await say(socket, "Good evening to you.")
        frames = await until_final(socket)
    assert 0.7 < len(audio_of(frames)) / width < 2
    assert frames[0]["alignment"] is None  # unless sync_alignment asks for it


async def test_characters_are_aligned_with_the_audio_of_their_frame(server: str) -> None:
    async with speaking(server) as socket:
        await say(socket, "Good evening, Ann.")
        frames = (await until_final(socket))[:-1]
    assert "".join(c for frame in frames for c in frame["alignment"]["chars"]) == "Good evening, Ann. "
    for frame in frames[:-1]:
        length_ms = len(base64.b64decode(frame["audio"])) / 8
        assert all(0 <= start <= length_ms for start in frame["alignment"]["charStartTimesMs"])


def test_a_words_time_is_shared_by_its_characters() -> None:
    spelled = characters([Timing("Hi", 0.0, 1.0), Timing("x", 1.5, 2.0)])
    assert spelled == [("H", 0.0, 0.5), ("i", 0.5, 1.0), (" ", 1.0, 1.5), ("x", 1.5, 2.0), (" ", 2.0, 2.0)]


async def test_a_flush_alone_is_spoken_but_not_final(server: str) -> None:
    async with speaking(server) as socket:
        await send(socket, text="How can ", flush=True)
        assert (await receive(socket))["isFinal"] is None
        await say(socket, "I help?")
        assert len([frame for frame in await until_final(socket) if frame["isFinal"]]) == 1


async def test_a_close_without_a_flush_drops_what_has_not_begun(server: str) -> None:
    async with speaking(server) as socket:
        await send(socket, text="This is one sentence. " * 30)
        await receive(socket)
        await send(socket, close_context=True)
        frames = await until_final(socket)
    assert len(audio_of(frames)) / 8000 < 15  # of some 45 s


async def test_a_sixth_context_costs_the_socket(server: str) -> None:
    async with speaking(server) as socket:
        for number in range(6):
            await send(socket, f"c{number}", text=" ")
        assert await error_and_close(socket) == ("max_active_conversations", 1008)


async def test_a_flush_of_an_unknown_context_opens_one(server: str) -> None:
    async with speaking(server) as socket:
        for number in range(6):
            await send(socket, f"c{number}", flush=True)
        assert await error_and_close(socket) == ("max_active_conversations", 1008)


async def test_a_final_context_leaves_its_place(server: str) -> None:
    async with speaking(server) as socket:
        for number in range(5):
            await send(socket, f"c{number}", text=" ")
        await send(socket, "c0", close_context=True)
        assert (await receive(socket)) == {"isFinal": True, "contextId": "c0"}
        await say(socket, "Hello.", "c5")
        assert (await until_final(socket))[-1]["contextId"] == "c5"


async def test_voice_settings_must_come_first(server: str) -> None:
    async with speaking(server) as socket:
        await send(socket, text="")
        await send(socket, text=" ", voice_settings={"speed": 1.1})
        assert await error_and_close(socket) == ("invalid_input_message", 1008)


async def test_a_context_without_input_ends(server: str) -> None:
    async with speaking(server, f"{QUERY}&inactivity_timeout=1") as socket:
        await send(socket, text=" ")
        await trio.sleep(0.6)
        await socket.send_message('{"text":""}')  # is of no context, and keeps only the socket alive
        assert await receive(socket) == {"isFinal": True, "contextId": "c"}


async def test_a_socket_without_input_is_closed(server: str) -> None:
    async with speaking(server, f"{QUERY}&inactivity_timeout=1") as socket:
        assert await error_and_close(socket) == ("input_timeout_exceeded", 1008)


async def test_close_socket_closes_it(server: str) -> None:
    async with speaking(server) as socket:
        await socket.send_message('{"close_socket":true}')
        with pytest.raises(ConnectionClosed) as closed, trio.fail_after(5):
            await socket.get_message()
    assert closed.value.reason is not None
    assert closed.value.reason.code == 1000


@pytest.mark.parametrize("frame", ["{not json", '{"text":7}', '{"text":" ","voice_settings":{"speed":3}}'])
async def test_a_bad_frame_costs_the_socket(server: str, frame: str) -> None:
    async with speaking(server) as socket:
        await socket.send_message(frame)
        assert (await error_and_close(socket))[1] == 1008


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        (QUERY, {}, 401),
        ("output_format=mp3_44100_128", KEY, 400),
        ("output_format=ulaw_8000&model_id=eleven_v3", KEY, 400),
        (f"{QUERY}&inactivity_timeout=181", KEY, 400),
    ],
)
async def test_the_upgrade_is_checked(server: str, query: str, headers: dict[str, str], status: int) -> None:
    with pytest.RaisesGroup(ConnectionRejected, flatten_subgroups=True) as refused:
        async with connected(server, f"{PATH}?{query}", headers):
            pass
    assert rejection(refused).status_code == status


# Our adapter


async def spoken(tts: ElevenLabsTTS, count: int = 1) -> list[Speaking]:
    """The events until so many utterances have ended."""
    events: list[Speaking] = []
    with trio.fail_after(15):
        while sum(isinstance(event, Message) and event.done for event in events) < count:
            events.append(await tts.events.receive())
    return events


async def test_the_adapter_gets_audio_and_timed_words(server: str, nursery: trio.Nursery) -> None:
    tts = ElevenLabsTTS("joe", "key", url=f"ws://{server}", voice_settings={"speed": 1.1})
    nursery.start_soon(tts.run)
    for piece in ("Good evening, ", "Ann. How can", " I help?"):
        tts.post(Message("u", piece))
    tts.post(Message("u", "", True))
    events = await spoken(tts)
    words = [word for event in events if isinstance(event, WordTimings) for word in event.words]
    edges = [edge for word in words for edge in (word.start_ms, word.end_ms)]
    length_ms = sum(len(event.data) for event in events if isinstance(event, Message)) / 8
    assert " ".join(word.text for word in words) == "Good evening, Ann. How can I help?"
    assert edges == sorted(edges)
    assert edges[-1] <= length_ms


async def test_the_adapter_outlives_many_interruptions(server: str, nursery: trio.Nursery) -> None:
    tts = ElevenLabsTTS("joe", "key", url=f"ws://{server}")
    nursery.start_soon(tts.run)
    for number in range(8):
        tts.post(Message(f"u{number}", "This is what nobody wants to hear.", number % 2 == 0))
        await trio.sleep(0.02)
        tts.abort(f"u{number}")
    tts.post(Message("v", "Hello.", True))
    tts.post(Message("w", "Bye.", True))
    events = await spoken(tts)
    while not [event for event in events if isinstance(event, Message) and event.uuid == "w" and event.done]:
        events += await spoken(tts)  # a short utterance may be whole before it is cut
    assert not [event for event in events if isinstance(event, ProviderError)]
    uuids = [event.uuid for event in events if isinstance(event, Message)]
    assert uuids == sorted(uuids)  # nothing of what was cut comes after it
    assert {uuid for uuid in uuids if not uuid.startswith("u")} == {"v", "w"}  # of the others, what came within 20 ms
