"""Twilio's webhooks and media handshakes: authenticated first, then answered with TwiML or with a call's media socket.

Statuses: unknown path 404, not POST 405, not a form 415, no signature 400, a wrong one 403 (as Dialog for TypeScript).
"""

import hmac
from collections.abc import Callable, Iterator
from typing import Protocol
from urllib.parse import parse_qsl, urlsplit

import structlog
from starlette.datastructures import ImmutableMultiDict
from twilio.request_validator import RequestValidator
from twilio.twiml.voice_response import Connect, VoiceResponse

from dialog_supervisor.call import Call, Next
from dialog_supervisor.carriers.base import CarrierError, Leg
from dialog_supervisor.carriers.twilio.rest import TwilioRest
from dialog_supervisor.carriers.twilio.voip import TwilioLeg
from dialog_supervisor.config import Config
from dialog_supervisor.http import Request, Response, Upgrade
from protocol.messages import Event, Metadata

PREFIX = "/twilio/"
VOICE_PATH = PREFIX + "voice"
AFTER_PATH = PREFIX + "after"
MEDIA_PREFIX = PREFIX + "media/"
SIGNATURE_HEADER = "x-twilio-signature"
MAX_FIELDS = 1000  # a voice webhook has about thirty
_FORM_TYPE = "application/x-www-form-urlencoded"
_CALLER_GONE = ("completed", "busy", "failed", "no-answer", "canceled")

log = structlog.get_logger("twilio")

Form = ImmutableMultiDict[str, str]
MakeLeg = Callable[[Callable[[Event], None]], Leg]


class Switchboard(Protocol):
    """Where calls are kept; the supervisor's part in a gateway's work."""

    def admit(self, metadata: Metadata, make_leg: MakeLeg) -> Call | None:
        """Begin a call, or return None when none is taken now."""

    def find(self, call_id: str) -> Call | None:
        """Return the call of this id, if it has not ended."""

    def claim(self, token: str) -> Call | None:
        """Return the call whose media socket this token opens, once."""


class TwilioGateway:
    """Answers everything below `/twilio/`."""

    def __init__(self, config: Config, switchboard: Switchboard, rest: TwilioRest) -> None:
        self._config = config
        self._switchboard = switchboard
        self._rest = rest
        self._origin = config.gateway.public_url.rstrip("/")
        self._validator = RequestValidator(config.twilio.auth_token)

    async def handle(self, request: Request) -> Response | Upgrade:
        """Answer a request."""
        if request.path.startswith(MEDIA_PREFIX):
            return self._media(request)
        answer = {VOICE_PATH: self._voice, AFTER_PATH: self._after}.get(request.path)
        if answer is None:
            return Response(404, "there is nothing here\n")
        form = self._form(request)
        return form if isinstance(form, Response) else answer(form)

    def _form(self, request: Request) -> Form | Response:
        """Return what an authentic webhook says, or the answer to one that is not."""
        if request.method != "POST":
            return Response(405, "POST only\n", headers={"allow": "POST"})
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM_TYPE:
            return Response(415, f"send {_FORM_TYPE}\n")
        signature = request.headers.get(SIGNATURE_HEADER)
        if not signature:
            return Response(400, "the X-Twilio-Signature header is missing\n")
        try:
            pairs = parse_qsl(request.body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
        except ValueError as error:
            return Response(400, f"the form cannot be read: {error}\n")
        form = Form(pairs)
        url = self._origin + request.path + (f"?{request.query}" if request.query else "")
        return form if self._validator.validate(url, form, signature) else self._forbidden(url)

    @staticmethod
    def _forbidden(url: str) -> Response:
        remedy = "compare twilio.auth_token with the console's, and gateway.public_url with the URL configured there"
        log.warning("signature does not match", url=url, remedy=remedy)
        return Response(403, "the signature does not match\n")

    # Webhooks

    def _voice(self, form: Form) -> Response:
        """A call comes in. Twilio may ask twice (a retry has the same CallSid); it is one call and one answer."""
        call_sid = form.get("CallSid", "")
        if not call_sid:
            return Response(400, "CallSid is missing\n")
        call = self._switchboard.find(call_sid)
        if call is None:
            metadata = Metadata(call_sid, "twilio", form.get("From", ""), form.get("To", ""), dict(form))
            call = self._switchboard.admit(metadata, lambda emit: self._leg(metadata, emit))
        if call is None:
            return self._twiml(self._fallback())
        return self._twiml(self._next(call))

    def _leg(self, metadata: Metadata, emit: Callable[[Event], None]) -> Leg:
        silence_s = self._config.calls.silence_timeout
        return TwilioLeg(metadata, self._rest, silence_s, lambda: self._stream_verb(metadata.call_id), emit)

    def _after(self, form: Form) -> Response:
        """A stream has ended; Twilio asks what now."""
        call = self._switchboard.find(form.get("CallSid", ""))
        if call is None:
            document = VoiceResponse()
            document.hangup()
            return self._twiml(document)
        call.stream_ended(gone=form.get("CallStatus", "") in _CALLER_GONE)
        return self._twiml(self._next(call))

    def _next(self, call: Call) -> VoiceResponse:
        match call.next_step():
            case Next.CONNECT:
                return self._connect(call.answered())
            case Next.FALLBACK:
                return self._fallback()
        document = VoiceResponse()
        document.hangup()
        return document

    def _connect(self, token: str) -> VoiceResponse:
        document = VoiceResponse()
        document.append(self._connect_verb(token))
        return document

    def _connect_verb(self, token: str) -> Connect:
        """The token is in the path: Twilio strips a stream URL's query (Twilio docs, <Stream>)."""
        connect = Connect(action=self._origin + AFTER_PATH, method="POST")
        connect.stream(url=self._media_url(token))
        return connect

    def _stream_verb(self, call_sid: str) -> Connect:
        call = self._switchboard.find(call_sid)
        if call is None:
            raise CarrierError("the call is over")
        return self._connect_verb(call.token)

    def _media_url(self, token: str) -> str:
        return self._origin.replace("http", "ws", 1) + MEDIA_PREFIX + token

    def _fallback(self) -> VoiceResponse:
        fallback, document = self._config.fallback, VoiceResponse()
        if fallback.dial:
            document.dial(fallback.dial)
            return document
        if fallback.say:
            document.say(fallback.say)
        document.hangup()
        return document

    @staticmethod
    def _twiml(document: VoiceResponse) -> Response:
        return Response(200, str(document), "text/xml; charset=utf-8")

    # The media socket

    def _media(self, request: Request) -> Response | Upgrade:
        if not request.wants_websocket:
            return Response(426, "this is for WebSockets\n", headers={"upgrade": "websocket", "connection": "upgrade"})
        signature = request.headers.get(SIGNATURE_HEADER)
        if not signature:
            return Response(400, "the X-Twilio-Signature header is missing\n")
        token = request.path.removeprefix(MEDIA_PREFIX)
        url = self._media_url(token)
        if not any(self._signed(candidate, signature) for candidate in signed_urls(url)):
            return self._forbidden(self._media_url("…"))
        call = self._switchboard.claim(token)
        if call is None:
            return Response(404, "no call waits for this media socket\n")
        return Upgrade(call.stream)

    def _signed(self, url: str, signature: str) -> bool:
        return hmac.compare_digest(self._validator.compute_signature(url, {}).encode(), signature.encode())


def signed_urls(url: str) -> Iterator[str]:
    """Yield the forms of a WebSocket URL that Twilio may have signed: with and without port, each with and without a slash.

    Twilio's documentation leaves open which it is ("try appending a trailing /"), and its own validator takes port 80 for a
    wss URL's default. The https form is never one of them.
    """
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = parts.port or (443 if parts.scheme == "wss" else 80)
    for place in dict.fromkeys((parts.netloc, host, f"{host}:{port}")):
        yield f"{parts.scheme}://{place}{parts.path}"
        yield f"{parts.scheme}://{place}{parts.path}/"
