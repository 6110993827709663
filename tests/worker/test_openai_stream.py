"""A model's stream, without I/O: sentences as they end, and a response put together from its pieces."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from dialog_worker.agent.completion import Answer, Sentences, ToolCall


def sentences(*pieces: str) -> list[str]:
    """Return what is cut off as the pieces come, and the rest."""
    cutter = Sentences()
    complete = [sentence for piece in pieces for sentence in cutter.feed(piece)]
    return [*complete, cutter.rest()]


# Sentences


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("Good evening. How can I help?", ["Good evening. ", "How can I help?"]),
        ("How are you? Fine, thanks! Good.", ["How are you? ", "Fine, thanks! ", "Good."]),
        ('She said "no way." Then she left.', ['She said "no way." ', "Then she left."]),
        ("Let me see… Here it is.", ["Let me see… ", "Here it is."]),
        ("First line\nSecond line", ["First line\n", "Second line"]),
        ("您好，欢迎光临本店。请问几位？", ["您好，欢迎光临本店。", "请问几位？"]),
        ("It costs 3.50 in all, at v1.2.3.", ["It costs 3.50 in all, at v1.2.3."]),
        ("Dr. Smith is in. Come.", ["Dr. Smith is in. ", "Come."]),
        ("1. Soup", ["1. Soup"]),
        ("Yes. Of course. Bye.", ["Yes. Of course. ", "Bye."]),
    ],
)
def test_a_text_is_cut_where_its_sentences_end(text: str, cut: list[str]) -> None:
    assert [piece for piece in sentences(text) if piece] == [piece for piece in cut if piece]


def test_a_sentence_is_complete_when_a_space_follows_it() -> None:
    cutter = Sentences()
    assert cutter.feed("Good evening.") == []
    assert cutter.feed(" ") == ["Good evening. "]


def test_a_full_stop_within_a_number_that_comes_in_pieces_is_no_end() -> None:
    assert sentences("That will be 12.", "50 euros.") == ["That will be 12.50 euros."]


def test_the_rest_is_given_out_once() -> None:
    cutter = Sentences()
    cutter.feed("Good evening")
    assert cutter.rest() == "Good evening"
    assert cutter.rest() == ""


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("ab .!?…\n\"')。"), max_size=12), max_size=12))
def test_no_character_is_lost_or_changed(pieces: list[str]) -> None:
    assert "".join(sentences(*pieces)) == "".join(pieces)


# A response


def chunk(delta: dict[str, Any] | None = None, finish_reason: str | None = None) -> ChatCompletionChunk:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return ChatCompletionChunk.model_validate(
        {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": choices}
    )


def call(index: int, arguments: str | None = None, *, id_: str | None = None, name: str | None = None) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": index, "id": id_, "type": "function", "function": function}]}


def test_text_is_returned_as_it_comes() -> None:
    answer = Answer()
    chunks = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
        chunk({}, "stop"),
    ]
    assert [answer.feed(one) for one in chunks] == ["", "Hel", "lo", ""]
    assert answer.finish_reason == "stop"
    assert answer.tool_calls == []


def test_a_chunk_without_choices_says_nothing() -> None:
    answer = Answer()
    assert answer.feed(chunk()) == ""
    assert answer.finish_reason is None


def test_a_content_of_null_is_no_text() -> None:
    assert Answer().feed(chunk({"content": None})) == ""


def test_a_tool_call_is_put_together_from_its_pieces() -> None:
    answer = Answer()
    for delta in (call(0, "", id_="call_1", name="book"), call(0, '{"peo'), call(0, 'ple": 4}')):
        assert answer.feed(chunk(delta)) == ""
    answer.feed(chunk({}, "tool_calls"))
    assert answer.tool_calls == [ToolCall("call_1", "book", '{"people": 4}')]


def test_several_tool_calls_may_be_interleaved() -> None:
    answer = Answer()
    for delta in (call(0, "{", id_="a", name="one"), call(1, "[", id_="b", name="two"), call(0, "}"), call(1, "]")):
        answer.feed(chunk(delta))
    answer.feed(chunk({}, "tool_calls"))
    assert answer.tool_calls == [ToolCall("a", "one", "{}"), ToolCall("b", "two", "[]")]


def test_a_server_that_repeats_id_and_name_changes_nothing() -> None:
    answer = Answer()
    for arguments in ("{", "}"):
        answer.feed(chunk(call(0, arguments, id_="a", name="one")))
    answer.feed(chunk({}, "tool_calls"))
    assert answer.tool_calls == [ToolCall("a", "one", "{}")]


def test_a_server_that_sends_a_whole_call_at_once_is_understood() -> None:
    answer = Answer()
    answer.feed(chunk(call(0, "{}", id_="a", name="one"), "stop"))
    assert answer.tool_calls == [ToolCall("a", "one", "{}")]


def test_calls_of_a_response_that_did_not_end_are_not_made() -> None:
    answer = Answer()
    answer.feed(chunk(call(0, '{"people": 4}', id_="a", name="book")))
    assert answer.tool_calls == []


def test_text_and_calls_may_come_in_one_response() -> None:
    answer = Answer()
    assert answer.feed(chunk({"content": "One moment."})) == "One moment."
    answer.feed(chunk(call(0, "{}", id_="a", name="look"), "tool_calls"))
    assert [one.name for one in answer.tool_calls] == ["look"]


def test_a_tool_call_has_the_form_of_the_history() -> None:
    assert ToolCall("a", "one", "{}").as_message() == {
        "id": "a",
        "type": "function",
        "function": {"name": "one", "arguments": "{}"},
    }
