"""The media socket: the `websockets` library's sans-IO protocol over a transport that never makes the sender wait.

A plain connection is used directly on readiness, which costs one wake-up and two system calls for a frame in and a frame
out; a TLS connection goes through trio's stream.
"""

import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self, cast

import trio
from msgspec import Struct
from websockets.exceptions import ConnectionClosed, InvalidState
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Protocol, Side, State
from websockets.server import ServerProtocol

OUTBOX_BYTES = 1 << 20  # about a minute and a half of speech as base64 in JSON, which the carrier has not taken
UNFINISHED_BYTES = 128 << 10  # beyond a message's permitted size: heads of its frames, and pings between them
_RECEIVE_BYTES = 64 << 10
_CLOSE_S = 2.0  # for the other side to answer a close
_DATA = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)
_FIN, _CONTROL, _MASKED, _SIZE = 0x80, 0x08, 0x80, 0x7F  # bits of a frame's first two bytes (RFC 6455, 5.2)
_EXTENDED_SIZES = {126: 2, 127: 8}  # bytes of the length that follows them
_MASK_BYTES = 4


class MediaSocketClosed(Exception):
    """The media socket is no more. `code` is as in RFC 6455; 1006 when the connection just ended."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"media socket closed with {code}{f' ({reason})' if reason else ''}")
        self.code = code
        self.reason = reason


class MediaSocketState(Struct, frozen=True, forbid_unknown_fields=True):
    """An open media socket on its way to a process that takes it over.

    `unsent` are bytes that the carrier has not taken; `unfinished` those of a message whose end has not come; `messages`
    those that came and were not read, each with whether it is text.
    """

    fd: int
    unsent: bytes = b""
    unfinished: bytes = b""
    messages: tuple[tuple[bytes, bool], ...] = ()


class Unfinished:
    """What has come of a message whose end has not, as bytes: whoever takes the socket over is fed them again. No I/O."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._frame = 0  # where the last frame in it begins, which is not whole
        self._wanted = 2  # how many bytes there must be to know more

    def feed(self, data: bytes) -> None:
        """Enter what was received, and forget the messages that it completes."""
        self.data += data
        if len(self.data) < self._wanted:
            return
        message, frame = 0, self._frame
        while (end := _frame_end(self.data, frame)) <= len(self.data):
            within_message = self.data[frame] & _CONTROL and frame != message
            whole = self.data[frame] & _FIN and not within_message
            frame = end
            if whole:
                message = frame
        del self.data[:message]
        self._frame, self._wanted = frame - message, end - message


def _frame_end(data: bytearray, at: int) -> int:
    """Return where the frame that begins at `at` ends, or how much there must be to know it (RFC 6455, 5.2)."""
    if len(data) < at + 2:
        return at + 2
    size = data[at + 1] & _SIZE
    extended = _EXTENDED_SIZES.get(size, 0)
    begin = at + 2 + extended + (_MASK_BYTES if data[at + 1] & _MASKED else 0)
    if not extended:
        return begin + size
    if len(data) < begin:
        return begin
    return begin + int.from_bytes(data[at + 2 : at + 2 + extended], "big")


class Transport(ABC):
    """Bytes in by `receive`, bytes out by `write`, which keeps what cannot leave at once for `run` to send."""

    def __init__(self) -> None:
        self.pending = bytearray()
        self._work = trio.Event()
        self._room = trio.Event()
        self._room.set()

    @abstractmethod
    async def receive(self) -> bytes:
        """Return some bytes, or none at the end of the connection, however it ended."""

    def write(self, data: bytes) -> None:
        """Take bytes to be sent, without waiting."""
        self.pending += data
        self._room = trio.Event() if self._room.is_set() else self._room
        self._work.set()

    async def room(self) -> None:
        """Wait until everything written has been sent, or never will be."""
        await self._room.wait()

    async def run(self) -> None:
        """Send what `write` kept, until cancelled."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            try:
                while self.pending:
                    await self._send_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                self.pending.clear()  # the reader will see the end of the connection, and says so
            self._room.set()

    @abstractmethod
    async def end(self) -> None:
        """Send nothing more, and say so to the other side."""

    @abstractmethod
    async def _send_some(self) -> None:
        """Send some of `pending` and remove it there."""


class ReadinessTransport(Transport):
    """A plain, non-blocking socket, used as soon as the kernel says that it is ready."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        self._fd = sock.fileno()

    @property
    def fd(self) -> int:
        """The socket's descriptor."""
        return self._fd

    async def receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                return self._sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                return b""

    def write(self, data: bytes) -> None:
        if not self.pending:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                return  # the reader will see the end of the connection, and says so
        if data:
            super().write(data)

    async def end(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def _send_some(self) -> None:
        await trio.lowlevel.wait_writable(self._fd)
        with suppress(BlockingIOError):
            del self.pending[: self._sock.send(self.pending)]


class StreamTransport(Transport):
    """Any trio stream; TLS in practice."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__()
        self._stream = stream

    async def receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(_RECEIVE_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def end(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.aclose()

    async def _send_some(self) -> None:
        data = bytes(self.pending)
        self.pending.clear()
        await self._stream.send_all(data)


class MediaSocket:
    """A server's end of a WebSocket: whole messages in, text out. Pings are answered by the way."""

    def __init__(self, transport: Transport, protocol: Protocol, max_message_bytes: int) -> None:
        self._transport = transport
        self._protocol = protocol
        self._unfinished_bytes = UNFINISHED_BYTES + max_message_bytes
        self._messages: deque[str | bytes] = deque()
        self._fragments: list[Frame] = []
        self._unfinished = Unfinished()

    @classmethod
    def taken_over(cls, transport: Transport, state: MediaSocketState, *, max_message_bytes: int) -> Self:
        """Return the end of an open WebSocket as another process left it."""
        protocol = Protocol(Side.SERVER, state=State.OPEN, max_size=max_message_bytes)
        media = cls(transport, protocol, max_message_bytes)
        media._messages.extend(data.decode() if text else data for data, text in state.messages)
        if state.unsent:
            transport.write(state.unsent)
        media._feed(state.unfinished)
        return media

    def hand_over(self) -> MediaSocketState | None:
        """Return what another process needs to go on with it: nothing when it is closing, or is not a plain connection's."""
        if not isinstance(self._transport, ReadinessTransport) or self._protocol.state is not State.OPEN:
            return None
        unsent, rest = bytes(self._transport.pending), bytes(self._unfinished.data)
        messages = tuple((one.encode(), True) if isinstance(one, str) else (one, False) for one in self._messages)
        return MediaSocketState(self._transport.fd, unsent, rest, messages)

    @classmethod
    def accepted(cls, transport: Transport, head: bytes, unread: bytes, *, max_message_bytes: int) -> Self:
        """Return the end of a connection whose handshake's request is `head`, answered; `unread` came behind it.

        What `websockets` does not take for a handshake is answered with the reason, and `serve` only sends that.
        """
        protocol = ServerProtocol(max_size=max_message_bytes)
        media = cls(transport, protocol, max_message_bytes)
        protocol.receive_data(head)
        for request in protocol.events_received():  # none if the library refuses what h11 took, such as a POST
            protocol.send_response(protocol.accept(cast(Request, request)))
        if unread and protocol.state is State.OPEN:
            media._feed(unread)
        media._flush()
        return media

    async def serve(self, serve: Callable[["MediaSocket"], Awaitable[None]]) -> None:
        """Let `serve` talk, and close."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._transport.run)
            if self._protocol.state is State.OPEN:
                try:
                    await serve(self)
                finally:
                    with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_S):
                        await self._finish()
            else:
                with trio.move_on_after(_CLOSE_S):
                    await self._transport.room()
            nursery.cancel_scope.cancel()

    def _feed(self, data: bytes) -> None:
        self._protocol.receive_data(data)
        self._unfinished.feed(data)
        if len(self._unfinished.data) > self._unfinished_bytes:
            self._protocol.fail(CloseCode.POLICY_VIOLATION, "a message comes in too many pieces")

    async def receive(self) -> str | bytes:
        """Return the next message: text as str, binary as bytes. Raises `MediaSocketClosed`."""
        while not self._messages:
            for event in self._protocol.events_received():
                self._take(cast(Frame, event))
            self._flush()
            if self._messages:
                break
            if self._protocol.state is not State.OPEN:
                raise self._closed()
            if data := await self._transport.receive():
                self._feed(data)
            else:
                self._protocol.receive_eof()
        return self._messages.popleft()

    def _take(self, frame: Frame) -> None:
        if frame.opcode not in _DATA:
            return
        self._fragments.append(frame)
        if not frame.fin:
            return
        first, *rest = self._fragments
        data = b"".join((first.data, *(part.data for part in rest))) if rest else bytes(first.data)
        self._fragments.clear()
        if first.opcode is Opcode.BINARY:
            self._messages.append(data)
            return
        try:
            self._messages.append(data.decode())
        except UnicodeDecodeError:
            self._protocol.fail(CloseCode.INVALID_DATA, "text is not UTF-8")

    def send(self, text: bytes) -> None:
        """Send UTF-8 text without waiting; on a closed socket, nothing."""
        try:
            self._protocol.send_text(text)
        except (InvalidState, ConnectionClosed):
            return
        self._flush()

    @property
    def has_room(self) -> bool:
        """Whether no more is unsent than a carrier may leave."""
        return len(self._transport.pending) <= OUTBOX_BYTES

    async def room(self) -> None:
        """Wait while there is none: back-pressure for whoever sends a lot."""
        if not self.has_room:
            await self._transport.room()

    def close(self, code: int, reason: str = "") -> None:
        """Begin to close; whoever receives learns of it when the other side has answered, or after two seconds."""
        if self._protocol.state is State.OPEN:
            self._protocol.send_close(code, reason)
            self._flush()

    async def _finish(self) -> None:
        """Close if nobody did, and wait for the other side to agree."""
        self.close(CloseCode.NORMAL_CLOSURE)
        while not self._protocol.eof_sent and (data := await self._transport.receive()):
            self._protocol.receive_data(data)
            self._protocol.events_received()
            self._flush()
        await self._transport.room()
        await self._transport.end()
        while await self._transport.receive():
            pass  # unread bytes would turn our close into a reset, and the other side would not see why

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:  # an empty one says that the connection should be half-closed; closing it all follows at once
                self._transport.write(data)

    def _closed(self) -> MediaSocketClosed:
        close = self._protocol.close_rcvd or self._protocol.close_sent
        return MediaSocketClosed(close.code if close else CloseCode.ABNORMAL_CLOSURE, close.reason if close else "")
