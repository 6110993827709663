"""When somebody speaks: cuts a stream of audio into utterances, on the audio's own clock, without I/O and without a model.

A `Segmenter` is fed samples at 16 kHz and tells what began and what ended; the recogniser gets whole segments.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dialog_local.speech.audio import Samples

RATE = 16_000  # Hz, what the recogniser takes
FRAME_SECONDS = 0.02
_FRAME = int(RATE * FRAME_SECONDS)

SILENCE_DBFS = -45.0  # quieter than this is never speech on a telephone line
_ABOVE_NOISE_DB = 10.0  # speech stands out from the line's noise by this much
_HYSTERESIS_DB = 3.0  # within speech, a little less is enough
_NOISE_RISES_DB = 0.04  # a frame, that is 2 dB/s: a pause resets it, a steady hum is learnt in some seconds
_LOUDEST_NOISE_DBFS = -40.0
_QUIETEST_DBFS = -90.0

_START_WINDOW = 8  # frames
_START_VOICED = 4  # of them: 80 ms of voice, which a click or a pop does not last
_PREROLL_FRAMES = 15  # 300 ms before the first voice, for soft consonants
_SHORTEST_ENDPOINT_S = 0.2  # stops within a word last up to 0.15 s; less would cut words
MAX_SEGMENT_S = 12.0  # the recogniser's time grows faster than its input
_CUT_WITHIN_S = 2.0  # a segment that is too long is cut at the quietest place of its last seconds


class SpeechDetector:
    """Tells whether a frame is voice, by its energy above the line's noise."""

    def __init__(self) -> None:
        self._noise = SILENCE_DBFS - _ABOVE_NOISE_DB

    def is_voiced(self, level_dbfs: float, *, within_speech: bool) -> bool:
        """Judge the next frame and learn the noise from it."""
        threshold = max(SILENCE_DBFS, self._noise + _ABOVE_NOISE_DB) - (_HYSTERESIS_DB if within_speech else 0)
        if level_dbfs < self._noise:
            self._noise = level_dbfs
        else:
            self._noise = min(self._noise + _NOISE_RISES_DB, _LOUDEST_NOISE_DBFS)
        return level_dbfs > threshold


@dataclass(frozen=True)
class SpeechStarted:
    """Voice began at this second of the stream."""

    at: float


@dataclass(frozen=True, eq=False)
class Segment:
    """Audio with voice in it, from second `start` on; `voice_start` and `voice_end` frame the voice itself.

    `speech_final` says that the speaker paused (or the stream was finalised), not just that the segment became too long.
    """

    audio: Samples
    start: float
    voice_start: float
    voice_end: float
    speech_final: bool = False
    from_finalize: bool = False

    @property
    def end(self) -> float:
        """The second of the stream at which the segment ends."""
        return self.start + len(self.audio) / RATE


@dataclass(frozen=True)
class UtteranceEnded:
    """Nothing was said for the configured time after `voice_end`."""

    voice_end: float


Happening: TypeAlias = SpeechStarted | Segment | UtteranceEnded


def level_dbfs(frame: Samples) -> float:
    """The frame's power relative to full scale, in dB."""
    power = float(np.dot(frame, frame)) / len(frame)
    return max(10 * math.log10(power), _QUIETEST_DBFS) if power > 0 else _QUIETEST_DBFS


def is_audible(audio: Samples) -> bool:
    """Some 20 ms in it are louder than a telephone line's silence."""
    whole = audio[: len(audio) - len(audio) % _FRAME].reshape(-1, _FRAME)
    return any(level_dbfs(frame) > SILENCE_DBFS for frame in whole)


class Segmenter:
    """Cuts a stream into segments. `endpointing_s` None never calls a segment speech-final; pauses still cut it."""

    def __init__(self, *, endpointing_s: float | None = 0.3, utterance_end_s: float | None = None) -> None:
        self._pause = max(_SHORTEST_ENDPOINT_S, endpointing_s or 0.0)
        self._endpoints = endpointing_s is not None
        self._utterance_end = utterance_end_s
        self._detector = SpeechDetector()
        self._rest: Samples = np.zeros(0, dtype=np.float32)
        self._frames: list[tuple[Samples, float]] = []  # the open segment, or the pre-roll
        self._recent: deque[bool] = deque(maxlen=_START_WINDOW)
        self._count = 0  # frames seen
        self._voice_start: float | None = None  # of the open segment
        self._voice_end = 0.0
        self._ending: float | None = None  # voice_end of an utterance whose end has not been told

    @property
    def now(self) -> float:
        """Seconds of audio seen."""
        return self._count * FRAME_SECONDS + len(self._rest) / RATE

    @property
    def quiet_s(self) -> float:
        """How long the speaker of the open segment has been silent."""
        return self._count * FRAME_SECONDS - self._voice_end

    def feed(self, samples: Samples) -> list[Happening]:
        """Take the next audio and return what happened in it, in order."""
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) - len(samples) % _FRAME
        self._rest = samples[whole:]
        happenings: list[Happening] = []
        for frame in samples[:whole].reshape(-1, _FRAME):
            happenings += self._frame(frame)
        return happenings

    def open_segment(self) -> Segment | None:
        """The segment that is being spoken, as far as it has come."""
        if self._voice_start is None:
            return None
        return self._segment(self._frames)

    def finalize(self) -> Segment | None:
        """End the open segment now."""
        if self._voice_start is None:
            return None
        return self._close(speech_final=True, from_finalize=True)

    def _frame(self, frame: Samples) -> list[Happening]:
        level = level_dbfs(frame)
        voiced = self._detector.is_voiced(level, within_speech=self._voice_start is not None)
        self._count += 1
        self._frames.append((frame, level))
        if self._voice_start is None:
            return self._waiting(voiced)
        return self._speaking(voiced)

    def _waiting(self, voiced: bool) -> list[Happening]:
        self._recent.append(voiced)
        if sum(self._recent) >= _START_VOICED:
            oldest = len(self._recent) - list(self._recent).index(True)
            self._voice_start = (self._count - oldest) * FRAME_SECONDS
            self._voice_end = self._count * FRAME_SECONDS
            self._recent.clear()
            self._ending = None
            return [SpeechStarted(self._voice_start)]
        del self._frames[:-_PREROLL_FRAMES]
        ended = self._ending
        if ended is None or self._utterance_end is None or self._past(ended) < self._utterance_end:
            return []
        self._ending = None
        return [UtteranceEnded(ended)]

    def _speaking(self, voiced: bool) -> list[Happening]:
        if voiced:
            self._voice_end = self._count * FRAME_SECONDS
        elif self._past(self._voice_end) >= self._pause:
            return [self._close(speech_final=self._endpoints)]
        if len(self._frames) * FRAME_SECONDS >= MAX_SEGMENT_S:
            return [self._cut()]
        return []

    def _past(self, moment: float) -> float:
        return round(self._count * FRAME_SECONDS - moment, 6)

    def _close(self, *, speech_final: bool, from_finalize: bool = False) -> Segment:
        segment = self._segment(self._frames, speech_final=speech_final, from_finalize=from_finalize)
        self._frames = self._frames[-_PREROLL_FRAMES:] if not from_finalize else []
        self._voice_start = None
        self._ending = segment.voice_end
        return segment

    def _cut(self) -> Segment:
        """Give up the first part of a segment that is too long, and go on with the rest."""
        last = self._frames[-int(_CUT_WITHIN_S / FRAME_SECONDS) :]
        quietest = min(range(len(last)), key=lambda index: last[index][1])
        at = len(self._frames) - len(last) + quietest + 1
        segment = self._segment(self._frames[:at])
        self._frames = self._frames[at:]
        self._voice_start = segment.end
        return segment

    def _segment(
        self, frames: list[tuple[Samples, float]], *, speech_final: bool = False, from_finalize: bool = False
    ) -> Segment:
        assert self._voice_start is not None
        start = (self._count - len(self._frames)) * FRAME_SECONDS
        end = start + len(frames) * FRAME_SECONDS
        audio = np.concatenate([frame for frame, _ in frames])
        return Segment(audio, start, self._voice_start, min(self._voice_end, end), speech_final, from_finalize)
