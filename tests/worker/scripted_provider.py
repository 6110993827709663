"""A provider's WebSocket server on loopback, whose every word a test says."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket

from dialog_worker.participant import Participant

PATIENCE_S = 5.0  # a test that waits longer has failed


class Peer:
    """The server's side of one connection."""

    def __init__(self, request: WebSocketRequest, socket: WebSocketConnection) -> None:
        self.path = request.path
        self.headers = {name.decode().lower(): value.decode() for name, value in request.headers}
        self._socket = socket
        self._put, self._frames = trio.open_memory_channel[str | bytes](1000)
        self.ended = trio.Event()

    async def pump(self) -> None:
        try:
            while True:
                await self._put.send(await self._socket.get_message())
        except ConnectionClosed:
            await self._put.aclose()
            self.ended.set()

    async def receive(self) -> str | bytes:
        with trio.fail_after(PATIENCE_S):
            return await self._frames.receive()

    async def receive_json(self) -> dict[str, Any]:
        """The next text frame; audio before it is passed over."""
        while isinstance(frame := await self.receive(), bytes):
            pass
        decoded: dict[str, Any] = msgspec.json.decode(frame)
        return decoded

    async def receive_audio(self, size: int) -> bytes:
        """The next audio, joined until there is so much of it; text frames are passed over."""
        audio = b""
        while len(audio) < size:
            frame = await self.receive()
            audio += frame if isinstance(frame, bytes) else b""
        return audio

    def unread(self) -> list[str | bytes]:
        frames = []
        try:
            while True:
                frames.append(self._frames.receive_nowait())
        except (trio.WouldBlock, trio.EndOfChannel):
            return frames

    async def send(self, message: dict[str, Any] | str | bytes) -> None:
        frame = msgspec.json.encode(message).decode() if isinstance(message, dict) else message
        await self._socket.send_message(frame)

    async def close(self, code: int = 1011, reason: str = "test") -> None:
        await self._socket.aclose(code, reason)

    def freeze(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Send nothing more, not even the answers to pings."""

        async def swallow(event: object) -> None:
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(self._socket, "_send", swallow)

    async def vanish(self) -> None:
        """End the connection without a word."""
        await trio.aclose_forcefully(self._socket._stream)


class ScriptedProvider:
    """Accepts connections, or refuses as many as `refusals` has statuses."""

    def __init__(self) -> None:
        self.url = ""
        self.refusals: list[int] = []
        self.refusal_headers: list[tuple[bytes, bytes]] = []
        self.attempts = 0
        self._accepted, self._peers = trio.open_memory_channel[Peer](100)

    async def accept(self) -> Peer:
        with trio.fail_after(PATIENCE_S):
            return await self._peers.receive()

    async def handle(self, request: WebSocketRequest) -> None:
        self.attempts += 1
        if self.refusals:
            await request.reject(self.refusals.pop(0), extra_headers=list(self.refusal_headers), body=b"no")
            return
        peer = Peer(request, await request.accept())
        await self._accepted.send(peer)
        await peer.pump()


@asynccontextmanager
async def scripted_provider() -> AsyncIterator[ScriptedProvider]:
    provider = ScriptedProvider()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve_websocket, provider.handle, "127.0.0.1", 0, None)
        provider.url = f"ws://127.0.0.1:{server.port}/speech"
        yield provider
        nursery.cancel_scope.cancel()


async def next_event(participant: Participant[Any]) -> Any:
    with trio.fail_after(PATIENCE_S):
        return await participant.events.receive()


async def events_until(participant: Participant[Any], enough: Callable[[Any], bool]) -> list[Any]:
    events = [await next_event(participant)]
    while not enough(events[-1]):
        events.append(await next_event(participant))
    return events


def no_event(participant: Participant[Any]) -> bool:
    """Whether nothing waits to be read."""
    return participant.events.statistics().current_buffer_used == 0
