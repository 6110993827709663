"""Text to speech by Cartesia (`/tts/websocket`): its requests and answers, and the socket that carries them.

Wire facts: Cartesia docs, "Text-to-Speech (WebSocket)", "Stream Inputs Using Continuations" (contexts), "Buffering",
"Concurrency limits and timeouts", "API errors".
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import trio
from msgspec import Struct
from trio_websocket import ConnectionClosed

from dialog_worker.provider import (
    GIVE_UP_S,
    ConfigurationError,
    Connection,
    Decoder,
    Endpoint,
    ProviderSocket,
    find_key,
    find_url,
)
from dialog_worker.tts.base import TTS
from dialog_worker.tts.contexts import Cancel, Contexts, Line
from protocol.messages import Message

URL = "wss://api.cartesia.ai/tts/websocket"
VERSION = "2026-08-14"  # of Cartesia's API; sent as a header
BYTES_PER_SAMPLE = {"pcm_mulaw": 1, "pcm_alaw": 1, "pcm_s16le": 2, "pcm_f32le": 4}
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


class CartesiaTTS(TTS):
    """Cartesia for one call. The key comes from `api_key` or CARTESIA_API_KEY, the URL from `url` or CARTESIA_URL.

    `voice`: the id of a voice. `speed` 0.6 to 1.5, `volume` 0.5 to 2 and `emotion` apply where the model has them.
    `timeout_s`: a complete utterance that is silent for so long is ended with a `ProviderError`.
    `max_buffer_delay_ms`: how long Cartesia waits for more text; 0, because an agent posts whole sentences.
    Raises `ConfigurationError` for a missing key or voice, a bad URL or an unknown encoding.
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
        timeout_s: float = 5.0,
        context_idle_s: float = CONTEXT_IDLE_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        super().__init__()
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
        decoder = Decoder[Incoming](Chunk, Timestamps, Done, Failure)
        self._socket = ProviderSocket(endpoint, decoder, self.emit, give_up_s=give_up_s)
        rate = sample_rate * BYTES_PER_SAMPLE[encoding]
        self._contexts = Contexts("Cartesia", rate, timeout_s=timeout_s, idle_s=context_idle_s)
        self._changed = trio.lowlevel.ParkingLot()

    def post(self, message: Message[str]) -> None:
        """Say `message.data`; whole sentences sound best, and begin at once."""
        self._contexts.post(message, trio.current_time())
        self._changed.unpark_all()

    def abort(self, uuid: str) -> None:
        """Stop this utterance; emit nothing more of it."""
        self._contexts.abort(uuid, trio.current_time())
        self._changed.unpark_all()

    async def run(self) -> None:
        """Hold a connection and speak until cancelled; after a fatal `ProviderError` every utterance ends at once."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._speak)
            self._contexts.give_up(await self._socket.serve(self._session))
            self._changed.unpark_all()

    async def _speak(self) -> None:
        """Tell the agent what is ready; the only task that does, so that the order is the queue's."""
        while True:
            while event := self._contexts.next_event(trio.current_time()):
                await self.emit(event)
            with trio.move_on_at(self._contexts.deadline()):
                await self._changed.park()

    async def _session(self, connection: Connection[Incoming]) -> None:
        """One connection. An idle one that Cartesia closes (after 5 min) is replaced at once, so that one is always warm."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send, connection)
                while True:
                    await self._understand(await connection.receive())
        except* ConnectionClosed:
            if self._contexts.busy:
                raise
        finally:
            self._contexts.disconnected(trio.current_time())
            self._changed.unpark_all()

    async def _send(self, connection: Connection[Incoming]) -> None:
        while True:
            while request := self._contexts.due(trio.current_time()):
                await connection.send(self._encode(request))
            await self._changed.park()

    def _encode(self, request: Line | Cancel) -> str:
        if isinstance(request, Cancel):
            return msgspec.json.encode({"context_id": request.context_id, "cancel": True}).decode()
        line = {"context_id": request.context_id, "transcript": request.text, "continue": not request.last}
        return msgspec.json.encode({**self._request, **line}).decode()

    async def _understand(self, message: Incoming) -> None:
        context_id = message.context_id or ""
        match message:
            case Chunk():
                self._contexts.audio(context_id, message.data, trio.current_time())
            case Timestamps(word_timestamps=columns):
                self._contexts.words(context_id, list(zip(columns.words, columns.start, columns.end, strict=False)))
            case Done():
                self._contexts.done(context_id)
            case Failure():
                await self._blame(message)
        self._changed.unpark_all()

    async def _blame(self, failure: Failure) -> None:
        text = f"Cartesia: {failure.message or failure.error or failure.title or 'no description'}"
        code = failure.error_code or str(failure.status_code or "error")
        if error := self._contexts.failed(failure.context_id, text, code):
            await self.emit(error)
