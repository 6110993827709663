"""Hypercorn's connections made robust: what happens on one of them ends neither the server nor another."""

import socket
import struct
import sys
import traceback
from contextlib import suppress

import trio
from hypercorn.config import Config
from hypercorn.events import Event, RawData
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.utils import wrap_app
from starlette.applications import Starlette

from dialog_local.misbehaviour.exchange import CUT

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER, on, for 0 s: a close resets the connection


class Connection(TCPServer):
    """One client's connection.

    Hypercorn 0.18 says goodbye (`send_eof`) while another task may be sending; trio raises `BusyResourceError` in that task
    then, which nobody catches and the whole server ends by. It also waits for the application to take the news of a client
    that left while that very application is sending. Neither happens here.
    """

    def __init__(self, app: Starlette, config: Config, context: WorkerContext, stream: trio.SocketStream) -> None:
        # Hypercorn types an application's messages more narrowly than Starlette does, and a stream as encrypted.
        wrapped = wrap_app(app, config.wsgi_max_body_size, "asgi")  # type: ignore[arg-type]
        super().__init__(wrapped, config, context, {CUT: self._cut}, stream)  # type: ignore[arg-type]
        self._plain = stream

    async def run(self) -> None:
        """Serve until the client has gone. What fails is told on stderr and goes no further."""
        try:
            await super().run()
        except* Exception as errors:  # noqa: BLE001 (this connection's boundary: the others go on)
            traceback.print_exception(errors, file=sys.stderr)

    async def protocol_send(self, event: Event) -> None:
        """Do what the protocol wants: send, or change what the connection is."""
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            with suppress(*_GONE), trio.CancelScope(shield=True):  # half a frame would spoil all that follow
                await self._plain.send_all(event.data)
                return
            await trio.aclose_forcefully(self._plain)  # so that the reading task notices, and tells the application

    async def _close(self) -> None:
        if not self.send_lock.locked():
            async with self.send_lock:
                with suppress(*_GONE):
                    await self._plain.send_eof()
        await self._plain.aclose()

    def _cut(self) -> None:
        """End it as by a fault of the network: reset, without a word."""
        with suppress(OSError):  # it is closed already
            self._plain.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self._plain.socket.close()
