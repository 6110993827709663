"""What Dialog asks of Twilio's REST API about a call: the vendor's own resources, with its errors as `CarrierError`."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import httpx
import trio
from twilio.base.exceptions import TwilioException, TwilioRestException, TwilioServiceException
from twilio.rest import Client
from twilio.twiml.voice_response import Dial, VoiceResponse

from dialog_supervisor.carriers.base import CarrierError
from dialog_supervisor.carriers.twilio.callbacks import OVER
from dialog_supervisor.carriers.twilio.transport import PRODUCTION_URL, HttpxTransport
from dialog_supervisor.sections import TwilioConfig
from dialog_supervisor.threads import in_thread
from protocol.messages import StartRecording, StartTranscript

_NOT_FOUND = 20404
_NOT_IN_PROGRESS = 21220
_MEDIA_ATTEMPTS = 5  # a recording's media may follow its callback after a moment
_MEDIA_BACKOFF_S = 0.5
_MEDIA_PASSING = (404, 429, 500, 502, 503, 504)
_RECORDING_EVENTS = ["in-progress", "completed", "absent"]


class TwilioRest:
    """The requests that Dialog makes about a call. All raise `CarrierError`."""

    def __init__(self, config: TwilioConfig, http: httpx.AsyncClient) -> None:
        self._http = http
        self._auth = (config.account_sid, config.auth_token)
        self._url = config.api_url.rstrip("/")
        self._timeout_s = config.timeout
        self._client = Client(*self._auth, http_client=HttpxTransport(http, self._url, config.timeout))
        self._loaded = False

    async def _resources(self) -> Client:
        """Return Twilio's client. At first it imports a hundred modules: in a thread, or all callers would wait for it."""
        if not self._loaded:
            with suppress(OSError):  # there can be no thread, and callers do wait
                await in_thread(lambda: self._client.calls)
            self._loaded = True
        return self._client

    async def _call(self, sid: str) -> Any:  # a CallContext; twilio-python has no types
        return (await self._resources()).calls(sid)

    # The call

    async def complete(self, call_sid: str) -> None:
        """End a call. One that is over already is no error."""
        try:
            await self._update(call_sid, status="completed")
        except CarrierError as error:
            if error.code not in (_NOT_FOUND, _NOT_IN_PROGRESS):
                raise

    async def dial(self, call_sid: str, destination: str) -> None:
        """Connect a call's caller to a number or SIP address, and end the call after that."""
        document, dial = VoiceResponse(), Dial()
        if destination.lower().startswith(("sip:", "sips:")):
            dial.sip(destination)
        else:
            dial.number(destination)
        document.append(dial)
        await self.replace(call_sid, document)

    async def replace(self, call_sid: str, document: VoiceResponse) -> None:
        """Have a call go on with another document; the stream under way is torn down."""
        await self._update(call_sid, twiml=str(document))

    async def _update(self, call_sid: str, **changes: str) -> None:
        with self._errors():
            call = await self._call(call_sid)
            await call.update_async(**changes)

    async def is_over(self, call_sid: str) -> bool:
        """Ask whether a call has ended."""
        try:
            with self._errors():
                call = await self._call(call_sid)
                call = await call.fetch_async()
        except CarrierError as error:
            if error.code == _NOT_FOUND:
                return True
            raise
        return call.status in OVER

    # Recordings

    async def start_recording(self, call_sid: str, request: StartRecording, callback_url: str) -> str:
        """Record a call and return the recording's sid; what becomes of it is reported to `callback_url`."""
        with self._errors():
            call = await self._call(call_sid)
            recording = await call.recordings.create_async(
                recording_channels=request.channels,
                recording_track=request.track,
                trim="trim-silence" if request.trim else "do-not-trim",
                recording_status_callback=callback_url,
                recording_status_callback_method="POST",
                recording_status_callback_event=_RECORDING_EVENTS,
            )
        return self._sid(recording.sid)

    async def change_recording(self, call_sid: str, sid: str, status: str, pause_behavior: str = "") -> None:
        """Have a recording "paused", "in-progress" again, or "stopped"."""
        behavior = {"pause_behavior": pause_behavior} if pause_behavior else {}
        with self._errors():
            call = await self._call(call_sid)
            await call.recordings(sid).update_async(status=status, **behavior)

    async def remove_recording(self, sid: str) -> None:
        """Delete a recording."""
        with self._errors():
            client = await self._resources()
            await client.recordings(sid).delete_async()

    @asynccontextmanager
    async def media(self, url: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open a recording's media, which may be large; the credentials go to Twilio's API and nowhere else."""
        url = url.replace(PRODUCTION_URL, self._url, 1)
        if not url.startswith(f"{self._url}/"):
            raise CarrierError(f"the recording is said to be at {url}, which is not Twilio's API at {self._url}")
        with self._reached():
            response = await self._media(self._http.build_request("GET", url, timeout=self._timeout_s))
            try:
                yield response.aiter_bytes()
            finally:
                await response.aclose()

    async def _media(self, request: httpx.Request) -> httpx.Response:
        attempt = 0
        while True:
            response = await self._http.send(request, auth=self._auth, stream=True, follow_redirects=True)
            if response.is_success:
                return response
            await response.aclose()
            attempt += 1
            if response.status_code not in _MEDIA_PASSING or attempt == _MEDIA_ATTEMPTS:
                raise CarrierError(f"Twilio answered {response.status_code} for the recording", status=response.status_code)
            await trio.sleep(_MEDIA_BACKOFF_S * 2 ** (attempt - 1))

    # Transcriptions

    async def start_transcription(self, call_sid: str, request: StartTranscript, callback_url: str) -> str:
        """Transcribe a call and return the transcription's sid; what is said is reported to `callback_url`."""
        model = {"speech_model": request.model} if request.model else {}
        with self._errors():
            call = await self._call(call_sid)
            transcription = await call.transcriptions.create_async(
                track=f"{request.track}_track{'s' if request.track == 'both' else ''}",
                transcription_engine=request.engine,
                language_code=request.language,
                partial_results=request.partial_results,
                status_callback_url=callback_url,
                status_callback_method="POST",
                **model,
            )
        return self._sid(transcription.sid)

    async def stop_transcription(self, call_sid: str, sid: str) -> None:
        """Transcribe no more."""
        with self._errors():
            call = await self._call(call_sid)
            await call.transcriptions(sid).update_async(status="stopped")

    def _sid(self, sid: str | None) -> str:
        if not sid:
            raise CarrierError(f"Twilio's API at {self._url} answered without a sid")
        return sid

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Inside, whatever Twilio, its library or the way there has to complain of becomes a `CarrierError`."""
        try:
            with self._reached():
                yield
        except TwilioRestException as error:
            code = None if error.code == error.status else error.code  # what the library puts where Twilio gave no code
            raise CarrierError(f"Twilio answered {error.status}: {error.msg}", code=code, status=error.status) from error
        except TwilioServiceException as error:
            said = ": ".join(filter(None, (error.title, error.detail)))
            raise CarrierError(f"Twilio answered {error.status}: {said}", code=error.code, status=error.status) from error
        except TwilioException as error:
            raise CarrierError(f"Twilio: {error}") from error
        except (ValueError, TypeError, AttributeError) as error:  # the library takes every answer for a JSON object
            reason = f"Twilio's API at {self._url} answered something else than a JSON object: {error}"
            raise CarrierError(reason) from error

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Inside, what goes wrong on the way becomes a `CarrierError`."""
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise CarrierError(f"Twilio's API at {self._url} cannot be reached: {reason}") from error
