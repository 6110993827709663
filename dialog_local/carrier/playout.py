"""The buffer between what an agent sends and what a caller hears, without I/O and without a clock of its own.

Twilio docs, Media Streams, WebSocket messages: media is buffered and played in order; a mark is returned when the audio
before it has been played, at once if nothing is buffered; `clear` empties the buffer and returns all remaining marks. Error
31931: audio beyond ten minutes of buffer is discarded. Times are seconds on any clock that does not run backwards.
"""

from collections import deque
from typing import TypeAlias

from msgspec import Struct

BYTES_PER_SECOND = 8000  # mu-law, 8 kHz, mono: a byte is a sample
SILENCE = 0xFF  # mu-law for zero
BUFFER_LIMIT_BYTES = 10 * 60 * BYTES_PER_SECOND


class Began(Struct, frozen=True):
    """Something is being played again."""

    at: float


class Heard(Struct, frozen=True):
    """Audio that has been played, the first sample of it at `at`."""

    at: float
    audio: bytes


class MarkReached(Struct, frozen=True):
    """A mark to be returned."""

    at: float
    name: str
    cleared: bool


class Emptied(Struct, frozen=True):
    """Nothing is left to play; `dropped_bytes` of it were never heard."""

    at: float
    dropped_bytes: int


class Overflowed(Struct, frozen=True):
    """Audio was discarded because ten minutes of it lie in the buffer already."""

    at: float
    discarded_bytes: int


Happening: TypeAlias = Began | Heard | MarkReached | Emptied | Overflowed


class Playout:
    """Plays what is appended, sample by sample, as time passes.

    Every method takes the current time and returns what has happened up to then, with exact times: a mark behind 100 ms of
    audio is reached 100 ms after that audio began, however late the question is asked.
    """

    def __init__(self) -> None:
        self._queue: deque[bytes | str] = deque()  # audio, and the names of marks between
        self._buffered = 0
        self._position = 0.0  # when the next sample of the queue is due

    @property
    def buffered_bytes(self) -> int:
        """Audio not yet played."""
        return self._buffered

    @property
    def buffered(self) -> bytes:
        """Audio not yet played, itself."""
        return b"".join(item for item in self._queue if isinstance(item, bytes))

    def append(self, audio: bytes, now: float) -> list[Happening]:
        """Add audio behind what is buffered, or discard it if the buffer is full."""
        happened = self.advance(now)
        if self._buffered + len(audio) > BUFFER_LIMIT_BYTES:
            return [*happened, Overflowed(now, len(audio))]
        if not audio:
            return happened
        if not self._buffered:
            self._position = now
            happened.append(Began(now))
        self._queue.append(audio)
        self._buffered += len(audio)
        return happened

    def mark(self, name: str, now: float) -> list[Happening]:
        """Set a mark behind what is buffered; with nothing buffered it is reached at once."""
        happened = self.advance(now)
        if not self._buffered:
            return [*happened, MarkReached(now, name, cleared=False)]
        self._queue.append(name)
        return happened

    def clear(self, now: float) -> list[Happening]:
        """Forget what is buffered and return every mark in it."""
        happened = self.advance(now)
        dropped, names = self._buffered, [item for item in self._queue if isinstance(item, str)]
        self._queue.clear()
        self._buffered = 0
        if dropped:
            happened.append(Emptied(now, dropped))
        happened.extend(MarkReached(now, name, cleared=True) for name in names)
        return happened

    def advance(self, now: float) -> list[Happening]:
        """Play up to now."""
        happened: list[Happening] = []
        was_playing = self._buffered > 0
        # A sample counts as played when it is over; the epsilon keeps sums of 20 ms steps from losing one to rounding.
        due = min(self._buffered, int((now - self._position) * BYTES_PER_SECOND + 1e-6)) if was_playing else 0
        while self._queue and (due > 0 or isinstance(self._queue[0], str)):
            item = self._queue.popleft()
            if isinstance(item, str):
                happened.append(MarkReached(self._position, item, cleared=False))
                continue
            happened.append(Heard(self._position, item[:due]))
            if len(item) > due:
                self._queue.appendleft(item[due:])
            self._consume(min(due, len(item)))
            due -= len(item)
        if was_playing and not self._buffered:
            happened.append(Emptied(self._position, 0))
        return happened

    def _consume(self, size: int) -> None:
        self._buffered -= size
        self._position += size / BYTES_PER_SECOND
