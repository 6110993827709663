"""Twilio's side of a call, written from Twilio's documentation alone: signed webhooks, TwiML, Media Streams.

It shares no code with `dialog_supervisor` or `dialog_local`, and its WebSocket library is another than the gateway's.
"""

import base64
import json
import ssl
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit
from xml.etree import ElementTree

import httpx
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream
from twilio.request_validator import RequestValidator

from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import ACCOUNT_SID, AUTH_TOKEN, Dialogd

FRAME = bytes(range(160))  # 20 ms, each byte another, so that a mix-up shows
FORM = "application/x-www-form-urlencoded"
CALLER, CALLEE = "+14155550123", "+14155550199"


def sign(url: str, fields: Mapping[str, str] | None = None, token: str = AUTH_TOKEN) -> str:
    """Return the X-Twilio-Signature of a request."""
    signature: str = RequestValidator(token).compute_signature(url, dict(fields or {}))
    return signature


@dataclass(frozen=True)
class Place:
    """Where a `dialogd` is that a test started by itself."""

    public_url: str
    port: int
    tls: ssl.SSLContext | None = None


class Twilio:
    """A Twilio account whose numbers point at one `dialogd`."""

    def __init__(self, dialogd: Dialogd | Place) -> None:
        self.public_url = dialogd.public_url
        self.tls = dialogd.tls
        self._port = dialogd.port
        self._http = httpx.AsyncClient(verify=dialogd.tls or False, timeout=PATIENCE_S, trust_env=False)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def request(self, method: str, url: str, *, headers: Any, content: bytes = b"") -> httpx.Response:
        """Send a request for a public URL to where dialogd really listens."""
        parts = urlsplit(url)
        place = parts._replace(netloc=f"127.0.0.1:{self._port}").geturl()
        extensions = {"sni_hostname": parts.hostname} if self.tls else {}
        return await self._http.request(
            method,
            place,
            headers=httpx.Headers([*httpx.Headers(headers).raw, (b"host", parts.netloc.encode())]),
            content=content,
            extensions=extensions,
        )

    async def post(self, url: str, fields: Mapping[str, str], *, signature: str | None = None) -> httpx.Response:
        """Post a webhook, signed unless `signature` says otherwise."""
        headers = {"Content-Type": FORM, "X-Twilio-Signature": sign(url, fields) if signature is None else signature}
        return await self.request("POST", url, headers=headers, content=str(httpx.QueryParams(dict(fields))).encode())

    async def ask(self, url: str, fields: Mapping[str, str]) -> ElementTree.Element:
        """Post a webhook and return the TwiML that it is answered with."""
        response = await self.post(url, fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/xml")
        document = ElementTree.fromstring(response.text)
        assert document.tag == "Response"
        return document

    @asynccontextmanager
    async def websocket(self, url: str, *, signature: str | None = None) -> AsyncIterator[WebSocketConnection]:
        """Open a signed media socket; an empty `signature` stands for none."""
        signature = sign(url) if signature is None else signature
        headers = [(b"x-twilio-signature", signature.encode())] if signature else []
        parts = urlsplit(url)
        stream: Any = await trio.open_tcp_stream("127.0.0.1", self._port)
        if self.tls:
            stream = trio.SSLStream(stream, self.tls, server_hostname=parts.hostname, https_compatible=True)
        rejection: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                yield await wrap_client_stream(nursery, stream, parts.netloc, parts.path, extra_headers=headers)
                nursery.cancel_scope.cancel()
        except* ConnectionRejected as rejections:  # by the library's reader task, in a group of its own
            rejection = _only(rejections)
        finally:
            await trio.aclose_forcefully(stream)
        if rejection is not None:  # raised here, because `except*` puts what is raised inside it into a group again
            raise rejection

    @asynccontextmanager
    async def streaming(self, **parameters: str) -> AsyncIterator["PhoneCall"]:
        """Place a call whose stream has started; if the block leaves the call alive, the caller hangs up."""
        call = PhoneCall(self)
        await call.ring()
        async with call.stream(**parameters):
            yield call
        await call.after("completed")


class PhoneCall:
    """One call: rings, streams, asks what comes after."""

    def __init__(self, twilio: Twilio) -> None:
        self._twilio = twilio
        self.sid = "CA" + uuid.uuid4().hex
        self.stream_sid = ""
        self.document = ElementTree.Element("Response")
        self.marks: list[str] = []
        self._sequence = 0
        self._socket: WebSocketConnection | None = None

    def fields(self, **more: str) -> dict[str, str]:
        """Return a voice webhook's parameters."""
        common = {"CallSid": self.sid, "AccountSid": ACCOUNT_SID, "From": CALLER, "To": CALLEE, "Direction": "inbound"}
        return common | {"ApiVersion": "2010-04-01", "CallStatus": "ringing", **more}

    async def ring(self, **more: str) -> ElementTree.Element:
        """Ask the number's voice URL what to do with the call."""
        self.document = await self._twilio.ask(self._twilio.public_url + "/twilio/voice", self.fields(**more))
        return self.document

    async def after(self, status: str = "in-progress") -> ElementTree.Element:
        """The stream of `<Connect>` is over: ask its action URL what comes next."""
        connect = self.document.find("Connect")
        assert connect is not None
        following = await self._twilio.ask(connect.attrib["action"], self.fields(CallStatus=status))
        if following.find("Connect") is not None:
            self.document = following
        return following

    async def report(self, about: str, **fields: str) -> httpx.Response:
        """Have Twilio report on this call's "recording", "transcript", "stream" or "status"."""
        known = {"CallSid": self.sid, "AccountSid": ACCOUNT_SID}
        return await self._twilio.post(f"{self._twilio.public_url}/twilio/{about}", known | fields)

    @property
    def stream_url(self) -> str:
        """The URL of the stream that the TwiML asks for."""
        stream = self.document.find("Connect/Stream")
        assert stream is not None, ElementTree.tostring(self.document)
        return stream.attrib["url"]

    @asynccontextmanager
    async def stream(self, **parameters: str) -> AsyncIterator[WebSocketConnection]:
        """Open the media socket that the TwiML asks for, and send what Twilio sends first."""
        async with self._twilio.websocket(self.stream_url) as socket:
            self._socket, self._sequence = socket, 0
            self.stream_sid = "MZ" + uuid.uuid4().hex
            await self.send({"event": "connected", "protocol": "Call", "version": "1.0.0"})
            await self.send(self.start_message(**parameters))
            yield socket

    def start_message(self, **parameters: str) -> dict[str, Any]:
        """Return the `start` of this call's stream."""
        start = {
            "accountSid": ACCOUNT_SID,
            "streamSid": self.stream_sid,
            "callSid": self.sid,
            "tracks": ["inbound"],
            "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
            "customParameters": parameters,
        }
        return {"event": "start", "sequenceNumber": "1", "start": start, "streamSid": self.stream_sid}

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send one message on the media socket."""
        assert self._socket is not None
        await self._socket.send_message(json.dumps(message))

    async def say(self, audio: bytes) -> None:
        """Have the caller say 20 ms of something."""
        self._sequence += 1
        media = {
            "track": "inbound",
            "chunk": str(self._sequence),
            "timestamp": str(20 * self._sequence),
            "payload": base64.b64encode(audio).decode(),
        }
        sequence = str(self._sequence + 1)
        await self.send({"event": "media", "sequenceNumber": sequence, "media": media, "streamSid": self.stream_sid})

    async def press(self, digit: str) -> None:
        """Have the caller press a key."""
        dtmf = {"track": "inbound_track", "digit": digit}
        await self.send({"event": "dtmf", "streamSid": self.stream_sid, "sequenceNumber": "5", "dtmf": dtmf})

    async def return_mark(self, name: str) -> None:
        """Tell that what was sent before a mark has been played."""
        await self.send({"event": "mark", "sequenceNumber": "6", "streamSid": self.stream_sid, "mark": {"name": name}})

    async def stop(self) -> None:
        """The caller hung up."""
        stop = {"accountSid": ACCOUNT_SID, "callSid": self.sid}
        await self.send({"event": "stop", "sequenceNumber": "9", "stop": stop, "streamSid": self.stream_sid})

    async def receive(self) -> dict[str, Any]:
        """Return the next message from dialogd."""
        assert self._socket is not None
        with trio.fail_after(PATIENCE_S):
            message: dict[str, Any] = json.loads(await self._socket.get_message())
        assert message["streamSid"] == self.stream_sid
        return message

    async def hear(self) -> bytes:
        """Return the next piece of audio that the caller hears; marks before it are remembered."""
        while (message := await self.receive())["event"] != "media":
            if message["event"] == "mark":
                self.marks.append(message["mark"]["name"])
        return base64.b64decode(message["media"]["payload"])

    async def echo(self, audio: bytes = FRAME) -> None:
        """Say something to an agent that echoes, and check that it comes back."""
        await self.say(audio)
        assert await self.hear() == audio

    async def echo_again(self) -> None:
        """The same on a stream that follows another: first may come what the caller had not heard of the last frame."""
        await self.say(FRAME)
        while await self.hear() != FRAME:
            pass

    async def closed(self) -> int:
        """Wait until dialogd closes the media socket and return the code; what comes before is dropped."""
        assert self._socket is not None
        with trio.fail_after(PATIENCE_S):
            try:
                while True:
                    await self._socket.get_message()
            except ConnectionClosed as closed:
                return int(closed.reason.code) if closed.reason else 1006


def _only(group: BaseExceptionGroup[Any]) -> BaseException:
    found = group.exceptions[0]
    return _only(found) if isinstance(found, BaseExceptionGroup) else found


def verbs(document: ElementTree.Element) -> list[str]:
    """Return the names of a TwiML document's verbs."""
    return [verb.tag for verb in document]
