"""Taps on the wires between dialogd, its providers and its carrier: they pass everything on, and date what they know."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec
import trio
from websockets.frames import Opcode

from dialog_worker.agent.completion import Sentences
from scripts.benches.turn_shares import Share, Shares
from scripts.benches.turn_sockets import DatedConnection, accepted, dial
from scripts.benches.turn_websocket import Frames, Upgrade

BYTES_PER_S = 8000  # of mu-law
KEY_BYTES = 160  # at the beginning of a piece of audio, by which it is known again
SURELY_S = 0.3  # of audio still to be played, with which the agent surely speaks
_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_EVENT = re.compile(rb"data: (\{.*\})\n")


class Tap(Protocol):
    """Looks at one connection's bytes. Dates: when dialogd's were received, and just before they are written to dialogd."""

    def asked(self, data: bytes, at: float) -> None:
        """The side that has opened the connection has sent this."""

    def answered(self, data: bytes, at: float) -> None:
        """The other side has."""


class Wire:
    """Connections through a port of the bench's to another. `to_dialogd`: dialogd is at the far end, not the near one."""

    def __init__(self, upstream: str, tap: Callable[[], Tap], *, to_dialogd: bool = False) -> None:
        host, port = upstream.split(":")
        self._upstream = host, int(port)
        self._tap = tap
        self._to_dialogd = to_dialogd

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection, until either side ends it."""
        near, tap = accepted(stream), self._tap()
        try:
            with near, await dial(self._upstream) as far:
                assert isinstance(far, DatedConnection)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, near, far, tap.asked, nursery.cancel_scope)
                    nursery.start_soon(self._pump, far, near, tap.answered, nursery.cancel_scope)
        except* OSError:
            pass  # a call is over

    async def _pump(
        self, source: DatedConnection, sink: DatedConnection, look: Callable[[bytes, float], None], end: trio.CancelScope
    ) -> None:
        from_dialogd = (look.__name__ == "answered") == self._to_dialogd
        while data := await source.receive():
            sent_at = sink.send(data)
            look(data, source.arrived_at if from_dialogd else sent_at)
        end.cancel()


class Calls:
    """What is known of each call: how long the agent's audio will play, and which audio is under way to the carrier."""

    def __init__(self, shares: Shares) -> None:
        self.shares = shares
        self.plays_until: dict[str, float] = {}
        self.under_way: dict[str, set[bytes]] = {}


class _Conversation:
    """A WebSocket's two directions, each after its head."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.call = ""
        self.upgrade: Upgrade | None = None
        self._heads = {"asked": b"", "answered": b""}
        self._frames = {"asked": Frames(), "answered": Frames()}
        self._open = {"asked": False, "answered": False}

    def messages(self, side: str, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield the JSON messages of one side."""
        if not self._open[side]:
            head = self._heads[side] = self._heads[side] + data
            if _HEAD_END not in head:
                return
            head, _, data = head.partition(_HEAD_END)
            self._open[side] = True
            if side == "asked":
                self.upgrade = Upgrade(head)
        for opcode, payload in self._frames[side].receive(data):
            if opcode == Opcode.TEXT:
                yield msgspec.json.decode(payload)


class EarTap(_Conversation):
    """Deepgram's."""

    _heard = False

    def asked(self, data: bytes, _at: float) -> None:
        if self.upgrade is None:
            list(self.messages("asked", data))
            self.call = self.upgrade.query.get("tag", "") if self.upgrade else ""

    def answered(self, data: bytes, at: float) -> None:
        for message in self.messages("answered", data):
            if message["type"] == "SpeechStarted" and self.calls.plays_until.get(self.call, 0) > time.time() + SURELY_S:
                self.calls.shares.begin(Share.CLEAR, self.call, at)
            elif message["type"] == "Results" and message["is_final"]:
                self._heard |= bool(message["channel"]["alternatives"][0]["transcript"])
                if message["speech_final"] and self._heard:
                    self._heard = False
                    self.calls.shares.begin(Share.REQUEST, self.call, at)


class ModelTap:
    """The model's."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._request = b""
        self._events = b""
        self._call = ""
        self._sentences: Sentences | None = None

    def asked(self, data: bytes, at: float) -> None:
        self._request += data
        head, found, body = self._request.partition(_HEAD_END)
        length = _LENGTH.search(head)
        if not found or len(body) < int(length[1] if length else 0):
            return
        self._request = self._events = b""
        if body:
            self._call = msgspec.json.decode(body).get("user", "")
            self._sentences = Sentences()
            self._calls.shares.end(Share.REQUEST, self._call, at)

    def answered(self, data: bytes, at: float) -> None:
        self._events += data
        for event in _EVENT.finditer(self._events):
            for choice in msgspec.json.decode(event[1])["choices"]:
                self._written(choice, at)
        self._events = self._events[self._events.rfind(b"\n") + 1 :]

    def _written(self, choice: dict[str, Any], at: float) -> None:
        if self._sentences is None:
            return
        complete = self._sentences.feed(choice["delta"].get("content") or "")
        if complete or (choice.get("finish_reason") and self._sentences.rest().strip()):
            self._sentences = None
            self._calls.shares.begin(Share.SENTENCE, self._call, at)


class VoiceTap(_Conversation):
    """Cartesia's."""

    def asked(self, data: bytes, at: float) -> None:
        for message in self.messages("asked", data):
            self.call = self.upgrade.headers.get("x-bench-call", "") if self.upgrade else ""
            if message.get("transcript", "").strip():
                self.calls.shares.end(Share.SENTENCE, self.call, at)

    def answered(self, data: bytes, at: float) -> None:
        for message in self.messages("answered", data):
            if message["type"] == "chunk":
                key = msgspec.convert(message["data"], bytes, strict=False)[:KEY_BYTES]
                self.calls.shares.begin(Share.AUDIO, (self.call, key), at)
                self.calls.under_way.setdefault(self.call, set()).add(key)


class LineTap(_Conversation):
    """The carrier's, in front of dialogd; webhooks pass by unread."""

    def asked(self, data: bytes, _at: float) -> None:
        if self.call or data.startswith(b"POST"):
            return
        for message in self.messages("asked", data):
            if message["event"] == "start":
                self.call = message["start"]["callSid"]

    def answered(self, data: bytes, at: float) -> None:
        if self.upgrade is None:
            return
        shares = self.calls.shares
        for message in self.messages("answered", data):
            if message["event"] == "media":
                audio = msgspec.convert(message["media"]["payload"], bytes, strict=False)
                shares.end(Share.AUDIO, (self.call, audio[:KEY_BYTES]), at)
                began = max(self.calls.plays_until.get(self.call, 0), at)
                self.calls.plays_until[self.call] = began + len(audio) / BYTES_PER_S
            elif message["event"] == "clear":
                shares.end(Share.CLEAR, self.call, at)
                self.calls.plays_until[self.call] = at
                for key in self.calls.under_way.pop(self.call, ()):
                    shares.forget(Share.AUDIO, (self.call, key))
