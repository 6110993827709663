"""Turns of OpenAI's realtime transcription, and the gate that finds speech, without I/O."""

import pytest

from dialog_worker.participant import ProviderError
from dialog_worker.stt.base import Final, Interim, SpeechEnded, SpeechStarted
from dialog_worker.stt.openai_turn import Completed, LogProb, Turns, merged
from dialog_worker.stt.voice import Began, Ended, VoiceGate

from .telephone import SECOND, silence, speech, texts

SERVER_VAD = {"type": "server_vad", "silence_duration_ms": 500}
BUFFER = "input_audio_buffer."
TRANSCRIPTION = "conversation.item.input_audio_transcription."
PROBLEM = ProviderError("OpenAI: no", code="bad")


# Turns


def test_an_item_becomes_a_turn() -> None:
    turns = Turns(3)
    assert list(turns.began(1.0, "a")) == [SpeechStarted()]
    assert list(turns.delta("a", "Hello ", 0)) == [Interim("Hello")]
    assert list(turns.delta("a", "there", 0)) == [Interim("Hello there")]
    turns.stopped(2.0, 0, "a")
    assert list(turns.committed("a", 0)) == []
    assert list(turns.completed("a", "Hello there.", 0.9)) == [Final("Hello there.", 0.9), SpeechEnded()]
    assert turns.idle


def test_transcripts_are_told_in_the_order_of_speech() -> None:
    turns = Turns(3)
    assert list(turns.began(1.0, "a")) == [SpeechStarted()]
    turns.stopped(2.0, 0, "a")
    assert list(turns.began(3.0, "b")) == []
    assert list(turns.completed("b", "second", None)) == []
    told = list(turns.completed("a", "first", None))
    assert told == [Final("first"), SpeechEnded(), SpeechStarted(), Final("second"), SpeechEnded()]


def test_an_empty_transcript_ends_without_a_final() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    assert list(turns.completed("a", " ", None)) == [SpeechEnded()]


def test_the_beginning_of_speech_is_told_once() -> None:
    turns = Turns(3)
    assert list(turns.began(1.0, "a")) == [SpeechStarted()]
    assert list(turns.began(1.0, "a")) == []


def test_speech_that_was_not_announced_begins_with_its_first_news() -> None:
    assert list(Turns(3).delta("a", "Hi", 0)) == [SpeechStarted(), Interim("Hi")]


def test_an_item_found_on_our_side_gets_the_id_of_the_first_news() -> None:
    turns = Turns(3)
    list(turns.began(1.0))
    assert list(turns.delta("a", "Hi", 0)) == [Interim("Hi")]
    turns.stopped(2.0, 0)
    assert list(turns.committed("a", 0)) == []
    assert texts(list(turns.completed("a", "Hi.", None))) == ["Hi."]


def test_a_late_transcript_is_replaced_by_its_deltas_and_then_ignored() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    list(turns.delta("a", "Hello", 0))
    turns.stopped(2.0, 10, "a")
    assert turns.due_at == 13
    assert list(turns.expire(12.9)) == []
    assert list(turns.expire(13)) == [Final("Hello"), SpeechEnded()]
    assert list(turns.completed("a", "Hello.", None)) == []


def test_a_transcript_that_never_comes_is_an_error() -> None:
    turns = Turns(3)
    list(turns.began(1.0))
    turns.stopped(2.0, 0)
    error, ended = turns.expire(3)
    assert isinstance(error, ProviderError)
    assert error.code == "timeout"
    assert ended == SpeechEnded()


def test_news_of_an_item_given_up_before_it_had_an_id_are_not_taken_for_the_next() -> None:
    turns = Turns(3)
    list(turns.began(1.0))
    turns.stopped(2.0, 0)
    list(turns.expire(3))
    list(turns.began(5.0))
    assert list(turns.completed("late", "One", None)) == []
    turns.stopped(6.0, 5)
    assert texts(list(turns.completed("next", "Two", None))) == ["Two"]


def test_news_give_an_overdue_transcript_more_time() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    turns.stopped(2.0, 0, "a")
    list(turns.delta("a", "Well", 2))
    assert turns.due_at == 5


def test_a_failed_item_keeps_what_was_understood() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    list(turns.delta("a", "Hello", 0))
    assert list(turns.failed("a", PROBLEM)) == [PROBLEM, Final("Hello"), SpeechEnded()]


def test_a_refused_commit_ends_its_turn() -> None:
    turns = Turns(3)
    list(turns.began(1.0))
    serial = turns.stopped(2.0, 0)
    assert list(turns.refused(serial, PROBLEM)) == [PROBLEM, SpeechEnded()]
    list(turns.began(3.0))
    assert texts(list(turns.completed("b", "Two", None))) == ["Two"]


def test_a_turn_goes_on_over_a_new_connection() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    list(turns.delta("a", "Hello th", 0))
    turns.reconnected(0)
    assert turns.settled_s(10) == 0
    assert list(turns.began(0.3, "b")) == []
    assert list(turns.delta("b", "Hello", 0)) == [Interim("Hello")]
    assert texts(list(turns.completed("b", "Hello there.", None))) == ["Hello there."]


def test_speech_that_a_new_connection_does_not_hear_ends_with_what_was_understood() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    list(turns.delta("a", "Hello", 0))
    turns.reconnected(10)
    assert list(turns.expire(13)) == [Final("Hello"), SpeechEnded()]


def test_a_transcript_that_waited_for_its_turn_is_heard_anew_on_a_new_connection() -> None:
    turns = Turns(3)
    list(turns.began(1.0, "a"))
    list(turns.began(3.0, "b"))
    list(turns.completed("b", "second", None))
    turns.reconnected(0)
    list(turns.began(1.0, "c"))
    assert texts(list(turns.completed("c", "first", None))) == ["first"]
    assert turns.idle


def test_audio_is_kept_from_the_first_open_item_on() -> None:
    turns = Turns(3)
    assert turns.settled_s(7) == 7
    list(turns.began(8.0, "a"))
    assert turns.settled_s(9) == 8
    turns.stopped(9.5, 0, "a")
    list(turns.completed("a", "Hi", None))
    assert turns.settled_s(9) == 9.5


def test_confidence_is_the_tokens_mean_probability() -> None:
    assert Completed("a", "Hi", (LogProb(0.0), LogProb(0.0))).confidence == 1.0
    assert Completed("a", "Hi", (LogProb(-1.0), LogProb(-3.0))).confidence == pytest.approx(0.1353, abs=1e-4)
    assert Completed("a", "Hi").confidence is None


def test_settings_are_merged_object_by_object() -> None:
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": None}, "d": 3}) == {"a": {"b": 1, "c": None}, "d": 3}


# Voice


def gate(audio: bytes, encoding: str = "mulaw", silence_s: float = 0.5) -> list[Began | Ended]:
    voice = VoiceGate(encoding, SECOND, silence_s)
    passing = [piece for start in range(0, len(audio), 100) for piece in voice.feed(audio[start : start + 100])]
    return [piece for piece in passing if not isinstance(piece, bytes)]


def test_a_stretch_of_speech_passes_with_what_comes_before_and_after() -> None:
    began, audio, ended = VoiceGate("mulaw", SECOND, 0.5).feed(silence(1) + speech(1) + silence(1))
    assert isinstance(began, Began)
    assert began.at_s == pytest.approx(0.66, abs=0.03)
    assert ended == Ended(2.5)
    assert isinstance(audio, bytes)
    assert len(audio) / SECOND == pytest.approx(2.5 - began.at_s)


@pytest.mark.parametrize("loudness", [0x10, 0x30, 0x40])  # down to about -35 dB of full scale
def test_a_voice_is_noticed_within_120_ms(loudness: int) -> None:
    voice = VoiceGate("mulaw", SECOND, 0.5)
    voice.feed(silence(1))
    assert voice.feed(speech(0.06, loudness)) == []
    assert any(isinstance(piece, Began) for piece in voice.feed(speech(0.06, loudness)))


def test_a_pause_within_speech_does_not_end_it() -> None:
    assert len(gate(speech(0.5) + silence(0.4) + speech(0.5) + silence(1))) == 2
    assert len(gate(speech(0.5) + silence(0.4) + speech(0.5) + silence(1), silence_s=0.3)) == 4


def test_clicks_and_the_lines_noise_are_no_speech() -> None:
    assert gate(silence(1) + speech(0.04) + silence(1)) == []
    assert gate(speech(3, 0x70)) == []


def test_a_steady_hum_is_learnt() -> None:
    hum = speech(12, 0x58)  # louder than the line's silence by 10 dB
    assert len(gate(hum)) == 2


def test_a_voice_above_the_noise_is_speech() -> None:
    noise = speech(12, 0x58)
    assert len(gate(noise)) == 2
    assert len(gate(noise + speech(1, 0x28) + noise[:SECOND])) == 4


def test_a_law_is_understood() -> None:
    assert gate(b"\xd5" * SECOND, "alaw") == []
    assert len(gate(b"\xd5" * SECOND + speech(1) + b"\xd5" * SECOND, "alaw")) == 2


def test_endless_speech_is_cut_before_it_is_longer_than_what_is_kept() -> None:
    assert [piece.at_s for piece in gate(speech(30)) if isinstance(piece, Ended)] == [28.0]
