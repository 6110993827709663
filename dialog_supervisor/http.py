"""HTTP on the public listener: every webhook and media handshake, and nothing gets far without being well-formed.

h11 parses; this room adds what h11 leaves open: limits, deadlines, and the refusal of requests that two parsers could read
differently (Content-Length with Transfer-Encoding, folded headers, bare line feeds).
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

import h11
import trio

from dialog_supervisor.sections import GatewayConfig
from dialog_supervisor.websocket import MediaSocket

HEAD_BYTES = 16 << 10  # request line and headers; Twilio's are about 1 KB
_RECEIVE_BYTES = 16 << 10
_LINGER_S = 1.0  # for a refused client to finish sending, so that a reset does not eat our answer
_AMBIGUOUS_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_FOLDED_HEADER = re.compile(rb"\r\n[ \t]")


@dataclass(frozen=True)
class Request:
    """A complete request. Header names are lower case; of a repeated header, `headers` holds the first."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def wants_websocket(self) -> bool:
        """Whether the client asks to speak WebSocket from here on."""
        return self.headers.get("upgrade", "").lower() == "websocket"


@dataclass(frozen=True)
class Response:
    """An answer with a body."""

    status: int
    body: str = ""
    media_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Upgrade:
    """An answer that turns the connection into a media socket, which `serve` owns until it returns."""

    serve: Callable[[MediaSocket], Awaitable[None]]


Handler = Callable[[Request], Awaitable[Response | Upgrade]]


class Refused(Exception):
    """A request that gets this status and reason, after which the connection is closed."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def check_head(head: bytes) -> None:
    """Refuse a header block that two parsers may read differently, so that a proxy and we cannot disagree."""
    if _AMBIGUOUS_LINE_END.search(head):
        raise Refused(400, "a line of the request's head ends in a bare CR or LF")
    if _FOLDED_HEADER.search(head):
        raise Refused(400, "a header is folded over several lines")
    names = {line.partition(b":")[0].strip().lower() for line in head.split(b"\r\n")[1:]}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise Refused(400, "Content-Length and Transfer-Encoding come together")


class Conversation:
    """HTTP/1.1 over one stream: requests in, answers out, within limits and deadlines. `served`: requests so far."""

    def __init__(self, stream: trio.abc.Stream, config: GatewayConfig, served: int = 0) -> None:
        self.silent = False  # between two requests: nothing of the next has come
        self._stream = stream
        self._config = config
        self._unread = b""
        self._h11 = h11.Connection(h11.SERVER)
        self._served = served
        self._for_head = False  # the answer is to a HEAD, and has no body
        self.head = b""  # the request's head as received, for the WebSocket handshake

    @property
    def unread(self) -> bytes:
        """What the client sent beyond the request."""
        return self._unread

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        return self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE

    async def receive(self) -> Request | None:
        """Return the next request, or None if the client left. Raises `Refused`."""
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self._for_head = False
        if not await self._first_byte():
            return None
        with trio.move_on_after(self._config.request_timeout):
            if not await self._receive_head():
                return None
            event = self._next_event()
            if not isinstance(event, h11.Request):
                raise Refused(400, "this is not an HTTP/1.1 request")
            request = _request(event)
            self._for_head = request.method == "HEAD"
            return request if request.wants_websocket else await self._receive_body(request)
        raise Refused(408, f"the request was not complete after {self._config.request_timeout:g} s")

    async def _first_byte(self) -> bool:
        """Wait for a request to begin. A connection that stays silent is closed without a word."""
        self._served += 1
        patience = self._config.request_timeout if self._served == 1 else self._config.idle_timeout
        with trio.move_on_after(patience) as scope:
            while not self._unread.lstrip(b"\r\n"):
                self.silent = True
                self._unread = bytes(await self._stream.receive_some(_RECEIVE_BYTES))
                self.silent = False
                if not self._unread:
                    return False
        if scope.cancelled_caught and self._served == 1:
            raise Refused(408, f"no request within {patience:g} s")
        return not scope.cancelled_caught

    async def _receive_head(self) -> bool:
        received = self._unread.lstrip(b"\r\n")  # RFC 9112, 2.2: ignore an empty line before the request
        while (end := received.find(b"\r\n\r\n")) == -1:
            if len(received) > HEAD_BYTES:
                raise Refused(400, f"the request's head is over {HEAD_BYTES} bytes")
            check_head(received)
            more = await self._stream.receive_some(_RECEIVE_BYTES)
            if not more:
                return False
            received += more
        self.head, self._unread = received[: end + 4], received[end + 4 :]
        if len(self.head) > HEAD_BYTES:
            raise Refused(400, f"the request's head is over {HEAD_BYTES} bytes")
        check_head(self.head)
        self._h11.receive_data(self.head)
        return True

    async def _receive_body(self, request: Request) -> Request:
        limit, body = self._config.request_size_limit, bytearray()
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:19]) > limit:
            raise Refused(413, f"the body is over {limit} bytes (gateway.request_size_limit)")
        if self._h11.they_are_waiting_for_100_continue:
            await self._stream.send_all(self._h11.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        if self._unread:
            self._h11.receive_data(self._unread)
        while not isinstance(event := self._next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                body += event.data
                if len(body) > limit:
                    raise Refused(413, f"the body is over {limit} bytes (gateway.request_size_limit)")
            elif event is h11.NEED_DATA:
                self._h11.receive_data(bytes(await self._stream.receive_some(_RECEIVE_BYTES)))
            else:
                raise Refused(400, "the request ended before its body did")
        self._unread = bytes(self._h11.trailing_data[0])
        return Request(request.method, request.path, request.query, request.headers, bytes(body))

    def _next_event(self) -> object:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            raise Refused(error.error_status_hint, str(error)) from None

    async def send(self, response: Response) -> None:
        """Send an answer; a client that does not take it in time is left."""
        body = response.body.encode()
        headers = [
            ("content-type", response.media_type),
            ("content-length", str(len(body))),
            *response.headers.items(),
        ]
        events: Iterable[h11.Event] = (
            h11.Response(status_code=response.status, headers=headers, reason=HTTPStatus(response.status).phrase),
            h11.Data(data=b"" if self._for_head else body),
            h11.EndOfMessage(),
        )
        data = b"".join(self._h11.send(event) or b"" for event in events)
        with trio.fail_after(self._config.request_timeout):
            await self._stream.send_all(data)

    async def refuse(self, refused: Refused) -> None:
        """Say why, then let the client finish sending, so that closing does not reset the connection under our answer."""
        if self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        await self.send(Response(refused.status, f"{refused.reason}\n", headers={"connection": "close"}))
        if isinstance(self._stream, trio.SocketStream):  # TLS has no half-close
            await self._stream.send_eof()
        with trio.move_on_after(_LINGER_S):
            while await self._stream.receive_some(_RECEIVE_BYTES):
                pass


def _request(event: h11.Request) -> Request:
    headers: dict[str, str] = {}
    for name, value in event.headers:
        headers.setdefault(name.decode("ascii"), value.decode("latin-1"))
    path, _, query = event.target.decode("ascii").partition("?")
    return Request(event.method.decode("ascii"), path, query, headers)
