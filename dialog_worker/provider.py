"""What the adapters of speech providers share: a WebSocket that is opened at once, reconnects, and tells what failed.

An adapter brings an `Endpoint`, the Structs that its server sends, and a session: what to do with one open connection.
"""

import math
import os
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache
from typing import Generic, TypeAlias, TypeVar
from urllib.parse import urlsplit

import msgspec
import trio
from msgspec import Struct
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream
from wsproto.utilities import LocalProtocolError

from dialog_worker.participant import ProviderError

CONNECT_TIMEOUT_S = 2.0  # DNS, TCP, TLS and upgrade together: ten times the usual, and TCP asks again after 1 s
PARTING_S = 0.3  # for the last words and the closing handshake; the call is over by then
BACKOFF_S = 0.1
BACKOFF_LIMIT_S = 5.0
WAITED_BACKOFF_S = 0.5  # the limit while somebody waits
GIVE_UP_S = 15.0  # of an outage that nobody notices: then something is wrong that will not pass
PATIENCE_S = 3.0  # of somebody who waits: the rest of a turn takes 1.5 s, and a caller should hear an answer within 5 s
WATCH_S = 0.1  # in an outage, between two looks at whether somebody waits
STABLE_S = 5.0  # a connection that lived so long had been accepted, although nothing was said on it
QUEUE_LIMIT = 64  # messages read ahead of the adapter; then TCP holds the server back
MESSAGE_LIMIT_BYTES = 1 << 20
EXCERPT_CHARS = 200  # of a refusal's body
RETRYABLE = frozenset({408, 425, 429})  # of 4xx; another such status would be the same again

MessageT = TypeVar("MessageT", bound=Struct)
Report: TypeAlias = Callable[[ProviderError], Awaitable[None]]
Stream: TypeAlias = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class ConfigurationError(ValueError):
    """An adapter was given something that it cannot work with; the text says what and how to remedy it."""


class ConnectionLost(Exception):
    """The connection is of no more use, though nobody closed it. `code` is a short word for programs; `fatal`: no retry
    will mend it.
    """

    def __init__(self, code: str, message: str, fatal: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.fatal = fatal


class Endpoint(Struct, frozen=True):
    """Where a provider is and how to be let in. `key_variable` names the key in messages to the user."""

    provider: str
    url: str
    headers: Mapping[str, str]
    key_variable: str
    farewell: str = ""  # a text frame to send before a connection is closed by our side

    @property
    def host(self) -> str:
        """The URL's host."""
        return urlsplit(self.url).hostname or ""

    @property
    def secure(self) -> bool:
        """Whether the URL asks for TLS."""
        return urlsplit(self.url).scheme == "wss"

    @property
    def port(self) -> int:
        """The URL's port, or the scheme's."""
        return urlsplit(self.url).port or (443 if self.secure else 80)

    @property
    def resource(self) -> str:
        """The URL's path and query."""
        parts = urlsplit(self.url)
        return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


@cache
def tls_context() -> ssl.SSLContext:
    """The process's one TLS context: making it takes tens of milliseconds, so a template makes it before it forks."""
    return ssl.create_default_context()


def find_key(given: str | None, variable: str, provider: str) -> str:
    """`given`, else the environment's; `ConfigurationError` if there is none."""
    key = (os.environ.get(variable, "") if given is None else given).strip()
    if not key:
        raise ConfigurationError(f"{provider} needs an API key: set {variable} in the agent's environment, or pass api_key=")
    return key


def find_url(given: str | None, variable: str, default: str) -> str:
    """`given`, else the environment's, else `default`; `ConfigurationError` unless it is a WebSocket's."""
    url = given or os.environ.get(variable) or default
    if urlsplit(url).scheme not in ("ws", "wss") or not urlsplit(url).hostname:
        raise ConfigurationError(
            f"{url!r} is no WebSocket URL: give {variable} or url= as wss://host/path or ws://host:port/path"
        )
    return url


class Decoder(Generic[MessageT]):
    """A provider's JSON as Structs tagged by `type`. Providers add types and fields at any time: those are passed over."""

    def __init__(self, *messages: type[MessageT]) -> None:
        self._envelope = msgspec.json.Decoder(_Envelope)
        self._decoders = {message.__struct_config__.tag: msgspec.json.Decoder(message) for message in messages}

    def decode(self, frame: str | bytes) -> MessageT | None:
        """The message, or None if its type is not one of ours. Raises `msgspec.DecodeError` for anything else."""
        decoder = self._decoders.get(self._envelope.decode(frame).type)
        return decoder.decode(frame) if decoder else None


class _Envelope(Struct):
    type: str = ""


class Connection(Generic[MessageT]):
    """One open socket of a provider."""

    def __init__(self, socket: WebSocketConnection, decoder: Decoder[MessageT], provider: str, report: Report) -> None:
        self._socket = socket
        self._decoder = decoder
        self._provider = provider
        self._report = report
        self.garbled = 0  # frames that could not be read
        self._proven = False
        self._opened_at = trio.current_time()

    @property
    def works(self) -> bool:
        """Whether it has proven to be of use, or has lived for so long that it must have been accepted."""
        return self._proven or trio.current_time() - self._opened_at >= STABLE_S

    def prove(self) -> None:
        """Its server does what it is for, so the outage is over. For an adapter to call at the first message that shows it:
        a greeting or an error is none.
        """
        self._proven = True

    async def answers(self, within_s: float) -> bool:
        """Whether the other side answers a WebSocket ping in time, as RFC 6455 demands."""
        with trio.move_on_after(within_s) as waiting:
            await self._socket.ping()
        return not waiting.cancelled_caught

    async def send(self, frame: str | bytes) -> None:
        """Send one text or binary frame; `ConnectionClosed` if the socket is not open any more."""
        await self._socket.send_message(frame)

    async def receive(self) -> MessageT:
        """The next message of a known type; `ConnectionClosed` after the last. May be cancelled without loss."""
        while True:
            frame = await self._socket.get_message()
            try:
                message = self._decoder.decode(frame)
            except msgspec.DecodeError as error:
                await self._pass_over(frame, error)
                continue
            if message is not None:
                return message

    async def _pass_over(self, frame: str | bytes, error: msgspec.DecodeError) -> None:
        self.garbled += 1
        if self.garbled == 1:  # one is news, a thousand are the same news
            text = f"{self._provider} sent a frame that cannot be read ({error}); ignored: {frame[:60]!r}"
            await self._report(ProviderError(text, code="garbage"))


class ProviderSocket(Generic[MessageT]):
    """A provider's WebSocket for as long as a call lasts, over as many connections as it takes.

    `waiting_since` returns the trio time since when somebody waits for this provider, `math.inf` while nobody does. An
    outage is fatal after `give_up_s` without a connection, and as soon as somebody has waited `patience_s` in it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        decoder: Decoder[MessageT],
        report: Report,
        *,
        give_up_s: float = GIVE_UP_S,
        waiting_since: Callable[[], float] = lambda: math.inf,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._endpoint = endpoint
        self._decoder = decoder
        self._report = report
        self._give_up_s = give_up_s
        self._waiting_since = waiting_since
        self._patience_s = patience_s
        self._connection: Connection[MessageT] | None = None
        self._failure: ProviderError | None = None  # the last of an outage
        self._outage_since = math.inf
        self._exhausted = False

    async def serve(self, session: Callable[[Connection[MessageT]], Awaitable[None]]) -> ProviderError:
        """Run `session` with one connection after another, until cancelled; returns the error that no retry will mend.

        A session ends by an exception of its connection's, which is reported once until a connection proves to work, or
        by returning: then the next follows without a word. It is cancelled when the outage becomes fatal.
        """
        attempt = 0
        while not self._is_over():
            worked = False
            async with trio.open_nursery() as nursery:
                if self._failure is not None:
                    nursery.start_soon(self._watch, nursery.cancel_scope)
                if attempt:
                    await self._back_off(attempt - 1)
                worked = await self._attempt(session)
                nursery.cancel_scope.cancel()
            attempt = 1 if worked else attempt + 1
        return await self._give_up()

    async def _watch(self, attempt: trio.CancelScope) -> None:
        """End an attempt with which the outage lasts too long, or the outage when the attempt works."""
        while self._connection is None or not self._connection.works:
            if trio.current_time() >= self._deadline():
                self._exhausted = True
                attempt.cancel()
                return
            await trio.sleep(WATCH_S)
        self._failure = None

    def _deadline(self) -> float:
        """When the outage becomes fatal."""
        patience = max(self._outage_since, self._waiting_since()) + self._patience_s
        return patience if self._connection else min(patience, self._outage_since + self._give_up_s)

    def _is_over(self) -> bool:
        if self._failure is None:
            return False
        return self._exhausted or self._failure.fatal or trio.current_time() >= self._deadline()

    async def _back_off(self, attempt: int) -> None:
        began, pause_s = trio.current_time(), backoff_s(attempt)
        while True:
            limit_s = pause_s if self._waiting_since() == math.inf else min(pause_s, WAITED_BACKOFF_S)
            left_s = began + limit_s - trio.current_time()
            if left_s <= 0:
                return
            await trio.sleep(min(left_s, WATCH_S))

    async def _attempt(self, session: Callable[[Connection[MessageT]], Awaitable[None]]) -> bool:
        """One connection from beginning to end; returns whether it worked."""
        failures: list[BaseException] = []
        began = trio.current_time()
        try:
            async with open_socket(self._endpoint) as socket:
                self._connection = Connection(socket, self._decoder, self._endpoint.provider, self._report)
                await session(self._connection)
        except* (ConnectionLost, ConnectionRejected, ConnectionClosed, LocalProtocolError) as group:
            failures = _leaves(group)
        finally:
            connection, self._connection = self._connection, None
        if worked := connection is not None and connection.works:
            self._failure = None
        if failures:
            declared = [failure for failure in failures if isinstance(failure, ConnectionLost)]
            failure = describe(self._endpoint, (declared or failures)[0])
            await self._fail(failure, since=trio.current_time() if connection else began)
        return worked

    async def _fail(self, failure: ProviderError, since: float) -> None:
        """Take note of what went wrong; the first time in an outage it is told, unless it is the end as well."""
        fresh = self._failure is None
        self._failure = failure
        if fresh:
            self._outage_since = since
            if not self._is_over():
                await self._report(failure)

    async def _give_up(self) -> ProviderError:
        assert self._failure is not None
        after_s = trio.current_time() - self._outage_since
        text = self._failure.message if self._failure.fatal else f"{self._failure.message}; gave up after {after_s:.0f} s"
        fatal = ProviderError(text, code=self._failure.code, fatal=True)
        await self._report(fatal)
        return fatal


@asynccontextmanager
async def open_socket(endpoint: Endpoint) -> AsyncIterator[WebSocketConnection]:
    """An open WebSocket; raises `ConnectionLost` or `ConnectionRejected`, perhaps in a group, if it cannot be had.

    Built from trio-websocket's parts instead of its `open_websocket_url`, which lets a failed TLS handshake pass for a
    server that does not answer, and which waits for the other side's close when the other side has died.
    """
    deadline = trio.current_time() + CONNECT_TIMEOUT_S
    async with trio.open_nursery() as nursery:
        async with _open_stream(endpoint, deadline) as stream:
            socket = await _upgrade(nursery, endpoint, stream, deadline)
            try:
                yield socket
            finally:
                await _part(socket, endpoint.farewell)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _open_stream(endpoint: Endpoint, deadline: float) -> AsyncIterator[Stream]:
    stream: Stream
    try:
        with trio.fail_at(deadline):
            stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
            if endpoint.secure:
                stream = trio.SSLStream(stream, tls_context(), server_hostname=endpoint.host, https_compatible=True)
                await _shake_hands(stream)
    except trio.TooSlowError:
        raise ConnectionLost("connect", f"no connection within {CONNECT_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise ConnectionLost("connect", f"cannot connect to {endpoint.host}:{endpoint.port}: {error}") from error
    try:
        yield stream
    finally:
        await trio.aclose_forcefully(stream)


async def _shake_hands(stream: trio.SSLStream[trio.SocketStream]) -> None:
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        await trio.aclose_forcefully(stream)
        raise ConnectionLost("tls", f"the TLS handshake failed: {error.__cause__ or error}") from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def _upgrade(nursery: trio.Nursery, endpoint: Endpoint, stream: Stream, deadline: float) -> WebSocketConnection:
    try:
        with trio.fail_at(deadline):
            return await wrap_client_stream(
                nursery,
                stream,
                urlsplit(endpoint.url).netloc.rpartition("@")[2],
                endpoint.resource,
                extra_headers=[(name.encode(), value.encode()) for name, value in endpoint.headers.items()],
                message_queue_size=QUEUE_LIMIT,
                max_message_size=MESSAGE_LIMIT_BYTES,
            )
    except trio.TooSlowError:
        raise ConnectionLost("connect", f"no answer to the upgrade within {CONNECT_TIMEOUT_S:.0f} s") from None


async def _part(socket: WebSocketConnection, farewell: str) -> None:
    """Say goodbye, but wait for nobody: shielded, because a cancelled call still owes the provider its last words."""
    with trio.move_on_after(PARTING_S, shield=True):
        try:
            if farewell:
                await socket.send_message(farewell)
            await socket.aclose()
        except (ConnectionClosed, LocalProtocolError):
            pass  # gone already, which is what was wanted


def backoff_s(attempt: int) -> float:
    """How long to wait before the next attempt: doubling, and scattered so that calls do not come back all at once."""
    return float(min(BACKOFF_LIMIT_S, BACKOFF_S * 2 ** min(attempt, 16)) * random.uniform(0.5, 1.0))


def describe(endpoint: Endpoint, failure: BaseException) -> ProviderError:
    """A failed or lost connection in a user's words; fatal if trying again would be in vain."""
    if isinstance(failure, ConnectionRejected):
        return _describe_rejection(endpoint, failure)
    if isinstance(failure, ConnectionLost):
        return ProviderError(f"{endpoint.provider}: {failure}", code=failure.code, fatal=failure.fatal)
    reason = failure.reason if isinstance(failure, ConnectionClosed) else None
    code = reason.code if reason else 1006
    return ProviderError(
        f"{endpoint.provider} closed the connection: {code} {(reason and reason.reason) or ''}".rstrip(), str(code)
    )


def _describe_rejection(endpoint: Endpoint, rejection: ConnectionRejected) -> ProviderError:
    status = rejection.status_code
    # Deepgram docs, WebSocket errors: a refused upgrade says why in the header dg-error; others say it in the body.
    said = [value for name, value in rejection.headers if name.lower().endswith(b"-error")] or [rejection.body or b""]
    reason = said[0].decode(errors="replace").strip()[:EXCERPT_CHARS]
    text = f"{endpoint.provider} refused the connection: HTTP {status} {reason}".rstrip()
    if status in (401, 403):
        return ProviderError(f"{text}; check the key in {endpoint.key_variable}", code=str(status), fatal=True)
    return ProviderError(text, code=str(status), fatal=400 <= status < 500 and status not in RETRYABLE)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
