"""A context at ElevenLabs, without I/O: the frames that it is told in, and the words that come back."""

from dialog_worker.tts.contexts import Line
from dialog_worker.tts.elevenlabs import Alignment, Incoming, OpenContext


def new_context() -> OpenContext:
    return OpenContext("c", {"voice_settings": {"speed": 1.1}}, 8000)


def texts(context: OpenContext, *pieces: str, last: bool = False) -> list[str]:
    frames = [frame for piece in pieces for frame in context.frames(Line("c", piece, last))]
    return [frame["text"] for frame in frames if frame.get("text", " ") != " "]


def spelled(text: str, start_ms: float, each_ms: float) -> Alignment:
    starts = tuple(start_ms + i * each_ms for i in range(len(text)))
    return Alignment(tuple(text), starts, (each_ms,) * len(text))


def test_a_context_is_initialised_once() -> None:
    context = new_context()
    first = {"text": " ", "context_id": "c", "voice_settings": {"speed": 1.1}}
    assert context.frames(Line("c", "One.", last=False)) == [first, {"text": "One. ", "context_id": "c"}]
    assert context.frames(Line("c", "Two.", last=False)) == [{"text": "Two. ", "context_id": "c"}]


def test_the_last_text_is_flushed_and_its_context_closed() -> None:
    context = new_context()
    context.frames(Line("c", "One.", last=False))
    ending = [{"context_id": "c", "flush": True}, {"context_id": "c", "close_context": True}]
    assert context.frames(Line("c", "", last=True)) == ending
    assert context.close() == []


def test_words_are_sent_whole() -> None:
    assert texts(new_context(), "Hel", "lo wor", "ld. By", "e") == ["Hello ", "world. "]


def test_a_sentence_needs_no_space_to_be_sent() -> None:
    assert texts(new_context(), "How can I help?", " Well.") == ["How can I help? ", " Well. "]


def test_a_point_after_a_digit_may_be_decimal() -> None:
    assert texts(new_context(), "It is 3.", "50 in all. ") == ["It is ", "3.50 in all. "]


def test_what_was_held_back_is_sent_at_the_end() -> None:
    context = new_context()
    assert texts(context, "Good bye") == ["Good "]
    assert texts(context, "", last=True) == ["bye "]


def heard_ms(context: OpenContext, message: Incoming) -> list[tuple[str, int, int]]:
    return [(word, round(1000 * start), round(1000 * end)) for word, start, end in context.hear(message)]


def test_words_are_timed_from_the_first_sample() -> None:
    context = new_context()
    assert heard_ms(context, Incoming(audio=bytes(800), alignment=spelled("Hi ", 10, 20))) == [("Hi", 10, 50)]
    assert heard_ms(context, Incoming(audio=bytes(800), alignment=spelled("you ", 0, 20))) == [("you", 100, 160)]


def test_a_word_may_go_on_in_the_next_frame() -> None:
    context = new_context()
    assert heard_ms(context, Incoming(audio=bytes(800), alignment=spelled("Hel", 40, 20))) == []
    assert heard_ms(context, Incoming(audio=bytes(800), alignment=spelled("lo ", 0, 20))) == [("Hello", 40, 140)]


def test_the_last_word_is_complete_when_the_context_ends() -> None:
    context = new_context()
    assert heard_ms(context, Incoming(audio=bytes(800), alignment=spelled("Hi", 0, 50))) == []
    assert heard_ms(context, Incoming(final=True)) == [("Hi", 0, 100)]


def test_the_normalised_alignment_serves_where_there_is_no_other() -> None:
    assert heard_ms(new_context(), Incoming(audio=b"a", normalized=spelled("Hi ", 0, 50))) == [("Hi", 0, 100)]
