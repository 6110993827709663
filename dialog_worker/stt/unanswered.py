"""Since when the caller's voice is without an answer: what tells a stalled recogniser from one that has nothing to say.

No I/O here; times are the event loop's, positions are seconds since the stream's first sample.
"""

import math

from dialog_worker.stt.buffer import BYTES_PER_SAMPLE, is_voiced

FRAME_S = 0.020
VOICE_S = 0.060  # loud for so long on end: a click is shorter, a syllable longer
UNCOVERED_S = 0.1  # a recogniser may end an answer a little before our loud frames end


class Unanswered:
    """Takes the caller's audio and the recogniser's answers; `since` is `math.inf` while nothing is owed."""

    def __init__(self, encoding: str, sample_rate: int) -> None:
        self._encoding = encoding
        self._rate = sample_rate * BYTES_PER_SAMPLE[encoding]
        self._frame = round(FRAME_S * sample_rate) * BYTES_PER_SAMPLE[encoding]
        self._position = 0
        self._loud = 0  # bytes on end
        self._voiced_until_s = 0.0
        self.since = math.inf
        self.voice_at = -math.inf  # when the caller was last heard

    def post(self, audio: bytes, now: float) -> None:
        """Take the caller's next audio."""
        for start in range(0, len(audio), self._frame):
            frame = audio[start : start + self._frame]
            self._position += len(frame)
            self._loud = self._loud + len(frame) if is_voiced(frame, self._encoding) else 0
            if self._loud >= VOICE_S * self._rate:
                self._voiced_until_s = self._position / self._rate
                self.since, self.voice_at = min(self.since, now), now

    def progress(self, now: float) -> None:
        """The recogniser said something, though not of all that it was given: it is waited for anew."""
        if not math.isinf(self.since):
            self.since = now

    def answered(self, until_s: float, now: float) -> None:
        """What was said up to here has its answer."""
        self.progress(now)
        if self._voiced_until_s <= until_s + UNCOVERED_S:
            self.since = math.inf
