"""An HTTP service on loopback that answers as a test says, and nothing else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio


@asynccontextmanager
async def http_server(*answers: bytes) -> AsyncIterator[str]:
    """Serve these answers, one a connection and the last for ever; an empty one is no answer at all. Give the URL."""
    left = list(answers)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            data = left.pop(0) if len(left) > 1 else left[0]
            if not data:
                await trio.sleep_forever()
            await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
        nursery.cancel_scope.cancel()


def http(status: int, body: bytes = b"") -> bytes:
    """Return an HTTP answer."""
    return f"HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
