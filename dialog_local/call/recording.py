"""Recordings as files: any PCM WAV becomes telephone audio, and a call's two sides become one stereo WAV."""

import io
import wave

import numpy as np

from dialog_local.speech.audio import Samples, UnreadableAudio, decode, encode, resample

TELEPHONE_RATE = 8000


def telephone_audio(wav: bytes) -> bytes:
    """Return a PCM WAV file, of any rate, width and number of channels, as mu-law at 8 kHz. Raises `UnreadableAudio`."""
    try:
        with wave.open(io.BytesIO(wav)) as file:
            channels, rate = file.getnchannels(), file.getframerate()
            samples = _samples(file.readframes(file.getnframes()), file.getsampwidth())
    except (wave.Error, EOFError) as error:
        raise UnreadableAudio(f"not a WAV file with PCM samples: {error}") from error
    mono = samples[: len(samples) // channels * channels].reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return encode(resample(mono, rate, TELEPHONE_RATE), "pcm_mulaw")


def stereo_wav(left: bytes, right: bytes) -> bytes:
    """Return a WAV file (16 bit, 8 kHz) of two mu-law tracks; the shorter one ends in silence."""
    length = max(len(left), len(right))
    tracks = [decode(_prolonged(track, length), "pcm_mulaw") for track in (left, right)]
    levels = np.stack(tracks, axis=1).reshape(-1)
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(TELEPHONE_RATE)
        file.writeframes(encode(levels, "pcm_s16le"))
    return written.getvalue()


def _prolonged(track: bytes, length: int) -> bytes:
    """Return a mu-law track prolonged to `length` samples."""
    return track.ljust(length, b"\xff")


def _samples(data: bytes, width: int) -> Samples:
    """Return little-endian PCM of 1 to 4 bytes a sample; 8 bit is unsigned (Microsoft, RIFF WAVE)."""
    if width == 1:
        unsigned: Samples = np.frombuffer(data, dtype=np.uint8).astype(np.float32)
        unsigned -= 128
        unsigned /= 128
        return unsigned
    whole = np.frombuffer(data[: len(data) // width * width], dtype=np.uint8).reshape(-1, width)
    padded = np.zeros((len(whole), 4), dtype=np.uint8)
    padded[:, 4 - width :] = whole
    levels = padded.view("<i4").reshape(-1).astype(np.float32)
    levels /= 2**31
    return levels
