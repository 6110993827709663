"""What Twilio records and transcribes of one call: asked for over REST, told of by callbacks, copied here if wanted.

Sources: Twilio docs, "Recordings" and "Real-Time Transcriptions" resources.
"""

from collections.abc import Mapping

import structlog
import trio
from msgspec import Struct

from dialog_supervisor.carriers.base import CarrierError, Leg
from dialog_supervisor.carriers.twilio import callbacks
from dialog_supervisor.carriers.twilio.rest import TwilioRest
from dialog_supervisor.files import NotKept, keep
from dialog_supervisor.sections import RecordingsConfig
from protocol.messages import Error, RecordingUrl, StartRecording, StartTranscript, TranscriptStatus

_DOWNLOADS = 64  # of one call, not yet begun

log = structlog.get_logger("twilio")


class RecordingsState(Struct, frozen=True, forbid_unknown_fields=True):
    """The recordings of a call that another dialogd goes on with. `uncopied` are finished, and to be copied here."""

    current: str = ""
    last: str = ""
    stopped: frozenset[str] = frozenset()
    wanted: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()
    uncopied: tuple[RecordingUrl, ...] = ()


class TranscriptionState(Struct, frozen=True, forbid_unknown_fields=True):
    """The transcription of a call that another dialogd goes on with."""

    current: str = ""
    last: str = ""
    over: frozenset[str] = frozenset()


class Recordings:
    """The recordings of one call, one at a time. What is told of them goes through `leg`."""

    def __init__(self, call_sid: str, leg: Leg, rest: TwilioRest, config: RecordingsConfig, callback_url: str) -> None:
        self._call_sid = call_sid
        self._leg = leg
        self._rest = rest
        self._config = config
        self._callback_url = callback_url
        self._current = ""  # under way
        self._last = ""
        self._stopped: set[str] = set()  # a report that one has begun may come after that
        self._changing = trio.Lock()  # two requests at a time would each find what the other is about to change
        self._wanted: set[str] = set()  # to be copied here
        self._finished: set[str] = set()
        self._uncopied: dict[str, RecordingUrl] = {}
        self._download, self._downloads = trio.open_memory_channel[RecordingUrl](_DOWNLOADS)

    def state(self) -> RecordingsState:
        """Return what another dialogd needs to go on."""
        sets = frozenset(self._stopped), frozenset(self._wanted), frozenset(self._finished)
        return RecordingsState(self._current, self._last, *sets, tuple(self._uncopied.values()))

    def take_up(self, state: RecordingsState) -> None:
        """Go on as another dialogd left it; a copy that it had begun is begun again."""
        self._current, self._last = state.current, state.last
        self._stopped, self._wanted, self._finished = set(state.stopped), set(state.wanted), set(state.finished)
        for recording in state.uncopied:
            self._completed(recording)

    async def start(self, request: StartRecording) -> None:
        """Begin to record. Raises `CarrierError`."""
        async with self._changing:
            if self._current:
                raise CarrierError(f"recording {self._current} is under way; stop it before another begins")
            sid = await self._rest.start_recording(self._call_sid, request, self._callback_url)
            if request.download:
                self._wanted.add(sid)
            self._begun(sid)

    def _begun(self, sid: str) -> None:
        if sid not in self._finished | self._stopped:
            self._current = self._last = sid
            self._leg.owe(sid)

    async def pause(self, behavior: str) -> None:
        """Pause. Raises `CarrierError`."""
        await self._rest.change_recording(self._call_sid, self._under_way(), "paused", behavior)

    async def resume(self) -> None:
        """Go on. Raises `CarrierError`."""
        await self._rest.change_recording(self._call_sid, self._under_way(), "in-progress")

    async def stop(self) -> None:
        """End the recording; its callback follows. Raises `CarrierError`."""
        async with self._changing:
            await self._stop(self._under_way())

    async def _stop(self, sid: str) -> None:
        await self._rest.change_recording(self._call_sid, sid, "stopped")
        self._stopped.add(sid)
        self._current = ""

    async def remove(self) -> None:
        """Delete the last recording at Twilio. Raises `CarrierError`."""
        async with self._changing:
            if not self._last:
                raise CarrierError("there is no recording of this call to be removed")
            if self._current:
                await self._stop(self._current)
            await self._rest.remove_recording(self._last)
            self._finished.add(self._last)
            self._leg.paid(self._last)
            self._last = ""

    def _under_way(self) -> str:
        if not self._current:
            raise CarrierError("no recording of this call is under way")
        return self._current

    def callback(self, fields: Mapping[str, str]) -> None:
        """Take Twilio's report on a recording, which may come twice, or before the answer to the request for it."""
        status = callbacks.recording(fields)
        if status.sid in self._finished:
            return
        self._leg.emit(status)
        if status.status == "in-progress":
            self._begun(status.sid)
            return
        if status.status not in ("completed", "absent", "failed"):
            return
        self._finished.add(status.sid)
        if self._current == status.sid:
            self._current = ""
        if status.status == "completed":
            self._completed(callbacks.recording_url(status))
        else:
            log.warning("there is no recording", recording=status.sid, status=status.status)
            self._leg.paid(status.sid)

    def _completed(self, recording: RecordingUrl) -> None:
        if recording.sid in self._wanted:
            try:
                self._download.send_nowait(recording)
                self._uncopied[recording.sid] = recording
            except trio.WouldBlock:
                self._not_copied(recording, f"{_DOWNLOADS} recordings of this call wait to be copied")
            return
        self._tell(recording)

    def _tell(self, recording: RecordingUrl) -> None:
        self._uncopied.pop(recording.sid, None)
        self._leg.emit(recording)
        self._leg.paid(recording.sid)

    async def run(self) -> None:
        """Copy finished recordings here, one after another, and tell of each."""
        async for recording in self._downloads:
            name = f"{self._call_sid}-{recording.sid}.{self._config.format}"
            media = self._rest.media(f"{recording.url}.{self._config.format}")
            try:
                path = await keep(media, self._config.directory / name, self._config.size_limit)
            except (CarrierError, NotKept) as error:
                self._not_copied(recording, str(error))
                continue
            log.info("recording is kept", recording=recording.sid, path=str(path), seconds=recording.duration_s)
            self._tell(RecordingUrl(recording.url, recording.duration_s, recording.sid, recording.channels, str(path)))

    def _not_copied(self, recording: RecordingUrl, reason: str) -> None:
        log.error("recording is not copied; it is still at the carrier", recording=recording.sid, reason=reason)
        self._leg.emit(Error("recording_not_copied", f"{recording.sid}: {reason}"))
        self._tell(recording)


class Transcription:
    """Twilio's transcription of one call. What is told of it goes through `leg`."""

    def __init__(self, call_sid: str, leg: Leg, rest: TwilioRest, callback_url: str) -> None:
        self._call_sid = call_sid
        self._leg = leg
        self._rest = rest
        self._callback_url = callback_url
        self._current = ""
        self._last = ""
        self._over: set[str] = set()  # stopped; a report that one has begun may come after that
        self._changing = trio.Lock()

    def state(self) -> TranscriptionState:
        """Return what another dialogd needs to go on."""
        return TranscriptionState(self._current, self._last, frozenset(self._over))

    def take_up(self, state: TranscriptionState) -> None:
        """Go on as another dialogd left it."""
        self._current, self._last, self._over = state.current, state.last, set(state.over)

    async def start(self, request: StartTranscript) -> None:
        """Begin to transcribe. Raises `CarrierError`."""
        async with self._changing:
            if self._current:
                raise CarrierError(f"transcription {self._current} is under way; stop it before another begins")
            self._begun(await self._rest.start_transcription(self._call_sid, request, self._callback_url))

    def _begun(self, sid: str) -> None:
        if sid and sid not in self._over:
            self._current = self._last = sid
            self._leg.owe(sid)

    async def stop(self) -> None:
        """End the transcription; its last callback follows. Raises `CarrierError`."""
        async with self._changing:
            if not (sid := self._current):
                raise CarrierError("no transcription of this call is under way")
            await self._rest.stop_transcription(self._call_sid, sid)
            self._over.add(sid)
            self._current = ""

    def callback(self, fields: Mapping[str, str]) -> None:
        """Take Twilio's report on a transcription."""
        report = callbacks.transcript(fields)
        if isinstance(report, TranscriptStatus):
            if report.status == "started":
                self._begun(report.sid)
            else:
                self._ended(report)
        self._leg.emit(report)

    def _ended(self, report: TranscriptStatus) -> None:
        if report.status == "failed":
            log.warning("transcription failed", transcription=report.sid, code=report.code, reason=report.message)
        sid = report.sid or self._last  # whether the report of an end has a sid is documented for its beginning alone
        self._over.add(sid)
        if self._current == sid:
            self._current = ""
        self._leg.paid(sid)
