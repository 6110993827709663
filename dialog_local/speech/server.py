"""One port for everything that an agent needs besides the phone: look-alikes of its providers on local models.

The port opens at once; `/healthz` answers 503 until the models are loaded, and so does every request that needs one.
"""

import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from dialog_local.brain.completions import FIRST_TOKEN_MS, Completions, models
from dialog_local.misbehaviour.asgi import PREFIX, Misbehaviour, MisbehaviourMiddleware
from dialog_local.speech.connection import Connection
from dialog_local.speech.dictation import transcribe_live
from dialog_local.speech.listen import Ear, listen, transcribe_recording
from dialog_local.speech.models import Moonshine, Piper, Remembering
from dialog_local.speech.multistream import multi_stream_input
from dialog_local.speech.speak import MAX_CONTEXTS, Mouth, tts_bytes, tts_websocket

SHUTDOWN_SECONDS = 1.0  # for requests under way
_WARM_UP = "Hello."

Loaded = TypeVar("Loaded")


@dataclass
class Speech:
    """The server's state: the models, once they are loaded."""

    ear: Ear | None = None
    mouth: Mouth | None = None

    @property
    def ready(self) -> bool:
        """Both models are loaded."""
        return self.ear is not None and self.mouth is not None

    async def load(self, max_contexts: int = MAX_CONTEXTS) -> None:
        """Load the models, telling on stderr; each serves as soon as it is there."""
        self.ear = Ear(await _loaded("recogniser", Moonshine))
        mouth = Mouth(await _loaded("voice", _warm_voice), max_contexts)
        self.mouth = mouth

    def app(self, completions: Completions) -> Starlette:
        """The routes."""

        async def live(websocket: WebSocket) -> None:
            await listen(websocket, self.ear)

        async def recorded(request: Request) -> Response:
            return await transcribe_recording(request, self.ear)

        async def spoken(websocket: WebSocket) -> None:
            await tts_websocket(websocket, self.mouth)

        async def spoken_in_contexts(websocket: WebSocket) -> None:
            await multi_stream_input(websocket, self.mouth)

        async def spoken_bytes(request: Request) -> Response:
            return await tts_bytes(request, self.mouth)

        async def healthz(_request: Request) -> Response:
            return JSONResponse({"ready": self.ready}, 200 if self.ready else 503)

        misbehaviour = Misbehaviour()
        return Starlette(
            routes=[
                WebSocketRoute("/v1/listen", live),
                Route("/v1/listen", recorded, methods=["POST"]),
                WebSocketRoute("/v1/realtime", lambda websocket: transcribe_live(websocket, self.ear)),
                WebSocketRoute("/tts/websocket", spoken),
                WebSocketRoute("/v1/text-to-speech/{voice_id}/multi-stream-input", spoken_in_contexts),
                Route("/tts/bytes", spoken_bytes, methods=["POST"]),
                Route("/v1/chat/completions", completions.chat, methods=["POST"]),
                Route("/v1/models", models),
                Route("/healthz", healthz),
                Route(PREFIX, misbehaviour.control, methods=["GET", "POST", "DELETE"]),
            ],
            middleware=[Middleware(MisbehaviourMiddleware, misbehaviour)],
            exception_handlers={ClientDisconnect: _gone},
        )


async def _gone(_request: Request, _left: Exception) -> Response:
    """Answer a client that left in mid-request, as an interrupted agent does: nobody reads this."""
    return Response(status_code=400)


def _warm_voice() -> Remembering:
    """A voice that has spoken: its first sentence takes several times as long as the next."""
    voice = Remembering(Piper())
    voice.say(_WARM_UP)
    return voice


async def _loaded(what: str, load: Callable[[], Loaded]) -> Loaded:
    print(f"loading the {what} … ", end="", file=sys.stderr, flush=True)
    began = time.monotonic()
    loaded = await trio.to_thread.run_sync(load)
    print(f"{time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return loaded


async def serve(
    listener: socket.socket,
    stop: Callable[[], Awaitable[None]] = trio.sleep_forever,
    *,
    max_contexts: int = MAX_CONTEXTS,
    first_token_ms: float = FIRST_TOKEN_MS,
) -> None:
    """Serve on a listening socket, which becomes the server's own, until `stop` returns."""
    host, port = listener.getsockname()[:2]
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
    speech = Speech()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(speech.load, max_contexts)
        await serve_app(speech.app(Completions(first_token_ms / 1000)), listener, stop)
        nursery.cancel_scope.cancel()


async def serve_app(app: Starlette, listener: socket.socket, stop: Callable[[], Awaitable[None]]) -> None:
    """Serve an application on a listening socket, which becomes the server's own, until `stop` returns."""
    config = Config()
    config.loglevel = "ERROR"
    context = WorkerContext(None)
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
            handler = partial(Connection, app, config, context)
            accepting.start_soon(partial(trio.serve_listeners, handler, listeners, handler_nursery=connections))
            await stop()
            accepting.cancel_scope.cancel()
        await context.terminated.set()  # ends connections without a request at once
        connections.cancel_scope.deadline = trio.current_time() + SHUTDOWN_SECONDS
