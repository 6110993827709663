"""The local providers as a whole: readiness, the command, and their silences on a virtual clock."""

import subprocess
import sys
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
import trio
from starlette.websockets import WebSocket
from trio.testing import MockClock

from dialog_local.brain.completions import Completions
from dialog_local.speech.audio import Samples
from dialog_local.speech.listen import Ear, listen
from dialog_local.speech.server import Speech
from dialog_local.speech.speak import Mouth, tts_websocket
from tests.local.sockets import CARTESIA, SILENCE, TELEPHONY, TOKEN, raw


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


def test_a_port_in_use_is_told_in_one_line(server: str) -> None:
    command = [sys.executable, "-m", "dialog_local", "--listen", server]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"dialog_local: cannot listen on {server}: Address already in use\n"


async def test_a_client_that_leaves_in_mid_request_is_no_error(server: str) -> None:
    host, _, port = server.partition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\ncontent-length: 100\r\n\r\n{"
    await stream.send_all(head.encode())
    await trio.sleep(0.05)  # so that the server is reading the body when the client leaves
    await trio.aclose_forcefully(stream)
    async with httpx.AsyncClient(base_url=f"http://{server}") as client:
        assert (await client.get("/healthz")).status_code == 200  # and the server's stderr stays empty: see the fixture
