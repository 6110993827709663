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

CONNECT_TIMEOUT_S = 5.0  # DNS, TCP, TLS and upgrade together
PARTING_S = 0.3  # for the last words and the closing handshake; the call is over by then
BACKOFF_S = 0.1
BACKOFF_LIMIT_S = 5.0
GIVE_UP_S = 15.0  # a caller does not wait longer than this
STABLE_S = 5.0  # a connection that lived so long had been accepted, although nothing was said on it
QUEUE_LIMIT = 64  # messages read ahead of the adapter; then TCP holds the server back
MESSAGE_LIMIT_BYTES = 1 << 20
EXCERPT_CHARS = 200  # of a refusal's body
RETRYABLE = frozenset({408, 425, 429})  # of 4xx; another such status would be the same again

MessageT = TypeVar("MessageT", bound=Struct)
Report: TypeAlias = Callable[[ProviderError], Awaitable[None]]


class ConfigurationError(ValueError):
    """An adapter was given something that it cannot work with; the text says what and how to remedy it."""


class ConnectionLost(Exception):
    """The connection is of no more use, though nobody closed it. `code` is a short word for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


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
        self._garbled = 0
        self.received = 0

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
            self.received += 1
            if message is not None:
                return message

    async def _pass_over(self, frame: str | bytes, error: msgspec.DecodeError) -> None:
        self._garbled += 1
        if self._garbled == 1:  # one is news, a thousand are the same news
            text = f"{self._provider} sent a frame that cannot be read ({error}); ignored: {frame[:60]!r}"
            await self._report(ProviderError(text, code="garbage"))


class ProviderSocket(Generic[MessageT]):
    """A provider's WebSocket for as long as a call lasts, over as many connections as it takes."""

    def __init__(
        self, endpoint: Endpoint, decoder: Decoder[MessageT], report: Report, *, give_up_s: float = GIVE_UP_S
    ) -> None:
        self._endpoint = endpoint
        self._decoder = decoder
        self._report = report
        self._give_up_s = give_up_s

    async def serve(self, session: Callable[[Connection[MessageT]], Awaitable[None]]) -> ProviderError:
        """Run `session` with one connection after another, until cancelled; returns the error that no retry will mend.

        A session ends by an exception of its connection's, which is reported once until a connection works again, or by
        returning: then the next follows without a word. An outage is mended silently, or is fatal after `give_up_s`.
        """
        began, attempt = math.inf, 0
        while True:
            failure, proven = await self._attempt(session)
            if proven:
                began, attempt = math.inf, 0
            if failure is not None:
                now = trio.current_time()
                fresh, began = math.isinf(began), min(began, now)
                if failure.fatal or now - began >= self._give_up_s:
                    return await self._give_up(failure, now - began)
                if fresh:
                    await self._report(failure)
            await trio.sleep(min(backoff_s(attempt), max(0.0, began + self._give_up_s - trio.current_time())))
            attempt += 1

    async def _give_up(self, failure: ProviderError, after_s: float) -> ProviderError:
        text = failure.message if failure.fatal else f"{failure.message}; gave up after {after_s:.0f} s"
        fatal = ProviderError(text, code=failure.code, fatal=True)
        await self._report(fatal)
        return fatal

    async def _attempt(
        self, session: Callable[[Connection[MessageT]], Awaitable[None]]
    ) -> tuple[ProviderError | None, bool]:
        """One connection from beginning to end: what went wrong, if anything, and whether it had worked."""
        failures: list[BaseException] = []
        connection: Connection[MessageT] | None = None
        opened = trio.current_time()
        try:
            async with open_socket(self._endpoint) as socket:
                connection = Connection(socket, self._decoder, self._endpoint.provider, self._report)
                opened = trio.current_time()
                await session(connection)
        except* (ConnectionLost, ConnectionRejected, ConnectionClosed, LocalProtocolError) as group:
            failures = _leaves(group)
        if connection is None:
            return describe(self._endpoint, failures[0]), False
        declared = [failure for failure in failures if isinstance(failure, ConnectionLost)]
        stable = not declared and trio.current_time() - opened >= STABLE_S
        failure = describe(self._endpoint, (declared or failures)[0]) if failures else None
        return failure, connection.received > 0 or stable


@asynccontextmanager
async def open_socket(endpoint: Endpoint) -> AsyncIterator[WebSocketConnection]:
    """An open WebSocket; raises `ConnectionLost` or `ConnectionRejected`, perhaps in a group, if it cannot be had.

    Built from trio-websocket's parts instead of its `open_websocket_url`, which lets a failed TLS handshake pass for a
    server that does not answer, and which waits for the other side's close when the other side has died.
    """
    async with trio.open_nursery() as nursery:
        async with _open_stream(endpoint) as stream:
            socket = await _upgrade(nursery, endpoint, stream)
            try:
                yield socket
            finally:
                await _part(socket, endpoint.farewell)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _open_stream(
    endpoint: Endpoint,
) -> AsyncIterator[trio.SocketStream | trio.SSLStream[trio.SocketStream]]:
    stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
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


async def _upgrade(
    nursery: trio.Nursery, endpoint: Endpoint, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]
) -> WebSocketConnection:
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
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
        return ProviderError(f"{endpoint.provider}: {failure}", code=failure.code)
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
