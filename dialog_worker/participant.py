"""The one shape that every participant of a call has: `post` something in, `run` while the call lasts, read `events`.

Constructing a participant does no I/O. `run` opens what it needs (a provider's socket, at once, so that it is warm before
the first word), serves until it is cancelled, and leaves nothing behind. `post` never blocks.
"""

from abc import ABC, abstractmethod
from typing import Generic, Literal, TypeVar

import trio
from msgspec import Struct

EVENTS_LIMIT = 256  # events not yet read; then `emit` waits, which holds the provider back

EventT = TypeVar("EventT")


class ProviderError(Struct, frozen=True):
    """A provider failed in some way. The participant goes on by itself unless `fatal`.

    `uuid` names the utterance that it cost, if one. `code` is the provider's, or a short word of ours. `participant` is
    filled in for whoever has both an STT and a TTS.
    """

    message: str
    code: str = ""
    uuid: str = ""
    fatal: bool = False
    participant: Literal["stt", "tts", ""] = ""


class Word(Struct, frozen=True):
    """A word and when it is said, in milliseconds since its utterance's (TTS) or the stream's (STT) first sample."""

    text: str
    start_ms: int
    end_ms: int


class Participant(ABC, Generic[EventT]):
    """Base of `STT` and `TTS`."""

    def __init__(self) -> None:
        self._emitter, self.events = trio.open_memory_channel[EventT](EVENTS_LIMIT)

    async def emit(self, event: EventT) -> None:
        """Hand an event to whoever reads `events`; waits while `EVENTS_LIMIT` of them lie unread."""
        await self._emitter.send(event)

    @abstractmethod
    async def run(self) -> None:
        """Serve one call until cancelled."""

    async def serve(self) -> None:
        """`run`, and end `events` when it is over."""
        async with self._emitter:
            await self.run()
