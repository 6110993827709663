"""The speech server over real sockets with the real models; silence and timeouts on a virtual clock."""

import base64
import json
import math
import re
import signal
import subprocess
import sys
import wave
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode

import httpx
import numpy as np
import pytest
import trio
from moonshine_voice.utils import get_assets_path
from starlette.websockets import WebSocket
from trio.testing import MockClock
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream

from dialog_local.audio import Resampler, Samples, decode, encode, read_wav, resample
from dialog_local.brain import Call, ChatMessage, answer
from dialog_local.cartesia import TextBuffer
from dialog_local.completions import Completions
from dialog_local.hearing import MAX_SEGMENT_S, RATE, Segment, Segmenter, SpeechStarted, UtteranceEnded
from dialog_local.listen import Ear, listen
from dialog_local.speak import Mouth, tts_websocket
from dialog_local.speech import Speech

BOOKING = "I would like to book a table for two people at half past seven, please."
SILENCE = b"\xff" * 160  # 20 ms
MAX_CONTEXTS = 3
TOKEN = {"Authorization": "Token any-key"}
CARTESIA = {"X-API-Key": "any-key", "Cartesia-Version": "2026-08-14"}
MULAW = {"container": "raw", "encoding": "pcm_mulaw", "sample_rate": 8000}
TELEPHONY = {"encoding": "mulaw", "sample_rate": "8000", "channels": "1", "smart_format": "true"}


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """`python -m dialog_local` with its models loaded; gives host and port. It must end cleanly on SIGTERM."""
    command = [sys.executable, "-m", "dialog_local", "--listen", "127.0.0.1:0", "--max-contexts", str(MAX_CONTEXTS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().removeprefix("listening on http://").strip()
        assert re.fullmatch(r"loading the recogniser … \d+\.\d s\n", process.stderr.readline())
        assert re.fullmatch(r"loading the voice … \d+\.\d s\n", process.stderr.readline())
        try:
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
    assert (process.returncode, rest) == (0, "")


@pytest.fixture(scope="session")
def spoken_booking(server: str) -> bytes:
    """`BOOKING` in mu-law, as the voice says it."""
    body = {"model_id": "sonic", "voice": {"id": "v"}, "transcript": BOOKING, "output_format": MULAW}
    response = httpx.post(f"http://{server}/tts/bytes", json=body, headers=CARTESIA, trust_env=False, timeout=30)
    assert response.status_code == 200
    return response.content


def raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as trio-websocket takes them."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]


@asynccontextmanager
async def connected(server: str, path: str, headers: dict[str, str]) -> AsyncIterator[WebSocketConnection]:
    """A WebSocket whose connection is closed whatever happens, which `open_websocket_url` leaves to the collector."""
    host, _, port = server.partition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream, trio.open_nursery() as nursery:
        yield await wrap_client_stream(nursery, stream, server, path, extra_headers=raw(headers))
        nursery.cancel_scope.cancel()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower().replace("-", " "))


def share_of_words(heard: str, said: str) -> float:
    return sum(word in words(heard) for word in words(said)) / len(words(said))


def human_recording(seconds: float) -> bytes:
    """A reader's voice, by way of the telephone."""
    with wave.open(str(get_assets_path() / "two_cities.wav")) as file:
        rate = file.getframerate()
        samples = decode(file.readframes(int(rate * seconds)), "pcm_s16le")
    return encode(resample(samples, rate, 8000), "pcm_mulaw")


# --- audio -----------------------------------------------------------------------------------------------------------


def test_every_mulaw_code_survives_decoding_and_encoding() -> None:
    codes = bytes(code for code in range(256) if code != 0x7F)  # 0x7F is a second zero
    assert encode(decode(codes, "pcm_mulaw"), "pcm_mulaw") == codes


def test_mulaw_silence_is_ff() -> None:
    assert encode(np.zeros(3, dtype=np.float32), "pcm_mulaw") == b"\xff\xff\xff"


def test_resampling_piecewise_is_resampling_at_once() -> None:
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, 8000).astype(np.float32)
    resampler = Resampler(22050, 8000)
    pieces = [resampler.feed(samples[start : start + 37]) for start in range(0, 8000, 37)]
    assert np.array_equal(np.concatenate([*pieces, resampler.flush()]), resample(samples, 22050, 8000))


def tone(hertz: float, rate: int) -> Samples:
    return np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)


def test_resampling_keeps_a_tone_in_place() -> None:
    assert np.allclose(resample(tone(440, 8000), 8000, 16000)[100:-100], tone(440, 16000)[100:-100], atol=1e-3)


def test_resampling_removes_what_the_lower_rate_cannot_carry() -> None:
    assert np.abs(resample(tone(6000, 22050), 22050, 8000)[100:-100]).max() < 1e-3


# --- hearing, on the audio's own clock -------------------------------------------------------------------------------


def silence(seconds: float) -> Samples:
    return np.zeros(int(RATE * seconds), dtype=np.float32)


def voice(seconds: float) -> Samples:
    """Something as loud as speech."""
    return np.random.default_rng(3).normal(0, 0.1, int(RATE * seconds)).astype(np.float32)


def happenings(segmenter: Segmenter, *parts: Samples) -> list[tuple[float, Any]]:
    """What happens, and the second of audio at which it is noticed."""
    audio = np.concatenate(parts)
    found = []
    for start in range(0, len(audio), 320):
        found += [(segmenter.now, happening) for happening in segmenter.feed(audio[start : start + 320])]
    return found


def test_the_start_of_speech_is_noticed_within_200_ms() -> None:
    [(noticed, started)] = happenings(Segmenter(), silence(1), voice(0.5))
    assert isinstance(started, SpeechStarted)
    assert started.at == pytest.approx(1.0, abs=0.03)
    assert noticed - 1.0 < 0.2


def test_the_start_of_a_human_voice_is_noticed_within_200_ms_of_its_first_sound() -> None:
    audio = resample(decode(human_recording(4), "pcm_mulaw"), 8000, RATE)
    first_sound = int(np.flatnonzero(np.abs(audio) > 0.05)[0]) / RATE
    noticed, started = happenings(Segmenter(), silence(1), audio)[0]
    assert isinstance(started, SpeechStarted)
    assert noticed - 1.0 - first_sound < 0.2


@pytest.mark.parametrize("peak", [0.0, 0.003])
def test_silence_and_faint_noise_are_no_speech(peak: float) -> None:
    noise = np.random.default_rng(4).uniform(-peak, peak, 3 * RATE).astype(np.float32)
    assert happenings(Segmenter(), noise) == []


def test_a_click_is_no_speech() -> None:
    assert happenings(Segmenter(), silence(1), voice(0.04), silence(1)) == []


def test_an_utterance_ends_after_the_endpointing_time() -> None:
    [_, (noticed, segment)] = happenings(Segmenter(endpointing_s=0.5), silence(1), voice(1), silence(1))
    assert isinstance(segment, Segment)
    assert segment.speech_final
    assert noticed == pytest.approx(2.5, abs=0.05)


def test_a_pause_shorter_than_endpointing_is_part_of_the_utterance() -> None:
    found = happenings(Segmenter(endpointing_s=0.5), voice(1), silence(0.4), voice(1), silence(1))
    assert [type(happening) for _, happening in found] == [SpeechStarted, Segment]


def test_without_endpointing_no_segment_is_speech_final() -> None:
    segments = [s for _, s in happenings(Segmenter(endpointing_s=None), voice(1), silence(1)) if isinstance(s, Segment)]
    assert [segment.speech_final for segment in segments] == [False]


def test_a_monologue_is_cut_and_nothing_of_it_is_lost() -> None:
    found = happenings(Segmenter(), voice(20), silence(1))
    segments = [happening for _, happening in found if isinstance(happening, Segment)]
    assert [segment.speech_final for segment in segments] == [False, True]
    assert segments[0].end - segments[0].start <= MAX_SEGMENT_S
    assert segments[1].start == pytest.approx(segments[0].end)


def test_the_utterance_end_comes_once_after_its_silence() -> None:
    ends = [
        (noticed, happening)
        for noticed, happening in happenings(Segmenter(utterance_end_s=1.0), voice(1), silence(4))
        if isinstance(happening, UtteranceEnded)
    ]
    assert len(ends) == 1
    assert ends[0][0] == pytest.approx(2.0, abs=0.05)


# --- Deepgram's socket -----------------------------------------------------------------------------------------------


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
    reply = answer([ChatMessage("user", heard(messages))], ["book_table"])
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
    assert spoken[-1]["end"] == pytest.approx(1.0 + len(spoken_booking) / 8000, abs=0.3)
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


def rejection(refused: pytest.ExceptionInfo[ExceptionGroup[ConnectionRejected]]) -> ConnectionRejected:
    [error] = refused.value.exceptions
    assert isinstance(error, ConnectionRejected)
    return error


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


# --- on a virtual clock ----------------------------------------------------------------------------------------------


class Wire:
    """A WebSocket's two directions as the server's framework sees them, without a network."""

    def __init__(self, path: str, headers: dict[str, str], query: dict[str, str]) -> None:
        self.outbox, self._inbox = trio.open_memory_channel[dict[str, Any]](1000)
        self.sent: list[dict[str, Any]] = []
        scope = {
            "type": "websocket",
            "path": path,
            "headers": [(name.lower(), value) for name, value in raw(headers)],
            "query_string": urlencode(query).encode(),
        }
        self.socket = WebSocket(scope, self._inbox.receive, self._send)
        self.outbox.send_nowait({"type": "websocket.connect"})

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def closed(self) -> tuple[int, str] | None:
        """Code and reason, once it is closed."""
        last = self.sent[-1]
        return (last["code"], last["reason"]) if last["type"] == "websocket.close" else None


class Unused:
    """Neither speech nor text reaches the models in these tests."""

    rate = 22050

    def transcribe(self, audio: Samples) -> str:
        raise AssertionError(f"{len(audio)} samples to transcribe")

    def say(self, sentence: str, speed: float = 1.0) -> Samples:
        raise AssertionError(f"{sentence!r} to say at {speed}")


async def test_a_silent_client_is_closed_after_ten_seconds(autojump_clock: MockClock) -> None:
    wire = Wire("/v1/listen", TOKEN, TELEPHONY)
    began = trio.current_time()
    await listen(wire.socket, Ear(Unused()))
    assert trio.current_time() - began == pytest.approx(10, abs=0.1)
    assert wire.closed is not None
    assert wire.closed[0] == 1011
    assert wire.closed[1].startswith("NET-0001")


@pytest.mark.parametrize("message", [{"text": '{"type":"KeepAlive"}'}, {"bytes": SILENCE}])
async def test_keep_alive_or_audio_keeps_the_stream_open(message: dict[str, Any], autojump_clock: MockClock) -> None:
    wire = Wire("/v1/listen", TOKEN, TELEPHONY)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen, wire.socket, Ear(Unused()))
        for _ in range(10):
            await trio.sleep(8)
            wire.outbox.send_nowait({"type": "websocket.receive", **message})
            assert wire.closed is None
        await trio.sleep(11)
        assert wire.closed is not None


async def test_an_idle_synthesis_socket_is_closed_after_five_minutes(autojump_clock: MockClock) -> None:
    wire = Wire("/tts/websocket", CARTESIA, {})
    began = trio.current_time()
    await tts_websocket(wire.socket, Mouth(Unused()))
    assert trio.current_time() - began == pytest.approx(300, abs=1)
    assert wire.closed is not None


async def test_nothing_is_ready_before_the_models_are_loaded() -> None:
    transport = httpx.ASGITransport(app=Speech().app(Completions()))
    async with httpx.AsyncClient(transport=transport, base_url="http://speech") as client:
        health = await client.get("/healthz")
        recording = await client.post("/v1/listen", headers=TOKEN, content=SILENCE)
        text = await client.post("/tts/bytes", headers=CARTESIA, json={})
    assert (health.status_code, health.json()) == (503, {"ready": False})
    assert (recording.status_code, text.status_code) == (503, 503)


async def test_health_says_ready_once_they_are(server: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        response = await client.get(f"http://{server}/healthz")
    assert (response.status_code, response.json()) == (200, {"ready": True})


# --- Cartesia's socket -----------------------------------------------------------------------------------------------


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
    assert all(20 <= len(base64.b64decode(m["data"])) / 8 <= 100 for m in messages[:-2])
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


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_told_in_one_line(server: str) -> None:
    command = [sys.executable, "-m", "dialog_local", "--listen", server]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"dialog_local: cannot listen on {server}: Address already in use\n"
