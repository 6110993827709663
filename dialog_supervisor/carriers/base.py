"""What a carrier must do. One `Leg` is one call's line: audio both ways, and what can be asked of the carrier about it."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Literal

import trio
from msgspec import Struct

from dialog_supervisor.carriers.playout import BYTES_PER_MS, OnTheWay, Playout, PlayoutState
from dialog_supervisor.websocket import MediaSocket, MediaSocketState
from protocol.messages import Event, Message, MessageDispatched, StartRecording, StartTranscript

AHEAD_S = 300.0  # how much audio a carrier is given ahead of its playing; Twilio discards above 600 s (error 31931)
EARLY_BYTES = 1 << 20  # two minutes of audio, posted before there is a stream to play it
_EARLY_OVERHEAD_BYTES = 200  # what a message takes besides its audio, so that empty ones are bounded too
_MARK_GRACE_S = 2.0  # for a mark to come back after its audio must have ended, by our clock


class CarrierError(Exception):
    """The carrier refused a request, or could not be asked. `code` and `status` are the carrier's."""

    def __init__(self, message: str, *, code: int | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class Unsupported(Exception):
    """This carrier's leg cannot do what was asked."""


class Unsettled(Struct, frozen=True, forbid_unknown_fields=True):
    """What a call has under way at its carrier besides its stream: what is `owed`, and what only the carrier's leg reads."""

    owed: tuple[str, ...] = ()
    carried: bytes = b""


class StreamEnd(Enum):
    """How a media stream ended."""

    STOPPED = "the carrier stopped the stream"
    LOST = "the media socket was lost"
    RELEASED = "the call is over"


class LegState(Struct, frozen=True, forbid_unknown_fields=True):
    """A line on its way to a process that takes it over; `socket` is its open stream's."""

    counts: dict[str, int]
    introduced: bool
    early: tuple[Message[bytes], ...]
    playout: PlayoutState
    unsettled: Unsettled
    socket: MediaSocketState | None


class Leg(ABC):
    """One call's line at a carrier. It lives as long as the call, and is served by one media socket after another.

    `emit` takes what the line has to tell the worker.
    """

    __slots__ = (
        "_ahead_s",
        "_changed",
        "_early",
        "_early_bytes",
        "_now",
        "_opening",
        "_owed",
        "_playout",
        "_socket",
        "_taken_over",
        "counts",
        "emit",
        "introduced",
        "open",
    )

    def __init__(self, emit: Callable[[Event], None]) -> None:
        # Called at every frame, by a local name: CPython 3.11 looks a function up anew when it is called in its attribute.
        self.emit = emit
        self._now = trio.lowlevel.current_clock().current_time  # trio.current_time costs thrice
        self.counts: defaultdict[str, int] = defaultdict(int)  # frames, and whatever was odd, for the log at the call's end
        self.open = False  # whether a stream takes audio
        self.introduced = False  # whether the worker was told of the line; a stream that follows another is the same one
        self._early: list[Message[bytes]] = []
        self._early_bytes = 0
        self._playout = Playout()
        self._ahead_s = 0.0  # how much audio the carrier had when the last was posted
        self._socket: MediaSocket | None = None  # the open stream's
        self._opening = False  # a media socket is open, and its stream is not
        self._taken_over = False  # an open stream is another process's, and yet to be served here
        self._owed: set[str] = set()  # recordings and transcriptions whose end the carrier has yet to tell
        self._changed = trio.Event()  # something was played or cut, or paid

    # From one process to another

    def hand_over(self, now: float) -> LegState | None:
        """Return what another process needs to go on with the line: nothing while that cannot be told, as in a handshake."""
        socket = self._socket.hand_over() if self._socket is not None else None
        if self._opening or (socket is None) is not (self._socket is None):
            return None
        playout = self._playout.hand_over(now)
        return LegState(dict(self.counts), self.introduced, tuple(self._early), playout, self.unsettled(), socket)

    def take_over(self, state: LegState, handed_over_at: float) -> None:
        """Go on with the line as another process left it; its open stream is to be served by `stream` again."""
        self.counts.update(state.counts)
        self.introduced = state.introduced
        for message in state.early:
            self._keep(message)
        self._playout = Playout.taken_over(state.playout, handed_over_at)
        self._taken_over = state.socket is not None
        self.take_up(state.unsettled)

    @abstractmethod
    def _carried(self) -> bytes:
        """Return what this carrier's leg alone knows of what is under way."""

    @abstractmethod
    def _take_up(self, carried: bytes) -> None:
        """Take it from another dialogd's leg."""

    # Audio to the caller

    def post(self, message: Message[bytes]) -> None:
        """Have the caller hear a piece of an utterance, now or when a stream is open; after `abort`, drop it."""
        if not self.open and not self._playout.refuses(message.uuid):
            self._keep(message)
            return
        clock = self._now
        now = clock()
        mark = self._playout.post(message.uuid, message.data, done=message.done, now=now)
        self._ahead_s = self._playout.ends_at - now
        if mark is None:
            self.counts["late"] += 1
            return
        self._say(message.data, mark)

    def _keep(self, message: Message[bytes]) -> None:
        """Keep a piece until there is a stream. An utterance that does not fit is given up as a whole, and told so."""
        self._early.append(message)
        self._early_bytes += _weight(message)
        if self._early_bytes > EARLY_BYTES:
            self.counts["too_early"] += 1
            self.abort(message.uuid)

    def orphaned(self) -> dict[str, int]:
        """Nobody will go on with what is being said: have it end where it is, and return how long each utterance will be.

        The caller hears it out, and it is reported as usual.
        """
        unposted = {message.uuid for message in self._early} - {message.uuid for message in self._early if message.done}
        for uuid in [*self._playout.unfinished(), *unposted]:
            self.post(Message(uuid, b"", done=True))
        lengths = self._playout.on_the_way()
        for message in self._early:
            lengths[message.uuid] = lengths.get(message.uuid, 0) + len(message.data) // BYTES_PER_MS
        return lengths

    def still_to_hear(self) -> tuple[OnTheWay, ...]:
        """Return each utterance that the carrier is playing or will play, and how much of it was heard."""
        return self._playout.still_to_hear(trio.current_time())

    def opened(self) -> None:
        """A stream is open: say what was lost with the one before, and what was posted meanwhile."""
        for mark, audio in self._playout.resume(trio.current_time()):
            self._say(audio, mark)
        early, self._early, self._early_bytes = self._early, [], 0
        for message in early:
            self.post(message)

    def abort(self, uuid: str) -> None:
        """Stop an utterance, also what the carrier has buffered of it, and tell how much of it was heard."""
        kept = [message for message in self._early if message.uuid == uuid]
        if kept:
            self._early = [message for message in self._early if message.uuid != uuid]
            self._early_bytes -= sum(map(_weight, kept))
        cut = self._playout.abort(uuid, trio.current_time())
        if cut is not None:
            self._send_clear()
            for mark, audio in cut.resend:
                self._say(audio, mark)
            self._notify()
            self.emit(cut.dispatched)
        elif kept:
            total_ms = sum(len(message.data) for message in kept) // BYTES_PER_MS
            self.emit(MessageDispatched(uuid, 0, total_ms, interrupted=True))

    def _say(self, audio: bytes, mark: str) -> None:
        if audio:
            self.counts["frames_out"] += 1
            self._send_media(audio)
        if mark:
            self._send_mark(mark)

    def marked(self, name: str) -> None:
        """Enter a mark that the carrier returned."""
        if dispatched := self._playout.marked(name, trio.current_time()):
            self._notify()
            self.emit(dispatched)

    def closed(self) -> None:
        """A stream is gone; what the caller has not heard is kept for the one that may follow."""
        self.open = False
        self._playout.pause(trio.current_time())
        self._notify()

    def interrupted(self) -> None:
        """Tell what was heard of everything that will not be played any more, because the conversation is over."""
        for dispatched in self._playout.stop(trio.current_time()):
            self.emit(dispatched)
        self._notify()

    @property
    def has_room(self) -> bool:
        """Whether more may be posted; if not, `room` is to be awaited first."""
        return self._ahead_s <= AHEAD_S and (self._socket is None or self._socket.has_room)

    async def room(self) -> None:
        """Wait while the carrier has more than `AHEAD_S` of audio, or its socket takes no more: back-pressure."""
        if self._socket is not None:
            await self._socket.room()
        while (ahead := self._playout.buffered_s(trio.current_time()) - AHEAD_S) > 0:
            changed = self._changed
            with trio.move_on_after(ahead):
                await changed.wait()

    async def played(self) -> None:
        """Wait until the caller has heard everything; a mark that never comes back is not waited for forever."""
        while self._playout or self._early:
            changed = self._changed
            with trio.move_on_after(self._playout.buffered_s(trio.current_time()) + _MARK_GRACE_S) as scope:
                await changed.wait()
            if scope.cancelled_caught and not self._playout.paused and not self._playout.buffered_s(trio.current_time()):
                self.counts["marks_missing"] += 1
                return

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @abstractmethod
    def _send_media(self, audio: bytes) -> None:
        """Send audio to the carrier, without waiting."""

    @abstractmethod
    def _send_mark(self, name: str) -> None:
        """Send a mark, without waiting."""

    @abstractmethod
    def _send_clear(self) -> None:
        """Have the carrier throw its buffer away."""

    # The line itself

    @abstractmethod
    async def stream(self, socket: MediaSocket) -> StreamEnd:
        """Serve a media socket until it ends."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the media socket; `stream` then returns."""

    @abstractmethod
    async def hangup(self) -> None:
        """End the call at the carrier. Raises `CarrierError`."""

    async def transfer_to(self, destination: str) -> None:
        """Connect the caller to `destination`. Raises `CarrierError` or `Unsupported`."""
        raise Unsupported(f"this carrier's transfer_to({destination!r})")

    async def send_dtmf(self, digits: str) -> None:
        """Press keys. Raises `CarrierError` or `Unsupported`."""
        raise Unsupported(f"this carrier's send_dtmf of {len(digits)} digits")

    async def start_recording(self, request: StartRecording) -> None:
        """Record the call. Raises `CarrierError` or `Unsupported`."""
        raise Unsupported(f"this carrier's start_recording of {request.track}")

    async def pause_recording(self, behavior: Literal["silence", "skip"]) -> None:
        """Pause the recording. Raises `CarrierError` or `Unsupported`."""
        raise Unsupported(f"this carrier's pause_recording with {behavior}")

    async def resume_recording(self) -> None:
        """Go on with a paused recording. Raises `CarrierError` or `Unsupported`."""
        raise Unsupported("this carrier's resume_recording")

    async def stop_recording(self) -> None:
        """Stop recording. Raises `CarrierError` or `Unsupported`."""
        raise Unsupported("this carrier's stop_recording")

    async def remove_recording(self) -> None:
        """Delete the recording. Raises `CarrierError` or `Unsupported`."""
        raise Unsupported("this carrier's remove_recording")

    async def start_transcript(self, request: StartTranscript) -> None:
        """Transcribe the call. Raises `CarrierError` or `Unsupported`."""
        raise Unsupported(f"this carrier's start_transcript of {request.track}")

    async def stop_transcript(self) -> None:
        """Transcribe no more. Raises `CarrierError` or `Unsupported`."""
        raise Unsupported("this carrier's stop_transcript")

    # What the carrier tells besides its stream, and still owes when the conversation is over

    def callback(self, about: str, fields: Mapping[str, str]) -> None:
        """Take the carrier's report on this call: `about` "recording", "transcript", "stream" or "status"."""
        raise Unsupported(f"callbacks about the {about} ({len(fields)} fields) of this carrier")

    async def run_errands(self) -> None:
        """Do, until cancelled, what takes long and was not asked for by a request, such as downloads."""
        await trio.sleep_forever()

    def owe(self, name: str) -> None:
        """Something will be told of after the conversation."""
        self._owed.add(name)

    def paid(self, name: str) -> None:
        """It was told, or never will be."""
        self._owed.discard(name)
        self._notify()

    def unsettled(self) -> Unsettled:
        """Return what another dialogd has to know of it."""
        return Unsettled(self.owed, self._carried())

    def take_up(self, unsettled: Unsettled) -> None:
        """Go on with what another dialogd had under way."""
        self._owed.update(unsettled.owed)
        if unsettled.carried:
            self._take_up(unsettled.carried)

    @property
    def owed(self) -> tuple[str, ...]:
        """What is still to be told."""
        return tuple(sorted(self._owed))

    async def settled(self) -> None:
        """Wait until nothing more is to come."""
        while self._owed:
            await self._changed.wait()


def _weight(message: Message[bytes]) -> int:
    return len(message.data) + len(message.uuid) + _EARLY_OVERHEAD_BYTES
