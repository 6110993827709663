"""One phone call as Twilio lives it: a webhook, the TwiML that comes back, its verbs one by one, and the end.

Whoever scripts a call uses `Call.caller` to act and `Call.log` to learn what happens.
"""

import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from math import ceil
from secrets import token_hex
from typing import Literal, TypeAlias

import trio
from msgspec import Struct

from dialog_local.carrier import twiml
from dialog_local.carrier.events import Answered, Dialed, Ended, EventLog, Played, Problem, Said, StreamEnded, StreamStarted
from dialog_local.carrier.line import Line
from dialog_local.carrier.media import HandshakeFailed, MediaSocket, Wire, hold_media
from dialog_local.carrier.playout import BYTES_PER_SECOND, SILENCE
from dialog_local.carrier.recordings import Recordings
from dialog_local.carrier.reports import Reports, iso_now, rfc_now
from dialog_local.carrier.transcriptions import Ear, Transcriptions
from dialog_local.carrier.webhooks import Route, WebhookFailed, Webhooks

Status: TypeAlias = Literal["queued", "ringing", "in-progress", "completed", "failed"]
StatusEvent: TypeAlias = Literal["ringing", "answered", "completed"]  # of which `answered` is told as in-progress
Voice: TypeAlias = Callable[[str], Awaitable[bytes]]  # text to mu-law at 8 kHz

SAY_CHARACTERS_PER_SECOND = 15  # how long <Say> takes where the phone company has no voice of its own
MAX_DOCUMENTS = 1000  # a call that redirects to itself for ever is ended here

CALLER_PLACE = {"City": "SPRINGFIELD", "State": "IL", "Zip": "62701", "Country": "US"}
CALLED_PLACE = {"City": "CHICAGO", "State": "IL", "Zip": "60601", "Country": "US"}


class CallEnded(Exception):
    """The caller wanted to do something in a call that is over."""


class Account(Struct, frozen=True):
    """Whose calls these are. `voice` speaks `<Say>`, else it passes in silence; `ssl_context` decides whom to trust.

    `ear` transcribes; without it, nothing can be transcribed.
    """

    sid: str
    auth_token: str
    voice: Voice | None
    ssl_context: ssl.SSLContext
    ear: Ear | None = None


class Step(Struct, frozen=True):
    """The document to be carried out next: where to ask for it and with which further parameters, or its text."""

    reference: twiml.Reference | None = None
    extra: dict[str, str] = {}
    text: str = ""


class Caller:
    """The person with the telephone: what a script can do in a call."""

    def __init__(self, call: "Call") -> None:
        self._call = call

    async def speak(self, audio: bytes) -> None:
        """Say mu-law audio (8 kHz) in real time; returns when the last of it is sent. Raises `CallEnded`."""
        await self._call.while_alive(lambda line: line.speak(audio))

    def hush(self) -> None:
        """Break off what is being said."""
        if self._call.line is not None:
            self._call.line.hush()

    def press(self, digits: str) -> None:
        """Press keys. Only a media stream hears them."""
        if self._call.line is not None:
            for digit in digits:
                self._call.line.press(digit)

    def hang_up(self) -> None:
        """Put the receiver down."""
        self._call.end("the caller hung up")


class Call:
    """One inbound call: made by `PhoneCompany.call`, carried by `run`.

    `log` is everything that happens in it; `line` exists once `run` has begun.
    """

    def __init__(
        self,
        account: Account,
        webhook_url: str,
        from_: str,
        to: str,
        *,
        via: str = "",
        fallback_url: str = "",
        status_url: str = "",
        status_events: tuple[StatusEvent, ...] = ("completed",),
    ) -> None:
        self.sid = "CA" + token_hex(16)
        self.account = account
        self.from_ = from_
        self.to = to
        self.status: Status = "queued"
        self.log = EventLog()
        self.line: Line | None = None
        self.socket: MediaSocket | None = None  # the open media stream, where tests cause their faults
        self.caller = Caller(self)
        self._created_at = rfc_now()
        self._fallback_url = fallback_url
        self._status_to = twiml.Reference(status_url) if status_url else None
        self._status_events = status_events
        self._statuses_told = 0
        self._route = Route(webhook_url, via, account.ssl_context)
        self._webhooks = Webhooks(account.auth_token, self._route)
        self._reports = Reports(account.sid, self.sid, self._webhooks, self._not_taken)
        self.recordings = Recordings(account.sid, self.sid, self._reports, self.log, self.now)
        self.transcriptions = Transcriptions(account.ear, self._reports, self.log, self.now)
        self._nursery: trio.Nursery | None = None
        self._next: Step | None = Step(twiml.Reference(webhook_url))
        self._scope = trio.CancelScope()  # around the document being carried out
        self._limited = trio.CancelScope()  # around the wait for the TimeLimit
        self._over = trio.Event()
        self._reason = ""
        self._ending = False
        self._answered_at: float | None = None
        self._duration = 0.0

    @property
    def ended(self) -> bool:
        """Whether the call is over."""
        return self.status in {"completed", "failed"}

    @property
    def problems(self) -> list[Problem]:
        """Errors and warnings so far."""
        return [event for event in self.log.history if isinstance(event, Problem)]

    @property
    def warnings(self) -> list[Problem]:
        """What the agent's side did wrong on its media streams: 31931, 31950 and 31951, each once per stream."""
        return [problem for problem in self.problems if problem.code in {31931, 31950, 31951}]

    def now(self) -> float:
        """Return the time of the call in seconds: since `run` began, 0 before."""
        return trio.current_time() - self.line.began_at if self.line is not None else 0.0

    async def while_alive(self, action: Callable[[Line], Awaitable[None]]) -> None:
        """Do something on the line. Raises `CallEnded` if the call ends before it is done."""
        if self.line is None or self.ended:
            raise CallEnded(f"call {self.sid} is {self.status}: {self._reason or 'it has not begun'}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_over, nursery.cancel_scope)
            await action(self.line)
            nursery.cancel_scope.cancel()
            return
        raise CallEnded(f"call {self.sid} has ended: {self._reason}")

    def replace(self, step: Step) -> None:
        """Carry out another document instead of the present one, whose stream is torn down."""
        self._next = step
        self._scope.cancel()

    def end(self, reason: str) -> None:
        """End the call as soon as the stream has been told."""
        if not self.ended:
            self._because(reason)
            self._ending = True
            self._scope.cancel()

    def limit(self, seconds: float) -> None:
        """End the call so long after its answer, whatever happens until then; an earlier limit is forgotten.

        Twilio docs, Call resource: TimeLimit is the call's duration. One that is over already ends the call at once.
        """
        self._limited.cancel()
        self._limited = trio.CancelScope()
        if self._nursery is not None:
            self._nursery.start_soon(self._end_after, seconds, self._limited)

    async def _end_after(self, seconds: float, limited: trio.CancelScope) -> None:
        with limited:
            answered_at = trio.current_time() if self._answered_at is None else self._answered_at
            await trio.sleep_until(answered_at + seconds)
            self.end(f"its TimeLimit of {seconds:g} s is over")

    async def run(self) -> None:
        """Place the call and live through it until somebody hangs up or it fails; `log` tells what happened.

        Returns when the last report on the call is made, which may be some time after its end.
        """
        self.status = "ringing"
        self.line = Line(trio.current_time(), self.log.append)
        async with self._webhooks, self._reports.open(), trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.line.run)
            self._tell_status("ringing")
            try:
                await self._follow_documents(nursery)
            finally:
                self._conclude(self.line)
            nursery.cancel_scope.cancel()

    def resource(self) -> dict[str, str | None]:
        """Return the call as Twilio's REST API describes it."""
        account = self.account.sid
        return {
            "sid": self.sid,
            "account_sid": account,
            "api_version": "2010-04-01",
            "status": self.status,
            "direction": "inbound",
            "from": self.from_,
            "to": self.to,
            "duration": str(ceil(self._duration)) if self.ended else None,
            "date_created": self._created_at,
            "uri": f"/2010-04-01/Accounts/{account}/Calls/{self.sid}.json",
        }

    async def _follow_documents(self, nursery: trio.Nursery) -> None:
        base_url = ""
        for _ in range(MAX_DOCUMENTS):
            step, self._next = self._next, None
            if step is None or self._ending:
                return None
            if step.reference is not None:
                base_url = step.reference.url
            try:
                with trio.CancelScope() as self._scope:
                    verbs = twiml.parse(await self._document(step), base_url)
                    self._answer()
                    following = await self._carry_out(verbs, nursery)
                    self._next = self._next or following
            except (WebhookFailed, twiml.DocumentError) as error:
                return self._fail(error)
        return self.end(f"{MAX_DOCUMENTS} documents followed each other without an end")

    async def _document(self, step: Step) -> str:
        if step.reference is None:
            return step.text
        params = self._parameters() | step.extra
        try:
            return await self._webhooks.ask(step.reference.url, params, step.reference.method)
        except WebhookFailed as error:
            if not self._fallback_url:
                raise
            self._problem(error.code, str(error), error.http_status)
            failure = {"ErrorCode": str(error.code), "ErrorUrl": error.url}
            return await self._webhooks.ask(self._fallback_url, params | failure)

    def _parameters(self) -> dict[str, str]:
        """Return what every webhook of this call is told (Twilio docs, TwiML for voice: request parameters)."""
        params = {
            "CallSid": self.sid,
            "AccountSid": self.account.sid,
            "From": self.from_,
            "To": self.to,
            "Caller": self.from_,
            "Called": self.to,
            "CallStatus": self.status,
            "Direction": "inbound",
            "ApiVersion": "2010-04-01",
        }
        for parties, place in ((("From", "Caller"), CALLER_PLACE), (("To", "Called"), CALLED_PLACE)):
            params |= {party + part: value for party in parties for part, value in place.items()}
        return params

    async def _carry_out(self, verbs: list[twiml.Verb], nursery: trio.Nursery) -> Step | None:
        """Do the verbs in order. Returns the step that one of them leads to, or None if the call is to end."""
        for verb in verbs:
            match verb:
                case twiml.Say():
                    await self._say(verb)
                case twiml.Play():
                    self.log.append(Played(self.now(), verb.url, verb.digits))
                case twiml.Pause():
                    await trio.sleep(verb.seconds)
                case twiml.Hangup():
                    self._because("the agent's side hung up with <Hangup>")
                    return None
                case twiml.Dial():
                    self.log.append(Dialed(self.now(), verb.targets))
                    self._because(f"the call was handed on to {', '.join(verb.targets)}")
                    return None
                case twiml.Redirect():
                    return Step(verb.to)
                case twiml.Connect():
                    outcome = await self._stream(verb, nursery)
                    if verb.action is not None:
                        return Step(verb.action, outcome)
        self._because("the document came to its end")
        return None

    def _because(self, reason: str) -> None:
        self._reason = self._reason or reason

    async def _say(self, verb: twiml.Say) -> None:
        assert self.line is not None
        self.log.append(Said(self.now(), verb.text))
        silence = bytes([SILENCE]) * (len(verb.text) * BYTES_PER_SECOND // SAY_CHARACTERS_PER_SECOND)
        audio = await self.account.voice(verb.text) if self.account.voice else silence
        for _ in range(max(1, verb.loop)):
            await self.line.play(audio)

    async def _stream(self, verb: twiml.Connect, nursery: trio.Nursery) -> dict[str, str]:
        """Connect the line with a media stream until one of them ends. Returns what `action` is told of it."""
        assert self.line is not None
        wire = Wire(self.account.sid, self.sid, "MZ" + token_hex(16), verb.parameters)
        outcome, tell = {"StreamSid": wire.stream_sid}, partial(self._tell_stream, verb, wire.stream_sid)
        try:
            hold = partial(hold_media, verb.url, wire, self._route, self.account.auth_token)
            self.socket = await nursery.start(hold)
        except HandshakeFailed as error:
            self._problem(error.code, str(error), error.http_status)
            tell("stream-error", f"{error.code}: {error}")
            return outcome | {"StreamError": str(error.code)}
        try:
            tell("stream-started")
            if abnormal := await self._converse(self.line, self.socket, verb):
                tell("stream-error", f"31903: {abnormal}")
        finally:
            self.socket = None
            tell("stream-stopped")
        return outcome

    async def _converse(self, line: Line, socket: MediaSocket, verb: twiml.Connect) -> str:
        """Hold a media stream until it ends. Returns what was abnormal about its end, "" for nothing."""
        wire = socket.wire
        socket.send(wire.connected())
        socket.send(wire.start())
        line.attach(socket)
        self.log.append(StreamStarted(self.now(), wire.stream_sid, verb.parameters))
        reason = "the call went on without it"
        try:
            abnormal = await socket.serve(line.handle, lambda error: line.warn(error.code, str(error)))
            reason = abnormal or "the agent's side closed the media socket"
            if abnormal:
                self._problem(31903, abnormal)
            return abnormal or ""
        finally:
            line.detach()
            await socket.close()
            self.log.append(StreamEnded(self.now(), wire.stream_sid, reason))

    def _answer(self) -> None:
        if self._answered_at is None and self.line is not None:
            self._answered_at = trio.current_time()
            self.status = "in-progress"
            self.line.answered = True
            self.log.append(Answered(self.now()))
            self._tell_status("answered")

    def _fail(self, error: WebhookFailed | twiml.DocumentError) -> None:
        self._problem(error.code, str(error), getattr(error, "http_status", 0))
        self._because(f"error {error.code}")

    def _problem(self, code: int, message: str, http_status: int = 0) -> None:
        self.log.append(Problem(self.now(), code, message, http_status))

    def _conclude(self, line: Line) -> None:
        if self._answered_at is None:
            self.status = "failed"
        else:
            self.status = "completed"
            self._duration = trio.current_time() - self._answered_at
        line.finish()
        self.recordings.finish()
        self.transcriptions.finish()
        self.log.append(Ended(self.now(), self._reason or "the call was broken off"))
        self._tell_status("completed")
        self._over.set()

    async def _cancel_when_over(self, scope: trio.CancelScope) -> None:
        await self._over.wait()
        scope.cancel()

    def _tell_status(self, event: StatusEvent) -> None:
        """Report on the call, if that was wished for (Twilio docs, Call resource: StatusCallback)."""
        if event not in self._status_events:
            return
        params = self._parameters() | {
            "Timestamp": rfc_now(),
            "CallbackSource": "call-progress-events",
            "SequenceNumber": str(self._statuses_told),
        }
        if event == "completed":
            params |= {
                "Duration": str(ceil(self._duration / 60)),
                "CallDuration": str(ceil(self._duration)),
                "SipResponseCode": "200",
            }
        self._statuses_told += 1
        self._reports.soon(self._status_to, params)

    def _tell_stream(self, verb: twiml.Connect, sid: str, event: str, error: str = "") -> None:
        """Report on a stream (Twilio docs, TwiML <Stream>: statusCallback)."""
        fields = {"StreamSid": sid, "StreamName": verb.name or sid, "StreamEvent": event, "Timestamp": iso_now()}
        self._reports.soon(verb.status_callback, fields | ({"StreamError": error} if error else {}))

    def _not_taken(self, error: WebhookFailed) -> None:
        self._problem(error.code, str(error), error.http_status)
