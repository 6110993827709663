"""Twilio's webhooks and media handshakes: authenticated first, then answered with TwiML or with a call's media socket.

Statuses: unknown path 404, not POST 405, not a form 415, no signature 400, a wrong one 403 (as Dialog for TypeScript).
"""

import hmac
from collections.abc import Callable
from functools import partial
from typing import Protocol
from urllib.parse import parse_qsl

import structlog
from starlette.datastructures import ImmutableMultiDict
from twilio.request_validator import RequestValidator
from twilio.twiml.voice_response import Connect, VoiceResponse

from dialog_supervisor.call import Call, MakeLeg, Next
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
from dialog_supervisor.store.keeper import Missing
from protocol.messages import Event, Metadata

SIGNATURE_HEADER = "x-twilio-signature"
MAX_FIELDS = 1000  # a voice webhook has about thirty
_LOOK_UP_TIMEOUT_S = 0.25  # for a call that is almost always a new one
_RESUME_TIMEOUT_S = 5.0  # for one that is under way; Twilio waits 15 s for the answer
_WAIT_S = 1  # before a caller asks again whose call another dialogd has
_MOST_WAITS = 10
_WAITED = "waited"  # how often, in the query, which is signed
_FORM_TYPE = "application/x-www-form-urlencoded"

log = structlog.get_logger("twilio")

Form = ImmutableMultiDict[str, str]


class Switchboard(Protocol):
    """Where calls are kept; the supervisor's part in a gateway's work."""

    def admit(self, metadata: Metadata, make_leg: MakeLeg) -> Call | None:
        """Begin a call, or return None when none is taken now."""

    def find(self, call_id: str) -> Call | None:
        """Return the call of this id, if it has not ended."""

    def claim(self, token: str) -> Call | None:
        """Return the call whose media socket this token opens, once."""

    async def resume(self, call_id: str, line: Callable[[Metadata], MakeLeg], timeout_s: float) -> Call | Missing:
        """Go on with a call that a dead dialogd left, or say why not."""

    async def forget(self, call_id: str) -> None:
        """A call that is not under way here is over, as the carrier says."""


class TwilioGateway:
    """Answers everything below `/twilio/`, and what is asked of nodes below `/n/NAME/twilio/`."""

    def __init__(self, config: Config, switchboard: Switchboard, rest: TwilioRest) -> None:
        self._config = config
        self._switchboard = switchboard
        self._rest = rest
        self._addresses = Addresses(config.gateway)
        self._validator = RequestValidator(config.twilio.auth_token)

    async def handle(self, request: Request) -> Response | Upgrade:
        """Answer a request."""
        path = self._addresses.here(request.path)
        if path.startswith(MEDIA_PREFIX):
            return self._media(request, path.removeprefix(MEDIA_PREFIX))
        about = CALLBACK_PATHS.get(path)
        if about is None and path not in (VOICE_PATH, AFTER_PATH):
            return Response(404, "there is nothing here\n")
        form = self._form(request)
        if isinstance(form, Response):
            return form
        if about is not None:
            return await self._callback(about, form)
        if path == VOICE_PATH and not form.get("CallSid"):
            return Response(400, "CallSid is missing\n")
        return self._twiml(await (self._voice(request, form) if path == VOICE_PATH else self._after(request, form)))

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

    async def _voice(self, request: Request, form: Form) -> VoiceResponse:
        """A call comes in. Twilio may ask twice (a retry has the same CallSid); it is one call and one answer.

        It may also ask here because something else has failed, and then says in what: this is the fallback URL too.
        """
        call_sid = form.get("CallSid", "")
        if (call := self._switchboard.find(call_sid)) is not None:
            return self._next(call)
        failed = "ErrorCode" in form
        found = await self._resume(form, _RESUME_TIMEOUT_S if failed else _LOOK_UP_TIMEOUT_S)
        if isinstance(found, Call):
            return self._next(found)
        if found in (Missing.ELSEWHERE, Missing.REFUSED) or form.get("CallStatus", "") in callbacks.OVER:
            return self._without(found, request)
        metadata = Metadata(call_sid, "twilio", form.get("From", ""), form.get("To", ""), dict(form))
        call = self._switchboard.admit(metadata, partial(self.leg, metadata))
        return self._busy() if call is None else self._next(call)

    async def _after(self, request: Request, form: Form) -> VoiceResponse:
        """A stream has ended; Twilio asks what now."""
        if (call := self._switchboard.find(form.get("CallSid", ""))) is not None:
            call.stream_ended(gone=form.get("CallStatus", "") in callbacks.OVER)
            return self._next(call)
        found = await self._resume(form, _RESUME_TIMEOUT_S)
        return self._next(found) if isinstance(found, Call) else self._without(found, request)

    async def _resume(self, form: Form, timeout_s: float) -> Call | Missing:
        """Go on with a call that is not known here; one that is over is forgotten."""
        call_sid = form.get("CallSid", "")
        if form.get("CallStatus", "") in callbacks.OVER:
            await self._switchboard.forget(call_sid)
            return Missing.UNKNOWN
        return await self._switchboard.resume(call_sid, lambda metadata: partial(self.leg, metadata), timeout_s)

    def _without(self, why: Missing, request: Request) -> VoiceResponse:
        """Return what a caller gets whose call cannot be gone on with here."""
        if why is Missing.UNKNOWN:
            return _hangup()
        waited = dict(parse_qsl(request.query)).get(_WAITED, "")
        times = int(waited) if waited.isdecimal() and len(waited) < 4 else 0
        if why is Missing.ELSEWHERE and times < _MOST_WAITS:
            document = VoiceResponse()
            document.pause(length=_WAIT_S)
            document.redirect(self._addresses.url(request.path, f"{_WAITED}={times + 1}"), method="POST")
            return document
        return self._fallback()

    def leg(self, metadata: Metadata, emit: Callable[[Event], None]) -> Leg:
        """Return a call's line."""
        return TwilioLeg(metadata, self._rest, self._config, lambda: self._stream_verb(metadata.call_id), emit)

    def _next(self, call: Call) -> VoiceResponse:
        match call.next_step():
            case Next.CONNECT:
                return self._connect(call.answered())
            case Next.FALLBACK:
                return self._fallback()
        return _hangup()

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

    async def _callback(self, about: str, form: Form) -> Response:
        """Twilio reports on a call. What is late or cannot be read is no reason for it to send it again."""
        call = self._switchboard.find(form.get("CallSid", ""))
        if call is None:
            if about == "status" and form.get("CallStatus", "") in callbacks.OVER:
                await self._switchboard.forget(form.get("CallSid", ""))
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

    def _media(self, request: Request, token: str) -> Response | Upgrade:
        if not request.wants_websocket:
            return Response(426, "this is for WebSockets\n", headers={"upgrade": "websocket", "connection": "upgrade"})
        signature = request.headers.get(SIGNATURE_HEADER)
        if not signature:
            return Response(400, "the X-Twilio-Signature header is missing\n")
        url = self._addresses.socket_url(request.path)
        if not any(self._signed(candidate, signature) for candidate in signed_urls(url)):
            return self._forbidden(self._addresses.media("…"))
        call = self._switchboard.claim(token)
        if call is None:
            return Response(404, "no call waits for this media socket\n")
        return Upgrade(call.stream)

    def _signed(self, url: str, signature: str) -> bool:
        return hmac.compare_digest(self._validator.compute_signature(url, {}).encode(), signature.encode())


def _hangup() -> VoiceResponse:
    document = VoiceResponse()
    document.hangup()
    return document


def _dial_or_say(number: str | None, words: str) -> VoiceResponse:
    document = VoiceResponse()
    if number:
        document.dial(number)
        return document
    if words:
        document.say(words)
    document.hangup()
    return document
