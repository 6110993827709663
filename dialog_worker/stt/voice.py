"""Where speech begins and ends, by its energy on a telephone line: for recognisers that leave this to their clients.

No I/O here. Times are seconds since the first audio that a gate was fed.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

from msgspec import Struct

FRAME_S = 0.020
SILENCE_DBFS = -45.0  # quieter than this is never speech on a telephone line
LOUDEST_NOISE_DBFS = -40.0
QUIETEST_DBFS = -90.0
ABOVE_NOISE_DB = 10.0  # speech stands out from the line's noise by this much
HYSTERESIS_DB = 3.0  # within speech, a little less is enough
NOISE_RISES_DB = 0.04  # a frame, that is 2 dB/s: a pause resets it, a steady hum is learnt in some seconds
START_WINDOW = 6  # frames
START_VOICED = 4  # of them: 80 ms of voice, which a click or a pop does not last
PREROLL_FRAMES = 15  # 300 ms before that, for soft consonants
LONGEST_S = 28.0  # within what an `AudioBuffer` keeps, so that a whole stretch can be sent again


class Began(Struct, frozen=True):
    """Somebody speaks; the audio that follows begins at `at_s`, a little before the voice."""

    at_s: float


class Ended(Struct, frozen=True):
    """It has been silent for long enough; no audio follows until the next `Began`."""

    at_s: float


Passing: TypeAlias = Began | bytes | Ended


class VoiceGate:
    """Lets the stretches of a G.711 stream pass that hold speech, each between `Began` and `Ended`.

    `silence_s` of silence end a stretch, and go with it. Notices a voice after 80 to 120 ms.
    """

    def __init__(self, encoding: str, sample_rate: int, silence_s: float) -> None:
        self._energies = ENERGIES[encoding]
        self._size = round(FRAME_S * sample_rate)
        self._patience = max(1, round(silence_s / FRAME_S))
        self._noise_dbfs = SILENCE_DBFS - ABOVE_NOISE_DB
        self._rest = b""
        self._count = 0  # frames seen
        self._held = deque[bytes](maxlen=PREROLL_FRAMES + START_WINDOW)
        self._recent = deque[bool](maxlen=START_WINDOW)
        self._speaking = False
        self._passed = 0  # frames of this stretch
        self._quiet = 0  # frames since its last voiced one

    def feed(self, audio: bytes) -> list[Passing]:
        """Take the next audio; returns what passes, pieces of one stretch joined."""
        passing: list[Passing] = []
        for piece in self._pass(audio):
            if isinstance(piece, bytes) and passing and isinstance(passing[-1], bytes):
                passing[-1] += piece
            else:
                passing.append(piece)
        return passing

    def _pass(self, audio: bytes) -> Iterator[Passing]:
        audio = self._rest + audio
        whole = len(audio) - len(audio) % self._size
        self._rest = audio[whole:]
        for start in range(0, whole, self._size):
            frame = audio[start : start + self._size]
            self._count += 1
            yield from self._speech(frame) if self._speaking else self._silence(frame)

    def _silence(self, frame: bytes) -> Iterator[Passing]:
        self._held.append(frame)
        self._recent.append(self._is_voiced(frame))
        if sum(self._recent) < START_VOICED:
            return
        self._speaking, self._passed, self._quiet = True, len(self._held), 0
        yield Began((self._count - len(self._held)) * FRAME_S)
        yield b"".join(self._held)
        self._held.clear()
        self._recent.clear()

    def _speech(self, frame: bytes) -> Iterator[Passing]:
        self._quiet = 0 if self._is_voiced(frame) else self._quiet + 1
        self._passed += 1
        yield frame
        if self._quiet >= self._patience or self._passed * FRAME_S >= LONGEST_S:
            self._speaking = False
            yield Ended(self._count * FRAME_S)

    def _is_voiced(self, frame: bytes) -> bool:
        level = self._level_dbfs(frame)
        threshold = max(SILENCE_DBFS, self._noise_dbfs + ABOVE_NOISE_DB) - (HYSTERESIS_DB if self._speaking else 0)
        risen = min(self._noise_dbfs + NOISE_RISES_DB, LOUDEST_NOISE_DBFS)
        self._noise_dbfs = min(level, risen)
        return level > threshold

    def _level_dbfs(self, frame: bytes) -> float:
        power = sum(map(self._energies.__getitem__, frame)) / len(frame)
        return max(QUIETEST_DBFS, 10 * math.log10(power)) if power > 0 else QUIETEST_DBFS


def _mulaw_level(code: int) -> int:
    code = ~code & 0x7F
    return (((code & 15) << 3) + 0x84 << (code >> 4)) - 0x84


def _alaw_level(code: int) -> int:
    code = (code ^ 0x55) & 0x7F
    segment, mantissa = code >> 4, ((code & 15) << 4) + 8
    return mantissa if segment == 0 else mantissa + 0x100 << segment - 1


def _energies(level: Callable[[int], int]) -> tuple[float, ...]:
    return tuple((level(code) / 32768) ** 2 for code in range(256))


ENERGIES = {"mulaw": _energies(_mulaw_level), "alaw": _energies(_alaw_level)}  # of each code (ITU-T G.711), 1 is full scale
