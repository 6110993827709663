"""The caller's audio between the phone and a recogniser: cut into frames, and kept until the recogniser has settled it.

No I/O here. Positions are bytes since the stream's first sample, so they outlive any one connection.
"""

BYTES_PER_SAMPLE = {"mulaw": 1, "alaw": 1, "linear16": 2}
KEPT_S = 30.0
SHORTEST_FRAME_S = 0.020
LONGEST_FRAME_S = 0.250
VOICED_SHARE = 0.1  # of a frame's samples that must be loud for the frame to hold a voice
QUIET_SEGMENTS = 0x30  # G.711 codes below this magnitude are under 3 % of full scale: line noise
QUIET_BYTES = {
    "mulaw": bytes(code for code in range(256) if (~code & 0x7F) < QUIET_SEGMENTS),
    "alaw": bytes(code for code in range(256) if ((code ^ 0x55) & 0x7F) < QUIET_SEGMENTS),
    "linear16": bytes([0, 1, 2, 3, 0xFC, 0xFD, 0xFE, 0xFF]),  # of the samples' high bytes
}


def is_voiced(audio: bytes, encoding: str) -> bool:
    """Whether a frame is loud enough that a working recogniser would have something to say about it."""
    levels = audio[1::2] if encoding == "linear16" else audio
    return len(levels.translate(None, QUIET_BYTES[encoding])) > VOICED_SHARE * len(levels)


class AudioBuffer:
    """Audio that waits to be sent, and audio that was sent but would have to be sent again on a new connection."""

    def __init__(
        self, encoding: str, sample_rate: int, limit: int | None = None, longest_s: float = LONGEST_FRAME_S
    ) -> None:
        self._width = BYTES_PER_SAMPLE[encoding]
        self._rate = sample_rate * self._width
        self._limit = self._bytes(KEPT_S) if limit is None else limit - limit % self._width
        self._shortest = self._bytes(SHORTEST_FRAME_S)
        self._longest = self._bytes(longest_s)
        self._audio = bytearray()
        self._start = 0  # where `_audio` begins
        self._sent = 0
        self._settled = 0
        self._origin = 0  # where the connection's own clock began
        self._lost = 0  # up to here nothing can be sent any more
        self._told = 0

    @property
    def offset_s(self) -> float:
        """What to add to the connection's times to get the stream's."""
        return self._origin / self._rate

    @property
    def settled_s(self) -> float:
        """Up to where audio is settled, by the connection's clock; negative if that was before the connection."""
        return (self._settled - self._origin) / self._rate

    @property
    def lost_s(self) -> float:
        """Seconds that were lost, and not yet told by `rewind`."""
        return max(0, self._lost - max(self._settled, self._told)) / self._rate

    @property
    def kept(self) -> bytes:
        """All that is not settled."""
        return bytes(self._audio)

    def append(self, audio: bytes) -> None:
        """Take new audio; beyond the limit the oldest goes."""
        self._audio += audio
        excess = len(self._audio) - self._limit
        if excess > 0:
            self._drop(excess + -excess % self._width)

    def take(self) -> bytes:
        """The next frame to send, as long as may be; empty while too little waits."""
        waiting = self._start + len(self._audio) - self._sent
        size = min(waiting - waiting % self._width, self._longest)
        if size < self._shortest:
            return b""
        begin = self._sent - self._start
        self._sent += size
        return bytes(self._audio[begin : begin + size])

    def settle(self, until_s: float) -> None:
        """Audio up to here, by the connection's clock, is recognised for good and need not be kept."""
        position = min(self._origin + self._bytes(until_s), self._sent)
        self._settled = max(self._settled, position)
        self._drop(self._settled - self._start)

    def rewind(self) -> float:
        """Begin a new connection with all that is kept; returns the seconds that were lost and not yet told."""
        self._sent = self._origin = self._lost = self._start
        lost_s, self._told = self.lost_s, self._lost
        return lost_s

    def _drop(self, size: int) -> None:
        if size <= 0:
            return
        del self._audio[:size]
        self._start += size
        skipped = self._start - self._sent
        if skipped > 0:  # never sent, so the connection's clock does not count it
            self._sent += skipped
            self._origin += skipped
            self._lost = self._start

    def _bytes(self, seconds: float) -> int:
        return round(seconds * self._rate / self._width) * self._width
