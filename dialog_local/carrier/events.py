"""What can be noticed about an emulated call, as frozen events in the order they happened.

`at` is always seconds since the call began, on the phone company's clock. The kinds follow what a person with a telephone
and the carrier's debugger open would see: sounds, marks, verbs, warnings.
"""

from typing import Literal, TypeAlias

import trio
from msgspec import Struct

Party: TypeAlias = Literal["caller", "agent"]


class Answered(Struct, frozen=True):
    """The first TwiML document arrived: the caller no longer hears ringing."""

    at: float


class StreamStarted(Struct, frozen=True):
    """A media socket is open and `start` has been sent on it."""

    at: float
    stream_sid: str
    parameters: dict[str, str]


class StreamEnded(Struct, frozen=True):
    """A media socket is gone; `reason` says who ended it and how."""

    at: float
    stream_sid: str
    reason: str


class AgentAudioBegan(Struct, frozen=True):
    """The playout buffer became non-empty: the agent's audio, be it silence, begins to play."""

    at: float


class AgentAudioEnded(Struct, frozen=True):
    """The playout buffer ran empty, or was emptied."""

    at: float


class VoiceBegan(Struct, frozen=True):
    """Sound on the line: the first sample of `who` that a person would hear."""

    at: float
    who: Party


class VoiceEnded(Struct, frozen=True):
    """`who` has been silent for a while; `at` is the last audible sample, so it lies before the moment of this event."""

    at: float
    who: Party


class Cleared(Struct, frozen=True):
    """The agent's side emptied the playout buffer: `dropped_ms` of audio will never be heard."""

    at: float
    dropped_ms: float


class MarkReturned(Struct, frozen=True):
    """A mark was sent back, because the audio before it was played, or (`cleared`) because the buffer was emptied."""

    at: float
    name: str
    cleared: bool


class Said(Struct, frozen=True):
    """The carrier itself spoke: a `<Say>` verb."""

    at: float
    text: str


class Played(Struct, frozen=True):
    """A `<Play>` verb: the URL of a recording (which the emulator does not fetch), or the digits played."""

    at: float
    url: str
    digits: str


class Dialed(Struct, frozen=True):
    """A `<Dial>` verb: the call was handed on to these numbers, SIP addresses or conference names, and leaves us."""

    at: float
    targets: tuple[str, ...]


class RecordingChanged(Struct, frozen=True):
    """A recording began, or was paused, resumed or stopped."""

    at: float
    recording_sid: str
    status: str


class TranscriptionChanged(Struct, frozen=True):
    """A transcription began or ended."""

    at: float
    transcription_sid: str
    status: str


class Transcribed(Struct, frozen=True):
    """One party's utterance was transcribed."""

    at: float
    who: Party
    text: str


class Problem(Struct, frozen=True):
    """An error or warning as Twilio's debugger would list it.

    `http_status` is what a webhook or handshake was answered with, 0 if there was no answer.
    """

    at: float
    code: int
    message: str
    http_status: int = 0


class Ended(Struct, frozen=True):
    """The call is over. Nothing follows."""

    at: float
    reason: str


Event: TypeAlias = (
    Answered
    | StreamStarted
    | StreamEnded
    | AgentAudioBegan
    | AgentAudioEnded
    | VoiceBegan
    | VoiceEnded
    | Cleared
    | MarkReturned
    | Said
    | Played
    | Dialed
    | RecordingChanged
    | TranscriptionChanged
    | Transcribed
    | Problem
    | Ended
)


class EventLog:
    """Everything that happened in one call, to be read from the first event by any number of readers."""

    def __init__(self) -> None:
        self.history: list[Event] = []
        self._appended = trio.Event()

    def append(self, event: Event) -> None:
        """Add an event and wake the readers. What comes after the end, when reports are still made, is not kept."""
        if self.history and isinstance(self.history[-1], Ended):
            return
        self.history.append(event)
        self._appended.set()
        self._appended = trio.Event()

    def __aiter__(self) -> "EventReader":
        return EventReader(self)

    async def grown(self) -> None:
        """Wait for the next event."""
        await self._appended.wait()


class EventReader:
    """Iterates over a log from its first event to `Ended`, waiting for those to come."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._next = 0

    def __aiter__(self) -> "EventReader":
        return self

    async def __anext__(self) -> Event:
        history = self._log.history
        if self._next and isinstance(history[self._next - 1], Ended):
            raise StopAsyncIteration
        while self._next >= len(history):
            await self._log.grown()
        self._next += 1
        return history[self._next - 1]
