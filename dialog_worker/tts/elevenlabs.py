"""Text to speech by ElevenLabs (`multi-stream-input`): its frames in both directions, and the socket that carries them.

Wire facts: ElevenLabs docs, "Multi-context WebSocket" (API reference and guide) and "Latency optimization"; where these are
silent, what the issue trackers of LiveKit agents, Pipecat and Bolna report of the service, named beside the fact.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import msgspec
import trio
from msgspec import Struct
from trio_websocket import ConnectionClosed

from dialog_worker.provider import (
    GIVE_UP_S,
    ConfigurationError,
    Connection,
    ConnectionLost,
    Decoder,
    Endpoint,
    find_key,
    find_url,
)
from dialog_worker.tts.contexts import QUEUE_LIMIT, TIMEOUT_S, Cancel, Limits, Line
from dialog_worker.tts.streaming import StreamingTTS

URL = "wss://api.elevenlabs.io"
KEY_VARIABLE = "ELEVENLABS_API_KEY"
BYTES_PER_SAMPLE = {"ulaw": 1, "alaw": 1, "pcm": 2}
LIVE_LIMIT = 4  # contexts of a socket; the fifth is the last that is allowed, and a sixth costs the socket (agents-js#1985)
INACTIVITY_TIMEOUT_S = 180  # the longest that the service offers; its default, 20, is shorter than many a pause
KEEP_ALIVE_S = 10.0

# What ends a connection, but says nothing against the utterances that were on it: they are sent again on the next.
_PASSING = frozenset({"input_timeout_exceeded", "max_active_conversations"})
_UNMENDABLE = frozenset({"invalid_api_key"})
# A piece may end in the middle of a word, except after a sentence's mark; "7." may yet become "7.50".
_SENTENCE_END = re.compile(r"[^\d\s][.!?…。！？]+[\"')\]]*$")


class Alignment(Struct, frozen=True):
    """When each character is said, in milliseconds since the first sample of the frame's audio."""

    chars: tuple[str, ...] = ()
    starts_ms: tuple[float, ...] = msgspec.field(name="charStartTimesMs", default=())
    durations_ms: tuple[float, ...] | None = msgspec.field(name="charDurationsMs", default=None)
    durations_too_ms: tuple[float, ...] = msgspec.field(name="charsDurationsMs", default=())  # the older spelling

    def times_ms(self) -> list[tuple[str, float, float]]:
        """Each character with its start and end."""
        durations = self.durations_too_ms if self.durations_ms is None else self.durations_ms
        return [(c, start, start + length) for c, start, length in zip(self.chars, self.starts_ms, durations, strict=False)]


class Incoming(Struct, frozen=True, tag_field="type", tag=""):
    """All that ElevenLabs sends of interest: audio, the end of a context, an error. Frames that carry a type are others."""

    camel_id: str | None = msgspec.field(name="contextId", default=None)
    snake_id: str | None = msgspec.field(name="context_id", default=None)
    audio: bytes | None = None
    final: bool | None = msgspec.field(name="isFinal", default=None)
    alignment: Alignment | None = None
    normalized: Alignment | None = msgspec.field(name="normalizedAlignment", default=None)
    message: str | None = None
    error: str | None = None
    code: int | None = None

    @property
    def context_id(self) -> str:
        """The context that it is of, or ""."""
        return self.camel_id or self.snake_id or ""


class OpenContext:
    """A context that the server counts: what it was told, and how far its audio and words have come."""

    def __init__(self, context_id: str, first: Mapping[str, Any], bytes_per_second: int) -> None:
        self._id = context_id
        self._first: Mapping[str, Any] | None = first  # what only a context's first frame may carry
        self._rate = bytes_per_second
        self._unsent = ""  # the beginning of a word
        self._word: list[tuple[str, float, float]] = []  # so much of the last word as was said
        self._received = 0  # bytes
        self.initialised = False  # its first frame is sent
        self.closed = False
        self.unwanted = False

    def frames(self, line: Line) -> list[dict[str, Any]]:
        """What to send for some text. Each text ends in a space: ElevenLabs takes one without for a part of a word."""
        frames: list[dict[str, Any]] = []
        if self._first is not None:
            frames.append({"text": " ", "context_id": self._id, **self._first})
            self._first = None
        text = self._whole_words(line.text, last=line.last)
        if text:
            frames.append({"text": text, "context_id": self._id})
        if line.last:
            frames.append({"context_id": self._id, "flush": True})  # which alone never ends a context (bolna#790)
            frames += self.close()
        return frames

    def close(self) -> list[dict[str, Any]]:
        """End it, once."""
        if self.closed:
            return []
        self.closed = True
        return [{"context_id": self._id, "close_context": True}]

    def hear(self, message: Incoming) -> list[tuple[str, float, float]]:
        """Count a frame's audio; returns the words that it completes, timed in seconds since the context's first sample.

        A word is complete when a space follows or the context ends, for it may go on in the next frame.
        """
        offset_s = self._received / self._rate
        self._received += len(message.audio or b"")
        words = []
        for character, start_ms, end_ms in (message.alignment or message.normalized or Alignment()).times_ms():
            if character.isspace():
                words += self._take_word()
            else:
                self._word.append((character, offset_s + start_ms / 1000, offset_s + end_ms / 1000))
        return words + (self._take_word() if message.final else [])

    def _take_word(self) -> list[tuple[str, float, float]]:
        word, self._word = self._word, []
        return [("".join(c for c, _, _ in word), word[0][1], word[-1][2])] if word else []

    def _whole_words(self, text: str, *, last: bool) -> str:
        text = self._unsent + text
        end = len(text) if last or _SENTENCE_END.search(text) else len(text) - len(re.split(r"\s", text)[-1])
        text, self._unsent = text[:end], text[end:]
        return text.rstrip() + " " if text.strip() else ""


class ElevenLabsTTS(StreamingTTS[Incoming]):
    """ElevenLabs for one call. The key comes from `api_key`, ELEVENLABS_API_KEY or ELEVEN_LABS_API_KEY.

    `voice_id`: the id of a voice. `url` or ELEVENLABS_URL: a server such as wss://api.eu.residency.elevenlabs.io, or, with
    its path, a whole endpoint. `output_format`: ulaw_N, alaw_N or pcm_N (16 bits) at N Hz. `voice_settings`: stability,
    similarity_boost, style, use_speaker_boost, speed (0.7 to 1.2). `query`: the endpoint's other parameters, and those that
    shall differ from what is sent by default, where None leaves one out.
    `timeout_s`: an utterance whose text is complete, or ends a sentence, and that is silent for so long is ended with a
    `ProviderError` of code timeout. `queue_size_limit`: pieces of text posted and not yet spoken; the one beyond ends its
    utterance with queue_full.
    Raises `ConfigurationError` for a missing key or voice, a bad URL, a format without a fixed rate, a model that this
    endpoint does not have, or limits below 1 piece or 0 s.
    """

    def __init__(
        self,
        voice_id: str,
        api_key: str | None = None,
        *,
        url: str | None = None,
        headers: Mapping[str, str] | None = None,
        model_id: str = "eleven_flash_v2_5",
        output_format: str = "ulaw_8000",
        language_code: str | None = None,
        voice_settings: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        timeout_s: float = TIMEOUT_S,
        queue_size_limit: int = QUEUE_LIMIT,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        if not voice_id:
            raise ConfigurationError(
                "ElevenLabsTTS needs the id of a voice: pass voice_id=, as found in ElevenLabs's voice library"
            )
        parameters = {
            "model_id": model_id,
            "output_format": output_format,
            "inactivity_timeout": INACTIVITY_TIMEOUT_S,
            "auto_mode": True,  # speaks what it has at once, because an agent posts whole sentences
            "sync_alignment": True,
            "language_code": language_code,
            **(query or {}),
        }
        if str(parameters["model_id"]).startswith("eleven_v3"):
            raise ConfigurationError(
                f"model_id={parameters['model_id']!r} has no multi-context socket: try eleven_flash_v2_5"
            )
        endpoint = Endpoint(
            provider="ElevenLabs",
            url=_endpoint_url(find_url(url, "ELEVENLABS_URL", URL), voice_id, parameters),
            headers={"xi-api-key": _find_key(api_key), **(headers or {})},
            key_variable=KEY_VARIABLE,
            farewell='{"close_socket":true}',
        )
        # Only in auto mode is a sentence spoken although more text may come. A context lives for `inactivity_timeout` and is
        # kept alive, so a pause never ends it.
        hesitation_s = 0 if str(parameters["auto_mode"]).lower() == "true" else math.inf
        limits = Limits(timeout_s, queue_size_limit, hesitation_s, idle_s=math.inf)
        self._rate = _bytes_per_second(str(parameters["output_format"]))
        super().__init__(endpoint, Decoder[Incoming](Incoming), self._rate, limits, give_up_s)
        self._first = {"voice_settings": dict(voice_settings)} if voice_settings else {}
        self._live: dict[str, OpenContext] = {}

    def _has_room(self) -> bool:
        return len(self._live) < LIVE_LIMIT

    def _is_clogged(self) -> bool:
        return not self._has_room() and all(context.unwanted for context in self._live.values())

    def _forget(self) -> None:
        self._live.clear()

    def _explain(self, failure: Exception) -> Exception:
        """A close may carry ElevenLabs's word for an error as its reason."""
        reason = failure.reason if isinstance(failure, ConnectionClosed) else None
        return _refusal(reason.reason) if reason and reason.reason in _UNMENDABLE else failure

    async def _transmit(self, connection: Connection[Incoming], request: Line | Cancel) -> None:
        context = self._live.get(request.context_id)
        if isinstance(request, Cancel):
            if context is None:
                return  # over already; a frame for an unknown context would open one (pipecat#4126)
            context.unwanted = True
            frames = context.close()
        else:
            if context is None:
                context = self._live[request.context_id] = OpenContext(request.context_id, self._first, self._rate)
            frames = context.frames(request)
        for frame in frames:
            await connection.send(msgspec.json.encode(frame).decode())
            context.initialised = True

    async def _keep_alive(self, connection: Connection[Incoming]) -> None:
        """Keep the socket alive, and each context that still waits for text. To others, a frame would do harm."""
        while True:
            await trio.sleep(KEEP_ALIVE_S)
            await connection.send('{"text":""}')
            for context_id, context in list(self._live.items()):
                if context.initialised and not context.closed and context_id in self._live:
                    await connection.send(msgspec.json.encode({"text": "", "context_id": context_id}).decode())

    async def _understand(self, connection: Connection[Incoming], message: Incoming) -> None:
        if message.error or message.code:
            self._blame(message)
            return
        context_id = message.context_id
        context = self._live.get(context_id)
        if context is None:
            return
        self._hear(connection, context_id, message.audio or b"")
        self._contexts.words(context_id, context.hear(message))
        if message.final:
            del self._live[context_id]  # only here does its slot become free (pipecat#5601)
            self._contexts.done(context_id)

    def _blame(self, failure: Incoming) -> None:
        """An error costs its context, else the only one; else the connection, which ElevenLabs closes after an error."""
        code = failure.error or str(failure.code)
        reason = failure.message or code
        if code in _UNMENDABLE:
            raise _refusal(code, reason)
        if code in _PASSING:
            if self._contexts.busy:
                raise ConnectionLost(code, reason)
            return
        self._live.pop(failure.context_id, None)
        for context in self._live.values() if not failure.context_id else ():
            context.unwanted = True
        if error := self._contexts.failed(failure.context_id, f"ElevenLabs: {reason}", code):
            raise ConnectionLost(error.code, reason)


def _refusal(code: str, reason: str | None = None) -> ConnectionLost:
    return ConnectionLost(code, f"{reason or code}; check the key in {KEY_VARIABLE}", fatal=True)


def _find_key(given: str | None) -> str:
    if given is None and not os.environ.get(KEY_VARIABLE):
        given = os.environ.get("ELEVEN_LABS_API_KEY")  # as Dialog for TypeScript names it
    return find_key(given, KEY_VARIABLE, "ElevenLabs")


def _endpoint_url(url: str, voice_id: str, parameters: Mapping[str, Any]) -> str:
    parts = urlsplit(url)
    path = parts.path.rstrip("/") or f"/v1/text-to-speech/{quote(voice_id, safe='')}/multi-stream-input"
    given = {name: str(value).lower() if isinstance(value, bool) else value for name, value in parameters.items()}
    query = {**dict(parse_qsl(parts.query)), **{name: value for name, value in given.items() if value is not None}}
    return parts._replace(path=path, query=urlencode(query), fragment="").geturl()


def _bytes_per_second(output_format: str) -> int:
    """How much audio a second takes: its timings are counted in bytes, which MP3 and Opus do not let."""
    codec, _, rate = output_format.partition("_")
    if codec not in BYTES_PER_SAMPLE or not rate.isdigit():
        raise ConfigurationError(f"output_format={output_format!r}: choose ulaw_8000, alaw_8000, or pcm_ and a rate in Hz")
    return BYTES_PER_SAMPLE[codec] * int(rate)
