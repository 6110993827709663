"""A chat-completions server for tests: it answers each request with the next script, and remembers what it was asked."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h11
import trio

Script = list[dict[str, Any] | float | bytes]  # deltas, seconds to wait between them, and what is no delta


def text(*pieces: str | float, finish: str = "stop") -> Script:
    """Return a script that writes these pieces; a number waits."""
    deltas: Script = [piece if isinstance(piece, float) else {"content": piece} for piece in pieces]
    return [*deltas, {"finish_reason": finish}]


def tool_call(name: str, *arguments: str, said: str = "") -> Script:
    """Return a script that calls a tool, its arguments split as OpenAI splits them."""
    first = {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": name, "arguments": ""}}]}
    rest = [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in arguments]
    return [*([{"content": said}] if said else []), first, *rest, {"finish_reason": "tool_calls"}]


class ModelServer:
    """Serves `/v1/chat/completions` and `/v1/models` on a port of its own."""

    def __init__(self) -> None:
        self.scripts: list[Script | int] = []  # an int is an HTTP status
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self.listed = 0  # times that its models were asked for
        self.url = ""

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        connection = h11.Connection(h11.SERVER)
        try:
            while connection.our_state is h11.IDLE:
                if not await self._exchange(connection, stream):
                    return
                connection.start_next_cycle()
        except trio.BrokenResourceError:
            return  # an interrupted agent closes the connection in mid-answer

    async def _exchange(self, connection: h11.Connection, stream: trio.SocketStream) -> bool:
        request, body = None, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some())
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        assert request is not None
        send = stream.send_all
        if request.target.endswith(b"/models"):
            self.listed += 1
            await send(_response(connection, 200, b'{"object":"list","data":[]}'))
            return True
        self.requests.append(json.loads(body))
        script = self.scripts.pop(0)
        if isinstance(script, int):
            await send(_response(connection, script, b'{"error":{"message":"out of order","code":"down"}}'))
            return True
        head = h11.Response(status_code=200, headers=[("content-type", "text/event-stream")])
        await send(connection.send(head) or b"")
        for step in script:
            if isinstance(step, float):
                await trio.sleep(step)
            elif isinstance(step, bytes):
                await send(connection.send(h11.Data(data=b"data: " + step + b"\n\n")) or b"")
            else:
                await send(connection.send(h11.Data(data=_chunk(step))) or b"")
        await send(connection.send(h11.Data(data=b"data: [DONE]\n\n")) or b"")
        await send(connection.send(h11.EndOfMessage()) or b"")
        return True


def _response(connection: h11.Connection, status: int, body: bytes) -> bytes:
    headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
    events = (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
    return b"".join(connection.send(event) or b"" for event in events)


def _chunk(step: dict[str, Any]) -> bytes:
    delta = {key: value for key, value in step.items() if key != "finish_reason"}
    choice = {"index": 0, "delta": delta, "finish_reason": step.get("finish_reason")}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


@asynccontextmanager
async def model_server() -> AsyncIterator[ModelServer]:
    """Serve for the length of the block."""
    server = ModelServer()
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/v1"
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        yield server
        nursery.cancel_scope.cancel()
