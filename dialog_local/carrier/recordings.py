"""Recordings of one call as Twilio makes them: begun, paused and stopped over REST, told of by callbacks, kept as WAV.

Twilio docs, "Recordings" resource and "Recording status callbacks". A recording has no audio of its own; it knows which
stretches of the line's two tracks belong to it.
"""

import io
import wave
from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import Literal, TypeAlias

import numpy as np
import trio
from msgspec import Struct

from dialog_local.carrier.events import EventLog, Party, RecordingChanged
from dialog_local.carrier.faults import RestError
from dialog_local.carrier.line import FRAME_BYTES, FRAME_SECONDS, Track, audible_span
from dialog_local.carrier.playout import BYTES_PER_SECOND, SILENCE
from dialog_local.carrier.reports import Reports, rfc_now
from dialog_local.carrier.twiml import Reference
from dialog_local.speech.audio import decode, encode

PROCESSING_SECONDS = 0.2  # from a recording's end until it can be had; Twilio's takes seconds
SHORTEST_SECONDS = 0.1  # what is shorter is no recording; where Twilio draws the line is not documented
TOO_SHORT = "16101"  # Twilio docs, error 16101: the recording is too short
CURRENT = "Twilio.CURRENT"  # stands for the sid of the recording under way
SOURCE = "StartCallRecordingAPI"

Channels: TypeAlias = Literal["mono", "dual"]
Side: TypeAlias = Literal["both", "inbound", "outbound"]
Pause: TypeAlias = Literal["silence", "skip"]
Status: TypeAlias = Literal["in-progress", "paused", "stopped", "completed", "absent"]


class Order(Struct, frozen=True):
    """What is to be recorded, and how. `callback` is told the `events`; `api_url` is where the recording can be fetched."""

    api_url: str
    channels: Channels = "mono"
    side: Side = "both"
    trim: bool = False
    callback: Reference | None = None
    events: tuple[str, ...] = ("completed",)


class _Span(Struct, frozen=True):
    """A stretch of the call in samples; `silent` for a pause that is kept as silence."""

    begin: int
    end: int
    silent: bool = False


class Recording:
    """One recording of the line's `tracks`, from `at` (seconds of the call) on."""

    def __init__(self, order: Order, tracks: dict[Party, Track], at: float) -> None:
        self.sid = "RE" + token_hex(16)
        self.order = order
        self.status: Status = "in-progress"
        self.started_at = rfc_now()
        self.seconds = 0.0
        self.ended = trio.Event()
        self._tracks = tracks
        self._spans: list[_Span] = []
        self._since = _sample(at)
        self._pause: Pause = "silence"

    @property
    def under_way(self) -> bool:
        """Whether it is being recorded, or may go on to be."""
        return self.status in {"in-progress", "paused"}

    def change(self, status: Literal["paused", "in-progress", "stopped"], pause: Pause, at: float) -> None:
        """Pause, go on or stop. Raises `RestError` for a recording that is over."""
        if not self.under_way:
            raise RestError(400, 21220, f"Recording {self.sid} is {self.status}; its status cannot be changed.")
        if self.status == "in-progress" or self._pause == "silence":
            self._spans.append(_Span(self._since, _sample(at), silent=self.status == "paused"))
        self._since, self._pause, self.status = _sample(at), pause, status
        if status == "stopped":
            self.ended.set()

    def conclude(self) -> None:
        """Decide, when the tracks have all of it, whether there is a recording."""
        self.seconds = len(self._sides()[0]) / BYTES_PER_SECOND
        self.status = "absent" if self.seconds < SHORTEST_SECONDS else "completed"

    def wav(self) -> bytes:
        """Return a WAV file, 16 bit at 8 kHz: two channels, the caller left and the agent right, or both mixed in one."""
        levels = [decode(side, "pcm_mulaw") for side in self._sides()]
        channels = levels if self.order.channels == "dual" else [np.add(*levels)]
        written = io.BytesIO()
        with wave.open(written, "wb") as file:
            file.setnchannels(len(channels))
            file.setsampwidth(2)
            file.setframerate(BYTES_PER_SECOND)  # one byte of mu-law is one sample
            file.writeframes(encode(np.stack(channels, axis=1).reshape(-1), "pcm_s16le"))
        return written.getvalue()

    def _sides(self) -> list[bytes]:
        """Return what was recorded of the caller and of the agent, equally long."""
        sides = [self._side("caller", wanted=self.order.side != "outbound")]
        sides.append(self._side("agent", wanted=self.order.side != "inbound"))
        return _trimmed(sides) if self.order.trim else sides

    def _side(self, who: Party, *, wanted: bool) -> bytes:
        heard = self._tracks[who].read()
        pieces = []
        for span in self._spans:
            piece = heard[span.begin : span.end] if wanted and not span.silent else b""
            pieces.append(piece.ljust(span.end - span.begin, bytes([SILENCE])))
        return b"".join(pieces)


class Recordings:
    """The recordings of one call, by sid. `now` is the call's clock in seconds."""

    def __init__(self, account_sid: str, call_sid: str, reports: Reports, log: EventLog, now: Callable[[], float]) -> None:
        self._account_sid = account_sid
        self._call_sid = call_sid
        self._reports = reports
        self._log = log
        self._now = now
        self._known: dict[str, Recording] = {}

    def start(self, order: Order, tracks: dict[Party, Track]) -> Recording:
        """Begin to record, until somebody stops it or the call ends."""
        recording = Recording(order, tracks, self._now())
        self._known[recording.sid] = recording
        self._log.append(RecordingChanged(self._now(), recording.sid, recording.status))
        self._reports.start(lambda: self._accompany(recording))
        return recording

    def find(self, sid: str) -> Recording | None:
        """Return a recording; `CURRENT` is the last one that is under way."""
        if sid != CURRENT:
            return self._known.get(sid)
        return next((each for each in reversed(self._known.values()) if each.under_way), None)

    def change(self, recording: Recording, status: Literal["paused", "in-progress", "stopped"], pause: Pause) -> None:
        """Pause, go on or stop. Raises `RestError`."""
        recording.change(status, pause, self._now())
        self._log.append(RecordingChanged(self._now(), recording.sid, status))

    def remove(self, recording: Recording) -> None:
        """Forget a recording. Raises `RestError` while it is under way."""
        if recording.under_way:  # inferred: no source tells what Twilio answers
            raise RestError(400, 21220, f"Recording {recording.sid} is {recording.status}; stop it before it is deleted.")
        del self._known[recording.sid]

    def finish(self) -> None:
        """Stop what is under way: the call is about to end."""
        for recording in self._known.values():
            if recording.under_way:
                self.change(recording, "stopped", "silence")

    async def _accompany(self, recording: Recording) -> None:
        """Tell of a recording from its beginning to the moment when it can be had; nothing of one that was deleted."""
        await self._tell(recording)
        await recording.ended.wait()
        await trio.sleep(PROCESSING_SECONDS)
        if recording.sid in self._known:
            recording.conclude()
            await self._tell(recording)

    async def _tell(self, recording: Recording) -> None:
        status = recording.status if recording.ended.is_set() else "in-progress"
        if status not in recording.order.events:
            return
        fields = {
            "RecordingSid": recording.sid,
            "RecordingUrl": recording.order.api_url + self._path(recording),
            "RecordingStatus": status,
            "RecordingChannels": str(_CHANNELS[recording.order.channels]),
            "RecordingStartTime": recording.started_at,
            "RecordingSource": SOURCE,
            "RecordingTrack": recording.order.side,
        }
        if status == "completed":
            fields["RecordingDuration"] = _whole(recording.seconds)
        if status == "absent":
            fields["ErrorCode"] = TOO_SHORT
        await self._reports.tell(recording.order.callback, fields)

    def resource(self, recording: Recording) -> dict[str, object]:
        """Return a recording as Twilio's REST API describes it."""
        return {
            "sid": recording.sid,
            "account_sid": self._account_sid,
            "call_sid": self._call_sid,
            "api_version": "2010-04-01",
            "status": recording.status,
            "channels": _CHANNELS[recording.order.channels],
            "source": SOURCE,
            "track": recording.order.side,
            "duration": _whole(recording.seconds) if recording.status == "completed" else None,
            "error_code": TOO_SHORT if recording.status == "absent" else None,
            "start_time": recording.started_at,
            "uri": self._path(recording) + ".json",
        }

    def _path(self, recording: Recording) -> str:
        return f"/2010-04-01/Accounts/{self._account_sid}/Recordings/{recording.sid}"


_CHANNELS = {"mono": 1, "dual": 2}


def _sample(seconds: float) -> int:
    """Return where the frame under way began: what a party says from now on is put into that frame when it is due."""
    return int(seconds / FRAME_SECONDS) * FRAME_BYTES


def _whole(seconds: float) -> str:
    return str(max(1, round(seconds)))


def _trimmed(sides: Sequence[bytes]) -> list[bytes]:
    """Return both sides without the silence before the first and after the last sound of either."""
    spans = [span for span in map(audible_span, sides) if span is not None]
    first = min((first for first, _ in spans), default=0)
    last = max((last for _, last in spans), default=-1)
    return [side[first : last + 1] for side in sides]
