"""Twilio's webhooks and media handshakes: authenticated first, then answered with TwiML or with a call's media socket.

Statuses: unknown path 404, not POST 405, not a form 415, no signature 400, a wrong one 403 (as Dialog for TypeScript).
"""

import hmac
from collections.abc import Callable
from typing import Protocol
from urllib.parse import parse_qsl

import structlog
from starlette.datastructures import ImmutableMultiDict
from twilio.request_validator import RequestValidator
from twilio.twiml.voice_response import Connect, VoiceResponse

from dialog_supervisor.call import Call, Next
from dialog_supervisor.carriers.base import CarrierError, Leg
from dialog_supervisor.carriers.twilio import callbacks
from dialog_supervisor.carriers.twilio.addresses import (
    AFTER_PATH,
    CALLBACK_PATHS,
    MEDIA_PREFIX,
    VOICE_PATH,
    Addresses,
    signed_urls,
)
from dialog_supervisor.carriers.twilio.rest import TwilioRest
from dialog_supervisor.carriers.twilio.voip import TwilioLeg
from dialog_supervisor.config import Config
from dialog_supervisor.http import Request, Response, Upgrade
from protocol.messages import Event, Metadata

SIGNATURE_HEADER = "x-twilio-signature"
MAX_FIELDS = 1000  # a voice webhook has about thirty
_FORM_TYPE = "application/x-www-form-urlencoded"

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
        self._addresses = Addresses(config.gateway.public_url)
        self._validator = RequestValidator(config.twilio.auth_token)

    async def handle(self, request: Request) -> Response | Upgrade:
        """Answer a request."""
        if request.path.startswith(MEDIA_PREFIX):
            return self._media(request)
        about = CALLBACK_PATHS.get(request.path)
        if about is None and request.path not in (VOICE_PATH, AFTER_PATH):
            return Response(404, "there is nothing here\n")
        form = self._form(request)
        if isinstance(form, Response):
            return form
        if about is not None:
            return self._callback(about, form)
        return self._voice(form) if request.path == VOICE_PATH else self._after(form)

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
        url = self._addresses.url(request.path, request.query)
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
            return self._twiml(self._busy())
        return self._twiml(self._next(call))

    def _leg(self, metadata: Metadata, emit: Callable[[Event], None]) -> Leg:
        return TwilioLeg(metadata, self._rest, self._config, lambda: self._stream_verb(metadata.call_id), emit)

    def _after(self, form: Form) -> Response:
        """A stream has ended; Twilio asks what now."""
        call = self._switchboard.find(form.get("CallSid", ""))
        if call is None:
            document = VoiceResponse()
            document.hangup()
            return self._twiml(document)
        call.stream_ended(gone=form.get("CallStatus", "") in callbacks.OVER)
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
        connect = Connect(action=self._addresses.after, method="POST")
        connect.stream(
            url=self._addresses.media(token),
            status_callback=self._addresses.callback("stream"),
            status_callback_method="POST",
        )
        return connect

    def _stream_verb(self, call_sid: str) -> Connect:
        call = self._switchboard.find(call_sid)
        if call is None:
            raise CarrierError("the call is over")
        return self._connect_verb(call.token)

    def _fallback(self) -> VoiceResponse:
        return _dial_or_say(self._config.fallback.dial, self._config.fallback.say)

    def _busy(self) -> VoiceResponse:
        """Return what a caller gets whose call is not taken."""
        fallback = self._config.fallback
        return _dial_or_say(fallback.dial if fallback.busy_dial is None else fallback.busy_dial, fallback.busy_say)

    @staticmethod
    def _twiml(document: VoiceResponse) -> Response:
        return Response(200, str(document), "text/xml; charset=utf-8")

    def _callback(self, about: str, form: Form) -> Response:
        """Twilio reports on a call. What is late or cannot be read is no reason for it to send it again."""
        call = self._switchboard.find(form.get("CallSid", ""))
        if call is None:
            log.info("a report on a call that is over", about=about, call=form.get("CallSid", ""))
            return Response(204)
        with structlog.contextvars.bound_contextvars(call=call.id):
            try:
                call.leg.callback(about, dict(form))
            except callbacks.Malformed as error:
                log.warning("a report cannot be read", about=about, reason=str(error))
        if about == "status" and form.get("CallStatus", "") in callbacks.OVER:
            call.stream_ended(gone=True)
        return Response(204)

    # The media socket

    def _media(self, request: Request) -> Response | Upgrade:
        if not request.wants_websocket:
            return Response(426, "this is for WebSockets\n", headers={"upgrade": "websocket", "connection": "upgrade"})
        signature = request.headers.get(SIGNATURE_HEADER)
        if not signature:
            return Response(400, "the X-Twilio-Signature header is missing\n")
        token = request.path.removeprefix(MEDIA_PREFIX)
        url = self._addresses.media(token)
        if not any(self._signed(candidate, signature) for candidate in signed_urls(url)):
            return self._forbidden(self._addresses.media("…"))
        call = self._switchboard.claim(token)
        if call is None:
            return Response(404, "no call waits for this media socket\n")
        return Upgrade(call.stream)

    def _signed(self, url: str, signature: str) -> bool:
        return hmac.compare_digest(self._validator.compute_signature(url, {}).encode(), signature.encode())


def _dial_or_say(number: str | None, words: str) -> VoiceResponse:
    document = VoiceResponse()
    if number:
        document.dial(number)
        return document
    if words:
        document.say(words)
    document.hangup()
    return document
