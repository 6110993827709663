"""Text to speech by Cartesia (`/tts/websocket`): its requests and answers, and the socket that carries them.

Wire facts: Cartesia docs, "Text-to-Speech (WebSocket)", "Stream Inputs Using Continuations" (contexts), "Buffering",
"Concurrency limits and timeouts", "API errors".
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import trio
from msgspec import Struct

from dialog_worker.provider import GIVE_UP_S, ConfigurationError, Connection, Decoder, Endpoint, find_key, find_url
from dialog_worker.tts.contexts import QUEUE_LIMIT, TIMEOUT_S, Cancel, Limits, Line
from dialog_worker.tts.streaming import StreamingTTS

URL = "wss://api.cartesia.ai/tts/websocket"
VERSION = "2026-08-14"  # of Cartesia's API; sent as a header
BYTES_PER_SAMPLE = {"pcm_mulaw": 1, "pcm_alaw": 1, "pcm_s16le": 2, "pcm_f32le": 4}
CROWDED = "concurrency_limited"  # more contexts than the subscription has: another call may end one at any moment
TOO_MANY_REQUESTS = 429  # its HTTP status, all there was in versions before 2026-03-01
CONTEXT_IDLE_S = 0.7  # a context expires 1 s after its last audio; the rest is for the way there


class Incoming(Struct, frozen=True, tag_field="type"):
    """Base of what Cartesia sends. `context_id` is the utterance's, under a number."""

    context_id: str | None = None


class Chunk(Incoming, frozen=True, tag="chunk"):
    """Audio, base64 in JSON."""

    data: bytes = b""


class WordColumns(Struct, frozen=True):
    """Words and their times, in seconds since the context's first sample."""

    words: tuple[str, ...] = ()
    start: tuple[float, ...] = ()
    end: tuple[float, ...] = ()


class Timestamps(Incoming, frozen=True, tag="timestamps"):
    """When words are said."""

    word_timestamps: WordColumns = WordColumns()


class Done(Incoming, frozen=True, tag="done"):
    """A context is over: all was said, it was cancelled, or it expired."""


class Failure(Incoming, frozen=True, tag="error"):
    """Something failed: one context, or, without its id, anything."""

    error_code: str | None = None
    title: str | None = None
    message: str | None = None
    error: str | None = None  # all there was in versions before 2026-03-01
    status_code: int | None = None


class CartesiaTTS(StreamingTTS[Incoming]):
    """Cartesia for one call. The key comes from `api_key` or CARTESIA_API_KEY, the URL from `url` or CARTESIA_URL.

    `voice`: the id of a voice. `speed` 0.6 to 1.5, `volume` 0.5 to 2 and `emotion` apply where the model has them.
    `max_buffer_delay_ms`: how long Cartesia waits for more text; 0, because an agent posts whole sentences.
    `timeout_s`: an utterance whose text is complete, or ends a sentence, and that is silent for so long is ended with a
    `ProviderError` of code timeout. `queue_size_limit`: pieces of text posted and not yet spoken; the one beyond ends its
    utterance with queue_full.
    Raises `ConfigurationError` for a missing key or voice, a bad URL, an unknown encoding, or limits below 1 piece or 0 s.
    """

    def __init__(
        self,
        voice: str,
        api_key: str | None = None,
        *,
        url: str | None = None,
        headers: Mapping[str, str] | None = None,
        model_id: str = "sonic-3.5",
        language: str = "en",
        encoding: str = "pcm_mulaw",
        sample_rate: int = 8000,
        speed: float | None = None,
        volume: float | None = None,
        emotion: str | None = None,
        max_buffer_delay_ms: int = 0,
        add_timestamps: bool = True,
        version: str = VERSION,
        timeout_s: float = TIMEOUT_S,
        queue_size_limit: int = QUEUE_LIMIT,
        context_idle_s: float = CONTEXT_IDLE_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        if encoding not in BYTES_PER_SAMPLE:
            raise ConfigurationError(f"encoding={encoding!r}: choose one of {', '.join(BYTES_PER_SAMPLE)}")
        if not voice:
            raise ConfigurationError(
                "CartesiaTTS needs the id of a voice: pass voice=, as found in Cartesia's voice library"
            )
        key = find_key(api_key, "CARTESIA_API_KEY", "Cartesia")
        endpoint = Endpoint(
            provider="Cartesia",
            url=find_url(url, "CARTESIA_URL", URL),
            headers={"Authorization": f"Bearer {key}", "Cartesia-Version": version, **(headers or {})},
            key_variable="CARTESIA_API_KEY",
        )
        tone = {"speed": speed, "volume": volume, "emotion": emotion}
        tone = {name: value for name, value in tone.items() if value is not None}
        self._request: dict[str, Any] = {  # must be the same in all requests of a context
            "model_id": model_id,
            # Cartesia's migration guide: the voice's `mode` went away with version 2026-08-14.
            "voice": {"id": voice} if version >= "2026-08-14" else {"mode": "id", "id": voice},
            "language": language,
            "output_format": {"container": "raw", "encoding": encoding, "sample_rate": sample_rate},
            "max_buffer_delay_ms": max_buffer_delay_ms,
            "add_timestamps": add_timestamps,
            **({"generation_config": tone} if tone else {}),
        }
        limits = Limits(timeout_s, queue_size_limit, hesitation_s=max_buffer_delay_ms / 1000, idle_s=context_idle_s)
        decoder = Decoder[Incoming](Chunk, Timestamps, Done, Failure)
        super().__init__(endpoint, decoder, sample_rate * BYTES_PER_SAMPLE[encoding], limits, give_up_s)

    async def _transmit(self, connection: Connection[Incoming], request: Line | Cancel) -> None:
        await connection.send(self._encode(request))

    def _encode(self, request: Line | Cancel) -> str:
        if isinstance(request, Cancel):
            return msgspec.json.encode({"context_id": request.context_id, "cancel": True}).decode()
        line = {"context_id": request.context_id, "transcript": request.text, "continue": not request.last}
        return msgspec.json.encode({**self._request, **line}).decode()

    async def _understand(self, connection: Connection[Incoming], message: Incoming) -> None:
        context_id = message.context_id or ""
        match message:
            case Chunk():
                self._hear(connection, context_id, message.data)
            case Timestamps(word_timestamps=columns):
                self._contexts.words(context_id, list(zip(columns.words, columns.start, columns.end, strict=False)))
            case Done():
                self._contexts.done(context_id)
            case Failure():
                await self._blame(message)

    async def _blame(self, failure: Failure) -> None:
        """An error costs its context, except that for want of room Cartesia is asked again for a moment."""
        crowded = failure.error_code == CROWDED or (not failure.error_code and failure.status_code == TOO_MANY_REQUESTS)
        if crowded and self._contexts.refused(failure.context_id, trio.current_time()):
            return
        text = f"Cartesia: {failure.message or failure.error or failure.title or 'no description'}"
        code = failure.error_code or str(failure.status_code or "error")
        if error := self._contexts.failed(failure.context_id, text, code):
            await self.emit(error)
