"""The phone company's REST API: the requests that steer its calls, authenticated, refused as Twilio refuses them.

Twilio docs: Call resource (fetch, update), Recordings and Real-Time Transcriptions. Errors are told as Twilio tells them:
code, message, status. Which code a bad value gets is documented for few parameters; `INVALID` stands for the others.
"""

import base64
import hmac
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dialog_local.carrier import recordings, transcriptions, twiml
from dialog_local.carrier.faults import Faults, Resource, RestError
from dialog_local.carrier.line import Line
from dialog_local.carrier.phonecall import Account, Call, Step
from dialog_local.carrier.recordings import Recording

ROOT = "/2010-04-01/Accounts/{account}"
INVALID = 20001  # Twilio docs, error 20001: unknown or invalid parameters

Choice = TypeVar("Choice", bound=str)
Handler = Callable[[Request, "Form"], Response]


class Form:
    """A request's fields, of which each may come more than once."""

    def __init__(self, body: bytes) -> None:
        self._pairs = parse_qsl(body.decode())

    def get(self, name: str, default: str = "") -> str:
        """Return the last value of a field."""
        return dict(self._pairs).get(name, default)

    def words(self, name: str) -> tuple[str, ...]:
        """Return the words of all of a field's values."""
        return tuple(word for key, value in self._pairs if key == name for word in value.split())

    def choice(self, name: str, default: Choice, *others: Choice) -> Choice:
        """Return a field that can have these values. Raises `RestError` for another."""
        given = self.get(name, default)
        for value in (default, *others):
            if value == given:
                return value
        raise RestError(400, INVALID, f"{name}={given!r} is not one of {', '.join((default, *others))}.")

    def flag(self, name: str) -> bool:
        """Return a field that is "true" or "false". Raises `RestError`."""
        return self.choice(name, "false", "true") == "true"

    def callback(self, url: str, method: str) -> twiml.Reference | None:
        """Return the address to be told, if there is one. Raises `RestError` for a method other than GET and POST."""
        chosen = self.choice(method, "POST", "GET")
        return twiml.Reference(self.get(url), chosen) if self.get(url) else None


class Api:
    """The requests about an account's `calls`, as far as `faults` lets them through."""

    def __init__(self, account: Account, calls: Mapping[str, Call], faults: Faults) -> None:
        self._account = account
        self._calls = calls
        self._faults = faults

    def app(self) -> Starlette:
        """Return the API to be served."""
        routes = [
            self._route("Calls", "GET", "/Calls/{call}.json", self._fetch_call),
            self._route("Calls", "POST", "/Calls/{call}.json", self._update_call),
            self._route("Recordings", "POST", "/Calls/{call}/Recordings.json", self._record),
            self._route("Recordings", "POST", "/Calls/{call}/Recordings/{recording}.json", self._change_recording),
            self._route("Recordings", "GET", "/Recordings/{recording}.json", self._fetch_recording),
            self._route("Recordings", "DELETE", "/Recordings/{recording}.json", self._remove_recording),
            self._route("Recordings", "GET", "/Recordings/{recording}.wav", self._fetch_audio),
            self._route("Transcriptions", "POST", "/Calls/{call}/Transcriptions.json", self._transcribe),
            self._route("Transcriptions", "POST", "/Calls/{call}/Transcriptions/{sid}.json", self._stop_transcription),
        ]
        return Starlette(routes=routes, exception_handlers={RestError: _refuse, 404: _refuse_unknown})

    def _route(self, resource: Resource, method: str, path: str, handle: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            await self._faults.strike(resource)
            self._authenticate(request)
            return handle(request, Form(await request.body()))

        return Route(ROOT + path, endpoint, methods=[method])

    def _authenticate(self, request: Request) -> None:
        expected = base64.b64encode(f"{self._account.sid}:{self._account.auth_token}".encode()).decode()
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Basic {expected}".encode()):
            raise RestError(401, 20003, "Authenticate: the account sid or the auth token is not the one configured")
        if request.path_params["account"] != self._account.sid:
            raise _unknown(request)

    # Calls

    def _fetch_call(self, request: Request, _form: Form) -> Response:
        return JSONResponse(self._call(request).resource())

    def _update_call(self, request: Request, form: Form) -> Response:
        call = self._call(request)
        if call.ended:
            raise RestError(400, 21220, "Call is not in-progress. Cannot redirect.")
        url, text, status, limit = map(form.get, ("Url", "Twiml", "Status", "TimeLimit"))
        method, wishes = form.choice("Method", "POST", "GET"), [wish for wish in (url, text, status) if wish]
        if len(wishes) > 1 or not (wishes or limit):
            raise RestError(400, 21218, "Give one of Status, Twiml and Url, or a TimeLimit.")
        if limit:
            call.limit(_seconds(limit))
        if status:
            _change_status(call, status)
        elif url:
            call.replace(Step(twiml.Reference(url, method)))
        elif text:
            call.replace(Step(text=text))
        return JSONResponse(call.resource())

    def _call(self, request: Request) -> Call:
        """Return the call that a request is about. Raises `RestError`."""
        call = self._calls.get(request.path_params["call"])
        if call is None:
            raise _unknown(request)
        return call

    # Recordings

    def _record(self, request: Request, form: Form) -> Response:
        call = self._call(request)
        line = _line(call, "recording")
        name = "RecordingStatusCallback"
        order = recordings.Order(
            str(request.base_url).rstrip("/"),
            form.choice("RecordingChannels", "mono", "dual"),
            form.choice("RecordingTrack", "both", "inbound", "outbound"),
            form.choice("Trim", "do-not-trim", "trim-silence") == "trim-silence",
            form.callback(name, name + "Method"),
            form.words(name + "Event") or ("completed",),
        )
        return JSONResponse(call.recordings.resource(call.recordings.start(order, line.tracks)), 201)

    def _change_recording(self, request: Request, form: Form) -> Response:
        call = self._call(request)
        recording = call.recordings.find(request.path_params["recording"])
        if recording is None:
            raise _unknown(request)
        status: Literal["stopped", "paused", "in-progress"] = form.choice("Status", "stopped", "paused", "in-progress")
        call.recordings.change(recording, status, form.choice("PauseBehavior", "silence", "skip"))
        return JSONResponse(call.recordings.resource(recording))

    def _fetch_recording(self, request: Request, _form: Form) -> Response:
        call, recording = self._recording(request)
        return JSONResponse(call.recordings.resource(recording))

    def _fetch_audio(self, request: Request, _form: Form) -> Response:
        _, recording = self._recording(request)
        if recording.status != "completed":
            raise _unknown(request)
        return Response(recording.wav(), media_type="audio/x-wav")

    def _remove_recording(self, request: Request, _form: Form) -> Response:
        call, recording = self._recording(request)
        call.recordings.remove(recording)
        return Response(status_code=204)

    def _recording(self, request: Request) -> tuple[Call, Recording]:
        """Return the recording that a request is about, and its call. Raises `RestError`."""
        for call in self._calls.values():
            if recording := call.recordings.find(request.path_params["recording"]):
                return call, recording
        raise _unknown(request)

    # Transcriptions

    def _transcribe(self, request: Request, form: Form) -> Response:
        call = self._call(request)
        line = _line(call, "transcription")
        order = transcriptions.Order(
            form.choice("Track", "both_tracks", "inbound_track", "outbound_track"),
            form.get("TranscriptionEngine", "google"),
            form.get("LanguageCode", "en-US"),
            form.flag("PartialResults"),
            form.callback("StatusCallbackUrl", "StatusCallbackMethod"),
        )
        made = call.transcriptions.start(order, line.tracks)
        return JSONResponse(_transcription(call, made), 201)

    def _stop_transcription(self, request: Request, form: Form) -> Response:
        call = self._call(request)
        transcription = call.transcriptions.find(request.path_params["sid"])
        if transcription is None:
            raise _unknown(request)
        form.choice("Status", "stopped")
        transcription.stop()
        return JSONResponse(_transcription(call, transcription))


def _line(call: Call, wish: str) -> Line:
    """Return the line of a call that is in progress. Raises `RestError` for any other."""
    if call.status != "in-progress" or call.line is None:
        message = f"Requested resource is not eligible for {wish}: the call is {call.status}."
        raise RestError(400, 21220, message)
    return call.line


def _seconds(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise RestError(400, INVALID, f"TimeLimit={text!r} is not a number of seconds greater than 0.")
    return int(text)


def _change_status(call: Call, status: str) -> None:
    if status == "completed" or (status == "canceled" and call.status in {"queued", "ringing"}):
        call.end(f"ended over REST: Status={status}")
        return
    raise RestError(400, 21218, f"Status={status!r} is not possible for a call that is {call.status}.")


def _transcription(call: Call, made: transcriptions.Transcription) -> dict[str, str]:
    """Return a transcription as Twilio's REST API describes it."""
    account = call.account.sid
    uri = f"/2010-04-01/Accounts/{account}/Calls/{call.sid}/Transcriptions/{made.sid}.json"
    return {"sid": made.sid, "account_sid": account, "call_sid": call.sid, "status": made.status, "uri": uri}


def _unknown(request: Request) -> RestError:
    return RestError(404, 20404, f"The requested resource {request.url.path} was not found")


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RestError)
    return error.response()


async def _refuse_unknown(request: Request, _error: Exception) -> Response:
    return _unknown(request).response()
