"""The way of the calls' adapters to the local providers, on which each connection is given the fault that it shall have."""

import socket
import struct
from collections import Counter
from collections.abc import Mapping

import trio

CHUNK_BYTES = 65536
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 s: closing resets the connection (socket(7))


class Detour:
    """Takes connections to `/NUMBER/PATH`, and leads them to `/misbehave/FAULT/PATH` of the server, or to `/PATH`.

    `faults`: by number, the faults of its connections, one after another; the last is that of all that follow.
    """

    def __init__(self, server: str, faults: Mapping[str, tuple[str, ...]]) -> None:
        self._host, _, self._port = server.partition(":")
        self._faults = faults
        self._taken = Counter[str]()

    async def run(self, task_status: trio.TaskStatus[str]) -> None:
        """Serve until cancelled; gives host and port."""
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        host, port = listener.socket.getsockname()
        task_status.started(f"{host}:{port}")
        await trio.serve_listeners(self._lead, [listener])

    async def _lead(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream(self._host, int(self._port))
        async with client, server, trio.open_nursery() as nursery:
            begin = bytes(await client.receive_some(CHUNK_BYTES))
            if not begin:  # it has changed its mind
                return
            method, _, rest = begin.partition(b" ")
            await server.send_all(method + b" " + self._path(rest.decode()).encode())
            for one, other in ((client, server), (server, client)):
                nursery.start_soon(self._pass_on, one, other, nursery.cancel_scope)

    def _path(self, rest: str) -> str:
        _, number, path = rest.split("/", 2)
        faults = self._faults[number]
        fault = faults[min(self._taken[number], len(faults) - 1)]
        self._taken[number] += 1
        return f"/misbehave/{fault}/{path}" if fault else f"/{path}"

    @staticmethod
    async def _pass_on(source: trio.SocketStream, sink: trio.SocketStream, both: trio.CancelScope) -> None:
        """Pass bytes on; the end of either side ends both, and a reset stays one."""
        try:
            async for data in source:
                await sink.send_all(data)
        except trio.BrokenResourceError:
            sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        both.cancel()
