"""What carries a media socket's bytes: a transport never makes the sender wait.

A plain connection is used directly on readiness, which costs two system calls for a frame in and a frame out; a TLS
connection goes through trio's stream.
"""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

import trio

from protocol.readiness import TURN_BYTES, read_each

_RECEIVE_BYTES = 16 << 10  # at once: as a rule there is one message of 350


class Transport(ABC):
    """Bytes in by `receive`, bytes out by `write`, which keeps what cannot leave at once for `run` to send."""

    __slots__ = ("_room", "_work", "pending")

    def __init__(self) -> None:
        self.pending = bytearray()
        self._work = trio.Event()
        self._room = trio.Event()
        self._room.set()

    @abstractmethod
    async def receive(self) -> bytes:
        """Return some bytes, or none at the end of the connection, however it ended."""

    async def each(self, take: Callable[[bytes], bool]) -> None:
        """Pass bytes to `take`, which must not wait, as they come, none for the end, until it returns True, or raises."""
        while not take(await self.receive()):
            pass

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

    __slots__ = ("_fd", "_sock")

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

    async def each(self, take: Callable[[bytes], bool]) -> None:
        await read_each(self._sock, take)

    def write(self, data: bytes) -> None:
        if not self.pending:
            try:
                sent = self._sock.send(data)
                if sent == len(data):
                    return
                data = data[sent:]
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

    __slots__ = ("_stream",)

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__()
        self._stream = stream

    async def receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(TURN_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def end(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.aclose()

    async def _send_some(self) -> None:
        data = bytes(self.pending)
        self.pending.clear()
        await self._stream.send_all(data)
