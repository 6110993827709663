"""Cartesia's protocol over real sockets, with the real voice behind it."""

import base64
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import trio
from trio_websocket import ConnectionRejected, WebSocketConnection

from dialog_local.speech.audio import read_wav
from dialog_local.speech.cartesia import TextBuffer
from tests.local.sockets import CARTESIA, MAX_CONTEXTS, MULAW, connected, rejection


@asynccontextmanager
async def speaking(server: str) -> AsyncIterator[WebSocketConnection]:
    async with connected(server, "/tts/websocket", CARTESIA) as socket:
        yield socket


def generation(transcript: str, context_id: str = "c", *, more: bool = False, **fields: Any) -> str:
    request = {"model_id": "sonic", "voice": {"id": "v"}, "output_format": MULAW, "context_id": context_id}
    return json.dumps({**request, "transcript": transcript, "continue": more, **fields})


async def until_done(socket: WebSocketConnection) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    with trio.fail_after(15):
        while not (messages and messages[-1]["done"]):
            messages.append(json.loads(await socket.get_message()))
    return messages


async def say(server: str, *requests: str) -> list[dict[str, Any]]:
    async with speaking(server) as socket:
        for request in requests:
            await socket.send_message(request)
        return await until_done(socket)
    raise AssertionError("unreachable: the block returns")


def audio_of(messages: list[dict[str, Any]]) -> bytes:
    return b"".join(base64.b64decode(message["data"]) for message in messages if message["type"] == "chunk")


def words_of(messages: list[dict[str, Any]]) -> list[str]:
    return [word for m in messages if m["type"] == "timestamps" for word in m["word_timestamps"]["words"]]


async def test_speech_comes_in_chunks_and_ends_in_done(server: str) -> None:
    messages = await say(server, generation("Good evening. How can I help?"))
    assert [message["type"] for message in messages] == ["chunk"] * (len(messages) - 1) + ["done"]
    sizes_ms = sorted(len(base64.b64decode(message["data"])) / 8 for message in messages[:-1])
    assert sizes_ms[-1] <= 100
    assert sizes_ms[2] >= 20  # only the end of each of the two sentences may be shorter
    assert 1.5 < len(audio_of(messages)) / 8000 < 4


@pytest.mark.parametrize(
    ("encoding", "rate", "width"), [("pcm_s16le", 16000, 2), ("pcm_f32le", 44100, 4), ("pcm_mulaw", 8000, 1)]
)
async def test_any_format_gives_the_same_duration(server: str, encoding: str, rate: int, width: int) -> None:
    form = {"container": "raw", "encoding": encoding, "sample_rate": rate}
    audio = audio_of(await say(server, generation("Good evening to you.", output_format=form)))
    assert len(audio) % width == 0
    assert 0.7 < len(audio) / width / rate < 2


async def test_word_timestamps_are_in_order_and_within_the_audio(server: str) -> None:
    messages = await say(server, generation("Good evening, Ann. How can I help?", add_timestamps=True))
    timings = [m["word_timestamps"] for m in messages if m["type"] == "timestamps"]
    edges = [edge for timing in timings for pair in zip(timing["start"], timing["end"], strict=True) for edge in pair]
    assert words_of(messages) == ["Good", "evening,", "Ann.", "How", "can", "I", "help?"]
    assert edges == sorted(edges)
    assert edges[-1] <= len(audio_of(messages)) / 8000


async def test_pieces_are_joined_verbatim(server: str) -> None:
    pieces = [generation(piece, more=True, add_timestamps=True) for piece in ("Hel", "lo wor", "ld. By", "e.")]
    messages = await say(server, *pieces, generation("", add_timestamps=True))
    assert words_of(messages) == ["Hello", "world.", "Bye."]


async def test_a_sentence_is_spoken_before_the_context_ends(server: str) -> None:
    async with speaking(server) as socket:
        await socket.send_message(generation("Good evening. How", more=True))
        with trio.fail_after(2.5):  # less than the default buffer delay
            assert json.loads(await socket.get_message())["type"] == "chunk"


async def test_flush_speaks_what_is_buffered_and_says_so(server: str) -> None:
    async with speaking(server) as socket:
        await socket.send_message(generation("How can", more=True))
        await socket.send_message(generation("", more=True, flush=True))
        kinds: list[str] = []
        with trio.fail_after(5):
            while not kinds or kinds[-1] != "flush_done":
                kinds.append(json.loads(await socket.get_message())["type"])
    assert "chunk" in kinds


async def test_buffered_text_is_spoken_after_the_buffer_delay(server: str) -> None:
    async with speaking(server) as socket:
        began = trio.current_time()
        await socket.send_message(generation("How can", more=True, max_buffer_delay_ms=400))
        with trio.fail_after(2.5):
            assert json.loads(await socket.get_message())["type"] == "chunk"
        assert trio.current_time() - began >= 0.4


async def test_cancel_stops_what_has_not_begun(server: str) -> None:
    text = "This is one sentence. " * 30
    async with speaking(server) as socket:
        await socket.send_message(generation(text))
        await socket.get_message()
        await socket.send_message('{"context_id":"c","cancel":true}')
        messages = await until_done(socket)
    assert messages[-1]["type"] == "done"
    assert len(audio_of(messages)) / 8000 < 15  # of some 45 s


async def test_cancelling_an_unknown_context_is_no_error(server: str) -> None:
    messages = await say(server, '{"context_id":"nobody","cancel":true}', generation("Hello."))
    assert messages[-1]["type"] == "done"


async def test_a_context_expires_a_second_after_its_last_audio(server: str) -> None:
    async with speaking(server) as socket:
        await socket.send_message(generation("Hello. ", more=True))
        assert (await until_done(socket))[-1]["type"] == "done"
        await socket.send_message(generation("Still there?", more=True))
        late = await until_done(socket)
    assert late[0]["error_code"] == "context_expired"


async def test_two_contexts_share_a_socket(server: str) -> None:
    async with speaking(server) as socket:
        await socket.send_message(generation("Good evening.", "a"))
        await socket.send_message(generation("Good night.", "b"))
        messages = [*await until_done(socket), *await until_done(socket)]
    assert {message["context_id"] for message in messages if message["type"] == "chunk"} == {"a", "b"}


async def test_one_context_too_many_is_refused(server: str) -> None:
    async with speaking(server) as socket:
        for number in range(MAX_CONTEXTS + 1):
            await socket.send_message(generation("", f"c{number}", more=True))
        messages = await until_done(socket)
    assert (messages[-1]["error_code"], messages[-1]["status_code"]) == ("concurrency_limited", 429)
    assert messages[-1]["context_id"] == f"c{MAX_CONTEXTS}"


@pytest.mark.parametrize(
    ("request_text", "code"),
    [
        ("{not json", "invalid_json"),
        ('{"transcript":"x"}', "invalid_request"),
        (generation("x", output_format={**MULAW, "encoding": "mp3"}), "invalid_request"),
        (generation("x", output_format={**MULAW, "sample_rate": 4000}), "invalid_request"),
        (generation("x", max_buffer_delay_ms=9000), "invalid_request"),
    ],
)
async def test_a_bad_request_gets_a_structured_error(server: str, request_text: str, code: str) -> None:
    [error] = await say(server, request_text)
    assert error["type"] == "error"
    assert (error["error_code"], error["status_code"]) == (code, 400)
    assert error["message"]


async def test_the_voice_may_not_change_within_a_context(server: str) -> None:
    async with speaking(server) as socket:
        await socket.send_message(generation("", more=True))
        await socket.send_message(generation("Hello.", voice={"id": "another"}))
        [error] = await until_done(socket)
    assert error["title"] == "Context changed"


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"X-API-Key": "any-key"}, 400), ({"Cartesia-Version": "2026-08-14"}, 401)],
)
async def test_synthesis_needs_a_key_and_a_version(server: str, headers: dict[str, str], status: int) -> None:
    with pytest.RaisesGroup(ConnectionRejected, flatten_subgroups=True) as refused:
        async with connected(server, "/tts/websocket", headers):
            pass
    assert rejection(refused).status_code == status


async def test_bytes_can_be_had_as_a_wav_file(server: str) -> None:
    form = {"container": "wav", "encoding": "pcm_s16le", "sample_rate": 16000}
    body = {"model_id": "sonic", "voice": "v", "transcript": "Good evening.", "output_format": form}
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        response = await client.post(f"http://{server}/tts/bytes", headers=CARTESIA, json=body)
    samples, rate = read_wav(response.content)
    assert rate == 16000
    assert 0.4 < len(samples) / rate < 2
    assert math.isfinite(float(np.abs(samples).max()))


def test_sentences_end_at_their_marks_and_not_at_abbreviations() -> None:
    buffer = TextBuffer()
    assert buffer.push("Mr. Smith comes at 7 p. m. sharp! He") == ["Mr. Smith comes at 7 p. m. sharp! "]
    assert buffer.push(" pays 3.50 today.") == []
    assert buffer.rest() == ["He pays 3.50 today."]


def test_marks_alone_are_not_spoken() -> None:
    buffer = TextBuffer()
    assert buffer.push("... ! ") == []
    assert buffer.rest() == []
