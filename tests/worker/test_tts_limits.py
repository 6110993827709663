"""Where an utterance ends before its text does, or is sent again: silence, errors, refusals, drops, a full queue."""

import math

from dialog_worker.participant import ProviderError, Word
from dialog_worker.tts.base import WordTimings
from dialog_worker.tts.contexts import Cancel, Line
from protocol.messages import Message

from .utterances import drain, new_contexts, say

# Silence


def test_silence_of_a_complete_utterance_ends_it() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    contexts.audio("u-1", b"1", 1)
    assert drain(contexts, 5.9) == [Message("u", b"1")]
    error, last = drain(contexts, 6)
    assert isinstance(error, ProviderError)
    assert (error.code, error.uuid) == ("timeout", "u")
    assert last == Message("u", b"", True)
    assert contexts.due(6) == Cancel("u-1")


def test_the_beginning_of_a_sentence_may_be_silent() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0)
    assert drain(contexts, 60) == []


def test_a_whole_sentence_is_waited_for_from_when_it_was_posted() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One. ", 0)
    say(contexts, "u", "Two. ", 3)
    assert contexts.deadline() == 5


def test_after_its_audio_a_sentence_is_not_waited_for() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One. ", 0)
    contexts.audio("u-1", b"1", 1)
    assert (contexts.waiting_since(), contexts.deadline()) == (math.inf, math.inf)


def test_a_provider_that_may_wait_for_more_text_is_given_the_time_for_it() -> None:
    contexts = new_contexts(hesitation_s=3)
    say(contexts, "u", "One. ", 0)
    assert contexts.deadline() == 8
    say(contexts, "u", "", 6, done=True)
    assert contexts.deadline() == 11


def test_the_patience_with_an_utterance_begins_with_its_turn() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    say(contexts, "v", "Two", 0, done=True)
    contexts.audio("u-1", b"1", 4)
    contexts.done("u-1")
    drain(contexts, 4)
    assert (contexts.waiting_since(), contexts.deadline()) == (4, 9)


def test_the_abort_of_a_later_utterance_does_not_prolong_patience() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    say(contexts, "v", "Two", 0, done=True)
    contexts.abort("v", 3)
    assert contexts.deadline() == 5


def test_without_a_connection_silence_does_not_count() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    contexts.disconnected(1)
    assert (contexts.waiting_since(), contexts.deadline()) == (0, math.inf)
    contexts.connected(4)
    assert contexts.deadline() == 9


def test_a_connection_is_not_trusted_after_a_silence() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    drain(contexts, 5)
    assert contexts.stalled
    contexts.connected(6)
    assert not contexts.stalled


# Errors and refusals


def test_an_error_ends_its_utterance_at_once() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0)
    assert contexts.failed("u-1", "Acme: bad", "bad") is None
    assert drain(contexts, 0) == [ProviderError("Acme: bad", "bad", "u"), Message("u", b"", True)]
    assert say(contexts, "u", "Two", 1, done=True) is None
    assert drain(contexts, 1) == []


def test_an_error_without_a_context_ends_the_only_one() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    assert contexts.failed(None, "Acme: bad", "bad") is None
    assert drain(contexts, 0) == [ProviderError("Acme: bad", "bad", "u"), Message("u", b"", True)]


def test_an_error_that_might_be_of_two_contexts_is_told_without_a_uuid() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    say(contexts, "v", "Two", 0, done=True)
    assert contexts.failed(None, "Acme: bad", "bad") == ProviderError("Acme: bad", "bad")
    assert drain(contexts, 0) == []


def test_a_refused_context_is_asked_for_again_for_a_second() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    for number, now in enumerate((0, 0.25, 0.5, 0.75), start=1):
        assert contexts.refused(f"u-{number}", now)
        assert contexts.due(now) is None
        assert contexts.retry_at(now) == now + 0.25
        assert contexts.due(now + 0.25) == Line(f"u-{number + 1}", "One", last=True)
    assert not contexts.refused("u-5", 1)


def test_a_refusal_without_a_name_is_of_the_only_context() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    assert contexts.refused(None, 0)
    assert contexts.due(0.25) == Line("u-2", "One", last=True)


def test_a_refusal_of_what_nobody_wants_any_more_is_no_failure() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    contexts.abort("u", 0)
    assert not contexts.refused("u-1", 0)
    assert contexts.failed("u-1", "Acme: full", "full") is None


def test_a_later_utterance_is_refused_until_its_turn() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    say(contexts, "v", "Two", 0, done=True)
    assert contexts.refused("v-1", 0)
    assert contexts.due(3) == Line("v-2", "Two", last=True)
    assert contexts.refused("v-2", 3)


def test_what_was_being_said_is_not_said_again_for_want_of_room() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0)
    contexts.audio("u-1", b"1", 0.1)
    assert not contexts.refused("u-1", 0.2)


def test_when_all_is_lost_what_was_said_is_told_first() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    say(contexts, "v", "Two ", 0)
    contexts.audio("u-1", b"1", 0.1)
    contexts.done("u-1")
    contexts.audio("v-1", b"2", 0.1)
    contexts.give_up(ProviderError("Acme: gone", "gone", fatal=True))
    said = [Message("u", b"1"), Message("u", b"", True), Message("v", b"2")]
    assert drain(contexts, 1) == [*said, ProviderError("Acme: gone", "gone", "v"), Message("v", b"", True)]


# A full queue


def test_a_piece_beyond_the_limit_is_told() -> None:
    contexts = new_contexts(queue_size_limit=1)
    say(contexts, "u", "One", 0)
    contexts.post(Message("u", "Two"), 0)
    error, last = drain(contexts, 0)
    text = "Acme: 2 pieces of text wait to be spoken, and 1 may: post longer pieces, or raise queue_size_limit"
    assert error == ProviderError(text, "queue_full", "u")
    assert last == Message("u", b"", True)
    assert contexts.due(0) == Cancel("u-1")


def test_the_end_of_an_utterance_is_no_piece() -> None:
    contexts = new_contexts(queue_size_limit=1)
    say(contexts, "u", "One", 0)
    say(contexts, "u", "", 0, done=True)
    assert drain(contexts, 0) == []


def test_a_context_that_is_done_is_spoken_however_its_words_were_written() -> None:
    contexts = new_contexts(queue_size_limit=1)
    say(contexts, "u", "At 7:30. ", 0)
    contexts.words("u-1", [("At", 0.0, 0.1), ("seven", 0.1, 0.2), ("thirty", 0.2, 0.3)])
    contexts.audio("u-1", bytes(2400), 0.1)
    contexts.done("u-1")
    assert say(contexts, "u", "Bye.", 0.2) == Line("u-2", "Bye.", last=False)


# A drop


def test_after_a_drop_what_had_not_begun_is_said_again() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One ", 0)
    say(contexts, "u", "two", 0, done=True)
    contexts.disconnected(1)
    assert contexts.due(1) == Line("u-2", "One two", last=True)


def test_after_a_drop_what_cannot_be_mended_ends() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    contexts.audio("u-1", b"1", 0.1)
    contexts.disconnected(0.2)
    assert contexts.due(1) is None
    chunk, error, last = drain(contexts, 1)
    assert chunk == Message("u", b"1")
    assert isinstance(error, ProviderError)
    assert error.code == "cut_off"
    assert last == Message("u", b"", True)


def test_a_drop_in_a_pause_costs_nothing() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One moment. ", 0)
    contexts.audio("u-1", b"1", 0.1)
    contexts.disconnected(2)
    assert say(contexts, "u", "Done.", 3, done=True) == Line("u-2", "Done.", last=True)


def test_a_drop_in_a_continuation_says_only_that_again() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One moment. ", 0)
    contexts.audio("u-1", b"1", 0.1)
    say(contexts, "u", "Done.", 3, done=True)
    contexts.disconnected(3.1)
    assert contexts.due(3.2) == Line("u-3", "Done.", last=True)


def test_after_a_drop_words_that_were_not_heard_are_said_again() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One, two, three.", 0, done=True)
    contexts.words("u-1", [("One,", 0.0, 0.1), ("two,", 0.1, 0.2)])
    contexts.audio("u-1", bytes(1200), 0.1)
    contexts.disconnected(0.2)
    assert contexts.due(0.3) == Line("u-2", " two, three.", last=True)
    contexts.audio("u-2", bytes(800), 0.4)
    contexts.words("u-2", [("two,", 0.0, 0.1)])
    timings = [event for event in drain(contexts, 0.4) if isinstance(event, WordTimings)]
    assert [word for timing in timings for word in timing.words] == [Word("One,", 0, 100), Word("two,", 150, 250)]


def test_a_second_drop_in_the_same_word_ends_the_utterance() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One, two, three.", 0, done=True)
    for context_id in ("u-1", "u-2"):
        contexts.words(context_id, [("One,", 0.0, 0.1)])
        contexts.audio(context_id, bytes(400), 0.1)
        contexts.disconnected(0.2)
        contexts.due(0.3)
    *_, error, last = drain(contexts, 0.3)
    assert isinstance(error, ProviderError)
    assert (error.code, error.uuid) == ("cut_off", "u")
    assert last == Message("u", b"", True)


def test_a_drop_in_a_continuation_repeats_nothing_of_what_came_before() -> None:
    contexts = new_contexts()
    say(contexts, "u", "At 7:30. ", 0)
    contexts.audio("u-1", bytes(2400), 0.1)
    contexts.words("u-1", [("At", 0.0, 0.1), ("seven", 0.1, 0.2), ("thirty", 0.2, 0.3)])
    say(contexts, "u", "Bye now.", 3, done=True)
    contexts.audio("u-2", bytes(800), 3.1)
    contexts.words("u-2", [("Goodbye", 0.0, 0.1)])
    contexts.disconnected(3.2)
    assert contexts.due(3.3) == Line("u-3", "Bye now.", last=True)


def test_a_drop_behind_the_last_word_ends_the_utterance_well() -> None:
    contexts = new_contexts()
    say(contexts, "u", "Bye.", 0, done=True)
    contexts.audio("u-1", bytes(800), 0.1)
    contexts.words("u-1", [("Bye.", 0.0, 0.1)])
    contexts.disconnected(0.2)
    assert drain(contexts, 0.2)[-1] == Message("u", b"", True)
    assert not contexts.busy
