"""The callers of a load test: each places a signed call and talks on its media socket, as cheaply as Python can.

They share the processor with what they measure, so sockets are used on readiness, frames are put together from prepared
pieces, and one task keeps the time for all.
"""

import heapq
import json
import os
import socket
import struct
import time
from binascii import b2a_base64
from collections.abc import Iterator, Mapping
from urllib.parse import urlencode, urlsplit

import h11
import msgspec
import trio
from msgspec import Struct
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake
from websockets.frames import Opcode
from websockets.uri import parse_uri
from websockets.utils import apply_mask

from dialog_local import media, twiml
from dialog_local.webhooks import signature

FRAME_S = 0.02  # Twilio sends 50 frames a second
FRAME_BYTES = 160  # 20 ms of mu-law at 8 kHz
SETUP_S = 15.0  # Twilio docs, webhooks connection overrides: the longest that a webhook may take
FIRST_ECHO_S = 5.0  # from `start`; an agent that echoes answers within milliseconds
CLOSE_S = 5.0  # from `stop` to the end of the connection
_STAMP = struct.Struct("<d")  # the frame's first 8 bytes: when it was sent
_REST = b"\xff" * (FRAME_BYTES - _STAMP.size)  # mu-law silence
_RECEIVE_BYTES = 64 << 10
_HEAD_BYTES = 16 << 10  # of an HTTP answer
_UNSENT_BYTES = 1 << 20  # a minute of frames that the server has not read
_FIN, _MASKED = 0x80, 0x80  # RFC 6455, 5.2
_CLOSE_NORMALLY = struct.pack(">H", 1000)
_decoder: msgspec.json.Decoder[media.Request] = msgspec.json.Decoder(media.Request)


class CallFailed(Exception):
    """A call could not be placed, or ended before it should; the message says why."""


class Target(Struct, frozen=True):
    """What is called. `url` is the webhook as the server knows it, and is signed; `address` is where it is reached."""

    url: str
    address: tuple[str, int]
    account_sid: str
    token: str


class Meter:
    """What all callers measure. Times are in seconds, by `time.perf_counter`; frames count while the window is open."""

    def __init__(self) -> None:
        self.webhooks: list[float] = []
        self.first_echoes: list[float] = []  # from `start`
        self.echoes: list[float] = []
        self.sent = 0
        self.complete = trio.Event()  # the window is closed and every frame of it has come back
        self._opened_at = self._closed_at = float("inf")

    @property
    def lost(self) -> int:
        """Frames of the window that have not come back."""
        return self.sent - len(self.echoes)

    def open(self) -> None:
        """Count what is sent from now on."""
        self._opened_at = time.perf_counter()

    def close(self) -> float:
        """Count nothing that is sent from now on, and return how many seconds the window was open."""
        self._closed_at = time.perf_counter()
        self._check()
        return self._closed_at - self._opened_at

    def count_sent(self, sent_at: float) -> None:
        """A frame leaves."""
        if self._opened_at <= sent_at < self._closed_at:
            self.sent += 1

    def count_echo(self, sent_at: float, now: float) -> None:
        """A frame has come back."""
        if self._opened_at <= sent_at < self._closed_at:
            self.echoes.append(now - sent_at)
            self._check()

    def _check(self) -> None:
        if self._closed_at < float("inf") and self.lost == 0:
            self.complete.set()


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
        audio = b2a_base64((bytes(_STAMP.size) + _REST), newline=False)
        self._tail = audio[12:] + b'"},"streamSid":"%b"}' % self.stream_sid.encode()  # base64 of all but the first 9 bytes

    def connected(self) -> bytes:
        """The first message."""
        return self._text({"event": "connected", "protocol": "Call", "version": "1.0.0"})

    def start(self) -> bytes:
        """The second message: what this stream is."""
        details = {
            "accountSid": self._account_sid,
            "streamSid": self.stream_sid,
            "callSid": self._call_sid,
            "tracks": ["inbound"],
            "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
            "customParameters": self._parameters,
        }
        return self._numbered("start", details)

    def media(self, sent_at: float) -> bytes:
        """A frame of silence that carries the time."""
        self._sequence += 1
        self._chunk += 1
        stamp = b2a_base64(_STAMP.pack(sent_at) + _REST[:1], newline=False)
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

    async def receive(self) -> bytes:
        """Return some bytes, or none at the end of the connection. Raises `OSError`."""
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue

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
    """Send a signed webhook and return the answer's body. Raises `CallFailed` or `OSError`."""
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
    if status != 200:
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


class Pacer:
    """Sends every call's frames when they are due, 20 ms after the ones before, however late those were."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, LoadCall]] = []
        self._added = trio.Event()
        self._count = 0

    def add(self, call: "LoadCall") -> None:
        """Keep the time for a call that has just sent its first frame, until it sends no more."""
        self._count += 1
        heapq.heappush(self._due, (trio.current_time() + FRAME_S, self._count, call))
        self._added.set()

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            if not self._due:
                self._added = trio.Event()
                await self._added.wait()
            await trio.sleep_until(self._due[0][0])  # a call added meanwhile is due later than this
            now = trio.current_time()
            while self._due and self._due[0][0] <= now:
                due, number, call = self._due[0]
                if call.send_frame():
                    heapq.heapreplace(self._due, (due + FRAME_S, number, call))
                else:
                    heapq.heappop(self._due)


class LoadCall:
    """One caller, from the webhook to the end of the media socket. `error` says what went wrong, if something did."""

    def __init__(self, target: Target, meter: Meter, pacer: Pacer) -> None:
        self.settled = trio.Event()  # audio has come back, or none ever will
        self.answered = False
        self.error = ""
        self._target = target
        self._meter = meter
        self._pacer = pacer
        self._call_sid = "CA" + os.urandom(16).hex()
        self._away: set[float] = set()  # when the frames that have not come back were sent
        self._frames = 0
        self._leaving = False
        self._patience = trio.CancelScope()
        self._started_at = 0.0
        self._stream: Stream | None = None
        self._connection: Connection | None = None

    async def run(self, arrives_at: float) -> None:
        """Place the call at a time of trio's clock, and talk until `stop`."""
        await trio.sleep_until(arrives_at)
        try:
            with trio.fail_after(SETUP_S):
                url, parameters = await self._dial()
                connection = await connect(self._target.address)
            with connection:
                with trio.fail_after(SETUP_S):
                    rest = await upgrade(connection, url, self._target.token)
                await self._talk(connection, Stream(self._target.account_sid, self._call_sid, parameters), rest)
        except trio.TooSlowError:
            self.error = f"it was not connected within {SETUP_S:g} s"
        except (CallFailed, OSError) as error:
            self.error = str(error)
        finally:
            self._connection = None
            self.settled.set()

    async def _dial(self) -> tuple[str, dict[str, str]]:
        """Ask the webhook, and return the media socket's URL and parameters."""
        numbers = {"From": "+15550001111", "To": "+15550002222", "Caller": "+15550001111", "Called": "+15550002222"}
        params = {"CallSid": self._call_sid, "AccountSid": self._target.account_sid, **numbers}
        params |= {"CallStatus": "ringing", "Direction": "inbound", "ApiVersion": "2010-04-01"}
        asked_at = time.perf_counter()
        document = await ask(self._target, params)
        self._meter.webhooks.append(time.perf_counter() - asked_at)
        try:
            verbs = twiml.parse(document, self._target.url)
        except twiml.DocumentError as error:
            raise CallFailed(str(error)) from error
        if not verbs or not isinstance(verbs[0], twiml.Connect):
            raise CallFailed(f"the webhook's answer does not begin with <Connect><Stream>: {document[:200]}")
        return verbs[0].url, verbs[0].parameters

    async def _talk(self, connection: Connection, stream: Stream, data: bytes) -> None:
        connection.write(stream.connected())
        self._started_at = time.perf_counter()
        connection.write(stream.start())
        self._stream, self._connection = stream, connection
        self._patience.deadline = trio.current_time() + FIRST_ECHO_S
        if self.send_frame():
            self._pacer.add(self)
        with self._patience:
            await self._read(connection, stream, data)
        if self._patience.cancelled_caught and self._leaving:
            raise CallFailed(f"the server did not close the media socket within {CLOSE_S:g} s of `stop`")
        if self._patience.cancelled_caught:
            self.stop()
            with trio.move_on_after(CLOSE_S):
                await self._read(connection, stream, b"")
            raise CallFailed(f"no frame came back within {FIRST_ECHO_S:g} s; does the agent echo? examples/echo does")
        if not self._leaving:
            raise CallFailed(f"the server closed the connection after {self._frames} frames")

    async def _read(self, connection: Connection, stream: Stream, data: bytes) -> None:
        """Act on what was received and on what comes, until the connection ends: the server does that last (RFC 6455, 7.1.1)."""
        self._take(connection, stream, data)
        while data := await connection.receive():
            self._take(connection, stream, data)

    def send_frame(self) -> bool:
        """Send a frame. Return False when the call sends no more."""
        if self._stream is None or self._connection is None or self._leaving:
            return False
        now = time.perf_counter()
        self._frames += 1
        self._away.add(now)
        self._meter.count_sent(now)
        try:
            self._connection.write(self._stream.media(now))
        except OSError:
            return False  # the reader finds the end of the connection, and says so
        return True

    def stop(self) -> None:
        """Say `stop` and close; `run` returns when the server has closed too."""
        if self._stream is None or self._connection is None:
            return
        self._leaving = True
        self._patience.deadline = trio.current_time() + CLOSE_S
        try:
            self._connection.write(self._stream.stop())
        except OSError as error:
            self.error = f"the connection was lost at `stop`: {error}"

    def _take(self, connection: Connection, stream: Stream, data: bytes) -> None:
        """Act on what was received."""
        for opcode, payload in stream.receive(data):
            if opcode == Opcode.TEXT:
                self._message(connection, stream, payload)
            elif opcode == Opcode.PING:
                connection.write(stream.pong(payload))
            elif opcode == Opcode.CLOSE and not self._leaving:
                code, reason = int.from_bytes(payload[:2], "big"), payload[2:].decode(errors="replace")
                raise CallFailed(f"the server closed the media socket with {code} {reason}, after {self._frames} frames")

    def _message(self, connection: Connection, stream: Stream, text: bytes) -> None:
        try:
            message = _decoder.decode(text)
        except msgspec.DecodeError as error:
            raise CallFailed(f"the server sent what is no message of Media Streams: {error}: {text[:120]!r}") from error
        if isinstance(message, media.Media):
            self._heard(message.media.payload)
        elif isinstance(message, media.Mark) and not self._leaving:
            connection.write(stream.mark(message.mark.name))

    def _heard(self, audio: bytes) -> None:
        """Account for the frames in a piece of audio that are ours."""
        now = time.perf_counter()
        for at in range(0, len(audio) - FRAME_BYTES + 1, FRAME_BYTES):
            (sent_at,) = _STAMP.unpack_from(audio, at)
            if sent_at not in self._away:
                continue
            self._away.remove(sent_at)
            self._meter.count_echo(sent_at, now)
            if not self.answered:
                self.answered = True
                self._patience.deadline = float("inf")
                self._meter.first_echoes.append(now - self._started_at)
                self.settled.set()
