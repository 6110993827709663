"""The telephone line of one emulated call: a clock of 20 ms frames, the caller's voice, the agent's audio, both recorded.

Frames leave on a schedule that does not drift: frame n is due 20 ms × (n + 1) after the call began, however late the one
before was. The two tracks of the recording are aligned to that clock, sample by sample.
"""

from collections.abc import Callable

import trio

from dialog_local.carrier import playout
from dialog_local.carrier.events import (
    AgentAudioBegan,
    AgentAudioEnded,
    Cleared,
    Event,
    MarkReturned,
    Party,
    Problem,
    VoiceBegan,
    VoiceEnded,
)
from dialog_local.carrier.media import Clear, Mark, Media, MediaSocket, Request
from dialog_local.carrier.playout import BYTES_PER_SECOND, SILENCE, Playout

FRAME_SECONDS = 0.02
FRAME_BYTES = 160
VOICE_HANGOVER_SECONDS = 0.7  # a pause between sentences is shorter, a pause between turns is not
AUDIBLE = 512  # of 32768, about -36 dBFS: above the noise of speech synthesis and of a quiet room


def _magnitude(code: int) -> int:
    """Return the absolute 16-bit value of a mu-law byte (ITU-T G.711)."""
    inverted = ~code & 0xFF
    return (((inverted & 0x0F) << 3) + 0x84 << (inverted >> 4 & 0x07)) - 0x84


_AUDIBLE_BYTES = bytes(code for code in range(256) if _magnitude(code) > AUDIBLE)
_AS_FLAGS = bytes(1 if code in _AUDIBLE_BYTES else 0 for code in range(256))


def audible_span(audio: bytes) -> tuple[int, int] | None:
    """Return the first and the last sample of mu-law audio that a person would hear, or None for silence."""
    flags = audio.translate(_AS_FLAGS)
    first = flags.find(1)
    return None if first < 0 else (first, flags.rfind(1))


class Track:
    """One side of the recording: mu-law from the call's first moment, silence where nothing was written."""

    def __init__(self) -> None:
        self._samples = bytearray()

    def write(self, offset: int, audio: bytes) -> None:
        """Put audio at a sample offset."""
        self.extend_to(offset)
        self._samples[offset : offset + len(audio)] = audio

    def extend_to(self, length: int) -> None:
        """Fill up with silence."""
        self._samples.extend(bytes([SILENCE]) * (length - len(self._samples)))

    def read(self, begin: float = 0.0, end: float | None = None) -> bytes:
        """Return the audio between two times of the call, in seconds."""
        stop = len(self._samples) if end is None else round(end * BYTES_PER_SECOND)
        return bytes(self._samples[round(begin * BYTES_PER_SECOND) : stop])


class _VoiceDetector:
    """Turns frames of one party into `VoiceBegan` and `VoiceEnded`."""

    def __init__(self, who: Party) -> None:
        self._who: Party = who
        self._last: float | None = None  # the last audible sample while speaking

    def feed(self, at: float, frame: bytes, to_come: Callable[[], bytes]) -> Event | None:
        """Take the frame that begins at `at`; return what changed. Who has sound `to_come` has not ended."""
        span = audible_span(frame)
        if span is None:
            if self._last is None or at - self._last <= VOICE_HANGOVER_SECONDS or audible_span(to_come()) is not None:
                return None
            ended, self._last = VoiceEnded(self._last, self._who), None
            return ended
        began = VoiceBegan(at + span[0] / BYTES_PER_SECOND, self._who) if self._last is None else None
        self._last = at + span[1] / BYTES_PER_SECOND
        return began


class Line:
    """What both parties put on the line and hear from it. `report` receives every event."""

    def __init__(self, began_at: float, report: Callable[[Event], None]) -> None:
        self.began_at = began_at
        self.answered = False  # until then nobody takes what the caller says
        self.tracks: dict[Party, Track] = {"caller": Track(), "agent": Track()}
        self._report = report
        self._voice = bytearray()  # what the caller is still to say
        self._taken = 0
        self._frames = 0
        self._ticked = trio.Event()
        self._playout = Playout()
        self._socket: MediaSocket | None = None
        self._first_frame = 0
        self._warned: set[int] = set()
        self._detectors = {who: _VoiceDetector(who) for who in self.tracks}
        self._to_come: dict[Party, Callable[[], bytes]] = {
            "caller": lambda: bytes(self._voice),
            "agent": lambda: self._playout.buffered,
        }

    async def run(self) -> None:
        """Keep the frames going until cancelled."""
        while True:
            await trio.sleep_until(self.began_at + (self._frames + 1) * FRAME_SECONDS)
            self._tick()
            self._ticked.set()
            self._ticked = trio.Event()

    async def speak(self, audio: bytes) -> None:
        """Queue the caller's audio behind what is queued; returns when its last frame has been sent."""
        self._voice += audio
        through = self._taken + len(self._voice)
        while self._taken < through:
            await self._ticked.wait()

    def hush(self) -> None:
        """Forget what the caller has not said yet."""
        self._taken += len(self._voice)
        self._voice.clear()

    def attach(self, socket: MediaSocket) -> None:
        """Connect a media stream: from the next frame on it hears the caller, and its requests are played."""
        self._socket, self._first_frame, self._warned = socket, self._frames, set()

    def detach(self) -> None:
        """Disconnect the media stream and forget what it had buffered."""
        self._socket = None
        for happened in self._playout.clear(trio.current_time()):
            self._notice(happened)

    def handle(self, request: Request) -> None:
        """Do what the media stream asks for."""
        now = trio.current_time()
        match request:
            case Media():
                happenings = self._playout.append(request.media.payload, now)
            case Mark():
                happenings = self._playout.mark(request.mark.name, now)
            case Clear():
                happenings = self._clear(now)
        for happened in happenings:
            self._notice(happened)

    async def play(self, audio: bytes) -> None:
        """Let the caller hear something of the phone company's own; returns when it has been played."""
        for happened in self._playout.append(audio, trio.current_time()):
            self._notice(happened)
        while self._playout.buffered_bytes:
            await self._ticked.wait()

    def warn(self, code: int, message: str) -> None:
        """Report a warning, each number once per stream."""
        if code not in self._warned:
            self._warned.add(code)
            self._report(Problem(self._since_began(trio.current_time()), code, message))

    def finish(self) -> None:
        """Bring both tracks to the same length at the end of the call."""
        length = round(self._since_began(trio.current_time()) * BYTES_PER_SECOND)
        for track in self.tracks.values():
            track.extend_to(length)

    def press(self, digit: str) -> None:
        """Send a touch tone, which only a media stream hears."""
        if self._socket is not None:
            self._socket.send(self._socket.wire.dtmf(digit))

    def _tick(self) -> None:
        for happened in self._playout.advance(trio.current_time()):
            self._notice(happened)
        begin = self._frames * FRAME_BYTES
        frame = self._take_frame()
        self.tracks["caller"].write(begin, frame)
        self.tracks["agent"].extend_to(begin + FRAME_BYTES)
        if self._socket is not None:
            self._socket.send_media(frame, (self._frames - self._first_frame) * 20)
        for who, detector in self._detectors.items():
            at = begin / BYTES_PER_SECOND
            event = detector.feed(at, self.tracks[who].read(at, at + FRAME_SECONDS), self._to_come[who])
            if event is not None:
                self._report(event)
        self._frames += 1

    def _take_frame(self) -> bytes:
        if not self.answered:
            return bytes([SILENCE]) * FRAME_BYTES
        frame = bytes(self._voice[:FRAME_BYTES])
        del self._voice[:FRAME_BYTES]
        self._taken += len(frame)
        return frame.ljust(FRAME_BYTES, bytes([SILENCE]))

    def _clear(self, now: float) -> list[playout.Happening]:
        happenings = self._playout.clear(now)
        dropped = sum(each.dropped_bytes for each in happenings if isinstance(each, playout.Emptied))
        self._report(Cleared(self._since_began(now), dropped / BYTES_PER_SECOND * 1000))
        return happenings

    def _notice(self, happened: playout.Happening) -> None:
        at = self._since_began(happened.at)
        match happened:
            case playout.Heard():
                self.tracks["agent"].write(round(at * BYTES_PER_SECOND), happened.audio)
            case playout.Began():
                self._report(AgentAudioBegan(at))
            case playout.Emptied():
                self._report(AgentAudioEnded(at))
            case playout.MarkReached():
                self._return_mark(at, happened)
            case playout.Overflowed():
                self.warn(31931, f"ten minutes of audio are buffered; {happened.discarded_bytes} bytes were discarded")

    def _return_mark(self, at: float, mark: playout.MarkReached) -> None:
        if self._socket is not None:
            self._socket.send(self._socket.wire.mark(mark.name))
            self._report(MarkReturned(at, mark.name, mark.cleared))

    def _since_began(self, now: float) -> float:
        return now - self.began_at
