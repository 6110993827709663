"""Since when the caller's voice is without an answer, without I/O."""

import math

from dialog_worker.stt.unanswered import Unanswered

from .telephone import silence, speech


def heard(audio: bytes, at: float = 10.0) -> Unanswered:
    voice = Unanswered("mulaw", 8000)
    voice.post(audio, at)
    return voice


def test_silence_needs_no_answer() -> None:
    assert heard(silence(5)).since == math.inf


def test_a_click_needs_no_answer() -> None:
    assert heard((speech(0.04) + silence(0.1)) * 10).since == math.inf


def test_a_voice_waits_from_its_first_word_on() -> None:
    voice = heard(speech(1))
    voice.post(speech(1) + silence(1), 11.0)
    assert voice.since == 10.0
    assert voice.voice_at == 11.0


def test_an_answer_to_all_of_it_ends_the_waiting() -> None:
    voice = heard(silence(0.5) + speech(1) + silence(1))
    voice.answered(1.5, 12.0)
    assert voice.since == math.inf


def test_an_answer_to_a_part_of_it_begins_the_waiting_anew() -> None:
    voice = heard(speech(1))
    voice.answered(0.5, 12.0)
    assert voice.since == 12.0


def test_news_without_an_answer_begin_the_waiting_anew() -> None:
    voice = heard(speech(1))
    voice.progress(12.0)
    assert voice.since == 12.0


def test_news_while_nobody_waits_begin_nothing() -> None:
    voice = heard(silence(1))
    voice.progress(12.0)
    assert voice.since == math.inf


def test_a_voice_is_found_across_pieces_of_20_ms() -> None:
    voice = Unanswered("mulaw", 8000)
    for _ in range(3):
        voice.post(speech(0.02), 10.0)
    assert voice.since == 10.0
