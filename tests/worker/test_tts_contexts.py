"""The queue of utterances before a provider that speaks in contexts: their order, pieces, pauses and words."""

from dialog_worker.participant import Word
from dialog_worker.tts.base import WordTimings
from dialog_worker.tts.contexts import AGAIN_SHARE, Cancel, Line
from protocol.messages import Message

from .utterances import drain, new_contexts, say


def test_pieces_share_a_context_and_the_last_closes_it() -> None:
    contexts = new_contexts()
    assert say(contexts, "u", "Hello, ", 0) == Line("u-1", "Hello, ", last=False)
    assert say(contexts, "u", "you.", 0) == Line("u-1", "you.", last=False)
    assert say(contexts, "u", "", 0, done=True) == Line("u-1", "", last=True)
    assert contexts.due(0) is None


def test_pieces_that_wait_are_sent_as_one() -> None:
    contexts = new_contexts()
    contexts.post(Message("u", "Hello, "), 0)
    contexts.post(Message("u", "you.", True), 0)
    assert contexts.due(0) == Line("u-1", "Hello, you.", last=True)


def test_an_utterance_ends_when_its_context_does() -> None:
    contexts = new_contexts()
    say(contexts, "u", "Hi", 0, done=True)
    contexts.audio("u-1", b"aa", 0.1)
    assert drain(contexts, 0.1) == [Message("u", b"aa")]
    contexts.done("u-1")
    assert drain(contexts, 0.2) == [Message("u", b"", True)]
    assert not contexts.busy


def test_an_utterance_without_text_ends_at_once() -> None:
    contexts = new_contexts()
    assert say(contexts, "u", " ", 0, done=True) is None
    assert drain(contexts, 0) == [Message("u", b"", True)]


def test_a_piece_after_a_pause_gets_a_context_of_its_own() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One moment. ", 0)
    contexts.audio("u-1", bytes(4000), 0.1)
    assert say(contexts, "u", "Done.", 2, done=True) == Line("u-2", "Done.", last=True)
    contexts.audio("u-2", bytes(800), 2.1)
    contexts.words("u-2", [("Done.", 0.0, 0.1)])
    contexts.audio("u-1", b"late", 2.2)
    contexts.done("u-2")
    events = drain(contexts, 3)
    assert WordTimings("u", (Word("Done.", 500, 600),)) in events
    assert b"".join(event.data for event in events if isinstance(event, Message)) == bytes(4800)
    assert events[-1] == Message("u", b"", True)


def test_a_context_that_the_provider_ended_is_not_used_again() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One moment. ", 0)
    contexts.audio("u-1", b"a", 0.1)
    contexts.done("u-1")
    assert say(contexts, "u", "Done.", 0.2) == Line("u-2", "Done.", last=False)


def test_a_context_awaiting_audio_is_not_idle() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One. ", 0)
    contexts.audio("u-1", b"a", 0.1)
    say(contexts, "u", "Two. ", 0.2)
    assert say(contexts, "u", "Three.", 3) == Line("u-1", "Three.", last=False)


def test_the_end_of_a_paused_utterance_waits_only_shortly() -> None:
    contexts = new_contexts()
    say(contexts, "u", "Bye.", 0)
    contexts.audio("u-1", b"a", 0.1)
    assert say(contexts, "u", "", 2, done=True) == Line("u-1", "", last=True)
    assert drain(contexts, 2) == [Message("u", b"a")]
    assert contexts.deadline() == 3
    assert drain(contexts, 3) == [Message("u", b"", True)]


def test_an_error_for_closing_a_context_that_was_over_is_no_error() -> None:
    contexts = new_contexts()
    say(contexts, "u", "Bye.", 0)
    contexts.audio("u-1", b"a", 0.1)
    say(contexts, "u", "", 2, done=True)
    assert contexts.failed("u-1", "no such context", "expired") is None
    assert drain(contexts, 2) == [Message("u", b"a"), Message("u", b"", True)]


def test_the_second_utterance_is_held_until_the_first_is_done() -> None:
    contexts = new_contexts()
    assert say(contexts, "u", "One", 0, done=True) == Line("u-1", "One", last=True)
    assert say(contexts, "v", "Two", 0, done=True) == Line("v-1", "Two", last=True)
    contexts.audio("v-1", b"2", 0.1)
    contexts.done("v-1")
    contexts.audio("u-1", b"1", 0.2)
    assert drain(contexts, 0.2) == [Message("u", b"1")]
    contexts.done("u-1")
    assert drain(contexts, 0.3) == [Message("u", b"", True), Message("v", b"2"), Message("v", b"", True)]


def test_no_more_than_two_utterances_are_generated_at_a_time() -> None:
    contexts = new_contexts()
    for uuid in "uvw":
        contexts.post(Message(uuid, uuid, True), 0)
    assert [contexts.due(0) for _ in range(3)] == [Line("u-1", "u", True), Line("v-1", "v", True), None]
    contexts.done("u-1")
    drain(contexts, 1)
    assert contexts.due(1) == Line("w-1", "w", True)


def test_nothing_follows_an_abort() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0)
    contexts.audio("u-1", b"1", 0.1)
    contexts.abort("u", 0.2)
    assert contexts.due(0.2) == Cancel("u-1")
    contexts.audio("u-1", b"late", 0.3)
    contexts.words("u-1", [("late", 0, 1)])
    assert say(contexts, "u", "more", 0.4) is None
    assert say(contexts, "u", "", 0.4, done=True) is None
    assert drain(contexts, 10) == []


def test_unknown_utterances_may_be_aborted() -> None:
    contexts = new_contexts()
    contexts.abort("who", 0)
    assert say(contexts, "who", "me", 0) == Line("who-1", "me", last=False)


def test_the_next_utterance_is_heard_after_an_abort() -> None:
    contexts = new_contexts()
    say(contexts, "u", "One", 0, done=True)
    say(contexts, "v", "Two", 0, done=True)
    contexts.audio("v-1", b"2", 4)
    contexts.abort("u", 8)
    assert drain(contexts, 8) == [Message("v", b"2")]
    assert contexts.deadline() == 13


def test_no_context_is_opened_where_there_is_no_room() -> None:
    contexts = new_contexts()
    contexts.post(Message("u", "One", True), 0)
    assert contexts.due(0, may_open=False) is None
    assert contexts.due(0) == Line("u-1", "One", last=True)


def test_words_wait_for_their_audio() -> None:
    contexts = new_contexts()
    say(contexts, "u", "Hi you", 0, done=True)
    contexts.words("u-1", [("Hi", 0.0, 0.1), ("you", 0.1, 0.3)])
    assert drain(contexts, 0) == []
    contexts.audio("u-1", bytes(800), 0.1)
    assert drain(contexts, 0.1) == [Message("u", bytes(800)), WordTimings("u", (Word("Hi", 0, 100),))]


def test_words_that_are_timed_beyond_the_last_audio_end_with_it() -> None:
    contexts = new_contexts()
    say(contexts, "u", "Hi you", 0, done=True)
    contexts.audio("u-1", bytes(800), 0.1)
    contexts.words("u-1", [("Hi", 0.0, 0.3), ("you", 0.3, 0.6)])
    contexts.done("u-1")
    timings = WordTimings("u", (Word("Hi", 0, 100), Word("you", 100, 100)))
    assert drain(contexts, 0.2) == [Message("u", bytes(800)), timings, Message("u", b"", True)]


def test_a_provider_in_the_middle_of_its_text_is_not_taken_for_idle() -> None:
    contexts = new_contexts()
    text = "We are open from noon to eleven every day but Monday. "
    say(contexts, "u", text, 0)
    contexts.words("u-1", [("We", 0.0, 0.1)])
    contexts.audio("u-1", bytes(800), 0.1)
    assert say(contexts, "u", "Bye.", 2, done=True) == Line("u-1", "Bye.", last=True)
    assert contexts.deadline() == 7


def test_after_one_silence_the_next_is_shorter_until_the_voice_is_heard_again() -> None:
    contexts = new_contexts()
    contexts.connected(0)
    say(contexts, "u", "Hi.", 0, done=True)
    assert contexts.deadline() == 5
    drain(contexts, 5)
    contexts.disconnected(5)
    contexts.connected(10)
    say(contexts, "v", "Hi.", 10, done=True)
    assert contexts.deadline() == 10 + AGAIN_SHARE * 5
    contexts.audio("v-1", b"a", 11)
    assert contexts.deadline() == 11 + 5
