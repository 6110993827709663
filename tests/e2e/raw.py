"""Bytes of one's own choosing on a connection to dialogd: HTTP and WebSocket as no well-behaved library would send them."""

import base64
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import trio

from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import Dialogd
from tests.e2e.twilio_client import PhoneCall, sign

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10


class Wire:
    """One connection."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._received = b""

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        await self.stream.send_all(data)

    async def until(self, mark: bytes) -> bytes:
        """Return what comes, up to and with `mark`."""
        with trio.fail_after(PATIENCE_S):
            while mark not in self._received:
                if not (more := await self.stream.receive_some()):
                    raise AssertionError(f"closed after {self._received!r}")
                self._received += more
        before, _, self._received = self._received.partition(mark)
        return before + mark

    async def exactly(self, count: int) -> bytes:
        """Return the next `count` bytes; fewer at the end of the connection."""
        with trio.fail_after(PATIENCE_S):
            while len(self._received) < count and (more := await self.stream.receive_some()):
                self._received += more
        data, self._received = self._received[:count], self._received[count:]
        return data

    async def rest(self) -> bytes:
        """Return everything until the other side ends the connection; being reset is an error."""
        with trio.fail_after(PATIENCE_S):
            while more := await self.stream.receive_some():
                self._received += more
        data, self._received = self._received, b""
        return data

    async def response(self) -> tuple[int, bytes]:
        """Return the next response's status and body."""
        head = await self.until(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return int(head.split()[1]), await self.exactly(length)

    async def closed_with(self) -> int:
        """Return the code of the Close frame that comes; frames before it are dropped."""
        while (received := await self.frame())[0] != CLOSE:
            pass
        return int.from_bytes(received[1][:2])

    async def frame(self) -> tuple[int, bytes]:
        """Return the next WebSocket frame's opcode and payload. Servers send them short, whole and unmasked here."""
        head = await self.exactly(2)
        assert len(head) == 2, "closed without a Close frame"
        length = head[1] if head[1] < 126 else int.from_bytes(await self.exactly(2))
        return head[0] & 0x0F, await self.exactly(length)

    async def close(self) -> None:
        """Be gone, without a word."""
        await trio.aclose_forcefully(self.stream)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def connect(dialogd: Dialogd) -> Wire:
    """Connect to a dialogd."""
    return Wire(await trio.open_tcp_stream("127.0.0.1", dialogd.port))


async def exchange(dialogd: Dialogd, request: bytes) -> tuple[int, bytes]:
    """Send a request and return the response's status and body, after which the connection must have been closed."""
    async with await connect(dialogd) as wire:
        await wire.send(request)
        answer = await wire.response()
        assert await wire.rest() == b""
        return answer


def frame(opcode: int, payload: bytes, *, fin: bool = True, masked: bool = True) -> bytes:
    """Return a client's WebSocket frame (RFC 6455, 5.2)."""
    size, mask_bit = len(payload), 0x80 if masked else 0
    if size < 126:
        length = bytes([mask_bit | size])
    elif size < 1 << 16:
        length = bytes([mask_bit | 126]) + size.to_bytes(2)
    else:
        length = bytes([mask_bit | 127]) + size.to_bytes(8)
    head = bytes([(0x80 if fin else 0) | opcode]) + length
    if not masked:
        return head + payload
    key = os.urandom(4)
    return head + key + bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))


def handshake(call: PhoneCall, **changed: str) -> bytes:
    """Return a signed upgrade request for a call's media socket, with headers changed, or left out where empty."""
    path = "/twilio/media/" + call.stream_url.rpartition("/")[2]
    headers = {
        "Host": "voice.test",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Version": "13",
        "X-Twilio-Signature": sign(call.stream_url),
    } | {name.replace("_", "-"): value for name, value in changed.items()}
    lines = [f"{name}: {value}" for name, value in headers.items() if value]
    return "\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode()


@asynccontextmanager
async def media_socket(dialogd: Dialogd, call: PhoneCall) -> AsyncIterator[Wire]:
    """Open a call's media socket and leave it to the test what is sent on it."""
    async with await connect(dialogd) as wire:
        await wire.send(handshake(call))
        assert (await wire.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        yield wire
