"""What the caller heard of a text, to the nearest word: by the voice's word timings, or by the pace of speech."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialog_worker.agent.utterance import heard_text
from dialog_worker.participant import Word

TEXT = "Good evening, this is Bella's. How can I help?"


def spoken(*texts: str, ms: int = 100) -> list[Word]:
    """Words of equal length, one behind the other."""
    return [Word(text, index * ms, (index + 1) * ms) for index, text in enumerate(texts)]


TIMED = spoken("Good", "evening", "this", "is", "Bella's", "How", "can", "I", "help")


@pytest.mark.parametrize(
    ("played_ms", "heard"),
    [
        (0, ""),
        (49, ""),
        (50, "Good"),
        (149, "Good"),
        (150, "Good evening,"),
        (450, "Good evening, this is Bella's."),
        (899, TEXT),
        (5000, TEXT),
    ],
)
def test_a_word_counts_when_half_of_it_was_played(played_ms: int, heard: str) -> None:
    assert heard_text(TEXT, TIMED, played_ms) == heard


def test_a_pause_before_a_word_is_not_the_word() -> None:
    words = [Word("One.", 0, 200), Word("Two.", 1000, 1200)]
    assert heard_text("One. Two.", words, 999) == "One."


def test_timings_may_carry_the_punctuation() -> None:
    assert heard_text("Yes, sir.", spoken("Yes,", "sir."), 60) == "Yes,"


def test_timings_that_cover_only_the_beginning_vouch_for_no_more() -> None:
    assert heard_text(TEXT, TIMED[:3], 10_000) == "Good evening, this"


def test_a_word_that_is_said_otherwise_than_written_stands_for_the_next_written_one() -> None:
    assert heard_text("That is $5 today.", spoken("That", "is", "five", "today"), 250) == "That is $5"


def test_a_word_that_is_said_otherwise_is_not_found_at_the_other_end() -> None:
    text = "At 7 we open, and there is music in the big hall from then on until seven."
    assert heard_text(text, spoken("At", "seven", "we"), 150) == "At 7"


def test_the_same_word_twice_is_two_words() -> None:
    assert heard_text("no no no", spoken("no", "no", "no"), 160) == "no no"


def test_a_script_without_spaces_is_cut_between_its_words() -> None:
    assert heard_text("您好，请讲。", spoken("您好", "请讲"), 60) == "您好，"


def test_an_opening_quote_belongs_to_the_word_behind_it() -> None:
    assert heard_text('Say "yes" now', spoken("Say", "yes", "now"), 60) == "Say"
    assert heard_text('Say "yes" now', spoken("Say", "yes", "now"), 160) == 'Say "yes"'


def test_without_timings_an_even_pace_is_assumed() -> None:
    assert heard_text("one two three four five six", [], 1000) == "one two three"


def test_without_timings_nothing_played_is_nothing_heard() -> None:
    assert heard_text(TEXT, [], 0) == ""


def test_without_timings_enough_played_is_everything() -> None:
    assert heard_text(TEXT, [], 60_000) == TEXT


def test_an_empty_text_is_heard_as_nothing() -> None:
    assert heard_text("", [], 1000) == ""
    assert heard_text("", spoken("ghost"), 1000) == ""


words = st.lists(st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=8), max_size=8)


@settings(deadline=None)
@given(words, words, st.integers(0, 2000), st.integers(0, 2000))
def test_what_was_heard_is_a_beginning_of_the_text_and_grows_with_time(
    written: list[str], timed: list[str], first: int, second: int
) -> None:
    text, timings = " ".join(written), spoken(*timed)
    earlier, later = (heard_text(text, timings, ms) for ms in sorted((first, second)))
    assert text.strip().startswith(later)
    assert later.startswith(earlier)
