"""How far into its text a voice is, from the words that it reports."""

import pytest

from dialog_worker.tts.script import Script


def new_script(*pieces: str) -> Script:
    script = Script()
    for piece in pieces:
        script.add(piece)
    script.sent = len(script.text)
    return script


def rest(script: Script, *words: str) -> str:
    """What of the text is behind these words."""
    for word in words:
        script.follow(word)
    return script.text[script.timed :].strip()


def test_words_are_followed_with_their_punctuation() -> None:
    assert rest(new_script("Yes, of course. Bye."), "Yes", "of", "course") == "Bye."


def test_a_repeated_word_is_counted_each_time() -> None:
    assert rest(new_script("No, no, no, thanks."), "No,", "no,") == "no, thanks."


def test_a_word_said_otherwise_than_written_moves_nothing() -> None:
    assert rest(new_script("It is $5 then."), "It", "is", "five", "dollars") == "$5 then."


def test_the_words_after_it_are_found_again() -> None:
    script = new_script("Your number is +44 20 7946 0958, extension 1234 5678, and the code 1234. Is that right? Good.")
    spoken = ["plus", "four", "four", "two", "zero", "seven", "nine", "four", "six", "zero", "nine", "five", "eight"]
    assert rest(script, "Your", "number", "is", *spoken, "and", "the") == "code 1234. Is that right? Good."


def test_a_word_that_is_not_sent_yet_is_not_said() -> None:
    script = new_script("Good ")
    script.add("evening.")
    assert rest(script, "evening.") == "Good evening."


def test_an_empty_word_is_none() -> None:
    assert rest(new_script("Hi."), "") == "Hi."


@pytest.mark.parametrize(
    ("text", "ends"),
    [("Good evening. ", True), ("Really?!", True), ('He said "no."', True), ("It is 7.", False), ("Well, ", False)],
)
def test_a_sentence_ends_with_its_mark(text: str, ends: bool) -> None:
    assert new_script(text).ends_a_sentence is ends


def test_pieces_wait_until_their_last_word_is_said() -> None:
    script = new_script("Good evening. ", "How are you? ", "Bye.")
    assert script.waiting == 3
    for word in ["Good", "evening.", "How", "are"]:
        script.said = script.follow(word)
    assert script.waiting == 2


def test_without_words_pieces_wait_until_audio_follows() -> None:
    script = new_script("Good evening. ")
    script.answer()
    script.add("Bye.")
    assert script.waiting == 1
