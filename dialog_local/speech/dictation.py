"""Serves OpenAI's realtime transcription on the shared recogniser: audio in, items and their transcripts out."""

from dataclasses import dataclass
from typing import TypeAlias

import trio
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from dialog_local.speech import realtime
from dialog_local.speech.audio import Resampler, StreamDecoder
from dialog_local.speech.hearing import RATE, Segment, Segmenter, SpeechStarted
from dialog_local.speech.listen import PENDING_HAPPENINGS, Ear
from dialog_local.speech.realtime import Append, BetaUpdate, Clear, Commit, Refused, Retrieve, SessionState, SessionUpdate

PHRASE_PAUSE_S = 0.4  # without turn detection; shorter pieces are understood worse
SHORTEST_COMMIT_S = 0.1  # OpenAI's error says so: "Expected at least 100ms of audio"


@dataclass(frozen=True, eq=False)
class _Part:
    """A stretch of an item, to be transcribed."""

    item_id: str
    segment: Segment


@dataclass(frozen=True)
class _End:
    """No more of it comes."""

    item_id: str
    seconds: float


_Work: TypeAlias = _Part | _End


class Dictation:
    """One session: `take` obeys a client's events, `run` transcribes what they brought. The two meet in a bounded queue."""

    def __init__(self, socket: WebSocket, ear: Ear) -> None:
        self._socket = socket
        self._ear = ear
        self._state = SessionState()
        self._work, self._todo = trio.open_memory_channel[_Work](PENDING_HAPPENINGS)
        self._before_s = 0.0  # audio heard with earlier settings
        self._item_id = realtime.new_item_id()
        self._item_from_s = 0.0
        self._last_item_id: str | None = None
        self._texts: list[str] = []  # of the item that is being transcribed
        self._segmenter = Segmenter()
        self._listen_anew()

    async def greet(self) -> None:
        """Begin the session."""
        await self._socket.send_text(realtime.event("session.created", session=self._state.shown()))

    async def take(self, text: str | bytes) -> None:
        """Obey one event. Raises `Refused`."""
        match realtime.parse_event(text):
            case SessionUpdate(session=changes):
                before = self._state.input
                self._state.update(changes)
                if (before.format, before.turn_detection) != (self._state.input.format, self._state.input.turn_detection):
                    self._listen_anew()
                await self._socket.send_text(realtime.event("session.updated", session=self._state.shown()))
            case Append(audio=audio):
                await self._hear(audio)
            case Commit():
                await self._commit_by_hand()
            case Clear():
                self._listen_anew()
                await self._socket.send_text(realtime.event("input_audio_buffer.cleared"))
            case Retrieve(item_id=item_id):
                raise Refused(
                    "item_not_found", f"Item with item_id {item_id!r} not found: this server keeps none", "item_id"
                )
            case BetaUpdate():
                raise realtime.beta_refused()

    async def run(self) -> None:
        """Send transcripts until cancelled."""
        async for work in self._todo:
            if self._state.input.transcription is None:
                continue
            match work:
                case _Part(item_id, segment):
                    await self._transcribe(item_id, segment)
                case _End(item_id, seconds):
                    await self._socket.send_text(realtime.completed(item_id, " ".join(self._texts), seconds))
                    self._texts = []

    @property
    def _now(self) -> float:
        return self._before_s + self._segmenter.now

    def _listen_anew(self) -> None:
        """Begin with an empty buffer. Without turn detection pauses still cut what is said, so that deltas come early."""
        self._before_s = self._now
        vad = self._state.input.turn_detection
        self._decoder = StreamDecoder(self._state.input.format.encoding)
        self._resampler = Resampler(self._state.input.format.rate, RATE)
        self._segmenter = Segmenter(endpointing_s=vad.silence_s if vad else PHRASE_PAUSE_S)
        self._item_from_s = self._before_s

    async def _hear(self, audio: bytes) -> None:
        for happening in self._segmenter.feed(self._resampler.feed(self._decoder.feed(audio))):
            match happening:
                case SpeechStarted(at):
                    await self._begin(at)
                case Segment():
                    await self._work.send(_Part(self._item_id, happening))
                    if happening.speech_final and self._state.input.turn_detection:
                        await self._stop(happening)

    async def _begin(self, at: float) -> None:
        vad = self._state.input.turn_detection
        if vad is None:
            return
        self._item_from_s = max(0.0, self._before_s + at - vad.prefix_padding_ms / 1000)
        start_ms = round(self._item_from_s * 1000)
        kind = "input_audio_buffer.speech_started"
        await self._socket.send_text(realtime.event(kind, item_id=self._item_id, audio_start_ms=start_ms))

    async def _stop(self, segment: Segment) -> None:
        kind, end_ms = "input_audio_buffer.speech_stopped", round((self._before_s + segment.end) * 1000)
        await self._socket.send_text(realtime.event(kind, item_id=self._item_id, audio_end_ms=end_ms))
        await self._commit()

    async def _commit_by_hand(self) -> None:
        seconds = self._now - self._item_from_s
        if seconds < SHORTEST_COMMIT_S:
            message = f"Error committing input audio buffer: expected at least 100ms of audio, got {seconds * 1000:.0f}ms"
            raise Refused("input_audio_buffer_commit_empty", message)
        if segment := self._segmenter.finalize():
            await self._work.send(_Part(self._item_id, segment))
        await self._commit()

    async def _commit(self) -> None:
        item_id, self._item_id = self._item_id, realtime.new_item_id()
        seconds, self._item_from_s = self._now - self._item_from_s, self._now
        kind, previous = "input_audio_buffer.committed", self._last_item_id
        await self._socket.send_text(realtime.event(kind, item_id=item_id, previous_item_id=previous))
        self._last_item_id = item_id
        await self._work.send(_End(item_id, seconds))

    async def _transcribe(self, item_id: str, segment: Segment) -> None:
        text = await self._ear.transcribe(segment.audio)
        for word in text.split():
            space = " " if self._texts else ""
            await self._socket.send_text(realtime.delta(item_id, space + word))
            self._texts.append(word)


async def transcribe_live(socket: WebSocket, ear: Ear | None) -> None:
    """Serve one WebSocket; `ear` is None while the recogniser is being loaded."""
    if not realtime.has_key(socket.headers):
        message = "Missing bearer authentication in header: send `Authorization: Bearer KEY`"
        await _deny(socket, 401, "invalid_api_key", message)
    elif ear is None:
        await _deny(socket, 503, "not_ready", "the recogniser is still being loaded; /healthz tells when it is ready")
    else:
        await socket.accept()
        try:
            await _serve(socket, ear)
        except* WebSocketDisconnect:
            pass  # the client has gone; whatever it had said is of no use to anybody


async def _deny(socket: WebSocket, status: int, code: str, message: str) -> None:
    await socket.send_denial_response(JSONResponse(realtime.denial(code, message), status))


async def _serve(socket: WebSocket, ear: Ear) -> None:
    try:
        realtime.check_connection(socket.headers, socket.query_params)
    except Refused as refused:
        await _refuse(socket, refused)
        return
    dictation = Dictation(socket, ear)
    with trio.move_on_after(realtime.SESSION_SECONDS) as life:
        async with trio.open_nursery() as nursery:
            await dictation.greet()
            nursery.start_soon(dictation.run)
            await _obey(socket, dictation)
            nursery.cancel_scope.cancel()
    if life.cancelled_caught:
        message = "Your session hit the maximum duration of 60 minutes."
        await socket.send_text(realtime.error(Refused("session_expired", message)))
        await socket.close(1001, message)


async def _obey(socket: WebSocket, dictation: Dictation) -> None:
    """Read events until one ends the connection. Raises `WebSocketDisconnect`."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text: str | bytes = message.get("text") or message.get("bytes") or ""
        try:
            await dictation.take(text)
        except Refused as refused:
            answers = realtime.event_id(text)
            if refused.closes:
                await _refuse(socket, refused, answers)
                return
            await socket.send_text(realtime.error(refused, answers))


async def _refuse(socket: WebSocket, refused: Refused, answers: str | None = None) -> None:
    await socket.send_text(realtime.error(refused, answers))
    await socket.close(4000, f"invalid_request_error.{refused.code}")
