"""One media stream as Twilio's end of it: the messages, and the socket they travel on.

Twilio docs, Media Streams, WebSocket messages: text frames with JSON; sequenceNumber, chunk and timestamp are strings,
sampleRate and channels are numbers. Warnings: 31950 for binary frames, 31951 for messages with missing or extra fields, of
an unknown kind or for another stream.
"""

import base64
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec
import trio
from msgspec import Struct
from trio_websocket import (
    CloseReason,
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
    wrap_client_stream,
)

from dialog_local.carrier.webhooks import Route, signature

HANDSHAKE_SECONDS = 10.0  # not documented by Twilio; as long as its webhooks may take to connect
CLOSE_SECONDS = 1.0  # for the closing handshake
OUTBOX_MESSAGES = 250  # five seconds of frames; a server that does not read for longer loses the caller's audio


def start_details(account_sid: str, stream_sid: str, call_sid: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return what Twilio's `start` message says of a stream (Twilio docs, Media Streams: WebSocket messages)."""
    return {
        "accountSid": account_sid,
        "streamSid": stream_sid,
        "callSid": call_sid,
        "tracks": ["inbound"],
        "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
        "customParameters": parameters,
    }


class _Payload(Struct, frozen=True, forbid_unknown_fields=True):
    payload: bytes  # msgspec decodes base64


class _Name(Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class Media(Struct, frozen=True, forbid_unknown_fields=True, tag_field="event", tag="media", rename="camel"):
    """Audio to be played: mu-law, 8 kHz, without header."""

    stream_sid: str
    media: _Payload


class Mark(Struct, frozen=True, forbid_unknown_fields=True, tag_field="event", tag="mark", rename="camel"):
    """A name to be returned when the audio before it has been played."""

    stream_sid: str
    mark: _Name


class Clear(Struct, frozen=True, forbid_unknown_fields=True, tag_field="event", tag="clear", rename="camel"):
    """Forget the audio that is buffered."""

    stream_sid: str


Request: TypeAlias = Media | Mark | Clear
_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Media | Mark | Clear)


class Malformed(Exception):
    """A frame that Twilio ignores with a warning of this number."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class HandshakeFailed(Exception):
    """The media socket could not be opened: 31920 for an answer that is not 101, 31901 for none, 31902 if refused."""

    def __init__(self, code: int, message: str, http_status: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.http_status = http_status


class Wire:
    """What Twilio writes on one stream, in its numbering, and how it reads the other side. Without I/O."""

    def __init__(self, account_sid: str, call_sid: str, stream_sid: str, parameters: dict[str, str]) -> None:
        self.stream_sid = stream_sid
        self._account_sid = account_sid
        self._call_sid = call_sid
        self._parameters = parameters
        self._sequence = 0
        self._chunk = 0

    def connected(self) -> str:
        """The first message, before any stream is named."""
        return json.dumps({"event": "connected", "protocol": "Call", "version": "1.0.0"})

    def start(self) -> str:
        """The second message: what this stream is."""
        start = start_details(self._account_sid, self.stream_sid, self._call_sid, self._parameters)
        return self._numbered("start", start=start)

    def media(self, audio: bytes, timestamp_ms: int) -> str:
        """One frame of the caller's audio; `timestamp_ms` counts from the start of the stream."""
        self._chunk += 1
        payload = base64.b64encode(audio).decode()
        media = {"track": "inbound", "chunk": str(self._chunk), "timestamp": str(timestamp_ms), "payload": payload}
        return self._numbered("media", media=media)

    def dtmf(self, digit: str) -> str:
        """A key that the caller pressed."""
        return self._numbered("dtmf", dtmf={"track": "inbound_track", "digit": digit})

    def mark(self, name: str) -> str:
        """A mark going back."""
        return self._numbered("mark", mark={"name": name})

    def stop(self) -> str:
        """The last message."""
        return self._numbered("stop", stop={"accountSid": self._account_sid, "callSid": self._call_sid})

    def receive(self, frame: str | bytes) -> Request:
        """Return what a frame asks for. Raises `Malformed`."""
        if isinstance(frame, bytes):
            raise Malformed(31950, f"a binary frame of {len(frame)} bytes; Media Streams takes JSON in text frames")
        try:
            request = _decoder.decode(frame)
        except msgspec.DecodeError as error:
            raise Malformed(31951, f"invalid message: {error}: {frame[:120]!r}") from error
        if request.stream_sid != self.stream_sid:
            raise Malformed(31951, f"invalid message: streamSid is {request.stream_sid!r} instead of {self.stream_sid!r}")
        return request

    def _numbered(self, event: str, **fields: Any) -> str:
        self._sequence += 1
        return json.dumps({"event": event, "sequenceNumber": str(self._sequence), "streamSid": self.stream_sid, **fields})


class MediaSocket:
    """The open WebSocket of one stream: `send` never blocks, requests come out of `serve`, `close` says `stop`."""

    def __init__(self, connection: WebSocketConnection, transport: trio.abc.Stream, wire: Wire) -> None:
        self.wire = wire
        self.muted = False  # a fault: media frames stop, everything else goes on
        self._connection = connection
        self._transport = transport
        self._outbox, self._outgoing = trio.open_memory_channel[str](OUTBOX_MESSAGES)
        self._written = trio.Event()
        self._closed = trio.Event()

    def send(self, message: str) -> None:
        """Queue a message; what finds the outbox full is dropped and counted."""
        with suppress(trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self._outbox.send_nowait(message)  # lost if the server does not read; a socket that is gone, `serve` tells

    def send_media(self, audio: bytes, timestamp_ms: int) -> None:
        """Queue a frame of the caller's audio, unless muted."""
        if not self.muted:
            self.send(self.wire.media(audio, timestamp_ms))

    async def serve(self, on_request: Callable[[Request], None], on_malformed: Callable[[Malformed], None]) -> str | None:
        """Read until the socket is gone. Returns the abnormal reason, or None when it was closed properly."""
        while True:
            try:
                frame = await self._connection.get_message()
            except ConnectionClosed as closed:
                return _abnormal(closed.reason)
            try:
                on_request(self.wire.receive(frame))
            except Malformed as malformed:
                on_malformed(malformed)

    async def send_raw(self, frame: str | bytes) -> None:
        """Send anything, unnumbered and past the outbox: a fault for tests. Raises `ConnectionClosed`."""
        await self._connection.send_message(frame)

    async def drop(self) -> None:
        """Lose the connection without a closing handshake: a fault for tests."""
        await trio.aclose_forcefully(self._transport)

    async def close(self) -> None:
        """Write what is queued, then `stop`, and close; with a second of patience for a server that does not answer."""
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            self.send(self.wire.stop())
            self._outbox.close()
            await self._written.wait()
            await self._connection.aclose()
        self._closed.set()

    async def write_until_closed(self) -> None:
        """Carry the outbox until `close` is done; for `hold_media`."""
        try:
            with self._outgoing:
                async for message in self._outgoing:
                    await self._connection.send_message(message)
        except ConnectionClosed:
            pass  # `serve` says so
        finally:
            self._written.set()
        await self._closed.wait()


async def hold_media(
    url: str,
    wire: Wire,
    route: Route,
    auth_token: str,
    *,
    task_status: trio.TaskStatus[MediaSocket] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Open the socket at `url` with a signed handshake, and hold it until it is closed. Raises `HandshakeFailed`.

    Meant for `nursery.start`, in a nursery that outlives the wish to end the stream, so that `stop` can still be said. The
    signature covers the ws(s) URL without parameters and its header is in lower case (Twilio docs, webhooks security).
    """
    transport = await _connect(route, url)
    refusal: HandshakeFailed | None = None
    try:
        async with trio.open_nursery() as nursery:
            connection = await _handshake(nursery, transport, url, route, auth_token)
            socket = MediaSocket(connection, transport, wire)
            task_status.started(socket)
            await socket.write_until_closed()
            nursery.cancel_scope.cancel()
    except* (HandshakeFailed, HandshakeError) as group:  # trio-websocket raises a refusal in its reader task
        refusal = _handshake_failure(url, group)
    finally:
        await trio.aclose_forcefully(transport)
    if refusal is not None:
        raise refusal


async def _connect(route: Route, url: str) -> trio.abc.Stream:
    try:
        with trio.fail_after(HANDSHAKE_SECONDS):
            return await route.connect(url)
    except OSError as error:
        raise HandshakeFailed(31902, f"cannot connect to {url}: {error}") from error
    except trio.TooSlowError as error:
        raise HandshakeFailed(31901, f"no connection to {url} within {HANDSHAKE_SECONDS:g} s") from error


async def _handshake(
    nursery: trio.Nursery, transport: trio.abc.Stream, url: str, route: Route, auth_token: str
) -> WebSocketConnection:
    host, path = route.host_header(url), route.path(url)
    headers = [(b"x-twilio-signature", signature(auth_token, url, {}).encode()), (b"user-agent", b"Twilio.TmeWs/1.0")]
    try:
        with trio.fail_after(HANDSHAKE_SECONDS):
            # Any stream will do; the annotation there names two kinds of it.
            return await wrap_client_stream(nursery, transport, host, path, extra_headers=headers)  # type: ignore[arg-type]
    except trio.TooSlowError as error:
        raise HandshakeFailed(31901, f"{url} did not answer the handshake in {HANDSHAKE_SECONDS:g} s") from error


def _handshake_failure(url: str, group: BaseExceptionGroup[HandshakeFailed | HandshakeError]) -> HandshakeFailed:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, HandshakeFailed):
        return error
    if isinstance(error, ConnectionRejected):
        message = f"{url} answered the WebSocket handshake with HTTP {error.status_code} instead of 101"
        return HandshakeFailed(31920, message, error.status_code)
    return HandshakeFailed(31920, f"{url} failed the WebSocket handshake: {error!r}")


def _abnormal(reason: CloseReason | None) -> str | None:
    if reason is None or reason.code == 1006:
        return "the media socket was lost without a closing handshake"
    if reason.code >= 1002 and reason.code != 1005:
        return f"the media socket was closed with {reason.code} {reason.reason or ''}".rstrip()
    return None
