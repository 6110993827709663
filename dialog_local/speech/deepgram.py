"""Deepgram's wire format, without I/O: what a client asks for, and the messages it gets.

Deepgram docs: live streaming API reference, endpointing, utterance end, finalize, audio keep alive; shapes as in
deepgram-sdk 7.17 (`listen/v1/types`).
"""

import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias
from uuid import uuid4

import msgspec

from dialog_local.speech.audio import Encoding
from dialog_local.speech.hearing import Segment
from dialog_local.speech.models import spread

ENCODINGS: dict[str, Encoding] = {"mulaw": "pcm_mulaw", "linear16": "pcm_s16le"}
RATES = range(8000, 48001)  # Hz
DEFAULT_ENDPOINTING_MS = 10.0
# The recogniser tells no confidence, and the field is not optional on the wire.
CONFIDENCE = 0.9
_MODEL = {"name": "moonshine-tiny-en", "version": "0.0.73", "arch": "moonshine"}
_MODEL_UUID = "6d6f6f6e-7368-696e-652d-74696e79656e"


class Refused(Exception):
    """A request that cannot be served: HTTP status and Deepgram's short code, which goes into the `dg-error` header."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class SchemaError(Exception):
    """A text frame that is not one of the control messages."""


class KeepAlive(msgspec.Struct, tag_field="type", tag="KeepAlive"):
    """The client is still there, though silent."""


class Finalize(msgspec.Struct, tag_field="type", tag="Finalize"):
    """Transcribe what was sent so far, now."""


class CloseStream(msgspec.Struct, tag_field="type", tag="CloseStream"):
    """Transcribe what was sent so far, then close."""


Control: TypeAlias = KeepAlive | Finalize | CloseStream
_controls: msgspec.json.Decoder[Control] = msgspec.json.Decoder(Control)


def parse_control(text: str) -> Control:
    """Read a text frame. Raises `SchemaError`."""
    try:
        return _controls.decode(text)
    except msgspec.DecodeError as error:
        raise SchemaError(f"{error}; expected KeepAlive, Finalize or CloseStream, got {text[:80]!r}") from error


@dataclass(frozen=True)
class Options:
    """The query of one stream; times in milliseconds, `endpointing_ms` None for `endpointing=false`."""

    encoding: Encoding = "pcm_s16le"
    sample_rate: int = 16_000
    interim_results: bool = False
    endpointing_ms: float | None = DEFAULT_ENDPOINTING_MS
    utterance_end_ms: float | None = None
    vad_events: bool = False
    punctuate: bool = False  # also smart_format, which includes it


def authorize(headers: Mapping[str, str]) -> None:
    """Take any key in `Authorization: Token KEY` (or `Bearer`). Raises `Refused` with 401 if there is none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() not in {"token", "bearer"} or not key.strip():
        raise Refused(401, "INVALID_AUTH", "Invalid credentials: send the header `Authorization: Token KEY`.")


def parse_options(query: Mapping[str, str], *, raw_audio: bool = True) -> Options:
    """Read a query; `raw_audio` demands encoding and sample rate, which a WAV file brings itself. Raises `Refused`."""
    encoding, rate = Options.encoding, Options.sample_rate
    if raw_audio:
        encoding, rate = _encoding(query), _sample_rate(query)
    if query.get("channels", "1") != "1":
        raise Refused(400, "Bad Request", f"channels={query['channels']}: this server recognises one channel")
    return Options(
        encoding=encoding,
        sample_rate=rate,
        interim_results=_flag(query, "interim_results"),
        endpointing_ms=_milliseconds(query, "endpointing", DEFAULT_ENDPOINTING_MS),
        utterance_end_ms=_milliseconds(query, "utterance_end_ms", None),
        vad_events=_flag(query, "vad_events"),
        punctuate=_flag(query, "punctuate") or _flag(query, "smart_format"),
    )


def _encoding(query: Mapping[str, str]) -> Encoding:
    name = query.get("encoding", "")
    if name not in ENCODINGS:
        raise Refused(400, "Bad Request", f"encoding={name!r}: this server takes {' and '.join(ENCODINGS)}")
    return ENCODINGS[name]


def _sample_rate(query: Mapping[str, str]) -> int:
    text = query.get("sample_rate", "")
    if not text.isascii() or not text.isdigit() or int(text) not in RATES:
        raise Refused(400, "Bad Request", f"sample_rate={text!r}: expected {RATES[0]} to {RATES[-1]}")
    return int(text)


def _flag(query: Mapping[str, str], name: str) -> bool:
    value = query.get(name, "false")
    if value not in {"true", "false"}:
        raise Refused(400, "Bad Request", f"{name}={value!r}: expected true or false")
    return value == "true"


def _milliseconds(query: Mapping[str, str], name: str, default: float | None) -> float | None:
    value = query.get(name)
    if value is None or value == "true":
        return default
    if value == "false":
        return None
    if not value.isascii() or not value.isdigit():
        raise Refused(400, "Bad Request", f"{name}={value!r}: expected milliseconds or false")
    return float(value)


class Messages:
    """Writes the server's messages for one stream or one request."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.request_id = str(uuid4())
        self._digest = hashlib.sha256()
        self._created = datetime.now(UTC)

    def count(self, audio: bytes) -> None:
        """Take note of received audio for the digest in `metadata`."""
        self._digest.update(audio)

    def results(self, segment: Segment, text: str, *, is_final: bool) -> str:
        """Say what a segment means."""
        message: dict[str, Any] = {
            "type": "Results",
            "channel_index": [0, 1],
            "duration": round(segment.end - segment.start, 3),
            "start": round(segment.start, 3),
            "is_final": is_final,
            "speech_final": is_final and segment.speech_final,
            "channel": {"alternatives": [self.alternative(text, [(segment, text)])]},
            "metadata": {"request_id": self.request_id, "model_info": _MODEL, "model_uuid": _MODEL_UUID},
            "from_finalize": is_final and segment.from_finalize,
        }
        return json.dumps(message)

    def alternative(self, text: str, parts: list[tuple[Segment, str]]) -> dict[str, Any]:
        """The transcript with its words' times."""
        words = [word for segment, part in parts for word in self._words(segment, part)]
        return {"transcript": self._shown(text), "confidence": CONFIDENCE if text else 0.0, "words": words}

    def speech_started(self, at: float) -> str:
        """Say that voice began."""
        return json.dumps({"type": "SpeechStarted", "channel": [0], "timestamp": round(at, 3)})

    def utterance_end(self, last_word_end: float) -> str:
        """Say that nothing was said for `utterance_end_ms`."""
        return json.dumps({"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": round(last_word_end, 3)})

    def error(self, description: str) -> str:
        """Refuse a text frame."""
        return json.dumps({"type": "Error", "variant": "SchemaError", "description": description})

    def metadata(self, seconds: float) -> dict[str, Any]:
        """What was processed; `type` is the stream's own."""
        return {
            "transaction_key": "deprecated",
            "request_id": self.request_id,
            "sha256": self._digest.hexdigest(),
            "created": self._created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "duration": round(seconds, 3),
            "channels": 1,
            "models": [_MODEL_UUID],
            "model_info": {_MODEL_UUID: _MODEL},
        }

    def _shown(self, text: str) -> str:
        return text if self._options.punctuate else " ".join(filter(None, map(_bare, text.split())))

    def _words(self, segment: Segment, text: str) -> list[dict[str, Any]]:
        words: list[dict[str, Any]] = []
        for timing in spread([word for word in text.split() if _bare(word)], segment.voice_start, segment.voice_end):
            word = {"word": _bare(timing.word), "start": round(timing.start, 3), "end": round(timing.end, 3)}
            punctuated = {"punctuated_word": timing.word} if self._options.punctuate else {}
            words.append({**word, "confidence": CONFIDENCE, **punctuated})
        return words


def _bare(word: str) -> str:
    """The word as Deepgram shows it without formatting: lower case, no punctuation around it."""
    return word.lower().strip(string.punctuation)
