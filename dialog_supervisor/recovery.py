"""What a call's next worker is told, so that it goes on where the last one was: the line, the state, the audio, the rest.

All of it can be taken out as a `CallState`, and another dialogd's `Recovery` can begin with that.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from msgspec import Struct

from protocol.messages import Checkpoint, Event, Media, MessageDispatched, Metadata, Restored, StreamingStarted

AUDIO_KEPT_S = 10.0  # of the caller's voice since the checkpoint
_BYTES_PER_MS = 8
_KEPT_BYTES = round(AUDIO_KEPT_S * 1000) * _BYTES_PER_MS
_SLACK_BYTES = _KEPT_BYTES // 4  # over which the buffer grows before it is cut: cutting at every frame would copy all of it
_UNDER_WAY_MS = 200  # of audio that was still in the pipe when the worker made its checkpoint
_REPLAYED_BYTES = 1600  # a piece: 200 ms
_TOLD_KEPT = 256  # events that a worker may have been told in vain


class CallState(Struct, frozen=True, kw_only=True):
    """All that a call's next worker has to know, in whichever process its supervisor is then.

    `metadata` and `started` are what was told last of the call and its stream, `reports` what became of utterances since the
    checkpoint, `missed` what there was no worker for. `deaths` are in seconds before the state was taken; `died_here` counts
    those since the checkpoint. `audio` is the caller's since the checkpoint, and ends at `audio_ends_ms` of the stream.
    """

    metadata: Metadata
    started: StreamingStarted | None = None
    checkpoint: bytes | None = None
    reports: tuple[MessageDispatched, ...] = ()
    missed: tuple[Event, ...] = ()
    deaths: tuple[float, ...] = ()
    died_here: int = 0
    audio: bytes = b""
    audio_ends_ms: int = 0


def may_take_up(state: CallState, restarts: int, window_s: float) -> bool:
    """Whether a call whose supervisor has died now is to go on under another."""
    recovery = Recovery(state.metadata, restarts, window_s)
    recovery.take_up(state, 0.0)
    return recovery.may_resume(0.0)


class Recovery:
    """One call's memory on behalf of its workers. No I/O.

    A worker that saves no checkpoint is followed by one that begins anew, and hears only what is said from then on.
    `changed` is called when anything but the audio is different.
    """

    __slots__ = (
        "_audio",
        "_audio_ends_ms",
        "_changed",
        "_deaths",
        "_died_here",
        "_metadata",
        "_missed",
        "_recent",
        "_restarts",
        "_started",
        "_state",
        "_window_s",
    )

    def __init__(
        self, metadata: Metadata, restarts: int, window_s: float, changed: Callable[[], None] = lambda: None
    ) -> None:
        self._changed = changed
        self._restarts = restarts
        self._window_s = window_s
        self._deaths: deque[float] = deque(maxlen=max(1, restarts))
        self._metadata = metadata
        self._started: StreamingStarted | None = None
        self._recent: deque[MessageDispatched] = deque(maxlen=_TOLD_KEPT)
        self._missed: deque[Event] = deque(maxlen=_TOLD_KEPT)
        self._state: bytes | None = None
        self._audio = bytearray()
        self._audio_ends_ms = 0
        self._died_here = 0  # workers since there is this checkpoint, the one that made it included

    def take_up(self, state: CallState, now: float) -> None:
        """Go on with what another had come to know."""
        self._metadata, self._started = state.metadata, state.started
        self._recent.extend(state.reports)
        self._missed.extend(state.missed)
        self._deaths.extend(now - ago for ago in state.deaths)
        self._state, self._died_here = state.checkpoint, state.died_here
        self._audio[:], self._audio_ends_ms = state.audio, state.audio_ends_ms

    def state(self, now: float, *, audio: bool) -> CallState:
        """Return what it knows, with the caller's audio or without."""
        return CallState(
            metadata=self._metadata,
            started=self._started,
            checkpoint=self._state,
            reports=tuple(self._recent),
            missed=tuple(self._missed),
            deaths=tuple(now - death for death in self._deaths),
            died_here=self._died_here,
            audio=bytes(self._audio) if audio else b"",
            audio_ends_ms=self._audio_ends_ms if audio else 0,
        )

    def told(self, event: Event) -> None:
        """A worker is told something, besides the caller's voice, that its successor may have to know."""
        if isinstance(event, Metadata):
            self._metadata = event
        elif isinstance(event, StreamingStarted):
            self._started = event
        elif isinstance(event, MessageDispatched):
            self._recent.append(event)
        else:
            return
        self._changed()

    def heard(self, media: Media) -> None:
        """A worker is told what the caller says; without a checkpoint, nobody will hear it again."""
        if self._state is None:
            return
        self._audio += media.payload
        self._audio_ends_ms = media.timestamp_ms + len(media.payload) // _BYTES_PER_MS
        if len(self._audio) > _KEPT_BYTES + _SLACK_BYTES:
            del self._audio[:-_KEPT_BYTES]

    def missed(self, event: Event) -> None:
        """There was no worker to tell it to. What the next one is told anyway is not kept twice."""
        if not isinstance(event, Media | Metadata | StreamingStarted | MessageDispatched):
            self._missed.append(event)
            self._changed()

    def saved(self, checkpoint: Checkpoint) -> None:
        """The worker has a new state; the audio that is accounted for in it is needed no more."""
        self._state = checkpoint.state
        self._died_here = 0
        self._recent.clear()
        kept = min(_KEPT_BYTES, (max(0, checkpoint.audio_ms) + _UNDER_WAY_MS) * _BYTES_PER_MS)
        del self._audio[:-kept]
        self._changed()

    def may_restart(self, now: float) -> bool:
        """Whether a worker that died now is to have a successor: not too often, and not twice in vain at one checkpoint."""
        if self._state is not None:
            self._died_here += 1
        return self._died_here <= 2 and self._within_budget(now)

    def may_resume(self, now: float) -> bool:
        """Whether a worker that died with its supervisor is to have a successor: not too often.

        It is not held against the checkpoint: the supervisor never looks into one.
        """
        self._died_here = max(self._died_here, 1)
        return self._within_budget(now)

    def _within_budget(self, now: float) -> bool:
        if self._restarts == 0:
            return False
        often = len(self._deaths) == self._restarts and now - self._deaths[0] < self._window_s
        self._deaths.append(now)
        self._changed()
        return not often

    def introduction(self, playing: Mapping[str, int]) -> Iterator[Event]:
        """Yield what the next worker is told first. `playing`: what of each utterance, in ms, the caller is still to hear.

        A state that a worker has died of before it saved another is left out the second time.
        """
        state = self._state if self._died_here <= 1 else None
        heard = {report.uuid: report.played_ms for report in self._recent}
        yield self._metadata
        yield Restored(state or b"", heard | dict(playing))
        if self._started is not None:
            yield self._started
        yield from self._recent
        yield from self._missed
        self._missed.clear()
        self._changed()
        if state is not None:
            yield from self._replayed()

    def _replayed(self) -> Iterator[Media]:
        begin_ms = self._audio_ends_ms - len(self._audio) // _BYTES_PER_MS
        for at in range(0, len(self._audio), _REPLAYED_BYTES):
            yield Media(begin_ms + at // _BYTES_PER_MS, bytes(self._audio[at : at + _REPLAYED_BYTES]))
