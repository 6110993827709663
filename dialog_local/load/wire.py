"""The wire of a load test's callers: signed webhooks, and media sockets whose frames are put together from prepared pieces.

They share the processor with what they measure, so sockets are used on readiness and a frame costs a few microseconds.
"""

import json
import os
import socket
import struct
from binascii import b2a_base64
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlencode, urlsplit

import h11
import trio
from msgspec import Struct
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake
from websockets.frames import Opcode
from websockets.uri import parse_uri
from websockets.utils import apply_mask

from dialog_local.carrier.media import start_details
from dialog_local.carrier.webhooks import signature
from protocol.readiness import when_readable

FRAME_BYTES = 160  # 20 ms of mu-law at 8 kHz
STAMP = struct.Struct("<d")  # a frame's first 8 bytes: when it was sent
_REST = b"\xff" * (FRAME_BYTES - STAMP.size)  # mu-law silence
_RECEIVE_BYTES = 64 << 10
_HEAD_BYTES = 16 << 10  # of an HTTP answer
_UNSENT_BYTES = 1 << 20  # a minute of frames that the server has not read
_FIN, _MASKED = 0x80, 0x80  # RFC 6455, 5.2
_CLOSE_NORMALLY = struct.pack(">H", 1000)


class CallFailed(Exception):
    """A call could not be placed, or ended before it should; the message says why."""


class Target(Struct, frozen=True):
    """What is called. `url` is the webhook as the server knows it, and is signed; `address` is where it is reached."""

    url: str
    address: tuple[str, int]
    account_sid: str
    token: str


def mark(stamp: bytes) -> bytes:
    """Return what a frame is known by when it comes back: its stamp, as any server leaves it.

    Mu-law has two zeros (ITU-T G.711), and a server that decodes the audio and encodes it again makes one of them.
    """
    return stamp.replace(b"\x7f", b"\xff")


class Stream:
    """One media stream as the carrier writes and reads it, in WebSocket frames. Without I/O.

    Twilio docs, Media Streams, WebSocket messages: text frames with JSON; sequenceNumber, chunk and timestamp are strings.
    """

    def __init__(self, account_sid: str, call_sid: str, parameters: dict[str, str]) -> None:
        self.stream_sid = "MZ" + os.urandom(16).hex()
        self._account_sid = account_sid
        self._call_sid = call_sid
        self._parameters = parameters
        self._sequence = 0
        self._chunk = 0
        self._mask = os.urandom(4)  # one for all frames: between two programs on one machine there is no proxy to confuse
        self._received = b""
        audio = b2a_base64((bytes(STAMP.size) + _REST), newline=False)
        self._tail = audio[12:] + b'"},"streamSid":"%b"}' % self.stream_sid.encode()  # base64 of all but the first 9 bytes

    def connected(self) -> bytes:
        """The first message."""
        return self._text({"event": "connected", "protocol": "Call", "version": "1.0.0"})

    def start(self) -> bytes:
        """The second message: what this stream is."""
        details = start_details(self._account_sid, self.stream_sid, self._call_sid, self._parameters)
        return self._numbered("start", details)

    def media(self, sent_at: float) -> bytes:
        """A frame of silence that carries the time."""
        self._sequence += 1
        self._chunk += 1
        stamp = b2a_base64(STAMP.pack(sent_at) + _REST[:1], newline=False)
        return self._frame(
            Opcode.TEXT,
            b'{"event":"media","sequenceNumber":"%d","media":{"track":"inbound","chunk":"%d","timestamp":"%d","payload":"%b%b'
            % (self._sequence, self._chunk, self._chunk * 20, stamp, self._tail),
        )

    def mark(self, name: str) -> bytes:
        """A mark going back."""
        return self._numbered("mark", {"name": name})

    def stop(self) -> bytes:
        """The last message, and the WebSocket's close."""
        stop = self._numbered("stop", {"accountSid": self._account_sid, "callSid": self._call_sid})
        return stop + self._frame(Opcode.CLOSE, _CLOSE_NORMALLY)

    def pong(self, payload: bytes) -> bytes:
        """The answer to a ping."""
        return self._frame(Opcode.PONG, payload)

    def receive(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield the opcode and payload of each frame that is complete. Raises `CallFailed` for one that is fragmented."""
        data, at = self._received + data, 0
        while (head := _frame_head(data, at)) is not None:
            begin, end = head
            if not data[at] & _FIN:
                raise CallFailed("the server sent a fragmented WebSocket message, which the load generator does not read")
            yield data[at] & 0x0F, data[begin:end]
            at = end
        self._received = data[at:]

    def _numbered(self, event: str, details: Mapping[str, object]) -> bytes:
        self._sequence += 1
        number = str(self._sequence)
        return self._text({"event": event, "sequenceNumber": number, event: details, "streamSid": self.stream_sid})

    def _text(self, message: Mapping[str, object]) -> bytes:
        return self._frame(Opcode.TEXT, json.dumps(message).encode())

    def _frame(self, opcode: int, payload: bytes) -> bytes:
        """Return a masked frame (RFC 6455, 5.2 and 5.3)."""
        size = len(payload)
        if size < 126:
            head = struct.pack(">BB", _FIN | opcode, _MASKED | size)
        else:
            head = struct.pack(">BBH", _FIN | opcode, _MASKED | 126, size)
        return head + self._mask + apply_mask(payload, self._mask)


def _frame_head(data: bytes, at: int) -> tuple[int, int] | None:
    """Return where the payload of the server's frame at `at` begins and ends, or None if it is not all there."""
    begin = at + 2
    if len(data) < begin:
        return None
    size = data[at + 1]
    if size >= 126:
        width = 2 if size == 126 else 8
        begin += width
        size = int.from_bytes(data[begin - width : begin], "big")
    return (begin, begin + size) if len(data) >= begin + size else None


class Connection:
    """A plain TCP connection, used as soon as the kernel says that it is ready. Use in `with`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unsent = b""

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._sock.close()

    def detach(self) -> socket.socket:
        """Give the socket away, to be used and closed elsewhere."""
        return socket.socket(fileno=self._sock.detach())

    async def receive(self) -> bytes:
        """Return some bytes, or none at the end of the connection. Raises `OSError`."""
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue

    async def each(self, take: Callable[[bytes], None]) -> None:
        """Pass what is received to `take`, until the end of the connection. Raises `OSError`, and what `take` raises."""

        def read() -> bool:
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return False
            if data:
                take(data)
            return not data

        await when_readable(self._sock.fileno(), read)

    def write(self, data: bytes) -> None:
        """Send without waiting; what the kernel does not take goes ahead of the next write. Raises `OSError`."""
        data = self._unsent + data
        try:
            self._unsent = data[self._sock.send(data) :]
        except BlockingIOError:
            self._unsent = data
        if len(self._unsent) > _UNSENT_BYTES:
            raise ConnectionError(f"the server does not read: {len(self._unsent)} bytes wait to be sent")


async def connect(address: tuple[str, int]) -> Connection:
    """Open a connection. Raises `OSError`."""
    stream = await trio.open_tcp_stream(*address)  # it sets TCP_NODELAY
    detached = socket.socket(fileno=stream.socket.detach())
    detached.setblocking(False)
    return Connection(detached)


async def ask(target: Target, params: Mapping[str, str]) -> str:
    """Send a signed webhook, or a report, and return the answer's body. Raises `CallFailed` or `OSError`."""
    body = urlencode(params).encode()
    parts = urlsplit(target.url)
    headers = {
        "Host": parts.netloc,
        "X-Twilio-Signature": signature(target.token, target.url, params),
        "Content-Type": "application/x-www-form-urlencoded",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    http = h11.Connection(h11.CLIENT)
    request = h11.Request(method="POST", target=parts.path or "/", headers=list(headers.items()))
    with await connect(target.address) as connection:
        connection.write(b"".join(http.send(event) or b"" for event in (request, h11.Data(data=body), h11.EndOfMessage())))
        try:
            status, answer = await _answer(http, connection)
        except h11.RemoteProtocolError as error:
            raise CallFailed(f"the webhook's answer is not HTTP: {error}") from error
    if status not in (200, 204):
        raise CallFailed(f"the webhook {target.url} was answered with HTTP {status}: {answer[:120].strip()}")
    return answer


async def _answer(http: h11.Connection, connection: Connection) -> tuple[int, str]:
    status, body = 0, b""
    while not isinstance(event := http.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            http.receive_data(await connection.receive())
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
    return status, body.decode(errors="replace")


async def upgrade(connection: Connection, url: str, token: str) -> bytes:
    """Make a connection the WebSocket of `url`, and return what came after the handshake. Raises `CallFailed`."""
    client = ClientProtocol(parse_uri(url))
    request = client.connect()
    request.headers["X-Twilio-Signature"] = signature(token, url, {})
    client.send_request(request)
    connection.write(b"".join(client.data_to_send()))
    received = b""
    while (end := received.find(b"\r\n\r\n")) == -1:
        more = await connection.receive()
        if not more or len(received) > _HEAD_BYTES:
            raise CallFailed(f"the media socket {url} was not answered with HTTP: {received[:120]!r}")
        received += more
    head, rest = received[: end + 4], received[end + 4 :]
    status_line = head.partition(b"\r\n")[0].decode(errors="replace")
    if " 101" not in status_line:
        raise CallFailed(f"the media socket was refused with {status_line}: {rest[:120].decode(errors='replace').strip()}")
    client.receive_data(head)
    if isinstance(client.handshake_exc, InvalidHandshake):
        raise CallFailed(f"the media socket's handshake failed: {client.handshake_exc}")
    return rest
