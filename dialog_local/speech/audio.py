"""Sound as the wire has it and as the models want it: mu-law and PCM bytes, WAV files, sample rates.

Samples are float32 arrays in -1..1, one channel.
"""

import io
import math
import wave
from typing import Literal, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Samples: TypeAlias = NDArray[np.float32]
Encoding = Literal["pcm_mulaw", "pcm_s16le", "pcm_f32le"]

BYTES_PER_SAMPLE: dict[Encoding, int] = {"pcm_mulaw": 1, "pcm_s16le": 2, "pcm_f32le": 4}
_FULL_SCALE = 32768
_STEP = np.float32(1 / _FULL_SCALE)
_BIAS, _CLIP = 0x84, 32635  # ITU-T G.711
_ZERO_CROSSINGS = 16  # of the filter's sinc on each side: 2 ms at 8 kHz
_PASSBAND = 0.92  # of the lower rate's half; the rest is the filter's slope
_KAISER_BETA = 8.0  # about 80 dB of attenuation


class UnreadableAudio(Exception):
    """The bytes are not the audio that they were said to be."""


def _mulaw_levels() -> NDArray[np.int16]:
    code = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (code >> 4) & 7, code & 15
    magnitude = ((mantissa.astype(np.int32) << 3) + _BIAS << exponent) - _BIAS
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.int16)


def _mulaw_codes() -> NDArray[np.uint8]:
    level = np.arange(-_FULL_SCALE, _FULL_SCALE, dtype=np.int32)
    magnitude = np.minimum(np.abs(level), _CLIP) + _BIAS
    exponent = np.floor(np.log2(magnitude)).astype(np.int32) - 7
    mantissa = (magnitude >> (exponent + 3)) & 15
    codes: NDArray[np.int32] = ~(np.where(level < 0, 0x80, 0) | exponent << 4 | mantissa) & 0xFF
    return codes.astype(np.uint8)


_LEVELS = _mulaw_levels().astype(np.float32) * _STEP  # by code
_CODES = _mulaw_codes()  # by level + 32768


def encode(samples: Samples, encoding: Encoding) -> bytes:
    """Return the bytes for samples; what is beyond full scale is clipped."""
    if encoding == "pcm_f32le":
        return samples.astype("<f4").tobytes()
    levels = np.clip(np.rint(samples * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int32)
    if encoding == "pcm_s16le":
        return levels.astype("<i2").tobytes()
    return _CODES[levels + _FULL_SCALE].tobytes()


def decode(data: bytes, encoding: Encoding) -> Samples:
    """Return the samples for bytes. Raises `UnreadableAudio` if they end within a sample."""
    if len(data) % BYTES_PER_SAMPLE[encoding]:
        raise UnreadableAudio(f"{len(data)} bytes of {encoding} end within a sample")
    if encoding == "pcm_mulaw":
        return _LEVELS[np.frombuffer(data, dtype=np.uint8)]
    if encoding == "pcm_s16le":
        return np.frombuffer(data, dtype="<i2").astype(np.float32) * _STEP
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


class StreamDecoder:
    """`decode` for a stream that may be cut anywhere, within a sample too."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding: Encoding = encoding
        self._rest = b""

    def feed(self, data: bytes) -> Samples:
        """Return the samples that `data` completes."""
        data = self._rest + data
        whole = len(data) - len(data) % BYTES_PER_SAMPLE[self._encoding]
        self._rest = data[whole:]
        return decode(data[:whole], self._encoding)


def read_wav(data: bytes) -> tuple[Samples, int]:
    """Return the first channel and the sample rate of a 16-bit PCM WAV file. Raises `UnreadableAudio`."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            if file.getsampwidth() != 2:
                raise UnreadableAudio(f"a WAV file with {8 * file.getsampwidth()}-bit samples; send 16-bit PCM")
            channels, rate = file.getnchannels(), file.getframerate()
            return decode(file.readframes(file.getnframes()), "pcm_s16le")[::channels], rate
    except (wave.Error, EOFError) as error:
        raise UnreadableAudio(f"not a WAV file with PCM samples: {str(error) or 'it ends too early'}") from error


class Resampler:
    """Converts a stream between two sample rates (Hz) with a polyphase low-pass filter; pieces join without a seam.

    The output is aligned with the input; the last `_ZERO_CROSSINGS` samples of the lower rate come out with `flush`.
    """

    def __init__(self, from_rate: int, to_rate: int) -> None:
        common = math.gcd(from_rate, to_rate)
        self._up, self._down = to_rate // common, from_rate // common
        self._taps = 2 * math.ceil(_ZERO_CROSSINGS * max(1.0, from_rate / to_rate))
        self._bank = self._filters()
        self._buffer: Samples = np.zeros(self._taps // 2 - 1, dtype=np.float32)
        self._step = 0  # the next output sample, in units of 1/up input samples from the buffer's start

    def feed(self, samples: Samples) -> Samples:
        """Return the output that can be computed so far."""
        if self._up == self._down:
            return samples
        self._buffer = np.concatenate([self._buffer, samples])
        end = (len(self._buffer) - self._taps + 1) * self._up
        steps = np.arange(self._step, max(end, self._step), self._down)
        if not len(steps):
            return np.zeros(0, dtype=np.float32)
        windows = sliding_window_view(self._buffer, self._taps)[steps // self._up]
        output: Samples = np.einsum("ij,ij->i", windows, self._bank[steps % self._up])
        following = int(steps[-1]) + self._down
        used = min(following // self._up, len(self._buffer))
        self._buffer, self._step = self._buffer[used:], following - used * self._up
        return output

    def flush(self) -> Samples:
        """Return what is still in the filter. The resampler is spent afterwards."""
        return self.feed(np.zeros(self._taps // 2, dtype=np.float32))

    def _filters(self) -> Samples:
        """One filter for each of the `up` positions between two input samples, each with a gain of one."""
        cutoff = _PASSBAND * min(1.0, self._up / self._down)
        half = self._taps // 2
        offsets = np.arange(self._taps)[None, :] - (half - 1) - np.arange(self._up)[:, None] / self._up
        window = np.i0(_KAISER_BETA * np.sqrt(np.clip(1 - (offsets / half) ** 2, 0, 1))) / np.i0(_KAISER_BETA)
        bank = np.sinc(cutoff * offsets) * window
        unit: Samples = (bank / bank.sum(axis=1, keepdims=True)).astype(np.float32)
        return unit


def resample(samples: Samples, from_rate: int, to_rate: int) -> Samples:
    """Convert a whole recording."""
    if from_rate == to_rate:
        return samples
    resampler = Resampler(from_rate, to_rate)
    return np.concatenate([resampler.feed(samples), resampler.flush()])
