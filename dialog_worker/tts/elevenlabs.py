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
from wsproto.utilities import LocalProtocolError

from dialog_worker.participant import ProviderError
from dialog_worker.provider import (
    GIVE_UP_S,
    STABLE_S,
    ConfigurationError,
    Connection,
    ConnectionLost,
    Decoder,
    Endpoint,
    ProviderSocket,
    backoff_s,
    describe,
    find_key,
    find_url,
)
from dialog_worker.tts.base import TTS
from dialog_worker.tts.contexts import Cancel, Contexts, Line
from protocol.messages import Message

URL = "wss://api.elevenlabs.io"
KEY_VARIABLE = "ELEVENLABS_API_KEY"
BYTES_PER_SAMPLE = {"ulaw": 1, "alaw": 1, "pcm": 2}
LIVE_LIMIT = 4  # contexts of a socket; the fifth is the last that is allowed, and a sixth costs the socket (agents-js#1985)
INACTIVITY_TIMEOUT_S = 180  # the longest that the service offers; its default, 20, is shorter than many a pause
KEEP_ALIVE_S = 10.0
FREEING_S = 2.0  # of silence, after which contexts that nobody wants are not waited for

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


class ElevenLabsTTS(TTS):
    """ElevenLabs for one call. The key comes from `api_key`, ELEVENLABS_API_KEY or ELEVEN_LABS_API_KEY.

    `voice_id`: the id of a voice. `url` or ELEVENLABS_URL: a server such as wss://api.eu.residency.elevenlabs.io, or, with
    its path, a whole endpoint. `output_format`: ulaw_N, alaw_N or pcm_N (16 bits) at N Hz. `voice_settings`: stability,
    similarity_boost, style, use_speaker_boost, speed (0.7 to 1.2). `query`: the endpoint's other parameters, and those that
    shall differ from what is sent by default, where None leaves one out.
    `timeout_s`: a complete utterance that is silent for so long is ended with a `ProviderError`.
    Raises `ConfigurationError` for a missing key or voice, a bad URL, a format without a fixed rate, or a model that this
    endpoint does not have.
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
        timeout_s: float = 5.0,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        super().__init__()
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
        self._endpoint = Endpoint(
            provider="ElevenLabs",
            url=_endpoint_url(find_url(url, "ELEVENLABS_URL", URL), voice_id, parameters),
            headers={"xi-api-key": _find_key(api_key), **(headers or {})},
            key_variable=KEY_VARIABLE,
            farewell='{"close_socket":true}',
        )
        self._first = {"voice_settings": dict(voice_settings)} if voice_settings else {}
        self._rate = _bytes_per_second(str(parameters["output_format"]))
        self._give_up_s = give_up_s
        self._socket = ProviderSocket(self._endpoint, Decoder[Incoming](Incoming), self.emit, give_up_s=give_up_s)
        # A context lives for `inactivity_timeout` and is kept alive, so a pause never ends it.
        self._contexts = Contexts("ElevenLabs", self._rate, timeout_s=timeout_s, idle_s=math.inf)
        self._live: dict[str, OpenContext] = {}
        self._failures = 0  # of connections in a row, none of which spoke
        self._failing_since = math.inf
        self._serving = trio.CancelScope()
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
            with self._serving:
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
        """One connection. One that ends while nothing is wanted of it is replaced in silence, so that one is always warm."""
        opened = trio.current_time()
        failure = await self._converse(connection)
        if failure is None:
            return
        if trio.current_time() - opened >= STABLE_S:
            self._failures, self._failing_since = 0, math.inf
        self._failures += 1
        self._failing_since = min(self._failing_since, trio.current_time())
        if error := self._hopeless(failure):
            await self._give_up(error)
        if self._failures > 1:  # a refusal in words counts as a sign of life below, where it would be retried at once
            await trio.sleep(backoff_s(self._failures))
        raise failure

    async def _converse(self, connection: Connection[Incoming]) -> Exception | None:
        """Serve a connection to its end: what it failed of, if anybody minds."""
        failures: list[Exception] = []
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, connection)
                nursery.start_soon(self._keep_alive, connection)
                await self._send(connection)
                nursery.cancel_scope.cancel()
        except* (ConnectionLost, ConnectionClosed, LocalProtocolError) as group:
            failures = [failure for failure in group.exceptions if isinstance(failure, Exception)]
        minded = self._contexts.busy
        self._disconnected()
        failures.sort(key=lambda failure: not isinstance(failure, ConnectionLost))  # which says more than a closed socket
        worst = failures[0] if failures else None
        return worst if minded or isinstance(worst, ConnectionLost) or _code(worst) in _UNMENDABLE else None

    def _disconnected(self) -> None:
        self._live.clear()
        self._contexts.disconnected(trio.current_time())
        self._changed.unpark_all()

    def _hopeless(self, failure: Exception) -> ProviderError | None:
        """The fatal error that a failure amounts to, if it is one."""
        code, text = _code(failure), describe(self._endpoint, failure).message
        if code in _UNMENDABLE:
            return ProviderError(f"{text}; check the key in {KEY_VARIABLE}", code=code, fatal=True)
        after_s = trio.current_time() - self._failing_since
        if after_s < self._give_up_s:
            return None
        return ProviderError(f"{text}; gave up after {after_s:.0f} s", code=code, fatal=True)

    async def _give_up(self, error: ProviderError) -> None:
        await self.emit(error)
        self._contexts.give_up(error)
        self._changed.unpark_all()
        self._serving.cancel()

    async def _send(self, connection: Connection[Incoming]) -> None:
        """Send what is due, until the connection is clogged: all its contexts are unwanted, and none of them ends."""
        while True:
            while request := self._contexts.due(trio.current_time(), may_open=len(self._live) < LIVE_LIMIT):
                await self._send_request(connection, request)
            clogged = len(self._live) >= LIVE_LIMIT and all(context.unwanted for context in self._live.values())
            with trio.move_on_after(FREEING_S if clogged else math.inf) as patience:
                await self._changed.park()
            if patience.cancelled_caught:
                return

    async def _send_request(self, connection: Connection[Incoming], request: Line | Cancel) -> None:
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

    async def _listen(self, connection: Connection[Incoming]) -> None:
        while True:
            message = await connection.receive()
            if message.error or message.code:
                self._blame(message)
            else:
                self._understand(message)
            self._changed.unpark_all()

    def _understand(self, message: Incoming) -> None:
        context_id = message.context_id
        context = self._live.get(context_id)
        if context is None:
            return
        if message.audio:
            self._failures, self._failing_since = 0, math.inf
            self._contexts.audio(context_id, message.audio, trio.current_time())
        self._contexts.words(context_id, context.hear(message))
        if message.final:
            del self._live[context_id]  # only here does its slot become free (pipecat#5601)
            self._contexts.done(context_id)

    def _blame(self, failure: Incoming) -> None:
        """An error costs its context, else the only one; else the connection, which ElevenLabs closes after an error."""
        code = failure.error or str(failure.code)
        reason = failure.message or code
        if code in _PASSING | _UNMENDABLE:
            if self._contexts.busy or code in _UNMENDABLE:
                raise ConnectionLost(code, reason)
            return
        self._live.pop(failure.context_id, None)
        for context in self._live.values() if not failure.context_id else ():
            context.unwanted = True
        if error := self._contexts.failed(failure.context_id, f"ElevenLabs: {reason}", code):
            raise ConnectionLost(error.code, reason)


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


def _code(failure: Exception | None) -> str:
    """ElevenLabs's word for a failure, which a close carries as its reason."""
    if isinstance(failure, ConnectionLost):
        return failure.code
    reason = failure.reason if isinstance(failure, ConnectionClosed) else None
    return (reason and reason.reason) or "closed"
