"""Speech to text by OpenAI's realtime transcription: the sessions that carry audio there and transcripts back.

Wire facts: OpenAI docs, "Realtime transcription" guide and Realtime API reference, in the shape that is generally available
(the beta's ended on 2026-05-12).
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import trio
from trio_websocket import ConnectionClosed
from wsproto.utilities import LocalProtocolError

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
from dialog_worker.stt.streaming import STALL_S, Stream, StreamingSTT
from dialog_worker.stt.voice import Began, Ended, VoiceGate

URL = "wss://api.openai.com/v1/realtime?intent=transcription"  # a `model` here is refused: the session names it
MODEL = "gpt-live-transcribe"  # what the guide recommends; it transcribes while somebody speaks, and has no turn detection
FORMATS = {"mulaw": "audio/pcmu", "alaw": "audio/pcma"}
RATE = 8000  # Hz, and bytes a second
LONGEST_APPEND_S = 0.1
SETUP_S = 2.0  # for the session to be created and to take its settings: ten times the usual
PROBE_ANSWER_S = 1.0  # of the time in which a stall is noticed
UNJUDGED_S = 5.0  # a server that has said nothing of audio sent so long ago has found no speech in it
SESSION_S = 3600.0  # a session ends after 60 minutes
PAUSE_FROM, FORCED_FROM = 0.9, 0.99  # of a session's life: begin another in the next pause, and in any case
EXPIRED = "session_expired"
FATAL = frozenset({"invalid_api_key", "invalid_model", "beta_api_shape_disabled", "4000"})
SETUP_ID, PROBE_ID, COMMIT_ID = "setup", "probe", "commit-"
# Changes nothing ("omitted fields keep their value"), and is answered by session.updated, or else by an error.
PROBE = f'{{"type":"session.update","event_id":"{PROBE_ID}","session":{{"type":"transcription"}}}}'


class OpenAISTT(StreamingSTT[Incoming]):
    """OpenAI realtime transcription for one call. The key comes from `api_key` or OPENAI_API_KEY, the URL from `url` or
    OPENAI_REALTIME_URL.

    `turn_detection`: `{"type": "server_vad", ...}` or `{"type": "semantic_vad", ...}` lets OpenAI find where speech begins
    and ends; None finds it here, by energy, and must be None for gpt-live-transcribe and gpt-realtime-whisper, which know
    none. `silence_ms`: the silence that then ends an utterance. `noise_reduction`: `{"type": "near_field"}` or
    `{"type": "far_field"}`. `include_logprobs`: gives each `Final` a confidence. `session`: any other setting, merged into
    the session. `queue_size_limit`: bytes of the caller's audio that are kept while OpenAI is away (None: 30 s). What is
    lost beyond it is told once an outage, with the code audio_lost. `finalize_timeout_s`: how long a transcript may take;
    then another connection is asked for it, once. `stall_s`: a voice without an answer for so long, nor to the question
    whether the server lives, calls for a new connection. `session_s`: how long a session may last.
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
        queue_size_limit: int | None = None,
        finalize_timeout_s: float = STALL_S,
        stall_s: float = STALL_S,
        session_s: float = SESSION_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
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
        super().__init__(endpoint, decoder, Stream(encoding, RATE, queue_size_limit, LONGEST_APPEND_S), give_up_s)
        self._encoding = encoding
        self._silence_s = silence_ms / 1000
        self._session_s = session_s
        self._stall_s = stall_s
        self._turns = Turns(finalize_timeout_s)
        self._stalled = False  # and nothing was heard since but that a session was set up
        self._begin(0.0)

    def _begin(self, now: float) -> None:
        """Forget what belonged to the connection before."""
        local = self._settings["audio"]["input"].get("turn_detection") is None
        self._gate = VoiceGate(self._encoding, RATE, self._silence_s) if local else None
        self._sent_s = 0.0  # audio that this connection was given, or that the gate held back
        self._judged_s = 0.0  # of it
        self._sendings = deque[tuple[float, float]]()  # when, and up to where
        self._opened_at = self._heard_at = now
        self._life_s = self._session_s
        self._expired = self._is_set_up = False
        self._patience = trio.CancelScope()

    async def _session(self, connection: Connection[Incoming]) -> None:
        self._begin(trio.current_time())
        await self._set_up(connection)
        await self._resume()
        self._turns.reconnected(trio.current_time())
        try:
            await self._converse(connection)
        finally:
            self._is_set_up = False

    async def _converse(self, connection: Connection[Incoming]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_audio, connection)
            nursery.start_soon(self._watch, connection)
            nursery.start_soon(self._ping, connection)
            while not self._is_over():
                await self._receive(connection)
            nursery.cancel_scope.cancel()

    def _end(self) -> Iterator[Hearing]:
        return self._turns.stop()

    def _waiting_since(self) -> float:
        """Since a transcript is due; without a session that can be trusted, since anything was said."""
        if self._is_set_up and not self._stalled:
            return self._turns.owed_since
        return self._voice.since if self._turns.idle else -math.inf

    async def _set_up(self, connection: Connection[Incoming]) -> None:
        update = {"type": "session.update", "event_id": SETUP_ID, "session": self._settings}
        with trio.move_on_after(SETUP_S):
            while True:
                match await self._hear(connection):
                    case SessionCreated(session):
                        self._schedule_end(session.expires_at)
                        await connection.send(msgspec.json.encode(update).decode())
                    case SessionUpdated():
                        self._is_set_up = True
                        self._prove(connection)
                        return
                    case Failure(problem):
                        fatal = _is_fatal(problem) or problem.type == "invalid_request_error"
                        raise _lost(problem, fatal=fatal)
        raise ConnectionLost("setup", f"no session within {SETUP_S:.0f} s")

    def _prove(self, connection: Connection[Incoming]) -> None:
        """A session works when it is set up; but if a transcript is owed, or an answer to a voice, only by its coming."""
        if math.isinf(self._turns.owed_since) and not self._stalled:
            connection.prove()

    def _schedule_end(self, expires_at: float | None) -> None:
        """Believe the server, unless our clock and its own disagree so much that the session would be over at once."""
        told_s = (expires_at or math.inf) - time.time()
        if told_s > self._session_s / 2:
            self._life_s = min(self._session_s, told_s)

    def _is_over(self) -> bool:
        age_s = trio.current_time() - self._opened_at
        pausing = self._turns.idle and age_s >= PAUSE_FROM * self._life_s
        return self._expired or pausing or age_s >= FORCED_FROM * self._life_s

    async def _send_audio(self, connection: Connection[Incoming]) -> None:
        try:
            while True:
                if audio := self._audio.take():
                    self._sent_s += len(audio) / RATE
                    self._sendings.append((trio.current_time(), self._sent_s))
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

    async def _watch(self, connection: Connection[Incoming]) -> None:
        """Ask a server that says nothing to a voice for a sign of life: it need not answer what it takes for noise."""
        try:
            while True:
                since = max(self._voice.since, self._heard_at)
                ask_at = since + self._stall_s - PROBE_ANSWER_S
                if math.isinf(since):
                    await self._posted.park()
                elif trio.current_time() < ask_at:
                    await trio.sleep_until(ask_at)
                else:
                    await self._probe(connection)
        except (ConnectionClosed, LocalProtocolError):
            return

    async def _probe(self, connection: Connection[Incoming]) -> None:
        asked_at = trio.current_time()
        with trio.move_on_after(PROBE_ANSWER_S):  # a dead connection may not even take it
            await connection.send(PROBE)
        await trio.sleep_until(asked_at + PROBE_ANSWER_S)
        if self._heard_at < asked_at:
            self._stalled = True
            raise ConnectionLost("stall", f"no answer to a voice for {self._stall_s:g} s")

    async def _receive(self, connection: Connection[Incoming]) -> None:
        message: Incoming | None = None
        with trio.CancelScope(deadline=self._next_deadline()) as self._patience:
            message = await self._hear(connection)
        now = trio.current_time()
        if message is None:
            self._check_transcript(now)
            hearings = list(self._turns.expire(now))
        else:
            self._heard_at, self._stalled = now, False
            hearings = list(self._understand(message, now))
            if not isinstance(message, Failure):
                self._prove(connection)
        self._settle()  # first: who reads these may ask at once what is owed besides
        await self._tell(hearings)

    def _check_transcript(self, now: float) -> None:
        """A transcript that did not come is asked for on another connection, and only once."""
        if item := self._turns.missing(now):
            fatal, item.asked_again = item.asked_again, True
            raise ConnectionLost("timeout", "no transcript of an utterance in time", fatal)

    def _settle(self) -> None:
        """Let go of the audio that no other connection will need."""
        while self._sendings and self._sendings[0][0] <= trio.current_time() - UNJUDGED_S:
            _, self._judged_s = self._sendings.popleft()
        self._audio.settle(self._turns.settled_s(self._judged_s))

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
        age_s = trio.current_time() - self._opened_at
        over_s = self._life_s * (PAUSE_FROM if age_s < PAUSE_FROM * self._life_s else FORCED_FROM)
        return min(self._turns.due_at, self._opened_at + over_s)

    def _understand(self, message: Incoming, now: float) -> Iterator[Hearing]:
        self._voice.progress(now)
        match message:
            case SessionUpdated():
                self._show_life(now)
            case VoiceStarted():
                yield from self._turns.began(message.audio_start_ms / 1000, message.item_id)
            case VoiceStopped():
                self._turns.stopped(message.audio_end_ms / 1000, now, message.item_id)
            case Committed():
                yield from self._turns.committed(message.item_id, now)
            case Delta():
                yield from self._turns.delta(message.item_id, message.delta or "", now)
            case Completed():
                yield from self._turns.completed(message.item_id, message.transcript, message.confidence)
            case ItemFailed():
                yield from self._turns.failed(message.item_id, message.error.told())
            case Failure():
                yield from self._fail(message.error, now)
        self._voice.answered(self._turns.done_s + self._audio.offset_s, now)

    def _show_life(self, now: float) -> None:
        """A living server, for which nobody's speech is open, has taken what was said for noise."""
        if self._turns.idle:
            self._voice.answered(math.inf, now)

    def _fail(self, problem: Problem, now: float) -> Iterator[Hearing]:
        event_id = problem.event_id or ""
        if problem.code == EXPIRED:
            self._expired = True
        elif _is_fatal(problem):
            raise _lost(problem, fatal=True)
        elif event_id.startswith(COMMIT_ID):
            yield from self._turns.refused(int(event_id.removeprefix(COMMIT_ID)), problem.told())
        elif event_id == PROBE_ID:
            self._show_life(now)
        else:
            yield problem.told()


def _settings(transcription: dict[str, Any], audio: dict[str, Any], *, include_logprobs: bool) -> dict[str, Any]:
    """A transcription session for `session.update`: null clears a setting of the audio; the others are left out instead."""
    known = {name: value for name, value in transcription.items() if value is not None}
    include = ["item.input_audio_transcription.logprobs"]
    session = {"type": "transcription", "audio": {"input": {**audio, "transcription": known}}}
    return {**session, "include": include} if include_logprobs else session


def _is_fatal(problem: Problem) -> bool:
    return problem.code in FATAL


def _lost(problem: Problem, *, fatal: bool) -> ConnectionLost:
    return ConnectionLost(problem.code or problem.type or "error", problem.message or "no description", fatal)


def _text(event: Append | Commit) -> str:
    return msgspec.json.encode(event).decode()
