"""The way in: takes the fault out of a URL, lets connections misbehave as they shall, and answers the control calls."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote_plus

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from dialog_local.misbehaviour.exchange import Exchange
from dialog_local.misbehaviour.faults import Close, Fault, Refuse, Unreadable, parse_fields, parse_spec
from dialog_local.misbehaviour.providers import PROVIDERS, Provider, provider_of

PREFIX = "/misbehave"
MAX_BODY_BYTES = 4096
_ELEVENLABS_PATH = "/v1/text-to-speech/any/multi-stream-input"


@dataclass
class _Order:
    """A fault that a control call ordered, and for how many connections it is still left; None for all."""

    provider: Provider
    fault: Fault
    left: int | None

    def take(self) -> bool:
        """Whether it is there for one more connection."""
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0

    def shown(self) -> dict[str, Any]:
        left = None if self.left is None else max(self.left, 0)
        return {"provider": self.provider.name, **msgspec.to_builtins(self.fault), "left": left}


@dataclass
class Misbehaviour:
    """All that misbehaves on one server: what was ordered, how often URLs have had their way, and what is open."""

    _orders: list[_Order] = field(default_factory=list)
    _limited: dict[tuple[str, Fault], _Order] = field(default_factory=dict)  # URLs with `times`
    _open: list[Exchange] = field(default_factory=list)  # oldest first

    async def control(self, request: Request) -> Response:
        """Serve `/misbehave`."""
        if request.method == "DELETE":
            self._heal()
        elif request.method == "POST":
            try:
                self._order(await _order_of(request))
            except Unreadable as error:
                return _unreadable(error)
        return JSONResponse({"misbehaving": [order.shown() for order in self._orders]})

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a connection or a request with an application, and with its faults."""
        try:
            scope, given = _addressed(scope)
            provider = provider_of(scope)
            for fault in given:
                _check(fault, provider, scope["path"])
        except Unreadable as error:
            await _answer(_unreadable(error), scope, receive, send)
            return
        if provider is None:
            await app(scope, receive, send)
            return
        faults = self._faults_of(provider, given)
        refusals = [fault for fault in faults if isinstance(fault, Refuse)]
        if refusals:
            await _answer(provider.refusal(refusals[0].status), scope, receive, send)
            return
        await self._exchange(app, Exchange(provider, scope, receive, send), faults)

    async def _exchange(self, app: ASGIApp, exchange: Exchange, faults: list[Fault]) -> None:
        for fault in faults:
            exchange.suffer(fault)
        self._open.append(exchange)
        try:
            await exchange.serve(app)
        finally:
            self._open.remove(exchange)

    def _faults_of(self, provider: Provider, given: list[Fault]) -> list[Fault]:
        """The faults of a new connection, each counted as had once more."""
        limited = [self._limited.setdefault((provider.name, f), _Order(provider, f, f.times)) for f in given]
        ordered = [order for order in self._orders if order.provider is provider]
        return [order.fault for order in [*ordered, *limited] if order.take()]

    def _order(self, order: _Order) -> None:
        self._orders.append(order)
        if isinstance(order.fault, Refuse):
            return
        for exchange in self._open:
            if exchange.provider is order.provider and order.take():
                exchange.suffer(order.fault)

    def _heal(self) -> None:
        self._orders.clear()
        self._limited.clear()
        for exchange in self._open:
            exchange.heal()


class MisbehaviourMiddleware:
    """Puts a `Misbehaviour` between the server and its routes."""

    def __init__(self, app: ASGIApp, misbehaviour: Misbehaviour) -> None:
        self._app = app
        self._misbehaviour = misbehaviour

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            await self._misbehaviour.serve(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _addressed(scope: Scope) -> tuple[Scope, list[Fault]]:
    """Take the faults out of a scope's path and query. Raises `Unreadable`."""
    path, faults = scope["path"], []
    while path.startswith(f"{PREFIX}/"):
        spec, slash, rest = path.removeprefix(f"{PREFIX}/").partition("/")
        path = slash + rest
        faults.append(parse_spec(spec))
    if faults and path in ("", "/") and any(name == b"xi-api-key" for name, _ in scope["headers"]):
        path = _ELEVENLABS_PATH
    kept = []
    for pair in scope["query_string"].decode("latin-1").split("&"):
        name, _, value = pair.partition("=")
        if name == "misbehave":
            faults.append(parse_spec(unquote_plus(value)))
        else:
            kept.append(pair)
    addressed = {"path": path, "raw_path": quote(path).encode(), "query_string": "&".join(kept).encode("latin-1")}
    return {**scope, **addressed} if faults else scope, faults


def _check(fault: Fault, provider: Provider | None, path: str) -> None:
    if provider is None:
        where = "WebSockets /v1/listen, /v1/realtime, /tts/websocket, /v1/text-to-speech/VOICE/multi-stream-input"
        raise Unreadable(f"{path or '/'} cannot misbehave; expected {where} or POST /v1/chat/completions")
    if isinstance(fault, Close) and provider.parting is None:
        raise Unreadable(f"{provider.name} has no WebSocket to close; use drop, or refuse")


async def _order_of(request: Request) -> _Order:
    """Read a control call. Raises `Unreadable`."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise Unreadable(f"the body is over {MAX_BODY_BYTES} bytes; expected one fault as a JSON object")
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise Unreadable(f"the body is no JSON object ({error}); expected one such as {_EXAMPLE}") from error
    name = fields.pop("provider", None)
    provider = next((provider for provider in PROVIDERS if provider.name == name), None)
    if provider is None:
        names = ", ".join(provider.name for provider in PROVIDERS)
        raise Unreadable(f"provider {name!r}: expected one of {names}")
    fault = parse_fields(fields)
    _check(fault, provider, PREFIX)
    return _Order(provider, fault, fault.times)


_EXAMPLE = '{"provider": "deepgram", "what": "drop", "after_s": 3}'


def _unreadable(error: Unreadable) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 400)


async def _answer(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer an upgrade or a request, whose body is read first: else closing the connection may take the answer back."""
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(response)
        return
    while (await receive()).get("more_body", False):
        pass
    await response(scope, receive, send)
