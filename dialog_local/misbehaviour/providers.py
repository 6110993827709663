"""The five endpoints that can misbehave: where they are, how each refuses and closes, and where its answers begin."""

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple

from starlette.responses import JSONResponse
from starlette.types import Scope

from dialog_local.brain import completions
from dialog_local.speech import cartesia, deepgram, elevenlabs, listen, realtime

_ON_PURPOSE = "this server was told to misbehave"
_UNAUTHORIZED, _TOO_MANY = 401, 429


class Piece(NamedTuple):
    """A message as a piece of an answer: which answer, whether this is heard or read of it, and whether it is the last."""

    answer: Hashable
    speaks: bool
    last: bool


class Parting(NamedTuple):
    """How a WebSocket ends: a frame first, where the provider sends one, and the close's reason."""

    frame: str | None
    reason: str


@dataclass(frozen=True)
class Provider:
    """One endpoint. `piece` is None where a request is one answer, `parting` where there is no WebSocket to close."""

    name: str
    kind: str  # of an ASGI scope
    path: re.Pattern[str]
    refusal: Callable[[int], JSONResponse]
    parting: Callable[[int, str | None], Parting] | None = None
    piece: Callable[[dict[str, Any]], Piece | None] | None = None


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown error"


def _word(status: int) -> str:
    return re.sub(r"\W+", "_", _phrase(status)).lower()


def _refused_by_deepgram(status: int) -> JSONResponse:
    code = {_UNAUTHORIZED: "INVALID_AUTH"}.get(status, _word(status).upper())
    return listen.refusal(deepgram.Refused(status, code, f"{_phrase(status)}: {_ON_PURPOSE}"))


def _refused_by_realtime(status: int) -> JSONResponse:
    return JSONResponse(realtime.denial(_openai_code(status), f"{_phrase(status)}: {_ON_PURPOSE}"), status)


def _refused_by_cartesia(status: int) -> JSONResponse:
    code = {_TOO_MANY: "concurrency_limited"}.get(status, _word(status))
    return JSONResponse(cartesia.Refused(status, code, _phrase(status), _ON_PURPOSE).body(), status)


def _refused_by_elevenlabs(status: int) -> JSONResponse:
    code = {_UNAUTHORIZED: "invalid_api_key", _TOO_MANY: "too_many_concurrent_requests"}.get(status, _word(status))
    return JSONResponse(elevenlabs.Refused(code, f"{_phrase(status)}: {_ON_PURPOSE}", status).body(), status)


def _refused_by_completions(status: int) -> JSONResponse:
    refused = completions.Refused(status, f"{_phrase(status)}: {_ON_PURPOSE}", _openai_code(status))
    return JSONResponse(refused.body, status)


def _openai_code(status: int) -> str:
    return {_UNAUTHORIZED: "invalid_api_key", _TOO_MANY: "rate_limit_exceeded"}.get(status, _word(status))


# RFC 6455, 7.4.1, and the registry of close codes
_REASONS = {1000: "", 1001: "going away", 1011: "internal error", 1012: "service restart", 1013: "try again later"}


def _part_as_deepgram(code: int, reason: str | None) -> Parting:
    """Deepgram docs, troubleshooting WebSocket, DATA and NET errors; its codes for DATA-0000 are 1002 and 1008."""
    data = "DATA-0000: could not decode the audio"
    net = "NET-0000: the service has not transmitted a Text frame to the client within the timeout window"
    return Parting(None, reason or {1002: data, 1008: data, 1011: net}.get(code, _reason(code)))


def _part_as_realtime(code: int, reason: str | None) -> Parting:
    """An error event goes before; 1001 is the end of the longest session, 4000 an invalid request."""
    expired = realtime.Refused("session_expired", "Your session hit the maximum duration of 60 minutes.")
    if code == 1001:
        return Parting(realtime.error(expired), reason or str(expired))
    if code == 4000:
        word = (reason or expired.code).removeprefix("invalid_request_error.")
        refused = expired if word == expired.code else realtime.Refused(word, _ON_PURPOSE)
        return Parting(realtime.error(refused), f"invalid_request_error.{word}")
    return Parting(None, reason or _reason(code))


def _part_as_cartesia(code: int, reason: str | None) -> Parting:
    return Parting(None, reason or ("idle for 5 minutes" if code == 1000 else _reason(code)))


def _part_as_elevenlabs(code: int, reason: str | None) -> Parting:
    """An error frame goes before a 1008, and its word is the close's reason."""
    if code != 1008:
        return Parting(None, reason or _reason(code))
    word = reason or "input_timeout_exceeded"
    return Parting(elevenlabs.Refused(word, _ON_PURPOSE).frame(), word)


def _reason(code: int) -> str:
    return _REASONS.get(code, _ON_PURPOSE)


def _piece_of_deepgram(message: dict[str, Any]) -> Piece | None:
    """An answer is an utterance's results; it begins with the first that has words."""
    if message["type"] == "UtteranceEnd":
        return Piece("utterance", speaks=False, last=True)
    if message["type"] != "Results":
        return None
    words = bool(message["channel"]["alternatives"][0]["transcript"])
    return Piece("utterance", speaks=words, last=message["speech_final"] or message["from_finalize"])


def _piece_of_realtime(message: dict[str, Any]) -> Piece | None:
    if not message["type"].startswith("conversation.item.input_audio_transcription."):
        return None
    return Piece(message["item_id"], speaks=True, last=not message["type"].endswith(".delta"))


def _piece_of_cartesia(message: dict[str, Any]) -> Piece | None:
    return Piece(message.get("context_id"), speaks=message["type"] == "chunk", last=message["type"] == "done")


def _piece_of_elevenlabs(message: dict[str, Any]) -> Piece | None:
    return Piece(message.get("contextId"), speaks=bool(message.get("audio")), last=bool(message.get("isFinal")))


PROVIDERS = (
    Provider("deepgram", "websocket", re.compile("/v1/listen"), _refused_by_deepgram, _part_as_deepgram, _piece_of_deepgram),
    Provider(
        "openai-realtime",
        "websocket",
        re.compile("/v1/realtime"),
        _refused_by_realtime,
        _part_as_realtime,
        _piece_of_realtime,
    ),
    Provider(
        "cartesia", "websocket", re.compile("/tts/websocket"), _refused_by_cartesia, _part_as_cartesia, _piece_of_cartesia
    ),
    Provider(
        "elevenlabs",
        "websocket",
        re.compile("/v1/text-to-speech/[^/]+/multi-stream-input"),
        _refused_by_elevenlabs,
        _part_as_elevenlabs,
        _piece_of_elevenlabs,
    ),
    Provider("openai", "http", re.compile("/v1/chat/completions"), _refused_by_completions),
)


def provider_of(scope: Scope) -> Provider | None:
    """Whose endpoint a scope asks for; None for anything that never misbehaves."""
    for provider in PROVIDERS:
        if scope["type"] == provider.kind and provider.path.fullmatch(scope["path"]):
            return provider
    return None
