"""OpenAI's transcription protocol over real sockets, with the real recogniser behind it."""

import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection

from dialog_local.speech import realtime
from dialog_local.speech.dictation import transcribe_live
from dialog_local.speech.listen import Ear
from dialog_worker.stt.base import Final, Hearing, SpeechEnded, SpeechStarted
from dialog_worker.stt.openai import OpenAISTT
from tests.local.sockets import BOOKING, SILENCE, connected, rejection, share_of_words
from tests.local.test_providers import Unused, Wire

PATH = "/v1/realtime?intent=transcription"
BEARER = {"Authorization": "Bearer any-key"}
STREAMING = {"model": "gpt-live-transcribe", "language": "en"}
VAD = {"type": "server_vad", "silence_duration_ms": 300}
DELTA = "conversation.item.input_audio_transcription.delta"
COMPLETED = "conversation.item.input_audio_transcription.completed"


class Client:
    def __init__(self, socket: WebSocketConnection) -> None:
        self._socket = socket

    async def send(self, kind: str, **fields: Any) -> None:
        await self._socket.send_message(json.dumps({"type": kind, **fields}))

    async def update(self, **settings: Any) -> None:
        given = {"format": {"type": "audio/pcmu"}, **settings}
        await self.send("session.update", event_id="up", session={"type": "transcription", "audio": {"input": given}})

    async def append(self, audio: bytes) -> None:
        for start in range(0, len(audio), 800):
            piece = base64.b64encode(audio[start : start + 800]).decode()
            await self.send("input_audio_buffer.append", audio=piece)

    async def receive(self) -> dict[str, Any]:
        with trio.fail_after(20):
            message: dict[str, Any] = json.loads(await self._socket.get_message())
        return message

    async def until(self, kind: str) -> list[dict[str, Any]]:
        messages = [await self.receive()]
        while messages[-1]["type"] != kind:
            messages.append(await self.receive())
        return messages

    async def closed(self) -> int:
        with trio.fail_after(5), pytest.raises(ConnectionClosed):
            await self._socket.get_message()
        assert self._socket.closed is not None
        return self._socket.closed.code


@asynccontextmanager
async def session(server: str, path: str = PATH, headers: dict[str, str] = BEARER) -> AsyncIterator[Client]:
    async with connected(server, path, headers) as socket:
        yield Client(socket)


def transcript(messages: list[dict[str, Any]]) -> str:
    return " ".join(message["transcript"] for message in messages if message["type"] == COMPLETED)


def kinds(messages: list[dict[str, Any]]) -> list[str]:
    return [message["type"].removeprefix("input_audio_buffer.") for message in messages]


async def test_a_session_is_created_and_lasts_an_hour(server: str) -> None:
    async with session(server) as client:
        created = await client.receive()
    assert created["type"] == "session.created"
    assert created["session"]["type"] == "transcription"
    assert created["session"]["expires_at"] - time.time() == pytest.approx(3600, abs=5)


async def test_omitted_settings_keep_their_values_and_null_clears(server: str) -> None:
    async with session(server) as client:
        await client.update(transcription={"model": "gpt-transcribe"}, turn_detection=VAD)
        await client.until("session.updated")
        await client.update(noise_reduction={"type": "far_field"})
        kept = (await client.until("session.updated"))[-1]["session"]["audio"]["input"]
        await client.update(turn_detection=None)
        cleared = (await client.until("session.updated"))[-1]["session"]["audio"]["input"]
    assert kept["turn_detection"]["silence_duration_ms"] == 300
    assert kept["format"] == {"type": "audio/pcmu"}
    assert cleared["turn_detection"] is None
    assert cleared["noise_reduction"] == {"type": "far_field"}


@pytest.mark.parametrize("vad", [VAD, {"type": "semantic_vad", "eagerness": "high"}])
async def test_the_server_finds_and_transcribes_what_is_said(
    server: str, spoken_booking: bytes, vad: dict[str, Any]
) -> None:
    async with session(server) as client:
        await client.update(transcription={"model": "gpt-transcribe"}, turn_detection=vad)
        await client.append(SILENCE * 50 + spoken_booking + SILENCE * 50)
        messages = (await client.until(COMPLETED))[2:]
    assert kinds(messages)[:3] == ["speech_started", "speech_stopped", "committed"]
    assert {message["item_id"] for message in messages} == {messages[0]["item_id"]}
    assert messages[0]["audio_start_ms"] == pytest.approx(800, abs=150)
    assert messages[1]["audio_end_ms"] == pytest.approx(1000 + len(spoken_booking) / 8, abs=400)
    assert share_of_words(transcript(messages), BOOKING) >= 0.8
    assert "".join(message["delta"] for message in messages if message["type"] == DELTA) == transcript(messages)


async def test_items_follow_each_other(server: str, spoken_booking: bytes) -> None:
    async with session(server) as client:
        await client.update(transcription={"model": "gpt-transcribe"}, turn_detection=VAD)
        await client.append((spoken_booking + SILENCE * 50) * 2)
        messages = await client.until(COMPLETED) + await client.until(COMPLETED)
    committed = [message for message in messages if message["type"] == "input_audio_buffer.committed"]
    assert committed[0]["previous_item_id"] is None
    assert committed[1]["previous_item_id"] == committed[0]["item_id"]


async def test_without_turn_detection_a_commit_makes_an_item(server: str, spoken_booking: bytes) -> None:
    async with session(server) as client:
        await client.update(transcription=STREAMING, turn_detection=None)
        await client.append(spoken_booking)
        await client.send("input_audio_buffer.commit")
        messages = (await client.until(COMPLETED))[2:]
    assert "speech_started" not in kinds(messages)
    assert kinds(messages).count("committed") == 1
    assert share_of_words(transcript(messages), BOOKING) >= 0.8


async def test_without_turn_detection_deltas_come_while_somebody_speaks(server: str, spoken_booking: bytes) -> None:
    async with session(server) as client:
        await client.update(transcription=STREAMING, turn_detection=None)
        await client.append(spoken_booking + SILENCE * 25)
        first = (await client.until(DELTA))[-1]
        await client.send("input_audio_buffer.commit")
        messages = await client.until(COMPLETED)
    assert first["item_id"] == messages[-1]["item_id"]
    assert messages[-1]["transcript"].startswith(first["delta"])


async def test_a_cleared_buffer_is_not_transcribed(server: str, spoken_booking: bytes) -> None:
    async with session(server) as client:
        await client.update(transcription=STREAMING, turn_detection=None)
        await client.append(spoken_booking[:1600])
        await client.send("input_audio_buffer.clear")
        await client.append(SILENCE * 10)
        await client.send("input_audio_buffer.commit")
        messages = await client.until(COMPLETED)
    assert "cleared" in kinds(messages)
    assert transcript(messages) == ""


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"transcription": STREAMING, "turn_detection": VAD}, "invalid_value"),
        ({"transcription": {"model": "gpt-realtime-whisper"}}, "invalid_value"),  # the default turn detection stays
        ({"transcription": {"model": "gpt-realtime-whisper", "prompt": "x"}, "turn_detection": None}, "invalid_value"),
        ({"transcription": {"language": "en"}}, "missing_required_parameter"),
        ({"format": {"type": "audio/opus"}}, "invalid_value"),
    ],
)
async def test_bad_settings_are_refused_and_the_session_stays(server: str, settings: dict[str, Any], code: str) -> None:
    async with session(server) as client:
        await client.update(**settings)
        error = (await client.until("error"))[-1]["error"]
        await client.update()
        await client.until("session.updated")
    assert (error["code"], error["event_id"], error["type"]) == (code, "up", "invalid_request_error")


@pytest.mark.parametrize(
    ("kind", "fields", "code"),
    [
        ("nonsense", {}, "invalid_value"),
        ("input_audio_buffer.append", {"audio": "!"}, "invalid_value"),
        ("input_audio_buffer.commit", {}, "input_audio_buffer_commit_empty"),
        ("conversation.item.retrieve", {"item_id": "item_none"}, "item_not_found"),
    ],
)
async def test_a_bad_event_is_answered_by_an_error(server: str, kind: str, fields: dict[str, Any], code: str) -> None:
    async with session(server) as client:
        await client.send(kind, event_id="e", **fields)
        error = (await client.until("error"))[-1]["error"]
    assert (error["code"], error["event_id"]) == (code, "e")


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        (PATH, {**BEARER, "OpenAI-Beta": "realtime=v1"}, "beta_api_shape_disabled"),
        (f"{PATH}&model=gpt-transcribe", BEARER, "invalid_model"),
        ("/v1/realtime", BEARER, "invalid_intent"),
    ],
)
async def test_a_connection_of_the_wrong_shape_is_closed(server: str, path: str, headers: dict[str, str], code: str) -> None:
    async with session(server, path, headers) as client:
        assert (await client.receive())["error"]["code"] == code
        assert await client.closed() == 4000


async def test_the_betas_event_closes_the_connection(server: str) -> None:
    async with session(server) as client:
        await client.send("transcription_session.update", session={})
        assert (await client.until("error"))[-1]["error"]["code"] == "beta_api_shape_disabled"
        assert await client.closed() == 4000


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer"}, {"Authorization": "Token key"}])
async def test_a_client_without_a_key_is_refused(server: str, headers: dict[str, str]) -> None:
    with pytest.RaisesGroup(ConnectionRejected, flatten_subgroups=True) as refused:
        async with session(server, headers=headers):
            pass
    assert rejection(refused).status_code == 401
    assert b"invalid_api_key" in (rejection(refused).body or b"")


def test_audio_has_one_rate_for_each_format() -> None:
    update = {"type": "transcription", "audio": {"input": {"format": {"type": "audio/pcm", "rate": 8000}}}}
    with pytest.raises(realtime.Refused, match="rate"):
        realtime.parse_event(json.dumps({"type": "session.update", "session": update}))


@pytest.mark.parametrize(("model", "vad"), [("gpt-live-transcribe", None), ("gpt-transcribe", VAD)])
async def test_our_own_adapter_understands_the_server(
    server: str, spoken_booking: bytes, nursery: trio.Nursery, model: str, vad: dict[str, Any] | None
) -> None:
    stt = OpenAISTT("key", url=f"ws://{server}{PATH}", model=model, turn_detection=vad)
    stt.post(SILENCE * 50 + spoken_booking + SILENCE * 50)
    nursery.start_soon(stt.run)
    events: list[Hearing] = []
    with trio.fail_after(20):
        while SpeechEnded() not in events:
            events.append(await stt.events.receive())
    [final] = [event for event in events if isinstance(event, Final)]
    assert events[0] == SpeechStarted()
    assert share_of_words(final.text, BOOKING) >= 0.8


async def test_a_session_ends_after_an_hour(autojump_clock: MockClock) -> None:
    wire = Wire("/v1/realtime", BEARER, {"intent": "transcription"})
    began = trio.current_time()
    await transcribe_live(wire.socket, Ear(Unused()))
    assert trio.current_time() - began == pytest.approx(3600)
    assert json.loads(wire.sent[-2]["text"])["error"]["code"] == "session_expired"
    assert wire.closed is not None
    assert wire.closed[0] == 1001
