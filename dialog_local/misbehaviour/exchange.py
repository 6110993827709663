"""One WebSocket connection or HTTP request, between the provider's code and the server: here the faults happen.

The provider's code is unaware of them: it reads and sends as ever, and is cancelled when its connection is ended for it.
"""

import itertools
import json
import math
from collections.abc import Hashable

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dialog_local.misbehaviour.faults import Close, Drop, Fault, Garbage, Slow, Stall
from dialog_local.misbehaviour.providers import Provider

CUT = "cut"  # of a scope's state: the server's function that resets the connection
PARTING_S = 1.0  # for the client's answer to a close
NO_JSON, WRONG_TYPES = '{"type": "Resu', '{"type": 7, "context_id": [], "data": {}, "choices": 3}'


class Exchange:
    """Serves one connection or request; `suffer` brings a fault upon it at any time, and `heal` takes all away."""

    def __init__(self, provider: Provider, scope: Scope, receive: Receive, send: Send) -> None:
        self.provider = provider
        self._scope = scope
        self._from_client = receive
        self._to_client = send
        self._nursery: trio.Nursery | None = None
        self._serving = trio.CancelScope()
        self._waiting: list[Fault] = []  # until the connection is open
        self._ends: list[trio.CancelScope] = []
        self._opened = False
        self._over = False  # cut or closed by a fault: nothing is sent any more
        self._gone = False  # the client
        self._event_stream = False
        self._in_turn = trio.Lock()
        self._well()

    def _well(self) -> None:
        self._silent_from = self._garbled_from = math.inf
        self._pause_s = 0.0
        self._begun: set[Hashable] = set()  # answers, while they are slow
        self._garbage = itertools.cycle((NO_JSON, WRONG_TYPES))

    def suffer(self, fault: Fault) -> None:
        """Have a fault, its seconds counted from now, or from when the connection opens."""
        if self._opened:
            self._fall_ill(fault)
        else:
            self._waiting.append(fault)

    def heal(self) -> None:
        """End all faults; what they have withheld or ended stays so."""
        self._waiting.clear()
        for end in self._ends:
            end.cancel()
        self._well()

    async def serve(self, app: ASGIApp) -> None:
        """Run the provider's code to its end, or to a fault's."""
        async with trio.open_nursery() as self._nursery:
            if self.provider.kind == "http":
                self._open()
            with self._serving:
                await app(self._scope, self._receive, self._send)
            if self._silent and not self._over:
                await self._until_gone()
            elif self._over or (self._opened and self.provider.kind == "websocket"):
                # Hypercorn stops reading a connection when messages wait that nobody takes, and never ends it then.
                with trio.move_on_after(PARTING_S):
                    await self._until_gone()
            self._nursery.cancel_scope.cancel()

    @property
    def _silent(self) -> bool:
        return trio.current_time() >= self._silent_from

    def _open(self) -> None:
        self._opened = True
        for fault in self._waiting:
            self._fall_ill(fault)

    def _fall_ill(self, fault: Fault) -> None:
        assert self._nursery is not None, "a connection is open only while it is served"
        match fault:
            case Stall(after_s=after_s):
                self._silent_from = min(self._silent_from, trio.current_time() + after_s)
            case Garbage(after_s=after_s):
                self._garbled_from = min(self._garbled_from, trio.current_time() + after_s)
            case Slow(delay_s=delay_s):
                self._pause_s = max(self._pause_s, delay_s)
            case Drop() | Close():
                self._nursery.start_soon(self._end, fault)

    async def _end(self, fault: Drop | Close) -> None:
        with trio.CancelScope() as end:
            self._ends.append(end)
            await trio.sleep(fault.after_s)
            if self._over or self._gone:
                return
            if isinstance(fault, Drop):
                self._over = True
                self._scope["state"][CUT]()
            else:
                await self._close(fault)
            self._serving.cancel()

    async def _close(self, fault: Close) -> None:
        assert self.provider.parting is not None, "faults are checked against their provider when they are asked for"
        async with self._in_turn:
            self._over = True
            parting = self.provider.parting(fault.code, fault.reason)
            if parting.frame is not None:
                await self._to_client({"type": "websocket.send", "text": parting.frame})
            await self._to_client({"type": "websocket.close", "code": fault.code, "reason": parting.reason})

    async def _until_gone(self) -> None:
        while not self._gone:
            await self._receive()

    async def _receive(self) -> Message:
        message = await self._from_client()
        self._gone = self._gone or message["type"].endswith(".disconnect")
        return message

    async def _send(self, message: Message) -> None:
        if self._pause_s and self._begins(message):
            await trio.sleep(self._pause_s)
        async with self._in_turn:
            if self._over or self._silent:
                return
            if message["type"] == "http.response.start":
                self._event_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            for sent in self._garbled(message) if trio.current_time() >= self._garbled_from else [message]:
                await self._to_client(sent)
        if message["type"] == "websocket.accept":
            self._open()

    def _begins(self, message: Message) -> bool:
        """Whether this is the first of an answer."""
        if self.provider.piece is None:
            return bool(message["type"] == "http.response.start")
        piece = self.provider.piece(json.loads(message["text"])) if message.get("text") else None
        if piece is None:
            return False
        first = piece.speaks and piece.answer not in self._begun
        if piece.last:
            self._begun.discard(piece.answer)
        elif piece.speaks:
            self._begun.add(piece.answer)
        return first

    def _garbled(self, message: Message) -> list[Message]:
        match message["type"]:
            case "websocket.send":
                return [{"type": "websocket.send", "text": next(self._garbage)}, message]
            case "http.response.body" if self._event_stream and message.get("body"):
                body = f"data: {next(self._garbage)}\n\n".encode() + message["body"]
                return [{**message, "body": body}]
            case "http.response.body" if message.get("body"):
                return [{**message, "body": b"{" * len(message["body"])}]  # as long as `content-length` says
        return [message]
