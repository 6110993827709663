"""The media socket: the `websockets` library's sans-IO protocol over a transport that never makes the sender wait.

What nearly every frame is, a whole message of text, goes past the library, whose care costs more than all the rest of a
frame's way; the library is given everything else, and never sees a part of a message that the quick way has seen another of.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Self, cast

import trio
from msgspec import Struct
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Protocol, Side, State
from websockets.server import ServerProtocol

from dialog_supervisor.frames import Unfinished, text_frame, whole_text
from dialog_supervisor.transports import ReadinessTransport, Transport

OUTBOX_BYTES = 1 << 20  # about a minute and a half of speech as base64 in JSON, which the carrier has not taken
UNFINISHED_BYTES = 128 << 10  # beyond a message's permitted size: heads of its frames, and pings between them
_CLOSE_S = 2.0  # for the other side to answer a close
_DATA = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)


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


class MediaSocket:
    """A server's end of a WebSocket: whole messages in, text out. Pings are answered by the way."""

    __slots__ = ("_fragments", "_max_message_bytes", "_messages", "_open", "_protocol", "_transport", "_unfinished")

    def __init__(self, transport: Transport, protocol: Protocol, max_message_bytes: int) -> None:
        self._transport = transport
        self._protocol = protocol
        self._max_message_bytes = max_message_bytes
        self._open = protocol.state is State.OPEN  # kept, as it is asked for every frame
        self._messages: deque[tuple[bytes, bool]] = deque()  # each with whether it is text
        self._fragments: list[Frame] = []
        self._unfinished = Unfinished()

    @classmethod
    def taken_over(cls, transport: Transport, state: MediaSocketState, *, max_message_bytes: int) -> Self:
        """Return the end of an open WebSocket as another process left it."""
        protocol = Protocol(Side.SERVER, state=State.OPEN, max_size=max_message_bytes)
        media = cls(transport, protocol, max_message_bytes)
        media._messages.extend(state.messages)
        if state.unsent:
            transport.write(state.unsent)
        media._take_in(state.unfinished)
        return media

    def hand_over(self) -> MediaSocketState | None:
        """Return what another process needs to go on with it: nothing when it is closing, or is not a plain connection's."""
        if not isinstance(self._transport, ReadinessTransport) or self._protocol.state is not State.OPEN:
            return None
        unsent, rest = bytes(self._transport.pending), bytes(self._unfinished.data)
        return MediaSocketState(self._transport.fd, unsent, rest, tuple(self._messages))

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
            media._take_in(unread)
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

    async def each(self, take: Callable[[bytes, bool], bool]) -> None:
        """Pass messages to `take`, which must not wait, as they come, each with whether it is text, until it returns True.

        Text is UTF-8. What comes after `take` returned True is kept. Raises `MediaSocketClosed`, and what `take` raises.
        """
        if not self._passed_on(take):
            await self._transport.each(partial(self._received, take))

    def _received(self, take: Callable[[bytes, bool], bool], data: bytes) -> bool:
        at, size = 0, len(data)
        if not self._unfinished.data:
            while at < size and self._open:
                if (found := whole_text(data, at, self._max_message_bytes)) is None:
                    break
                text, at = found
                if take(text, True):
                    self._take_in(data[at:])
                    return True
        if at == size > 0 and self._open:
            return False  # as nearly always
        if not data:
            self._protocol.receive_eof()
            self._flush()
        self._take_in(data[at:])
        return self._passed_on(take)

    def _passed_on(self, take: Callable[[bytes, bool], bool]) -> bool:
        """Pass on what is whole; return whether `take` has enough. Raises `MediaSocketClosed` when nothing can follow."""
        while self._messages:
            if take(*self._messages.popleft()):
                return True
        if not self._open:
            raise self._closed()
        return False

    def _take_in(self, data: bytes) -> None:
        """Have the library read what is not the usual."""
        if not data:  # which would tell the library that nothing follows
            return
        self._protocol.receive_data(data)
        self._unfinished.feed(data)
        if len(self._unfinished.data) > UNFINISHED_BYTES + self._max_message_bytes:
            self._protocol.fail(CloseCode.POLICY_VIOLATION, "a message comes in too many pieces")
        for event in self._protocol.events_received():
            self._take(cast(Frame, event))
        self._flush()

    def _take(self, frame: Frame) -> None:
        if frame.opcode not in _DATA:
            return
        self._fragments.append(frame)
        if not frame.fin:
            return
        first, *rest = self._fragments
        data = b"".join((first.data, *(part.data for part in rest))) if rest else bytes(first.data)
        self._fragments.clear()
        if first.opcode is not Opcode.BINARY:
            try:
                data.decode()
            except UnicodeDecodeError:
                self._protocol.fail(CloseCode.INVALID_DATA, "text is not UTF-8")
                return
        self._messages.append((data, first.opcode is not Opcode.BINARY))

    def send(self, text: bytes) -> None:
        """Send UTF-8 text without waiting; on a closed socket, nothing."""
        if self._open:
            self._transport.write(text_frame(text))

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
        self._open = self._protocol.state is State.OPEN

    def _closed(self) -> MediaSocketClosed:
        close = self._protocol.close_rcvd or self._protocol.close_sent
        return MediaSocketClosed(close.code if close else CloseCode.ABNORMAL_CLOSURE, close.reason if close else "")
