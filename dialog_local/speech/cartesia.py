"""Cartesia's wire format, without I/O: generation requests, how their text becomes sentences, and the server's messages.

Cartesia docs: TTS WebSocket API reference, contexts, buffering, API errors; shapes as in cartesia 4.2
(`types/generation_request.py`, `types/websocket_response.py`).
"""

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from dialog_local.speech.audio import BYTES_PER_SAMPLE, Encoding
from dialog_local.speech.models import Timing

RATES = range(8000, 48001)  # Hz
DEFAULT_BUFFER_DELAY_MS = 3000
MAX_BUFFER_DELAY_MS = 5000
MAX_TRANSCRIPT_CHARS = 10_000
_SLOWEST, _FASTEST = 0.6, 1.5


class Refused(Exception):
    """A request that cannot be served: HTTP status, and Cartesia's code, title and message."""

    def __init__(self, status: int, code: str, title: str, message: str, context_id: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.title = title
        self.context_id = context_id

    def body(self) -> dict[str, Any]:
        """The structured error (since version 2026-03-01)."""
        return {"error_code": self.code, "title": self.title, "message": str(self), "status_code": self.status}


class OutputFormat(msgspec.Struct, frozen=True):
    """How the audio shall come."""

    container: str
    encoding: Encoding
    sample_rate: int


class GenerationConfig(msgspec.Struct, frozen=True):
    """How it shall be spoken; volume and emotion are ignored here."""

    speed: float = 1.0


class Generation(msgspec.Struct):
    """One generation request; `context_id` only on the WebSocket."""

    model_id: str
    transcript: str
    voice: Any  # a string or an object, by version; this server has one voice
    output_format: OutputFormat
    context_id: str = ""
    continues: bool = msgspec.field(name="continue", default=False)
    flush: bool = False
    max_buffer_delay_ms: int = DEFAULT_BUFFER_DELAY_MS
    add_timestamps: bool = False
    generation_config: GenerationConfig | None = None

    @property
    def speed(self) -> float:
        """Speaking rate, 1 is normal."""
        return self.generation_config.speed if self.generation_config else 1.0

    def fixed(self) -> tuple[Any, ...]:
        """What must stay the same within a context."""
        return self.model_id, self.voice, self.output_format, self.speed, self.add_timestamps


class Cancel(msgspec.Struct):
    """Stop what has not begun of a context."""

    context_id: str
    cancel: bool


def authorize(headers: Mapping[str, str], query: Mapping[str, str]) -> None:
    """Take any key in `Authorization: Bearer` or `X-API-Key`, and any dated version. Raises `Refused`."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    key = bearer if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    if not key.strip() and not query.get("access_token"):
        message = "send the header `Authorization: Bearer KEY` or `X-API-Key: KEY`"
        raise Refused(401, "unauthorized", "Unauthorized", message)
    version = query.get("cartesia_version") or headers.get("cartesia-version", "")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", version):
        message = f"version {version!r}: send the header `Cartesia-Version: 2026-08-14` or ?cartesia_version=2026-08-14"
        raise Refused(400, "invalid_version", "Invalid version", message)


def parse_message(text: str | bytes) -> Generation | Cancel:
    """Read a frame of the WebSocket. Raises `Refused`, with the context where it can be told."""
    try:
        fields = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise Refused(400, "invalid_json", "Invalid JSON", str(error)) from error
    context = fields.get("context_id") if isinstance(fields, dict) else None
    context_id = context if isinstance(context, str) else None
    if not context_id:
        raise Refused(400, "invalid_request", "Invalid request", "`context_id` is missing")
    if fields.get("cancel") is True:
        return Cancel(context_id, cancel=True)
    request = parse_generation(fields, context_id)
    if request.output_format.container != "raw":
        message = f"output_format.container {request.output_format.container!r}: a WebSocket carries raw audio"
        raise Refused(400, "invalid_request", "Invalid request", message, context_id)
    return request


def parse_generation(fields: Any, context_id: str | None = None) -> Generation:
    """Check a request's fields. Raises `Refused`."""
    try:
        request = msgspec.convert(fields, Generation)
    except msgspec.ValidationError as error:
        raise Refused(400, "invalid_request", "Invalid request", str(error), context_id) from error
    problem = _problem(request)
    if problem:
        raise Refused(400, "invalid_request", "Invalid request", problem, context_id)
    return request


def _problem(request: Generation) -> str | None:
    form = request.output_format
    if form.container not in {"raw", "wav"}:
        return f"output_format.container {form.container!r}: expected raw or wav"
    if form.sample_rate not in RATES:
        return f"output_format.sample_rate {form.sample_rate}: expected {RATES[0]} to {RATES[-1]}"
    if not 0 <= request.max_buffer_delay_ms <= MAX_BUFFER_DELAY_MS:
        return f"max_buffer_delay_ms {request.max_buffer_delay_ms}: expected 0 to {MAX_BUFFER_DELAY_MS}"
    if len(request.transcript) > MAX_TRANSCRIPT_CHARS:
        return f"a transcript of {len(request.transcript)} characters; at most {MAX_TRANSCRIPT_CHARS} at once"
    if not _SLOWEST <= request.speed <= _FASTEST:
        return f"generation_config.speed {request.speed}: expected {_SLOWEST} to {_FASTEST}"
    return None


# A sentence ends at its mark and the space after it, but not after "Mr." or a single letter as in "p. m.".
_SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)[.!?…]+[\"')\]]*\s+|\n+|[。！？]+")


class TextBuffer:
    """Collects text, joined verbatim, and gives it out in whole sentences."""

    def __init__(self) -> None:
        self._text = ""

    def __bool__(self) -> bool:
        return bool(self._text.strip())

    def push(self, text: str) -> list[str]:
        """Add text and return the sentences that it completes."""
        self._text += text
        sentences, start = [], 0
        for end in _SENTENCE_END.finditer(self._text):
            sentences.append(self._text[start : end.end()])
            start = end.end()
        self._text = self._text[start:]
        return [sentence for sentence in sentences if is_speakable(sentence)]

    def rest(self) -> list[str]:
        """Give out what is left as a sentence."""
        rest, self._text = self._text, ""
        return [rest] if is_speakable(rest) else []


def is_speakable(text: str) -> bool:
    """There is something to say in it, not just spaces and marks."""
    return any(character.isalnum() for character in text)


def bytes_per_second(form: OutputFormat) -> int:
    """How much audio a second takes."""
    return BYTES_PER_SAMPLE[form.encoding] * form.sample_rate


def chunk(context_id: str, audio: bytes, step_time_ms: float, flush_id: int) -> str:
    """Some audio; `step_time_ms` is how long it took to make."""
    data = base64.b64encode(audio).decode()
    fields = {"data": data, "step_time": round(step_time_ms, 3), "flush_id": flush_id}
    return _message("chunk", context_id, done=False, **fields)


def timestamps(context_id: str, timings: list[Timing]) -> str:
    """When words are said, in seconds since the context's first sample."""
    words = {
        "words": [timing.word for timing in timings],
        "start": [round(timing.start, 3) for timing in timings],
        "end": [round(timing.end, 3) for timing in timings],
    }
    return _message("timestamps", context_id, done=False, word_timestamps=words)


def flush_done(context_id: str, flush_id: int) -> str:
    """All audio of a manual flush has been sent."""
    return _message("flush_done", context_id, done=False, flush_id=flush_id, flush_done=True)


def done(context_id: str) -> str:
    """The context's last message."""
    return _message("done", context_id, done=True)


def error(refused: Refused) -> str:
    """What was wrong with a request."""
    context = {} if refused.context_id is None else {"context_id": refused.context_id}
    return json.dumps({"type": "error", "done": True, **context, **refused.body()})


def _message(kind: str, context_id: str, *, done: bool, **fields: Any) -> str:
    return json.dumps({"type": kind, "context_id": context_id, "done": done, "status_code": 206, **fields})
