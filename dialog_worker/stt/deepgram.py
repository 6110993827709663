"""Speech to text by Deepgram Nova (`/v1/listen`): the socket that carries audio there and results back.

Wire facts: Deepgram docs, "Live streaming" reference, "Audio keep alive", "Recovering from connection errors".
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

import trio

from dialog_worker.participant import ProviderError
from dialog_worker.provider import (
    GIVE_UP_S,
    ConfigurationError,
    Connection,
    ConnectionLost,
    Decoder,
    Endpoint,
    ProviderSocket,
    find_key,
    find_url,
)
from dialog_worker.stt.base import STT, Hearing
from dialog_worker.stt.buffer import BYTES_PER_SAMPLE, AudioBuffer, is_voiced
from dialog_worker.stt.deepgram_turn import Failure, Incoming, Results, Turn, UtteranceEnd, VoiceDetected

URL = "wss://api.deepgram.com/v1/listen"
KEEP_ALIVE_S = 4.0  # Deepgram closes after 10 s without audio or KeepAlive, and advises 3 to 5
FINALIZE_ANSWER_S = 1.0  # Finalize is not always answered
STALL_S = 8.0


class DeepgramSTT(STT):
    """Deepgram Nova for one call. The key comes from `api_key` or DEEPGRAM_API_KEY, the URL from `url` or DEEPGRAM_URL.

    `endpointing_ms`: silence that ends an utterance (None: never by silence alone). `utterance_end_ms`: time without
    words that ends it in spite of noise (at least 1000). `keyterms`: names to listen for. `options`: any other query
    parameter. `finalize_timeout_s`: after so long without news of an open turn Deepgram is asked to close it.
    Raises `ConfigurationError` for a missing key, a bad URL or an encoding that telephony does not have.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        url: str | None = None,
        headers: Mapping[str, str] | None = None,
        model: str = "nova-3",
        language: str = "en",
        encoding: str = "mulaw",
        sample_rate: int = 8000,
        endpointing_ms: int | None = 300,
        utterance_end_ms: int | None = 1000,
        smart_format: bool = True,
        keyterms: tuple[str, ...] | list[str] = (),
        options: Mapping[str, Any] | None = None,
        keep_alive_s: float = KEEP_ALIVE_S,
        finalize_timeout_s: float = 3.0,
        stall_s: float = STALL_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        super().__init__()
        if encoding not in BYTES_PER_SAMPLE:
            raise ConfigurationError(f"encoding={encoding!r}: choose one of {', '.join(BYTES_PER_SAMPLE)}")
        query = {
            "model": model,
            "language": language,
            "encoding": encoding,
            "sample_rate": sample_rate,
            "channels": 1,
            "interim_results": True,
            "endpointing": endpointing_ms if endpointing_ms is not None else False,
            "utterance_end_ms": utterance_end_ms,
            "vad_events": True,
            "smart_format": smart_format,
            "keyterm": list(keyterms),
        }
        endpoint = Endpoint(
            provider="Deepgram",
            url=with_query(find_url(url, "DEEPGRAM_URL", URL), {**query, **(options or {})}),
            headers={"Authorization": f"Token {find_key(api_key, 'DEEPGRAM_API_KEY', 'Deepgram')}", **(headers or {})},
            key_variable="DEEPGRAM_API_KEY",
            farewell='{"type":"CloseStream"}',
        )
        decoder = Decoder[Incoming](Results, VoiceDetected, UtteranceEnd, Failure)
        self._socket = ProviderSocket(endpoint, decoder, self.emit, give_up_s=give_up_s)
        self._encoding = encoding
        self._keep_alive_s = keep_alive_s
        self._finalize_timeout_s = finalize_timeout_s
        self._stall_s = stall_s
        self._audio = AudioBuffer(encoding, sample_rate)
        self._posted = trio.lowlevel.ParkingLot()
        self._turn = Turn()
        self._overdue_at = math.inf
        self._finalizing = False
        self._unanswered_since = math.inf

    def post(self, audio: bytes) -> None:
        """Take the caller's next audio; the last 30 s are kept while Deepgram is away."""
        self._audio.append(audio)
        self._posted.unpark_all()

    async def run(self) -> None:
        """Hold a connection until cancelled; returns after a fatal `ProviderError`."""
        await self._socket.serve(self._session)
        await self._tell(self._turn.end(forced=True))

    async def _session(self, connection: Connection[Incoming]) -> None:
        lost_s = self._audio.rewind()
        if lost_s:
            text = f"Deepgram was away for too long: {lost_s:.1f} s of the caller's audio were lost"
            await self.emit(ProviderError(text, code="audio_lost"))
        self._turn.forget_interim()
        self._unanswered_since = math.inf
        self._expect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_audio, connection)
            while True:
                await self._receive(connection)

    async def _send_audio(self, connection: Connection[Incoming]) -> None:
        while True:
            if frame := self._audio.take():
                self._check_stall(frame)
                await connection.send(frame)
                continue
            with trio.move_on_after(self._keep_alive_s) as idle:
                await self._posted.park()
            if idle.cancelled_caught:
                await connection.send('{"type":"KeepAlive"}')

    def _check_stall(self, frame: bytes) -> None:
        if is_voiced(frame, self._encoding):
            now = trio.current_time()
            self._unanswered_since = min(self._unanswered_since, now)
            if now - self._unanswered_since >= self._stall_s:
                raise ConnectionLost("stall", f"no answer for {self._stall_s:.0f} s while somebody speaks")

    async def _receive(self, connection: Connection[Incoming]) -> None:
        message: Incoming | None = None
        with trio.move_on_at(self._overdue_at):
            message = await connection.receive()
        if message is None:
            await self._finalize(connection)
        else:
            self._unanswered_since = math.inf
            await self._understand(message)

    async def _finalize(self, connection: Connection[Incoming]) -> None:
        """Ask for an open turn's end; the second time, end it ourselves."""
        if self._finalizing:
            await self._tell(self._turn.end(forced=True))
            self._expect()
        else:
            self._finalizing, self._overdue_at = True, trio.current_time() + FINALIZE_ANSWER_S
            await connection.send('{"type":"Finalize"}')

    async def _understand(self, message: Incoming) -> None:
        offset_s = self._audio.offset_s
        match message:
            case Results():
                if message.is_final:
                    self._audio.settle(message.start + message.duration)
                news = bool(message.best.transcript)
                await self._tell(self._turn.results(message, offset_s))
                if news or not self._turn.is_open:
                    self._expect()
            case VoiceDetected():
                await self._tell(self._turn.voice_detected(message.timestamp + offset_s))
                self._expect()
            case UtteranceEnd():
                if message.last_word_end >= 0:
                    await self._tell(self._turn.utterance_end(message.last_word_end + offset_s))
                self._expect()
            case Failure():
                text = message.description or message.message or "no description"
                await self.emit(ProviderError(f"Deepgram: {text}", code=message.variant or "error"))

    def _expect(self) -> None:
        """Set the time by which an open turn should have had news."""
        self._finalizing = False
        self._overdue_at = trio.current_time() + self._finalize_timeout_s if self._turn.is_open else math.inf

    async def _tell(self, hearings: Iterator[Hearing]) -> None:
        for hearing in list(hearings):
            await self.emit(hearing)


def with_query(url: str, parameters: Mapping[str, Any]) -> str:
    """The URL with parameters in Deepgram's spelling: lower-case booleans, lists repeated, None left out."""
    pairs = [
        (name, str(item).lower() if isinstance(item, bool) else str(item))
        for name, value in parameters.items()
        for item in (value if isinstance(value, list | tuple) else [value])
        if item is not None
    ]
    return f"{url}{'&' if urlsplit(url).query else '?'}{urlencode(pairs)}"
