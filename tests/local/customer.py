"""A customer of the phone company: the web server behind a number, which says what a test wants it to say."""

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from twilio.request_validator import RequestValidator

from dialog_local.carrier.company import PhoneCompany
from dialog_local.carrier.events import Event
from dialog_local.carrier.phonecall import Call

SID, TOKEN = "AC" + "1" * 32, "secret"
LOUD = bytes([0x80, 0x00]) * 80  # 20 ms of the loudest square wave
Conversation = Callable[[WebSocket, str], Awaitable[None]]


class Customer:
    """Answers webhooks from `documents` (path to TwiML) and remembers them; talks on media sockets as `converse` says."""

    def __init__(self) -> None:
        self.documents: dict[str, str | int] = {}
        self.requests: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self.converse: Conversation = listen
        self.messages: list[dict[str, Any]] = []
        self.handshakes: list[dict[str, str]] = []
        self.url = ""
        self._asked = trio.Event()

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                WebSocketRoute("/media/{token}", self._media),
                Route("/{path:path}", self._answer, methods=["GET", "POST"]),
            ]
        )

    async def _answer(self, request: Request) -> Response:
        params = dict(parse_qsl((await request.body()).decode(), keep_blank_values=True))
        self.requests.append((request.url.path, dict(request.headers), params))
        self._asked.set()
        self._asked = trio.Event()
        document = self.documents.get(request.url.path, 404)
        if isinstance(document, int):
            return Response(status_code=document)
        return Response(f"<Response>{document}</Response>", media_type="text/xml")

    async def _media(self, websocket: WebSocket) -> None:
        self.handshakes.append(dict(websocket.headers))
        await websocket.accept()
        try:
            while True:
                message = json.loads(await websocket.receive_text())
                self.messages.append(message)
                if message["event"] == "start":
                    break
            await self.converse(websocket, message["streamSid"])
            while True:
                self.messages.append(json.loads(await websocket.receive_text()))
        except (WebSocketDisconnect, RuntimeError):
            return  # the phone company, or `converse`, closed it

    def reports(self, path: str) -> list[dict[str, str]]:
        """Return what was told at a path, every report of it signed."""
        told = [(headers, params) for asked, headers, params in self.requests if asked == path]
        validator = RequestValidator(TOKEN)
        assert all(validator.validate(self.url + path, params, headers["x-twilio-signature"]) for headers, params in told)
        return [params for _, params in told]

    async def told(self, path: str, count: int = 1) -> dict[str, str]:
        """Return the last of so many reports at a path, as soon as there are so many."""
        with trio.fail_after(5):
            while len(self.reports(path)) < count:
                await self._asked.wait()
        return self.reports(path)[count - 1]

    def stream(self, inside: str = "", **attributes: str) -> str:
        given = "".join(f' {name}="{value}"' for name, value in attributes.items())
        return f'<Connect{given}><Stream url="{self.url.replace("http", "ws")}/media/t?lost=1">{inside}</Stream></Connect>'

    def received(self, event: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["event"] == event]


async def listen(_websocket: WebSocket, _sid: str) -> None:
    """Say nothing."""


def media(sid: str, audio: bytes) -> str:
    return json.dumps({"event": "media", "streamSid": sid, "media": {"payload": base64.b64encode(audio).decode()}})


def mark(sid: str, name: str) -> str:
    return json.dumps({"event": "mark", "streamSid": sid, "mark": {"name": name}})


@asynccontextmanager
async def open_customer() -> AsyncIterator[Customer]:
    customer = Customer()
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.accesslog = config.errorlog = None
    config.graceful_timeout = 0.1
    async with trio.open_nursery() as nursery:
        [customer.url] = await nursery.start(serve, customer.app(), config)
        yield customer
        nursery.cancel_scope.cancel()


def place(company: PhoneCompany, customer: Customer, **options: Any) -> Call:
    return company.call(customer.url + "/voice", "+15550001111", "+15550002222", **options)


async def run(call: Call, seconds: float = 5) -> None:
    with trio.fail_after(seconds):
        await call.run()


async def until(call: Call, kind: type[Event], count: int = 1) -> Any:
    with trio.fail_after(5):
        async for event in call.log:
            if isinstance(event, kind):
                count -= 1
                if not count:
                    return event
    raise AssertionError(f"the call ended without {kind.__name__}: {call.log.history}")


def events(call: Call, kind: type[Any]) -> list[Any]:
    return [event for event in call.log.history if isinstance(event, kind)]
