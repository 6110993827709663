"""Sockets whose reads are dated by the kernel: the bench may come late to read, and its lateness is no part of a figure.

Dates are CLOCK_REALTIME, because the kernel's are: SO_TIMESTAMPNS, socket(7), which TCP gives for the last bytes of a read.
"""

import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable

import trio

from dialog_local.load.wire import Connection

_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python has no name for it
_TIMESPEC = struct.Struct("qq")
_RECEIVE_BYTES = 64 << 10
LATENESS: list[float] = []  # from each arrival until it was read


class DatedConnection(Connection):
    """A connection that keeps the date of what it received last in `arrived_at`."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.arrived_at = 0.0

    async def receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self.sock)
            try:
                data, ancillary, _, _ = self.sock.recvmsg(_RECEIVE_BYTES, socket.CMSG_SPACE(_TIMESPEC.size))
            except BlockingIOError:
                continue
            now = self.arrived_at = time.time()
            for level, kind, value in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
                    seconds, nanoseconds = _TIMESPEC.unpack(value)
                    self.arrived_at = seconds + nanoseconds / 1e9
                    LATENESS.append(now - self.arrived_at)
            return data

    def send(self, data: bytes) -> float:
        """Write, and return the date just before."""
        now = time.time()
        self.write(data)
        return now


class SecureConnection(DatedConnection):
    """The server's end of a TLS connection; what is received is dated before it is decrypted."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    async def shake_hands(self) -> None:
        """Do the handshake. Raises `OSError`."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                super().send(self._outgoing.read())
                await self._feed()
            else:
                super().send(self._outgoing.read())
                return

    async def receive(self) -> bytes:
        while True:
            try:
                return self._tls.read(_RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                await self._feed()
            except ssl.SSLZeroReturnError:
                return b""

    def send(self, data: bytes) -> float:
        self._tls.write(data)
        return super().send(self._outgoing.read())

    async def _feed(self) -> None:
        data = await super().receive()
        if not data:
            raise ConnectionError("the connection ended without TLS's close_notify")
        self._incoming.write(data)


async def dial(address: tuple[str, int]) -> DatedConnection:
    """Open a connection. Raises `OSError`."""
    stream = await trio.open_tcp_stream(*address)
    return DatedConnection(_detached(stream))


def accepted(stream: trio.SocketStream, context: ssl.SSLContext | None = None) -> DatedConnection:
    """Take over a connection that trio has accepted."""
    return SecureConnection(_detached(stream), context) if context else DatedConnection(_detached(stream))


def _detached(stream: trio.SocketStream) -> socket.socket:
    sock = socket.socket(fileno=stream.socket.detach())
    sock.setblocking(False)
    return sock


async def serve(
    handler: Callable[[trio.SocketStream], Awaitable[None]],
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on a port of this machine, and tell its address."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    host, port = listener.socket.getsockname()[:2]
    task_status.started(f"{host}:{port}")
    await trio.serve_listeners(handler, [listener])
