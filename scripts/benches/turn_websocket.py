"""The server's side of a provider's WebSocket: the handshake, and frames read and written at little cost."""

import struct
from collections.abc import AsyncIterator, Iterator
from urllib.parse import parse_qs, urlsplit

from websockets.frames import Opcode
from websockets.utils import accept_key, apply_mask

from scripts.benches.turn_sockets import DatedConnection

_FIN = 0x80  # RFC 6455, 5.2
_HEAD_END = b"\r\n\r\n"


class Upgrade:
    """What a client asked for: the query of its URL, and its headers, in lower case."""

    def __init__(self, head: bytes) -> None:
        request, *lines = head.decode("latin-1").split("\r\n")
        self.query = {name: values[0] for name, values in parse_qs(urlsplit(request.split(" ")[1]).query).items()}
        pairs = (line.partition(":") for line in lines if line)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}


class Frames:
    """Cuts what a client sends into frames. Without I/O."""

    def __init__(self) -> None:
        self._received = b""

    def receive(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield the opcode and payload of each frame that is complete."""
        data, at = self._received + data, 0
        while (place := _frame_place(data, at)) is not None:
            begin, end, masked = place
            payload = data[begin:end]
            yield data[at] & 0x0F, apply_mask(payload, data[begin - 4 : begin]) if masked else payload
            at = end
        self._received = data[at:]


def _frame_place(data: bytes, at: int) -> tuple[int, int, bool] | None:
    """Return where the payload of the frame at `at` begins and ends, and if it is masked; None if it is not all there."""
    begin = at + 2
    if len(data) < begin:
        return None
    masked, size = bool(data[at + 1] & 0x80), data[at + 1] & 0x7F
    if size >= 126:
        width = 2 if size == 126 else 8
        begin += width
        if len(data) < begin:
            return None
        size = int.from_bytes(data[begin - width : begin], "big")
    begin += 4 if masked else 0
    return (begin, begin + size, masked) if len(data) >= begin + size else None


def frame(payload: bytes, opcode: int = Opcode.TEXT) -> bytes:
    """Return a server's frame."""
    size = len(payload)
    if size < 126:
        return struct.pack(">BB", _FIN | opcode, size) + payload
    if size < 1 << 16:
        return struct.pack(">BBH", _FIN | opcode, 126, size) + payload
    return struct.pack(">BBQ", _FIN | opcode, 127, size) + payload


async def accept(connection: DatedConnection) -> Upgrade:
    """Do the handshake. Raises `OSError`."""
    head = b""
    while _HEAD_END not in head:
        more = await connection.receive()
        if not more:
            raise ConnectionError("the client left within the handshake")
        head += more
    upgrade = Upgrade(head.partition(_HEAD_END)[0])
    key = accept_key(upgrade.headers["sec-websocket-key"])
    answer = f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {key}"
    connection.send(answer.encode() + _HEAD_END)
    return upgrade


async def messages(connection: DatedConnection) -> AsyncIterator[tuple[int, bytes]]:
    """Yield a client's text and binary messages until it leaves; pings are answered. Raises `OSError`."""
    frames = Frames()
    while data := await connection.receive():
        for opcode, payload in frames.receive(data):
            if opcode == Opcode.PING:
                connection.send(frame(payload, Opcode.PONG))
            elif opcode == Opcode.CLOSE:
                connection.send(frame(payload, Opcode.CLOSE))
                return
            else:
                yield opcode, payload
