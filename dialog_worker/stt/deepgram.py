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
    find_key,
    find_url,
)
from dialog_worker.stt.base import Hearing
from dialog_worker.stt.buffer import BYTES_PER_SAMPLE
from dialog_worker.stt.deepgram_turn import Failure, Incoming, Results, Turn, UtteranceEnd, VoiceDetected
from dialog_worker.stt.streaming import STALL_S, Stream, StreamingSTT

URL = "wss://api.deepgram.com/v1/listen"
KEEP_ALIVE_S = 4.0  # Deepgram closes after 10 s without audio or KeepAlive, and advises 3 to 5
FINALIZE_ANSWER_S = 1.0  # Finalize is not always answered
PAUSED_SHARE = 0.8  # of the stall's time is enough when the caller has stopped
GAP_S = 0.05  # results follow each other without one
FINALIZE = '{"type":"Finalize"}'


class DeepgramSTT(StreamingSTT[Incoming]):
    """Deepgram Nova for one call. The key comes from `api_key` or DEEPGRAM_API_KEY, the URL from `url` or DEEPGRAM_URL.

    `endpointing_ms`: silence that ends an utterance (None: never by silence alone). `utterance_end_ms`: time without
    words that ends it in spite of noise (at least 1000). `keyterms`: names to listen for. `options`: any other query
    parameter. `queue_size_limit`: bytes of the caller's audio that are kept while Deepgram is away (None: 30 s). What is
    lost beyond it is told once an outage, with the code audio_lost. `finalize_timeout_s`: after so long without news of an
    open turn Deepgram is asked to close it. `stall_s`: a voice without an answer for so long calls for a new connection.
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
        queue_size_limit: int | None = None,
        finalize_timeout_s: float = 2.5,
        stall_s: float = STALL_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
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
        super().__init__(endpoint, decoder, Stream(encoding, sample_rate, queue_size_limit), give_up_s)
        self._keep_alive_s = keep_alive_s
        self._finalize_timeout_s = finalize_timeout_s
        self._stall_s = stall_s
        self._turn = Turn()
        self._overdue_at = math.inf
        self._finalizing = False
        self._connected_at = -math.inf
        self._garbled = 0  # frames of this connection, before its last final result

    async def _session(self, connection: Connection[Incoming]) -> None:
        await self._resume()
        self._turn.forget_interim()
        self._connected_at = trio.current_time()
        self._garbled = 0
        self._expect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_audio, connection)
            nursery.start_soon(self._watch, connection)
            nursery.start_soon(self._ping, connection)
            while True:
                await self._receive(connection)

    def _end(self) -> Iterator[Hearing]:
        return self._turn.stop()

    def _waiting_since(self) -> float:
        """Since a voice is without an answer, or an open turn without its end."""
        return min(self._voice.since, self._voice.voice_at if self._turn.is_open else math.inf)

    async def _send_audio(self, connection: Connection[Incoming]) -> None:
        while True:
            if frame := self._audio.take():
                await connection.send(frame)
                continue
            with trio.move_on_after(self._keep_alive_s) as idle:
                await self._posted.park()
            if idle.cancelled_caught:
                await connection.send('{"type":"KeepAlive"}')

    async def _watch(self, connection: Connection[Incoming]) -> None:
        """Leave a server that ignores a voice. One that found no words in it shows that it lives when asked to finalize."""
        asked_at = -math.inf
        while True:
            stalled_at = self._stalled_at()
            ask_at = stalled_at - FINALIZE_ANSWER_S
            now = trio.current_time()
            if math.isinf(stalled_at):
                await self._posted.park()
            elif now >= stalled_at:
                raise self._stall()
            elif now >= ask_at > asked_at and not self._turn.is_open:
                asked_at = ask_at
                with trio.move_on_at(stalled_at):
                    await connection.send(FINALIZE)
            else:
                await trio.sleep_until(ask_at if now < ask_at else stalled_at)

    def _stall(self) -> ConnectionLost:
        return ConnectionLost("stall", f"no answer to a voice for {self._stall_s:g} s")

    def _stalled_at(self) -> float:
        """When it will be too long. Within a turn news may be slow, as the caller notices only after the last word."""
        since = max(self._voice.since, self._connected_at)
        if not self._turn.is_open:
            return since + self._stall_s
        paused = self._voice.voice_at + PAUSED_SHARE * self._stall_s
        return min(max(since + self._stall_s, paused), since + 2 * self._stall_s)

    async def _receive(self, connection: Connection[Incoming]) -> None:
        message: Incoming | None = None
        with trio.move_on_at(self._overdue_at):
            message = await connection.receive()
        if message is None:
            await self._finalize(connection)
            return
        if isinstance(message, Results) and message.is_final:
            self._check_gap(connection.garbled, message.start)
        await self._understand(message)
        if _is_proof(message, in_turn=self._turn.is_open):
            connection.prove()

    def _check_gap(self, garbled: int, start_s: float) -> None:
        """A final result that could not be read leaves a gap, whose audio has to be sent again."""
        if garbled > self._garbled and start_s > self._audio.settled_s + GAP_S:
            raise ConnectionLost("garbage", "a final result could not be read")
        self._garbled = garbled

    async def _finalize(self, connection: Connection[Incoming]) -> None:
        """Ask for an open turn's end; the second time, end it ourselves, or leave a server that has missed some of it."""
        if self._finalizing and self._voice.since < math.inf:
            raise self._stall()
        if self._finalizing:
            hearings = list(self._turn.end(forced=True))
            self._audio.settle(self._turn.forced_until_s - self._audio.offset_s)
            self._expect()
            await self._tell(hearings)
        else:
            self._finalizing, self._overdue_at = True, trio.current_time() + FINALIZE_ANSWER_S
            await connection.send(FINALIZE)

    async def _understand(self, message: Incoming) -> None:
        offset_s, now = self._audio.offset_s, trio.current_time()
        match message:
            case Results():
                end_s = message.start + message.duration
                if message.is_final:
                    self._audio.settle(end_s)
                self._voice.answered(end_s + offset_s, now)
                hearings = list(self._turn.results(message, offset_s))
                if message.best.transcript or not self._turn.is_open:
                    self._expect()
                await self._tell(hearings)
            case VoiceDetected():
                self._voice.progress(now)
                hearings = list(self._turn.voice_detected(message.timestamp + offset_s))
                self._expect()
                await self._tell(hearings)
            case UtteranceEnd():
                self._voice.progress(now)
                if message.last_word_end >= 0:
                    await self._tell(self._turn.utterance_end(message.last_word_end + offset_s))
                self._expect()
            case Failure():
                text = message.description or message.message or "no description"
                await self._report(ProviderError(f"Deepgram: {text}", code=message.variant or "error"))

    def _expect(self) -> None:
        """Set the time by which an open turn should have had news."""
        self._finalizing = False
        self._overdue_at = trio.current_time() + self._finalize_timeout_s if self._turn.is_open else math.inf


def _is_proof(message: Incoming, *, in_turn: bool) -> bool:
    """Whether it brought things forward for good: a server that drops every connection within a turn does not work."""
    return not isinstance(message, Failure) and (not in_turn or (isinstance(message, Results) and bool(message.is_final)))


def with_query(url: str, parameters: Mapping[str, Any]) -> str:
    """The URL with parameters in Deepgram's spelling: lower-case booleans, lists repeated, None left out."""
    pairs = [
        (name, str(item).lower() if isinstance(item, bool) else str(item))
        for name, value in parameters.items()
        for item in (value if isinstance(value, list | tuple) else [value])
        if item is not None
    ]
    return f"{url}{'&' if urlsplit(url).query else '?'}{urlencode(pairs)}"
