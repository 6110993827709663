"""Twilio's reports on a call, form fields in and the pipe's events out. No I/O.

Sources: Twilio docs, "Call resource" (status and recording callbacks), TwiML <Stream> (statusCallback); for the real-time
transcription callbacks, which are documented in part, live captures. Unknown fields are passed over.
"""

import re
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from protocol.messages import CallStatus, RecordingStatus, RecordingUrl, StreamStatus, Transcript, TranscriptStatus

_DECIMAL = re.compile(r"[0-9]{1,15}(\.[0-9]{0,30})?|\.[0-9]{1,30}")  # single precision, widened, has many places

OVER = ("completed", "busy", "failed", "no-answer", "canceled")  # a call's last states


class Malformed(Exception):
    """A report does not say what it should."""


class _TranscriptionData(Struct, frozen=True):
    """What was understood; a draft has no confidence."""

    transcript: str = ""
    confidence: float | None = None


def transcript(fields: Mapping[str, str]) -> Transcript | TranscriptStatus:
    """Read a report on a transcription. Raises `Malformed`."""
    sid, event = fields.get("TranscriptionSid", ""), fields.get("TranscriptionEvent", "")
    match event.removeprefix("transcription-"):
        case "started":
            return TranscriptStatus("started", sid)
        case "stopped":
            return TranscriptStatus("stopped", sid)
        case "error":  # which of the two spellings is right is not documented
            message = fields.get("ErrorMessage") or fields.get("TranscriptionError", "")
            code = fields.get("ErrorCode") or fields.get("TranscriptionErrorCode", "")
            return TranscriptStatus("failed", sid, message, _number(code))
        case "content":
            return _content(fields)
    raise Malformed(f"TranscriptionEvent={event!r} is not known")


def _content(fields: Mapping[str, str]) -> Transcript:
    try:
        data = msgspec.json.decode(fields.get("TranscriptionData", ""), type=_TranscriptionData)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Malformed(f"TranscriptionData cannot be read: {error}") from None
    return Transcript(
        data.transcript,
        fields.get("Track", "").removesuffix("_track"),
        fields.get("Final", "true").lower() == "true",
        data.confidence,
        _number(fields.get("SequenceId", "")) or 0,
        fields.get("LanguageCode", ""),
        _decimal(fields.get("Stability", "")),
    )


def recording(fields: Mapping[str, str]) -> RecordingStatus:
    """Read a report on a recording. Raises `Malformed`."""
    sid, status = fields.get("RecordingSid", ""), fields.get("RecordingStatus", "")
    if not sid or not status:
        raise Malformed("RecordingSid or RecordingStatus is missing")
    return RecordingStatus(sid, status, dict(fields))


def recording_url(status: RecordingStatus) -> RecordingUrl:
    """Return what a complete recording's report says of where it is."""
    fields = status.fields
    channels = _number(fields.get("RecordingChannels", "")) or 1
    return RecordingUrl(fields.get("RecordingUrl", ""), _decimal(fields.get("RecordingDuration", "")), status.sid, channels)


def stream(fields: Mapping[str, str]) -> StreamStatus:
    """Read a report on a media stream. Raises `Malformed`."""
    event = fields.get("StreamEvent", "")
    if event not in ("stream-started", "stream-stopped", "stream-error"):
        raise Malformed(f"StreamEvent={event!r} is not known")
    return StreamStatus(event.removeprefix("stream-"), fields.get("StreamSid", ""), fields.get("StreamError", ""))


def call(fields: Mapping[str, str]) -> CallStatus:
    """Read a report on the call itself. Raises `Malformed`."""
    status = fields.get("CallStatus", "")
    if not status:
        raise Malformed("CallStatus is missing")
    return CallStatus(status, dict(fields))


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _decimal(text: str) -> float | None:
    return float(text) if _DECIMAL.fullmatch(text) else None
