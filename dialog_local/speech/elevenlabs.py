"""ElevenLabs's multi-context wire format, without I/O: the options of a socket, the client's frames and the server's.

ElevenLabs docs: "Multi-context WebSocket" (API reference and guide); `websocketTTS` schemas of their AsyncAPI document.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from dialog_local.speech.audio import Encoding
from dialog_local.speech.cartesia import OutputFormat
from dialog_local.speech.models import Timing

_CODECS: dict[str, Encoding] = {"ulaw": "pcm_mulaw", "pcm": "pcm_s16le"}
_RATES = frozenset({8000, 16000, 22050, 24000, 44100, 48000})  # Hz
_LONGEST_INACTIVITY_S = 180


class Refused(Exception):
    """What cannot be served: a status for the upgrade (afterwards the socket is closed with 1008), a code and a message."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.code = code
        self.status = status

    def body(self) -> dict[str, Any]:
        """What a refused upgrade says."""
        return {"detail": {"status": self.code, "message": str(self)}}

    def frame(self) -> str:
        """What a socket says before it is closed."""
        return json.dumps({"message": str(self), "error": self.code, "code": 1008})


class Options(msgspec.Struct, frozen=True):
    """A socket's options, from its query; those that change only how it sounds or is billed are ignored."""

    form: OutputFormat
    inactivity_s: int
    aligned: bool


class VoiceSettings(msgspec.Struct, frozen=True):
    """How it shall be spoken; all but the speed is ignored here."""

    speed: float = 1.0


class Input(msgspec.Struct, frozen=True):
    """A client's frame; text without a `context_id` is of a context without a name."""

    context_id: str | None = None
    text: str = ""
    voice_settings: VoiceSettings | None = None
    flush: bool = False
    close_context: bool = False
    close_socket: bool = False


def authorize(headers: Mapping[str, str]) -> None:
    """Take any key in `xi-api-key`. Raises `Refused`."""
    if not headers.get("xi-api-key", "").strip():
        raise Refused("needs_authorization", "send the header `xi-api-key: KEY`", 401)


def parse_options(query: Mapping[str, str]) -> Options:
    """Read a socket's query. Raises `Refused`."""
    model = query.get("model_id", "")
    if model.startswith("eleven_v3"):
        raise Refused("unsupported_model", f"model_id {model!r} is not served on the multi-context socket")
    inactivity = query.get("inactivity_timeout", "20")
    if not inactivity.isdecimal() or not 1 <= int(inactivity) <= _LONGEST_INACTIVITY_S:
        raise Refused("invalid_request", f"inactivity_timeout {inactivity!r}: expected 1 to {_LONGEST_INACTIVITY_S} s")
    output_format = query.get("output_format", "mp3_44100_128")
    return Options(_form(output_format), int(inactivity), query.get("sync_alignment", "false") == "true")


def _form(output_format: str) -> OutputFormat:
    codec, _, rate = output_format.partition("_")
    if codec not in _CODECS or not rate.isdecimal() or int(rate) not in _RATES:
        raise Refused("invalid_output_format", f"output_format {output_format!r}: this server has ulaw_8000 and pcm_RATE")
    return OutputFormat("raw", _CODECS[codec], int(rate))


def parse_input(text: str | bytes) -> Input:
    """Read a frame. Raises `Refused`."""
    try:
        frame = msgspec.json.decode(text, type=Input)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused("invalid_input_message", f"Could not parse input message: {error}") from error
    speed = frame.voice_settings.speed if frame.voice_settings else 1.0
    if not 0.7 <= speed <= 1.2:
        raise Refused("invalid_voice_settings", f"voice_settings.speed {speed}: expected 0.7 to 1.2")
    return frame


Character = tuple[str, float, float]  # when it begins and ends, in seconds


def characters(timings: list[Timing]) -> list[Character]:
    """Share each word's time among its characters; a space follows each word and lasts until the next."""
    spelled: list[Character] = []
    for word, following in zip(timings, [*timings[1:], None], strict=True):
        share = (word.end - word.start) / max(len(word.word), 1)
        spelled += [(c, word.start + i * share, word.start + (i + 1) * share) for i, c in enumerate(word.word)]
        spelled.append((" ", word.end, following.start if following else word.end))
    return spelled


def audio(context_id: str | None, data: bytes, spelled: list[Character] | None, start_s: float) -> str:
    """Some audio and what is said in it; the times on the wire count from `start_s`, where this audio begins."""
    alignment = None
    if spelled is not None:
        starts = [round(1000 * (begin - start_s)) for _, begin, _ in spelled]
        ends = [round(1000 * (end - start_s)) for _, _, end in spelled]
        alignment = {
            "chars": [c for c, _, _ in spelled],
            "charStartTimesMs": starts,
            "charDurationsMs": [end - start for start, end in zip(starts, ends, strict=True)],
        }
    fields = {"audio": base64.b64encode(data).decode(), "alignment": alignment, "normalizedAlignment": alignment}
    return json.dumps({**fields, "isFinal": None, "contextId": context_id})


def final(context_id: str | None) -> str:
    """A context's last frame."""
    return json.dumps({"isFinal": True, "contextId": context_id})
