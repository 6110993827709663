"""Audio arithmetic, and where speech begins and ends, on the audio's own clock."""

from typing import Any

import numpy as np
import pytest

from dialog_local.speech.audio import Resampler, Samples, decode, encode, resample
from dialog_local.speech.hearing import MAX_SEGMENT_S, RATE, Segment, Segmenter, SpeechStarted, UtteranceEnded
from tests.local.sockets import human_recording, silence, voice


def test_every_mulaw_code_survives_decoding_and_encoding() -> None:
    codes = bytes(code for code in range(256) if code != 0x7F)  # 0x7F is a second zero
    assert encode(decode(codes, "pcm_mulaw"), "pcm_mulaw") == codes


def test_mulaw_silence_is_ff() -> None:
    assert encode(np.zeros(3, dtype=np.float32), "pcm_mulaw") == b"\xff\xff\xff"


def test_resampling_piecewise_is_resampling_at_once() -> None:
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, 8000).astype(np.float32)
    resampler = Resampler(22050, 8000)
    pieces = [resampler.feed(samples[start : start + 37]) for start in range(0, 8000, 37)]
    assert np.array_equal(np.concatenate([*pieces, resampler.flush()]), resample(samples, 22050, 8000))


def tone(hertz: float, rate: int) -> Samples:
    return np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)


def test_resampling_keeps_a_tone_in_place() -> None:
    assert np.allclose(resample(tone(440, 8000), 8000, 16000)[100:-100], tone(440, 16000)[100:-100], atol=1e-3)


def test_resampling_removes_what_the_lower_rate_cannot_carry() -> None:
    assert np.abs(resample(tone(6000, 22050), 22050, 8000)[100:-100]).max() < 1e-3


def happenings(segmenter: Segmenter, *parts: Samples) -> list[tuple[float, Any]]:
    """What happens, and the second of audio at which it is noticed."""
    audio = np.concatenate(parts)
    found = []
    for start in range(0, len(audio), 320):
        found += [(segmenter.now, happening) for happening in segmenter.feed(audio[start : start + 320])]
    return found


def test_the_start_of_speech_is_noticed_within_200_ms() -> None:
    [(noticed, started)] = happenings(Segmenter(), silence(1), voice(0.5))
    assert isinstance(started, SpeechStarted)
    assert started.at == pytest.approx(1.0, abs=0.03)
    assert noticed - 1.0 < 0.2


def test_the_start_of_a_human_voice_is_noticed_within_200_ms_of_its_first_sound() -> None:
    audio = resample(decode(human_recording(4), "pcm_mulaw"), 8000, RATE)
    first_sound = int(np.flatnonzero(np.abs(audio) > 0.05)[0]) / RATE
    noticed, started = happenings(Segmenter(), silence(1), audio)[0]
    assert isinstance(started, SpeechStarted)
    assert noticed - 1.0 - first_sound < 0.2


@pytest.mark.parametrize("peak", [0.0, 0.003])
def test_silence_and_faint_noise_are_no_speech(peak: float) -> None:
    noise = np.random.default_rng(4).uniform(-peak, peak, 3 * RATE).astype(np.float32)
    assert happenings(Segmenter(), noise) == []


def test_a_click_is_no_speech() -> None:
    assert happenings(Segmenter(), silence(1), voice(0.04), silence(1)) == []


def test_an_utterance_ends_after_the_endpointing_time() -> None:
    [_, (noticed, segment)] = happenings(Segmenter(endpointing_s=0.5), silence(1), voice(1), silence(1))
    assert isinstance(segment, Segment)
    assert segment.speech_final
    assert noticed == pytest.approx(2.5, abs=0.05)


def test_a_pause_shorter_than_endpointing_is_part_of_the_utterance() -> None:
    found = happenings(Segmenter(endpointing_s=0.5), voice(1), silence(0.4), voice(1), silence(1))
    assert [type(happening) for _, happening in found] == [SpeechStarted, Segment]


def test_without_endpointing_no_segment_is_speech_final() -> None:
    segments = [s for _, s in happenings(Segmenter(endpointing_s=None), voice(1), silence(1)) if isinstance(s, Segment)]
    assert [segment.speech_final for segment in segments] == [False]


def test_a_monologue_is_cut_and_nothing_of_it_is_lost() -> None:
    found = happenings(Segmenter(), voice(20), silence(1))
    segments = [happening for _, happening in found if isinstance(happening, Segment)]
    assert [segment.speech_final for segment in segments] == [False, True]
    assert segments[0].end - segments[0].start <= MAX_SEGMENT_S
    assert segments[1].start == pytest.approx(segments[0].end)


def test_the_utterance_end_comes_once_after_its_silence() -> None:
    ends = [
        (noticed, happening)
        for noticed, happening in happenings(Segmenter(utterance_end_s=1.0), voice(1), silence(4))
        if isinstance(happening, UtteranceEnded)
    ]
    assert len(ends) == 1
    assert ends[0][0] == pytest.approx(2.0, abs=0.05)
