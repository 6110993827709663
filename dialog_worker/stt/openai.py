"""Speech to text by OpenAI's realtime transcription: the sessions that carry audio there and transcripts back.

Wire facts: OpenAI docs, "Realtime transcription" guide and Realtime API reference, in the shape that is generally available
(the beta's ended on 2026-05-12).
"""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import trio
from trio_websocket import ConnectionClosed
from wsproto.utilities import LocalProtocolError

from dialog_worker.participant import ProviderError
from dialog_worker.provider import (
    GIVE_UP_S,
    ConfigurationError,
    Connection,
    ConnectionLost,
    Decoder,
    Endpoint,
    ProviderSocket,
    backoff_s,
    find_key,
    find_url,
)
from dialog_worker.stt.base import STT, Hearing
from dialog_worker.stt.buffer import AudioBuffer
from dialog_worker.stt.openai_turn import (
    Append,
    Commit,
    Committed,
    Completed,
    Delta,
    Failure,
    Incoming,
    ItemFailed,
    Problem,
    SessionCreated,
    SessionUpdated,
    Turns,
    VoiceStarted,
    VoiceStopped,
    merged,
)
from dialog_worker.stt.voice import Began, Ended, VoiceGate

URL = "wss://api.openai.com/v1/realtime?intent=transcription"  # a `model` here is refused: the session names it
MODEL = "gpt-live-transcribe"  # what the guide recommends; it transcribes while somebody speaks, and has no turn detection
FORMATS = {"mulaw": "audio/pcmu", "alaw": "audio/pcma"}
RATE = 8000  # Hz, and bytes a second
LONGEST_APPEND_S = 0.1
SETUP_S = 5.0  # for the session to be created and to take its settings
PROBE_AFTER_S = 5.0  # without a message, which is normal in silence, ask whether the server is alive
PROBE_ANSWER_S = 3.0
SESSION_S = 3600.0  # a session ends after 60 minutes
PAUSE_FROM, FORCED_FROM = 0.9, 0.99  # of a session's life: begin another in the next pause, and in any case
EXPIRED = "session_expired"
FATAL = frozenset({"invalid_api_key", "invalid_model", "beta_api_shape_disabled", "4000"})
SETUP_ID, PROBE_ID, COMMIT_ID = "setup", "probe", "commit-"
# An event that changes nothing and is always answered, if only by an error that there is no such item.
PROBE = f'{{"type":"conversation.item.retrieve","event_id":"{PROBE_ID}","item_id":"item_none"}}'


class OpenAISTT(STT):
    """OpenAI realtime transcription for one call. The key comes from `api_key` or OPENAI_API_KEY, the URL from `url` or
    OPENAI_REALTIME_URL.

    `turn_detection`: `{"type": "server_vad", ...}` or `{"type": "semantic_vad", ...}` lets OpenAI find where speech begins
    and ends; None finds it here, by energy, and must be None for gpt-live-transcribe and gpt-realtime-whisper, which know
    none. `silence_ms`: the silence that then ends an utterance. `noise_reduction`: `{"type": "near_field"}` or
    `{"type": "far_field"}`. `include_logprobs`: gives each `Final` a confidence. `session`: any other setting, merged into
    the session. `finalize_timeout_s`: how long a transcript may take. `session_s`: how long a session may last.
    Raises `ConfigurationError` for a missing key, a bad URL or an encoding that is not G.711.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        model: str = MODEL,
        url: str | None = None,
        headers: Mapping[str, str] | None = None,
        language: str | None = "en",
        prompt: str | None = None,
        encoding: str = "mulaw",
        noise_reduction: Mapping[str, Any] | None = None,
        turn_detection: Mapping[str, Any] | None = None,
        silence_ms: int = 500,
        include_logprobs: bool = False,
        session: Mapping[str, Any] | None = None,
        finalize_timeout_s: float = 5.0,
        session_s: float = SESSION_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        super().__init__()
        if encoding not in FORMATS:
            raise ConfigurationError(f"encoding={encoding!r}: choose one of {', '.join(FORMATS)}")
        endpoint = Endpoint(
            provider="OpenAI",
            url=find_url(url, "OPENAI_REALTIME_URL", URL),
            headers={"Authorization": f"Bearer {find_key(api_key, 'OPENAI_API_KEY', 'OpenAI')}", **(headers or {})},
            key_variable="OPENAI_API_KEY",
        )
        base = _settings(
            {"model": model, "language": language, "prompt": prompt},
            {"format": {"type": FORMATS[encoding]}, "noise_reduction": noise_reduction, "turn_detection": turn_detection},
            include_logprobs=include_logprobs,
        )
        self._settings = merged(base, dict(session or {}))
        decoder = Decoder[Incoming](
            SessionCreated, SessionUpdated, VoiceStarted, VoiceStopped, Committed, Delta, Completed, ItemFailed, Failure
        )
        self._socket = ProviderSocket(endpoint, decoder, self.emit, give_up_s=give_up_s)
        self._encoding = encoding
        self._silence_s = silence_ms / 1000
        self._session_s = session_s
        self._give_up_s = give_up_s
        self._audio = AudioBuffer(encoding, RATE, longest_s=LONGEST_APPEND_S)
        self._posted = trio.lowlevel.ParkingLot()
        self._turns = Turns(finalize_timeout_s)
        self._telling = trio.StrictFIFOLock()
        self._life = trio.CancelScope()
        self._refusal: ProviderError | None = None
        self._setbacks = 0  # sessions in a row that were not set up
        self._setback_since = math.inf
        self._begin(0.0)

    def post(self, audio: bytes) -> None:
        """Take the caller's next audio; the last 30 s are kept while OpenAI is away."""
        self._audio.append(audio)
        self._posted.unpark_all()

    async def run(self) -> None:
        """Hold a session until cancelled; returns after a fatal `ProviderError`."""
        with self._life:
            await self._socket.serve(self._session)
        if self._refusal is not None:
            await self.emit(self._refusal)
        await self._tell(self._turns.end())

    def _begin(self, now: float) -> None:
        """Forget what belonged to the connection before."""
        local = self._settings["audio"]["input"].get("turn_detection") is None
        self._gate = VoiceGate(self._encoding, RATE, self._silence_s) if local else None
        self._sent_s = 0.0  # audio that this connection was given, or that the gate held back
        self._opened_at = self._heard_at = now
        self._life_s = self._session_s
        self._probed = self._expired = False
        self._patience = trio.CancelScope()

    async def _session(self, connection: Connection[Incoming]) -> None:
        self._begin(trio.current_time())
        await self._set_up(connection)
        self._setbacks, self._setback_since = 0, math.inf
        lost_s = self._audio.rewind()
        if lost_s:
            text = f"OpenAI was away for too long: {lost_s:.1f} s of the caller's audio were lost"
            await self.emit(ProviderError(text, code="audio_lost"))
        self._turns.reconnected(trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_audio, connection)
            while not self._is_over():
                await self._receive(connection)
            nursery.cancel_scope.cancel()

    async def _set_up(self, connection: Connection[Incoming]) -> None:
        update = {"type": "session.update", "event_id": SETUP_ID, "session": self._settings}
        with trio.move_on_after(SETUP_S):
            while True:
                match await self._hear(connection):
                    case SessionCreated(session):
                        self._schedule_end(session.expires_at)
                        await connection.send(msgspec.json.encode(update).decode())
                    case SessionUpdated():
                        return
                    case Failure(problem):
                        await self._fall_back(problem)
        await self._fall_back(Problem(code="setup", message=f"no session within {SETUP_S:.0f} s"))

    def _schedule_end(self, expires_at: float | None) -> None:
        """Believe the server, unless our clock and its own disagree so much that the session would be over at once."""
        told_s = (expires_at or math.inf) - time.time()
        if told_s > self._session_s / 2:
            self._life_s = min(self._session_s, told_s)

    async def _fall_back(self, problem: Problem) -> None:
        """A session that was not set up: refused for good, or to be tried again more and more slowly."""
        now = trio.current_time()
        self._setback_since = min(self._setback_since, now)
        error = problem.told()
        if _is_fatal(problem) or problem.type == "invalid_request_error" or now - self._setback_since >= self._give_up_s:
            await self._give_up(error)
        await trio.sleep(backoff_s(self._setbacks))
        self._setbacks += 1
        raise ConnectionLost(error.code, problem.message or "no description")

    async def _give_up(self, error: ProviderError) -> None:
        self._refusal = ProviderError(error.message, code=error.code, fatal=True)
        self._life.cancel()
        await trio.lowlevel.checkpoint()

    def _is_over(self) -> bool:
        age_s = trio.current_time() - self._opened_at
        pausing = self._turns.idle and age_s >= PAUSE_FROM * self._life_s
        return self._expired or pausing or age_s >= FORCED_FROM * self._life_s

    async def _send_audio(self, connection: Connection[Incoming]) -> None:
        try:
            while True:
                if audio := self._audio.take():
                    self._sent_s += len(audio) / RATE
                    await self._send(connection, audio)
                    self._settle()
                else:
                    await self._posted.park()
        except (ConnectionClosed, LocalProtocolError):
            return  # the receiving side reads what the server said before it closed, and then tells why

    async def _send(self, connection: Connection[Incoming], audio: bytes) -> None:
        for passing in self._gate.feed(audio) if self._gate else [audio]:
            match passing:
                case Began(at_s):
                    await self._tell(self._turns.began(at_s))
                case Ended(at_s):
                    serial = self._turns.stopped(at_s, trio.current_time())
                    self._patience.deadline = self._next_deadline()
                    await connection.send(_text(Commit(f"{COMMIT_ID}{serial}")))
                case _:
                    await connection.send(_text(Append(passing)))

    async def _receive(self, connection: Connection[Incoming]) -> None:
        message: Incoming | None = None
        with trio.CancelScope(deadline=self._next_deadline()) as self._patience:
            message = await self._hear(connection)
        if message is None:
            await self._tell(self._turns.expire(trio.current_time()))
            await self._probe(connection)
        else:
            self._heard_at, self._probed = trio.current_time(), False
            await self._understand(message)
        self._settle()

    def _settle(self) -> None:
        """Let go of the audio that no other connection will need."""
        self._audio.settle(self._turns.settled_s(self._sent_s))

    async def _hear(self, connection: Connection[Incoming]) -> Incoming:
        """The next message; closes with a reason of OpenAI's own are read as the errors that they stand for."""
        try:
            return await connection.receive()
        except ConnectionClosed as closed:
            code, reason = (closed.reason.code, closed.reason.reason) if closed.reason else (1006, None)
            # OpenAI closes a session at its age limit with 1001, and one whose URL or headers it refuses with 4000.
            if code == 1001 and trio.current_time() - self._opened_at >= self._life_s / 2:
                return Failure(Problem(code=EXPIRED))
            if code == 4000:
                return Failure(Problem(code="4000", message=reason))
            raise

    def _next_deadline(self) -> float:
        probing = self._heard_at + PROBE_AFTER_S + (PROBE_ANSWER_S if self._probed else 0.0)
        age_s = trio.current_time() - self._opened_at
        over_s = self._life_s * (PAUSE_FROM if age_s < PAUSE_FROM * self._life_s else FORCED_FROM)
        return min(self._turns.due_at, probing, self._opened_at + over_s)

    async def _probe(self, connection: Connection[Incoming]) -> None:
        """Ask a server that has long been silent for a sign of life; the second time, leave it."""
        silent_s = trio.current_time() - self._heard_at
        if silent_s >= PROBE_AFTER_S + PROBE_ANSWER_S:
            raise ConnectionLost("stall", f"no answer for {silent_s:.0f} s")
        if silent_s >= PROBE_AFTER_S and not self._probed:
            self._probed = True
            with trio.move_on_after(PROBE_ANSWER_S):  # a dead connection may not even take it
                await connection.send(PROBE)

    async def _understand(self, message: Incoming) -> None:
        now = trio.current_time()
        match message:
            case VoiceStarted():
                await self._tell(self._turns.began(message.audio_start_ms / 1000, message.item_id))
            case VoiceStopped():
                self._turns.stopped(message.audio_end_ms / 1000, now, message.item_id)
            case Committed():
                await self._tell(self._turns.committed(message.item_id, now))
            case Delta():
                await self._tell(self._turns.delta(message.item_id, message.delta or "", now))
            case Completed():
                await self._tell(self._turns.completed(message.item_id, message.transcript, message.confidence))
            case ItemFailed():
                await self._tell(self._turns.failed(message.item_id, message.error.told()))
            case Failure():
                await self._fail(message.error)

    async def _fail(self, problem: Problem) -> None:
        event_id = problem.event_id or ""
        if problem.code == EXPIRED:
            self._expired = True
        elif _is_fatal(problem):
            await self._give_up(problem.told())
        elif event_id.startswith(COMMIT_ID):
            await self._tell(self._turns.refused(int(event_id.removeprefix(COMMIT_ID)), problem.told()))
        elif event_id != PROBE_ID:
            await self.emit(problem.told())

    async def _tell(self, hearings: Iterable[Hearing]) -> None:
        async with self._telling:  # both directions have news, and the order of the turns must not suffer
            for hearing in list(hearings):
                await self.emit(hearing)


def _settings(transcription: dict[str, Any], audio: dict[str, Any], *, include_logprobs: bool) -> dict[str, Any]:
    """A transcription session for `session.update`: null clears a setting of the audio; the others are left out instead."""
    known = {name: value for name, value in transcription.items() if value is not None}
    include = ["item.input_audio_transcription.logprobs"]
    session = {"type": "transcription", "audio": {"input": {**audio, "transcription": known}}}
    return {**session, "include": include} if include_logprobs else session


def _is_fatal(problem: Problem) -> bool:
    return problem.code in FATAL


def _text(event: Append | Commit) -> str:
    return msgspec.json.encode(event).decode()
