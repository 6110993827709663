"""What the tests of the local providers share: how to reach them, and what to say to them."""

import re
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio
from moonshine_voice.utils import get_assets_path
from trio_websocket import ConnectionRejected, WebSocketConnection, wrap_client_stream

from dialog_local.speech.audio import Samples, decode, encode, resample
from dialog_local.speech.hearing import RATE

BOOKING = "I would like to book a table for two people at half past seven, please."

BOOKING = "I would like to book a table for two people at half past seven, please."
SILENCE = b"\xff" * 160  # 20 ms
MAX_CONTEXTS = 3
TOKEN = {"Authorization": "Token any-key"}
CARTESIA = {"X-API-Key": "any-key", "Cartesia-Version": "2026-08-14"}
MULAW = {"container": "raw", "encoding": "pcm_mulaw", "sample_rate": 8000}
TELEPHONY = {"encoding": "mulaw", "sample_rate": "8000", "channels": "1", "smart_format": "true"}


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


def silence(seconds: float) -> Samples:
    return np.zeros(int(RATE * seconds), dtype=np.float32)


def voice(seconds: float) -> Samples:
    """Something as loud as speech."""
    return np.random.default_rng(3).normal(0, 0.1, int(RATE * seconds)).astype(np.float32)


def rejection(refused: pytest.ExceptionInfo[ExceptionGroup[ConnectionRejected]]) -> ConnectionRejected:
    [error] = refused.value.exceptions
    assert isinstance(error, ConnectionRejected)
    return error
