"""What every agent is: it wires the phone line to speech and back, runs one turn at a time, and stops when interrupted.

An agent's author overrides handlers (`on_…`) and `inference`. `run` opens the nursery that everything of the call lives in;
when the call is over, nothing of it is left.
"""

import logging
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import TypeVar

import trio

from dialog_worker.agent.ear import Ear
from dialog_worker.agent.handlers import Handlers
from dialog_worker.agent.turn import Question, Turn
from dialog_worker.agent.utterance import Utterance
from dialog_worker.agent.voice import Voice
from dialog_worker.participant import ProviderError
from dialog_worker.stt.base import STT, Final, Hearing, SpeechEnded, SpeechStarted
from dialog_worker.tts.base import TTS
from dialog_worker.voip import VoIP
from protocol.messages import (
    CallStatus,
    Dtmf,
    Error,
    Event,
    Media,
    Message,
    MessageDispatched,
    Metadata,
    RecordingStatus,
    RecordingUrl,
    Restored,
    Shutdown,
    StreamingStarted,
    StreamingStopped,
    StreamStatus,
    TimeLimit,
    Transcript,
    TranscriptStatus,
)

QUEUE_SIZE_LIMIT = 32  # of the caller's messages waiting for their turn
EVENTS_LIMIT = 256  # events waiting for their handler; then the line is read no further
_NOTICED_LATE_S = 0.8  # after its first sample speech is known to be speech
_LEAVE_EARLY_S = 0.5  # of the time that a shutdown gives, kept for leaving

log = logging.getLogger("agent")


Participants = TypeVar("Participants", STT, TTS)

_turn: ContextVar[Turn | None] = ContextVar("turn", default=None)


def new_uuid() -> str:
    """Return a name for a message."""
    return str(uuid.uuid4())


class Agent(Handlers):
    """The participant that decides. With neither `stt` nor `tts` it deals with audio itself, in `on_media`.

    Of several `stt` or `tts` the first is used, and each next one when the one before it has failed for good.
    `queue_size_limit`: how many messages of the caller's may wait for their turn.
    `nursery` is the call's, from the start of `run` on: for work of the agent's own that ends with the call.
    """

    nursery: trio.Nursery

    def __init__(
        self,
        *,
        voip: VoIP,
        stt: STT | Sequence[STT] | None = None,
        tts: TTS | Sequence[TTS] | None = None,
        queue_size_limit: int = QUEUE_SIZE_LIMIT,
    ) -> None:
        self.voip = voip
        self._ear = Ear(_several(stt), self._hear, self._lose)
        self._voice = Voice(voip, _several(tts), self.on_provider_error, self._lose)
        self._thinking = trio.CancelScope()
        self._gave_up = False
        self._interruptible: set[trio.CancelScope] = set()
        self._current: Turn | None = None
        self._speaking_since: float | None = None
        self._settled_at = 0.0  # all that the caller said until then is told
        self._ask, self._questions = trio.open_memory_channel[Question](queue_size_limit)
        self._all_handled = trio.Event()
        self._happen, self._happened = trio.open_memory_channel[Event](EVENTS_LIMIT)
        self._handlers: dict[type[Event], Callable[..., Awaitable[None]]] = {
            Metadata: self.on_metadata,
            StreamingStarted: self.on_streaming_started,
            StreamingStopped: self.on_streaming_stopped,
            StreamStatus: self.on_stream_status,
            Dtmf: self.on_dtmf,
            Transcript: self.on_transcript,
            TranscriptStatus: self.on_transcript_status,
            RecordingUrl: self.on_recording_url,
            RecordingStatus: self.on_recording_status,
            MessageDispatched: self.on_message_dispatched,
            CallStatus: self.on_call_status,
            TimeLimit: self.on_time_limit,
            Restored: self.on_restored,
            Error: self.on_error,
            Shutdown: self.on_shutdown,
        }

    @property
    def stt(self) -> STT | None:
        """What it hears with at present; `set_stt` changes it."""
        return self._ear.stt

    @property
    def tts(self) -> TTS | None:
        """What it speaks with at present; `set_tts` changes it."""
        return self._voice.tts

    # What an author overrides, besides `Handlers`

    def on_media(self, media: Media) -> None:
        """Handle 20 ms of the caller's voice; fifty come a second, so this must not wait. By default the STT gets it."""
        if self.stt is not None:
            self.stt.post(media.payload)

    async def on_vad(self, speaking: bool) -> None:
        """Handle the caller's beginning or ceasing to speak. By default the agent stops talking when the caller begins."""
        if speaking:
            self.abort()

    async def on_restored(self, restored: Restored) -> None:
        """Handle that this worker takes over from one that died. By default `restore` is called."""
        await self.restore(restored.checkpoint, restored.playing)

    def checkpoint(self) -> bytes:
        """Return all that a worker that takes over this call has to know; `save` has the supervisor keep it."""
        return b""

    async def restore(self, checkpoint: bytes, playing: dict[str, int]) -> None:
        """Go on with a call whose worker died. `checkpoint` is its last, empty if it saved none, or died of it before.

        `playing` tells, for each message that was being said, how many ms of it the caller has heard or will hear.
        """

    async def give_up(self, reason: str) -> None:
        """Hand the caller over to what `[fallback]` says, because the agent cannot go on."""
        self._gave_up = True
        self.failed_to_answer()
        log.error("the agent gives up: %s", reason)
        await self.voip.dispose(fallback=True)

    async def inference(self, message: Message[str]) -> None:
        """Answer what the caller said. Overriding this replaces the whole answer logic; by default nothing is answered."""

    # What an author calls

    def post(self, message: Message[str]) -> None:
        """Take something that the caller said; it is answered when its turn comes. Empty text is ignored."""
        if not message.data.strip():
            return
        try:
            self._ask.send_nowait(Question(message))
        except trio.WouldBlock:
            limit = self._ask.statistics().max_buffer_size
            with suppress(trio.WouldBlock):
                self._happen.send_nowait(Error("queue_full", f"{limit:g} messages wait for an answer; one more gets none"))

    async def dispatch_message(self, message: Message[str], allow_interrupt: bool = True) -> str:
        """Say a whole message, wait until it was played or cut, and return what the caller heard of it."""

        async def once() -> AsyncIterable[str]:
            yield message.data

        return await self.dispatch_text(message.uuid, once(), allow_interrupt)

    async def dispatch_text(self, uuid: str, pieces: AsyncIterable[str], allow_interrupt: bool = True) -> str:
        """Say pieces of text as they come, wait until all was played or cut, and return what the caller heard of it."""
        with self.uninterrupted():
            utterance = self.utter(uuid, allow_interrupt)
            with self.interruptible() if allow_interrupt else nullcontext():
                async for piece in pieces:
                    utterance.say(piece)
            utterance.finish()
            return await self.heard(utterance)

    def utter(self, uuid: str, allow_interrupt: bool = True) -> Utterance:
        """Begin to say something, piece by piece. The caller of this awaits `heard` in the end."""
        utterance = self._voice.begin(uuid, interruptible=allow_interrupt)
        if (turn := _turn.get()) is not None:
            turn.answers_with(utterance)
            if turn.aborted:
                utterance.cut()
        return utterance

    async def heard(self, utterance: Utterance) -> str:
        """Wait until an utterance was played or cut, and return what the caller heard of it."""
        try:
            return await utterance.heard()
        finally:
            self._voice.forget(utterance)

    def abort(self) -> None:
        """Stop talking and thinking, except for what was begun with `allow_interrupt=False`."""
        speaking = [utterance for utterance in self._voice.utterances.values() if utterance.interruptible]
        for utterance in speaking:
            self._voice.cut(utterance)
        if self._current is not None:
            self._current.aborted = True
        for scope in tuple(self._interruptible):
            scope.cancel()
        if speaking:
            self.voip.trace("interrupted", "", {"uuid": speaking[0].uuid})

    def set_stt(self, stt: STT | None) -> None:
        """Hear with another STT from now on. What the old one had not recognised yet, the new one does."""
        self._ear.use(stt)

    def set_tts(self, tts: TTS | None) -> None:
        """Speak with another TTS from now on. What the old one has begun to say, it finishes."""
        self._voice.use(tts)

    @contextmanager
    def interruptible(self) -> Iterator[trio.CancelScope]:
        """Inside, `abort` cancels what is awaited, and the block is left."""
        with trio.CancelScope() as scope:
            self._interruptible.add(scope)
            try:
                yield scope
            finally:
                self._interruptible.discard(scope)

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Inside, `abort` does not cancel the inference: for what has to be brought to its end, such as a booking."""
        turn = _turn.get()
        if turn is None or turn.scope not in self._interruptible:
            yield
            return
        self._interruptible.discard(turn.scope)
        try:
            yield
        finally:
            self._interruptible.add(turn.scope)

    @property
    def interrupted(self) -> bool:
        """Whether the caller has begun to speak again since the inference that asks began."""
        turn = _turn.get()
        return turn is not None and turn.aborted

    def failed_to_answer(self) -> None:
        """Have the turn under way counted as failed, whatever the caller is told instead of an answer."""
        if self._current is not None:
            self._current.failed = True

    def save(self) -> None:
        """Have the supervisor keep the present `checkpoint`. What the caller says from now on will be heard again."""
        self.voip.save(self.checkpoint(), self._unsettled_ms())

    def _unsettled_ms(self) -> int:
        """How much of the caller's latest audio is not accounted for yet: all since it began to speak, if it does.

        Speech is noticed late, so a little counts also in silence; but nothing that the last utterance was made of.
        """
        now = trio.current_time()
        began = now if self._speaking_since is None else self._speaking_since
        return round(min(now - began + _NOTICED_LATE_S, now - self._settled_at) * 1000)

    async def hangup(self) -> None:
        """Wait until all that is being said was heard, then end the call. Raises `RequestFailed`.

        After `give_up` it does nothing, as the caller has been handed over.
        """
        await self._said_all()
        if not self._gave_up:
            await self.voip.hangup()

    async def transfer_to(self, destination: str) -> None:
        """Wait until all that is being said was heard, then connect the caller elsewhere. Raises `RequestFailed`.

        After `give_up` it does nothing, as the caller has been handed over.
        """
        await self._said_all()
        if not self._gave_up:
            await self.voip.transfer_to(destination)

    async def _said_all(self) -> None:
        for utterance in tuple(self._voice.utterances.values()):
            utterance.finish()
            await utterance.heard()

    async def dispose(self) -> None:
        """Stop talking and let go of the line."""
        self.abort()
        await self.voip.dispose()

    # The wiring

    async def run(self) -> None:
        """Serve the call until it is over. Raises what a handler or `inference` raises."""
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            self.activate()
            nursery.start_soon(self._handle)
            await self._listen()
            nursery.cancel_scope.cancel()

    def activate(self) -> None:
        """Connect the participants: line to ear, ear to mind, mind to voice, voice to line. `run` does it."""
        self._ear.open(self.nursery)
        self._voice.open(self.nursery)
        self._thinking = trio.CancelScope()
        self.nursery.start_soon(self._think, self._thinking)

    def deactivate(self) -> None:
        """Disconnect the participants: nothing is heard, thought or said any more, but for what the voice has begun.

        The handlers go on. To begin again, `set_stt` and `set_tts` to new ones, and `activate`.
        """
        self._ear.close()
        self._voice.close()
        self._thinking.cancel()

    async def _listen(self) -> None:
        """Take what happens on the line, until the call is over and its last handler is done."""
        while (event := await self.voip.listen(self.on_media)) is not None:
            if isinstance(event, Shutdown):
                await self._handled(event)
                return
            if isinstance(event, MessageDispatched):
                self._voice.dispatched(event)
            await self._happen.send(event)

    async def _handled(self, shutdown: Shutdown) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_on)
            with trio.move_on_after(max(0.0, shutdown.deadline_s - _LEAVE_EARLY_S)):
                await self._happen.send(shutdown)
                await self._happen.aclose()
                await self._all_handled.wait()
            nursery.cancel_scope.cancel()

    async def _read_on(self) -> None:
        """Have the line read, so that what a last handler asks for is answered; nothing else is to come."""
        async for _ in self.voip:
            pass

    async def _handle(self) -> None:
        async for event in self._happened:
            if handler := self._handlers.get(type(event)):
                await handler(event)
        self._all_handled.set()

    async def _hear(self, hearing: Hearing) -> None:
        match hearing:
            case SpeechStarted():
                self._speaking_since = trio.current_time()
                self.voip.trace("speech_started", "")
                await self.on_vad(True)
            case SpeechEnded():
                self._settle()
                self.voip.trace("speech_ended", "")
                await self.on_vad(False)
            case Final(text=text):
                self._settle()
                self.voip.trace("heard", text)
                self.abort()
                self.post(Message(new_uuid(), text, done=True))
            case ProviderError():
                await self.on_provider_error(hearing)

    def _settle(self) -> None:
        self._speaking_since, self._settled_at = None, trio.current_time()

    async def _lose(self, error: ProviderError) -> None:
        await self.give_up(error.message)

    async def _think(self, scope: trio.CancelScope) -> None:
        with scope:
            async for question in self._questions:
                with self.interruptible() as interruption, self._taking(Turn(interruption, question.asked_at)):
                    await self.inference(question.message)

    @contextmanager
    def _taking(self, turn: Turn) -> Iterator[None]:
        """Inside is the turn, whose outcome is reported however it ends."""
        self._current = turn
        _turn.set(turn)
        complete = False
        try:
            yield
            complete = True
        except Exception:
            turn.failed = True  # and the worker ends of it
            raise
        finally:
            self._current = None
            self.voip.report(turn.report(complete=complete))


def _several(given: Participants | Sequence[Participants] | None) -> Sequence[Participants]:
    if given is None:
        return ()
    return given if isinstance(given, Sequence) else (given,)
