"""What every agent is: it wires the phone line to speech and back, runs one turn at a time, and stops when interrupted.

An agent's author overrides handlers (`on_…`) and `inference`. `run` opens the nursery that everything of the call lives in;
when the call is over, nothing of it is left.
"""

import logging
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import trio
from msgspec import Struct

from dialog_worker.agent.utterance import Utterance
from dialog_worker.participant import ProviderError
from dialog_worker.stt.base import STT, Final, Interim, SpeechEnded, SpeechStarted
from dialog_worker.tts.base import TTS, WordTimings
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
    RecordingUrl,
    Restored,
    Shutdown,
    StreamingStarted,
    StreamingStopped,
    Transcript,
)

QUESTIONS_LIMIT = 32  # user messages waiting for their turn
EVENTS_LIMIT = 256  # events waiting for their handler; then the line is read no further
_LEAVE_EARLY_S = 0.5  # of the time that a shutdown gives, kept for leaving

log = logging.getLogger("agent")


class ProviderFailed(Exception):
    """A provider is gone for good, and the agent can no longer hear or speak."""


class Turn(Struct):
    """One inference under way. `aborted`: the caller has begun to speak again, and what it says now is not heard."""

    scope: trio.CancelScope
    aborted: bool = False


_turn: ContextVar[Turn | None] = ContextVar("turn", default=None)


def new_uuid() -> str:
    """Return a name for a message."""
    return str(uuid.uuid4())


class Agent:
    """The participant that decides. With neither `stt` nor `tts` it deals with audio itself, in `on_media`.

    `nursery` is the call's, from the start of `run` on: for work of the agent's own that ends with the call.
    """

    nursery: trio.Nursery

    def __init__(self, *, voip: VoIP, stt: STT | None = None, tts: TTS | None = None) -> None:
        self.voip = voip
        self.stt = stt
        self.tts = tts
        self._utterances: dict[str, Utterance] = {}
        self._interruptible: set[trio.CancelScope] = set()
        self._current: Turn | None = None
        self._ask, self._questions = trio.open_memory_channel[Message[str]](QUESTIONS_LIMIT)
        self._all_handled = trio.Event()
        self._happen, self._happened = trio.open_memory_channel[Event](EVENTS_LIMIT)
        self._handlers: dict[type[Event], Callable[..., Awaitable[None]]] = {
            Metadata: self.on_metadata,
            StreamingStarted: self.on_streaming_started,
            StreamingStopped: self.on_streaming_stopped,
            Dtmf: self.on_dtmf,
            Transcript: self.on_transcript,
            RecordingUrl: self.on_recording_url,
            MessageDispatched: self.on_message_dispatched,
            CallStatus: self.on_call_status,
            Restored: self.on_restored,
            Error: self.on_error,
        }

    # What an author overrides. Handlers run one after another, in the order of the events, beside the wiring: one that
    # takes long delays the next handler and nothing else.

    def on_media(self, media: Media) -> None:
        """Handle 20 ms of the caller's voice; fifty come a second, so this must not wait. By default the STT gets it."""
        if self.stt is not None:
            self.stt.post(media.payload)

    async def on_vad(self, speaking: bool) -> None:
        """Handle the caller's beginning or ceasing to speak. By default the agent stops talking when the caller begins."""
        if speaking:
            self.abort()

    async def on_metadata(self, metadata: Metadata) -> None:
        """Handle what the carrier tells of the call."""

    async def on_streaming_started(self, started: StreamingStarted) -> None:
        """Handle the opening of the line. By default nothing is said."""

    async def on_streaming_stopped(self, stopped: StreamingStopped) -> None:
        """Handle the end of the line."""

    async def on_dtmf(self, dtmf: Dtmf) -> None:
        """Handle a key pressed by the caller."""

    async def on_transcript(self, transcript: Transcript) -> None:
        """Handle the carrier's own transcription."""

    async def on_recording_url(self, recording: RecordingUrl) -> None:
        """Handle the completion of a recording."""

    async def on_message_dispatched(self, dispatched: MessageDispatched) -> None:
        """Handle the news of how much of a message the caller heard."""

    async def on_call_status(self, status: CallStatus) -> None:
        """Handle a change of the call's state at the carrier."""

    async def on_restored(self, restored: Restored) -> None:
        """Take over from a worker that died."""

    async def on_error(self, error: Error) -> None:
        """Handle trouble on the supervisor's side. By default it is logged."""
        log.warning("%s: %s", error.code, error.message)

    async def on_provider_error(self, error: ProviderError) -> None:
        """Handle trouble at a provider. By default it is logged, and a fatal one ends this worker."""
        log.warning("provider: %s%s", error.message, f" ({error.code})" if error.code else "")
        if error.fatal:
            raise ProviderFailed(error.message)

    async def inference(self, message: Message[str]) -> None:
        """Answer what the caller said. Overriding this replaces the whole answer logic; by default nothing is answered."""

    # What an author calls

    def post(self, message: Message[str]) -> None:
        """Take something that the caller said; it is answered when its turn comes. Empty text is ignored."""
        if not message.data.strip():
            return
        try:
            self._ask.send_nowait(message)
        except trio.WouldBlock:
            log.warning("%d messages wait for an answer; this one is not answered", QUESTIONS_LIMIT)

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
        if self.tts is None:
            raise RuntimeError(f"{type(self).__name__} has no TTS to speak with; give it one, or post audio to self.voip")
        utterance = self._utterances[uuid] = Utterance(uuid, self.voip, self.tts, interruptible=allow_interrupt)
        if (turn := _turn.get()) is not None and turn.aborted:
            utterance.cut()
        return utterance

    async def heard(self, utterance: Utterance) -> str:
        """Wait until an utterance was played or cut, and return what the caller heard of it."""
        try:
            return await utterance.heard()
        finally:
            self._utterances.pop(utterance.uuid, None)

    def abort(self) -> None:
        """Stop talking and thinking, except for what was begun with `allow_interrupt=False`."""
        speaking = [utterance for utterance in self._utterances.values() if utterance.interruptible]
        for utterance in speaking:
            utterance.cut()
        if self._current is not None:
            self._current.aborted = True
        for scope in tuple(self._interruptible):
            scope.cancel()
        if speaking:
            self.voip.trace("interrupted", "", {"uuid": speaking[0].uuid})

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

    async def hangup(self) -> None:
        """Wait until all that is being said was heard, then end the call. Raises `RequestFailed`."""
        await self._said_all()
        await self.voip.hangup()

    async def transfer_to(self, destination: str) -> None:
        """Wait until all that is being said was heard, then connect the caller elsewhere. Raises `RequestFailed`."""
        await self._said_all()
        await self.voip.transfer_to(destination)

    async def _said_all(self) -> None:
        for utterance in tuple(self._utterances.values()):
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
        if self.stt is not None:
            self.nursery.start_soon(self.stt.run)
            self.nursery.start_soon(self._hear, self.stt)
        if self.tts is not None:
            self.nursery.start_soon(self.tts.run)
            self.nursery.start_soon(self._speak, self.tts)
        self.nursery.start_soon(self._think)

    async def _listen(self) -> None:
        """Take what happens on the line, until the call is over and its last handler is done."""
        async for event in self.voip:
            if isinstance(event, Media):
                self.on_media(event)
                continue
            if isinstance(event, Shutdown):
                await self._handled(event.deadline_s - _LEAVE_EARLY_S)
                return
            if isinstance(event, MessageDispatched) and (utterance := self._utterances.get(event.uuid)):
                utterance.report(event)
            await self._happen.send(event)

    async def _handled(self, patience_s: float) -> None:
        with trio.move_on_after(max(0.0, patience_s)):
            await self._happen.aclose()
            await self._all_handled.wait()

    async def _handle(self) -> None:
        async for event in self._happened:
            if handler := self._handlers.get(type(event)):
                await handler(event)
        self._all_handled.set()

    async def _hear(self, stt: STT) -> None:
        async for hearing in stt.events:
            match hearing:
                case SpeechStarted():
                    self.voip.trace("speech_started", "")
                    await self.on_vad(True)
                case SpeechEnded():
                    self.voip.trace("speech_ended", "")
                    await self.on_vad(False)
                case Final(text=text):
                    self.voip.trace("heard", text)
                    self.abort()
                    self.post(Message(new_uuid(), text, done=True))
                case ProviderError():
                    await self.on_provider_error(hearing)
                case Interim():
                    pass

    async def _speak(self, tts: TTS) -> None:
        async for speaking in tts.events:
            match speaking:
                case Message(uuid=uuid):
                    await self.voip.room()
                    if utterance := self._utterances.get(uuid):
                        utterance.audio_posted = True
                    self.voip.post(speaking)
                case WordTimings(uuid=uuid, words=words):
                    if utterance := self._utterances.get(uuid):
                        utterance.words.extend(words)
                case ProviderError():
                    await self.on_provider_error(speaking)

    async def _think(self) -> None:
        async for message in self._questions:
            with self.interruptible() as scope:
                self._current = Turn(scope)
                _turn.set(self._current)
                await self.inference(message)
            self._current = None
