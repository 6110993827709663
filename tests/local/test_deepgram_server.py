"""Deepgram's protocol over real sockets, with the real recogniser behind it."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
import trio
from moonshine_voice.utils import get_assets_path
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection

from dialog_local.brain.offered import Tool
from dialog_local.brain.receptionist import Call, ChatMessage, answer
from tests.local.sockets import (
    BOOKING,
    SILENCE,
    TELEPHONY,
    TOKEN,
    connected,
    human_recording,
    rejection,
    share_of_words,
    words,
)


@asynccontextmanager
async def listening(server: str, **options: str) -> AsyncIterator[WebSocketConnection]:
    query = urlencode({**TELEPHONY, **options})
    async with connected(server, f"/v1/listen?{query}", TOKEN) as socket:
        yield socket


async def post_audio(socket: WebSocketConnection, audio: bytes) -> None:
    """Send in pieces of 20 ms, faster than real time."""
    for start in range(0, len(audio), 160):
        await socket.send_message(audio[start : start + 160])


async def until_closed(socket: WebSocketConnection) -> list[dict[str, Any]]:
    messages = []
    with trio.fail_after(20):
        while True:
            try:
                messages.append(json.loads(await socket.get_message()))
            except ConnectionClosed:
                return messages


async def hear(server: str, audio: bytes, **options: str) -> list[dict[str, Any]]:
    """Everything that the server says about some audio, up to the close."""
    async with listening(server, **options) as socket, trio.open_nursery() as nursery:

        async def talk() -> None:
            await post_audio(socket, audio)
            await socket.send_message('{"type":"CloseStream"}')

        nursery.start_soon(talk)
        return await until_closed(socket)
    raise AssertionError("unreachable: the block returns")


def transcript(message: dict[str, Any]) -> str:
    text: str = message["channel"]["alternatives"][0]["transcript"]
    return text


def heard(messages: list[dict[str, Any]]) -> str:
    return " ".join(transcript(message) for message in messages if message["type"] == "Results" and message["is_final"])


async def test_a_spoken_sentence_is_recognised(server: str, spoken_booking: bytes) -> None:
    messages = await hear(server, spoken_booking + SILENCE * 25)
    assert share_of_words(heard(messages), BOOKING) >= 0.8


async def test_a_human_voice_is_recognised(server: str) -> None:
    messages = await hear(server, human_recording(8), endpointing="300")
    said = "It was the best of times, it was the worst of times, it was the age of wisdom"
    assert share_of_words(heard(messages), said) >= 0.8


async def test_a_spoken_booking_makes_the_brain_book(server: str, spoken_booking: bytes) -> None:
    messages = await hear(server, spoken_booking)
    tool = Tool("book_table", {"properties": {"people": {}, "time": {}}, "required": ["people", "time"]})
    reply = answer([ChatMessage("user", heard(messages))], [tool])
    assert reply == Call("book_table", {"people": 2, "time": "19:30"})


async def test_the_events_of_an_utterance_come_in_order(server: str, spoken_booking: bytes) -> None:
    audio = SILENCE * 50 + spoken_booking + SILENCE * 75
    messages = await hear(
        server, audio, vad_events="true", interim_results="true", utterance_end_ms="1000", endpointing="300"
    )
    kinds = [message["type"] for message in messages if message["type"] != "Results" or message["is_final"]]
    assert kinds == ["SpeechStarted", "Results", "UtteranceEnd", "Metadata"]


async def test_timestamps_count_audio(server: str, spoken_booking: bytes) -> None:
    messages = await hear(server, SILENCE * 50 + spoken_booking + SILENCE * 50, vad_events="true", endpointing="600")
    assert messages[0]["timestamp"] == pytest.approx(1.1, abs=0.15)
    spoken = messages[1]["channel"]["alternatives"][0]["words"]
    assert spoken[0]["start"] == pytest.approx(1.1, abs=0.15)
    assert spoken[-1]["end"] == pytest.approx(
        1.0 + len(spoken_booking) / 8000, abs=0.7
    )  # the voice ends in a silence of its own choosing
    assert all(before["end"] <= after["start"] for before, after in pairwise(spoken))


async def test_the_pause_makes_a_result_speech_final(server: str, spoken_booking: bytes) -> None:
    messages = await hear(server, spoken_booking + SILENCE * 25, endpointing="300")
    assert [message["speech_final"] for message in messages if message["type"] == "Results"][-1]


async def test_interim_results_come_only_when_asked_for(server: str, spoken_booking: bytes) -> None:
    without = await hear(server, spoken_booking, endpointing="300")
    assert all(message["is_final"] for message in without if message["type"] == "Results")
    async with listening(server, interim_results="true", endpointing="300") as socket:
        for start in range(0, len(spoken_booking), 800):  # faster than real time, but leaving the recogniser some
            await socket.send_message(spoken_booking[start : start + 800])
            await trio.sleep(0.03)
        await socket.send_message('{"type":"CloseStream"}')
        messages = await until_closed(socket)
    assert any(not message["is_final"] for message in messages if message["type"] == "Results")


async def test_words_are_bare_without_formatting(server: str, spoken_booking: bytes) -> None:
    text = heard(await hear(server, spoken_booking, smart_format="false"))
    assert text == text.lower()
    assert not set(text) & set(".,?!")


async def test_finalize_answers_at_once(server: str, spoken_booking: bytes) -> None:
    async with listening(server) as socket:
        await post_audio(socket, spoken_booking[:12000])
        await socket.send_message('{"type":"Finalize"}')
        with trio.fail_after(5):
            message = json.loads(await socket.get_message())
    assert message["from_finalize"]
    assert words(transcript(message))[:2] == ["i", "would"]


async def test_finalize_in_silence_gives_an_empty_result(server: str) -> None:
    async with listening(server) as socket:
        await socket.send_message('{"type":"Finalize"}')
        with trio.fail_after(5):
            message = json.loads(await socket.get_message())
    assert (message["from_finalize"], transcript(message)) == (True, "")


async def test_metadata_comes_last_and_counts_the_audio(server: str) -> None:
    messages = await hear(server, SILENCE * 100)
    assert [message["type"] for message in messages] == ["Metadata"]
    assert messages[0]["duration"] == pytest.approx(2.0, abs=0.01)


async def test_an_empty_frame_closes_the_stream(server: str) -> None:
    async with listening(server) as socket:
        await socket.send_message(b"")
        assert [message["type"] for message in await until_closed(socket)] == ["Metadata"]
        assert socket.closed is not None
        assert socket.closed.code == 1000


async def test_a_frame_that_is_no_control_message_is_an_error(server: str) -> None:
    async with listening(server) as socket:
        await socket.send_message('{"type":"Nonsense"}')
        with trio.fail_after(5):
            message = json.loads(await socket.get_message())
    assert (message["type"], message["variant"]) == ("Error", "SchemaError")


async def test_two_streams_do_not_mix(server: str, spoken_booking: bytes) -> None:
    results: dict[str, str] = {}

    async def one(name: str, audio: bytes) -> None:
        results[name] = heard(await hear(server, audio, endpointing="300"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, "booking", spoken_booking)
        nursery.start_soon(one, "reader", human_recording(6))
    assert share_of_words(results["booking"], BOOKING) >= 0.8
    assert "worst" in words(results["reader"])


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        ({}, TELEPHONY, 401),
        ({"Authorization": "Token"}, TELEPHONY, 401),
        (TOKEN, {"encoding": "mulaw"}, 400),
        (TOKEN, {**TELEPHONY, "encoding": "opus"}, 400),
        (TOKEN, {**TELEPHONY, "channels": "2"}, 400),
        (TOKEN, {**TELEPHONY, "interim_results": "True"}, 400),
    ],
)
async def test_a_bad_upgrade_is_refused_with_the_reason(
    server: str, headers: dict[str, str], query: dict[str, str], status: int
) -> None:
    with pytest.RaisesGroup(ConnectionRejected, flatten_subgroups=True) as refused:
        async with connected(server, f"/v1/listen?{urlencode(query)}", headers):
            pass
    assert rejection(refused).status_code == status
    assert {"dg-error", "dg-request-id"} <= {name.decode() for name, _ in rejection(refused).headers or ()}


async def test_a_recording_is_transcribed(server: str, spoken_booking: bytes) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        url = f"http://{server}/v1/listen?{urlencode(TELEPHONY)}"
        response = await client.post(url, headers=TOKEN, content=spoken_booking)
    alternative = response.json()["results"]["channels"][0]["alternatives"][0]
    assert share_of_words(alternative["transcript"], BOOKING) >= 0.8
    assert response.json()["metadata"]["duration"] == pytest.approx(len(spoken_booking) / 8000, abs=0.01)


async def test_a_wav_file_is_transcribed(server: str) -> None:
    recording = await trio.Path(get_assets_path() / "beckett.wav").read_bytes()
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        response = await client.post(f"http://{server}/v1/listen", headers=TOKEN, content=recording)
    alternative = response.json()["results"]["channels"][0]["alternatives"][0]
    assert share_of_words(alternative["transcript"], "ever tried ever failed no matter try again fail again") >= 0.8


@pytest.mark.parametrize(("headers", "body", "status"), [({}, b"x", 401), (TOKEN, b"", 400), (TOKEN, b"RIFF", 400)])
async def test_a_bad_recording_is_refused(server: str, headers: dict[str, str], body: bytes, status: int) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        response = await client.post(f"http://{server}/v1/listen?{urlencode(TELEPHONY)}", headers=headers, content=body)
    assert response.status_code == status
    assert response.json()["err_msg"] == response.headers["dg-error"]
