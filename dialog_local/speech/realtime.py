"""The wire format of OpenAI's realtime transcription, without I/O: a session's settings, a client's events, our answers.

OpenAI docs: "Realtime transcription" guide, Realtime API reference; shapes as in openai 3.50 (`types/realtime`).
"""

import json
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias
from uuid import uuid4

import msgspec
from msgspec import UNSET, Struct, UnsetType

from dialog_local.speech.audio import Encoding

SESSION_SECONDS = 3600.0  # then the server closes with 1001
LONGEST_ITEM_ID = 32
WITHOUT_TURN_DETECTION = frozenset({"gpt-live-transcribe", "gpt-realtime-whisper"})
WITHOUT_PROMPT = frozenset({"gpt-realtime-whisper"})
_SILENCE_S = {"low": 1.2, "medium": 0.8, "auto": 0.8, "high": 0.5}  # of semantic_vad; no model judges the sense here
_TRANSCRIPTION = "conversation.item.input_audio_transcription"


class Refused(Exception):
    """An event or a connection that OpenAI refuses, with its error's fields; `closes` if the connection ends by it."""

    def __init__(self, code: str, message: str, param: str | None = None, *, closes: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.closes = closes


class Pcmu(Struct, frozen=True, tag_field="type", tag="audio/pcmu"):
    """G.711 mu-law at 8 kHz."""

    encoding: ClassVar[Encoding] = "pcm_mulaw"
    rate: ClassVar[int] = 8000


class Pcm(Struct, frozen=True, tag_field="type", tag="audio/pcm"):
    """16-bit samples; OpenAI takes one rate only."""

    encoding: ClassVar[Encoding] = "pcm_s16le"
    rate: Literal[24000] = 24000


class ServerVad(Struct, frozen=True, tag_field="type", tag="server_vad"):
    """Turns end by silence. `threshold` is taken and ignored."""

    threshold: float = 0.5
    prefix_padding_ms: float = 300
    silence_duration_ms: float = 500

    @property
    def silence_s(self) -> float:
        """How much silence ends a turn."""
        return self.silence_duration_ms / 1000


class SemanticVad(Struct, frozen=True, tag_field="type", tag="semantic_vad"):
    """Turns end when a sentence seems to: here after more or less silence."""

    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    prefix_padding_ms: float = 300

    @property
    def silence_s(self) -> float:
        """How much silence ends a turn."""
        return _SILENCE_S[self.eagerness]


TurnDetection: TypeAlias = ServerVad | SemanticVad


class Transcription(Struct, frozen=True):
    """Which model writes; this server has one, whatever its name."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None


class Input(Struct, frozen=True):
    """How the audio comes and what becomes of it."""

    format: Pcmu | Pcm = Pcm()
    transcription: Transcription | None = None
    noise_reduction: dict[str, Any] | None = None
    turn_detection: TurnDetection | None = ServerVad()


class InputUpdate(Struct, frozen=True):
    """Fields left out keep their values; null clears."""

    format: Pcmu | Pcm | UnsetType = UNSET
    transcription: Transcription | UnsetType | None = UNSET
    noise_reduction: dict[str, Any] | UnsetType | None = UNSET
    turn_detection: TurnDetection | UnsetType | None = UNSET


class AudioUpdate(Struct, frozen=True):
    """Only input here."""

    input: InputUpdate = InputUpdate()


class SessionChanges(Struct, frozen=True):
    """What a client may set."""

    type: Literal["transcription"]
    audio: AudioUpdate = AudioUpdate()
    include: list[str] | None = None


class Outgoing(Struct, frozen=True, tag_field="type"):
    """Base of what a client sends."""

    event_id: str | None = None


class SessionUpdate(Outgoing, frozen=True, kw_only=True, tag="session.update"):
    """Change the session."""

    session: SessionChanges


class BetaUpdate(Outgoing, frozen=True, tag="transcription_session.update"):
    """The beta's way to change it."""


class Append(Outgoing, frozen=True, kw_only=True, tag="input_audio_buffer.append"):
    """More audio, base64 on the wire."""

    audio: bytes


class Commit(Outgoing, frozen=True, tag="input_audio_buffer.commit"):
    """The audio so far is an item."""


class Clear(Outgoing, frozen=True, tag="input_audio_buffer.clear"):
    """Forget the audio so far."""


class Retrieve(Outgoing, frozen=True, kw_only=True, tag="conversation.item.retrieve"):
    """Show an item; this server keeps none."""

    item_id: str


ClientEvent: TypeAlias = SessionUpdate | BetaUpdate | Append | Commit | Clear | Retrieve
_events: msgspec.json.Decoder[ClientEvent] = msgspec.json.Decoder(ClientEvent)


def parse_event(text: str | bytes) -> ClientEvent:
    """Read a client's event. Raises `Refused`."""
    try:
        return _events.decode(text)
    except msgspec.DecodeError as error:
        raise Refused("invalid_value", f"{error}; got {text[:80]!r}") from error


class _Envelope(Struct):
    event_id: str | None = None


def event_id(text: str | bytes) -> str | None:
    """The id that a client gave an event, as far as it can be read."""
    try:
        return msgspec.json.decode(text, type=_Envelope).event_id
    except msgspec.DecodeError:
        return None


def has_key(headers: Mapping[str, str]) -> bool:
    """Whether there is any key in `Authorization: Bearer KEY`."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and bool(key.strip())


def check_connection(headers: Mapping[str, str], query: Mapping[str, str]) -> None:
    """Raise `Refused` for a connection that is accepted only to be told why it cannot be used."""
    if "realtime=v1" in headers.get("openai-beta", ""):
        raise beta_refused()
    if "model" in query:
        message = f"Model {query['model']!r} in the URL: a transcription session takes its model by session.update."
        raise Refused("invalid_model", message, closes=True)
    if query.get("intent") != "transcription":
        raise Refused("invalid_intent", "This server only transcribes: connect with ?intent=transcription", closes=True)


def beta_refused() -> Refused:
    """What a client of the beta is told."""
    message = "The Realtime Beta API is no longer supported. Please use /v1/realtime for the GA API."
    return Refused("beta_api_shape_disabled", message, closes=True)


class SessionState:
    """A session's settings as they stand."""

    def __init__(self) -> None:
        self.id = f"sess_{uuid4().hex}"
        self.expires_at = int(time.time() + SESSION_SECONDS)
        self.input = Input()
        self.include: list[str] | None = None

    def update(self, changes: SessionChanges) -> None:
        """Take a client's changes, or none of them: raises `Refused`."""
        given = msgspec.structs.asdict(changes.audio.input)
        new = msgspec.structs.replace(self.input, **{name: value for name, value in given.items() if value is not UNSET})
        model = new.transcription.model if new.transcription else None
        if new.transcription and not model:
            raise Refused(
                "missing_required_parameter", "Missing required parameter: 'session.audio.input.transcription.model'."
            )
        if new.turn_detection and model in WITHOUT_TURN_DETECTION:
            message = "Turn detection is not supported for this transcription model"
            raise Refused("invalid_value", message, "session.audio.input.turn_detection")
        if new.transcription and new.transcription.prompt and model in WITHOUT_PROMPT:
            message = "Prompt is not supported for this transcription model"
            raise Refused("invalid_value", message, "session.audio.input.transcription.prompt")
        self.input, self.include = new, changes.include if changes.include is not None else self.include

    def shown(self) -> dict[str, Any]:
        """As `session.created` and `session.updated` show it."""
        return {
            "type": "transcription",
            "object": "realtime.transcription_session",
            "id": self.id,
            "expires_at": self.expires_at,
            "audio": {"input": msgspec.to_builtins(self.input)},
            "include": self.include,
        }


def event(kind: str, **fields: Any) -> str:
    """One of the server's events."""
    return json.dumps({"type": kind, "event_id": f"event_{uuid4().hex[:20]}", **fields})


def error(refused: Refused, answers: str | None = None) -> str:
    """Refuse the client's event with the id `answers`."""
    fields = {"code": refused.code, "message": str(refused), "param": refused.param, "event_id": answers}
    return event("error", error={"type": "invalid_request_error", **fields})


def denial(code: str, message: str) -> dict[str, Any]:
    """What a refused upgrade says."""
    return {"error": {"type": "invalid_request_error", "code": code, "message": message, "param": None}}


def new_item_id() -> str:
    """An id for the next item."""
    return f"item_{uuid4().hex}"[:LONGEST_ITEM_ID]


def delta(item_id: str, text: str) -> str:
    """More of an item's transcript."""
    return event(f"{_TRANSCRIPTION}.delta", item_id=item_id, content_index=0, delta=text)


def completed(item_id: str, transcript: str, seconds: float) -> str:
    """An item's whole transcript."""
    usage = {"type": "duration", "seconds": round(seconds, 3)}
    return event(f"{_TRANSCRIPTION}.completed", item_id=item_id, content_index=0, transcript=transcript, usage=usage)
