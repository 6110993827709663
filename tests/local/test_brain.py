"""The scripted receptionist: what it understands, what it answers, and how that looks on OpenAI's wire."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import openai
import pytest
import trio

from dialog_local.brain import receptionist as brain
from dialog_local.brain.completions import Completions
from dialog_local.brain.offered import Tool
from dialog_local.brain.receptionist import GOODBYE, Call, ChatMessage, Function, Say, ToolCall, answer
from dialog_local.brain.understanding import Details, details
from dialog_local.speech.server import Speech, serve_app


def tool(name: str, *required: str, **optional: str) -> Tool:
    """A tool with these parameters, all but the `optional` required."""
    kinds = dict.fromkeys(required, "string") | optional
    return Tool(
        name, {"type": "object", "properties": {key: {"type": kinds[key]} for key in kinds}, "required": [*required]}
    )


BOOK_TABLE = tool("book_table", "people", "time")
BOOK = [BOOK_TABLE, tool("hang_up")]
LOOKUPS = [tool("todays_menu"), tool("opening_hours", day="string"), tool("free_table", "time", people="integer")]
RECEPTION = [*BOOK, *LOOKUPS, tool("transfer_to_person")]


def conversation(*texts: str) -> list[ChatMessage]:
    """User and assistant in turns, the user last."""
    roles = ["user", "assistant"] if len(texts) % 2 else ["assistant", "user"]
    return [ChatMessage("system", "You are a receptionist."), *(ChatMessage(roles[i % 2], t) for i, t in enumerate(texts))]


def booked(*more: ChatMessage) -> list[ChatMessage]:
    call = ToolCall("call_1", Function("book_table", '{"people": 4, "time": "19:30"}'))
    return [
        *conversation("A table for four at seven thirty"),
        ChatMessage("assistant", tool_calls=[call]),
        ChatMessage("tool", "Table 7 for 4 people at 19:30", tool_call_id="call_1"),
        *more,
    ]


@pytest.mark.parametrize(
    ("said", "people", "time"),
    [
        ("A table for four at seven thirty.", 4, "19:30"),
        ("I would like to book a table for two people at half-past seven, please.", 2, "19:30"),
        ("Hello! can I book a table for five at eight o'clock to-night?", 5, "20:00"),
        ("At seven p. m..", None, "19:00"),
        ("At seven p M..", None, "19:00"),
        ("at 7pm", None, "19:00"),
        ("at 7 pm for 3", 3, "19:00"),
        ("19:45 for six", 6, "19:45"),
        ("7.30 for the two of us", 2, "19:30"),
        ("quarter past eight, a couple of people", 2, "20:15"),
        ("a quarter to nine", None, "20:45"),
        ("ten past eight for twelve guests", 12, "20:10"),
        ("twenty to eight", None, "19:40"),
        ("seven thirty five for a party of ten", 10, "19:35"),
        ("eight oh five", None, "20:05"),
        ("at eleven in the morning for three", 3, "11:00"),
        ("at noon, just me", 1, "12:00"),
        ("Twenty five people at six", 25, "18:00"),
        ("a table for for at ate", 4, "20:00"),
        ("Six people.", 6, None),
        ("For three.", 3, None),
        ("four people please", 4, None),
        ("for seven thirty", None, "19:30"),
        ("for a thousand people", None, None),
        ("what a lovely day", None, None),
    ],
)
def test_people_and_time_are_found_in_what_was_said(said: str, people: int | None, time: str | None) -> None:
    assert details(said) == Details(people, time)


def test_a_lone_number_is_what_was_asked_for() -> None:
    assert details("four", wanted="people") == Details(people=4)
    assert details("Eight.", wanted="time") == Details(time="20:00")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Hello, good evening.", brain.HELLO),
        ("When are you open on Sunday?", brain.HOURS),
        ("What is on the menu?", brain.MENU),
        ("Who are you?", brain.WHO),
        ("Am I speaking to a robot? Are you a human?", brain.WHO),
        ("Hey, where are you?", brain.WHO),  # "Who are you?" as the recogniser hears the local voice
        ("I want to book a table", brain.ASK_BOTH),
        ("I want to book a table for two", brain.ASK_TIME),
        ("A table at seven please", brain.ASK_PEOPLE),
        ("Thank you bye.", brain.GOODBYE),
        ("The bay.", brain.GOODBYE),  # "Goodbye.", likewise
        ("The weather is nice", brain.NOT_UNDERSTOOD),
        ("What did you say?", brain.NOTHING_SAID),
    ],
)
def test_an_utterance_gets_its_answer(said: str, expected: str) -> None:
    assert answer(conversation(said), []) == Say(expected)


def test_without_an_utterance_it_greets() -> None:
    assert answer([ChatMessage("system", "You are a receptionist.")], BOOK) == Say(brain.HELLO)


def test_it_says_that_it_is_a_script() -> None:
    assert "script" in brain.WHO
    assert "no language model" in brain.WHO


def test_the_menu_is_long_enough_to_be_interrupted() -> None:
    assert len(brain.MENU.split()) > 45


def test_a_complete_booking_calls_the_tool() -> None:
    assert answer(conversation("A table for four at seven thirty"), BOOK) == Call(
        "book_table", {"people": 4, "time": "19:30"}
    )


def test_a_booking_is_put_together_from_several_turns() -> None:
    messages = conversation("I want a table", brain.ASK_BOTH, "Six people.", brain.ASK_TIME, "Eight.")
    assert answer(messages, BOOK) == Call("book_table", {"people": 6, "time": "20:00"})


def test_a_later_word_corrects_an_earlier_one() -> None:
    messages = conversation("a table for two", brain.ASK_TIME, "no, for three people, at eight")
    assert answer(messages, BOOK) == Call("book_table", {"people": 3, "time": "20:00"})


def test_without_the_tool_it_does_not_pretend_to_book() -> None:
    reply = answer(conversation("A table for four at seven thirty"), [])
    assert isinstance(reply, Say)
    assert "no tool to book" in reply.text


def test_the_tool_result_is_quoted() -> None:
    reply = answer(booked(), BOOK)
    assert isinstance(reply, Say)
    assert "Table 7 for 4 people at 19:30." in reply.text


def test_an_earlier_booking_is_done() -> None:
    messages = booked(ChatMessage("assistant", "Booked."), ChatMessage("user", "another table please"))
    assert answer(messages, BOOK) == Say(brain.ASK_BOTH)


def test_goodbye_hangs_up_where_that_is_possible() -> None:
    assert answer(conversation("Good-bye."), BOOK) == Call("hang_up", {}, GOODBYE)


def test_after_hanging_up_it_says_goodbye() -> None:
    call = ToolCall("call_1", Function("hang_up", "{}"))
    messages = [ChatMessage("assistant", tool_calls=[call]), ChatMessage("tool", "ok", tool_call_id="call_1")]
    assert answer([*conversation("bye"), *messages], BOOK) == Say(brain.GOODBYE)


def test_repeating_quotes_what_the_history_holds() -> None:
    messages = conversation("the menu please", "With pleasure, here is", "What did you say?")
    assert answer(messages, BOOK) == Say("I said: With pleasure, here is")


def test_repeating_twice_quotes_the_same() -> None:
    messages = conversation(
        "the menu please", "With pleasure,", "pardon?", "I said: With pleasure,", "Can you repeat that, please?"
    )
    assert answer(messages, BOOK) == Say("I said: With pleasure,")


# The tools that are offered


def after(name: str, result: str, *said: str) -> list[ChatMessage]:
    """A conversation in which a tool has just been called."""
    call = ToolCall("call_1", Function(name, "{}"))
    return [
        *conversation(*said),
        ChatMessage("assistant", tool_calls=[call]),
        ChatMessage("tool", result, tool_call_id="call_1"),
    ]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("What is on the menu?", Call("todays_menu", {})),
        ("When are you open?", Call("opening_hours", {})),
        ("Are you open on Sundays?", Call("opening_hours", {"day": "sunday"})),
        ("Is there a table free at eight?", Call("free_table", {"time": "20:00"})),
        ("Is there a table-free for two people at eight?", Call("free_table", {"time": "20:00", "people": 2})),
        ("Do you have a table available?", Say(brain.ASK_TIME)),
        ("Can I speak to a person?", Call("transfer_to_person", {}, brain.CONNECTING)),
        ("I would like to speak a person, please.", Call("transfer_to_person", {}, brain.CONNECTING)),
        ("The operator, please.", Call("transfer_to_person", {}, brain.CONNECTING)),
        ("Am I speaking to a person?", Say(brain.WHO)),
        ("Can I get a table for one person?", Say(brain.ASK_TIME)),
    ],
)
def test_a_question_calls_the_tool_for_it(said: str, expected: Say | Call) -> None:
    assert answer(conversation(said), RECEPTION) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Is there a table free at eight?", brain.ASK_PEOPLE),
        ("Can I speak to a person?", brain.NOBODY_ELSE),
    ],
)
def test_without_a_tool_for_it_a_question_gets_what_the_script_can_do(said: str, expected: str) -> None:
    assert answer(conversation(said), BOOK) == Say(expected)


def test_tools_are_found_by_the_words_in_their_names_and_called_by_their_schema() -> None:
    offered = [Tool("appendNote"), tool("reserveSeats", "guests", "at")]
    assert answer(conversation("A table for two at eight"), offered) == Call("reserveSeats", {"guests": 2, "at": "20:00"})


def test_what_the_script_cannot_know_it_does_not_invent() -> None:
    reply = answer(conversation("A table for two at eight"), [tool("book_table", "people", "time", "phone_number")])
    assert isinstance(reply, Say)
    assert "phone number" in reply.text


def test_a_table_that_is_free_is_offered_for_booking() -> None:
    messages = after("free_table", "yes, at 20:00", "Is there a table free at eight?")
    assert answer(messages, RECEPTION) == Say(f"Yes, at 20:00. {brain.SHALL_I_BOOK}")
    messages += [ChatMessage("assistant", brain.SHALL_I_BOOK), ChatMessage("user", "Yes, for two people, please.")]
    assert answer(messages, RECEPTION) == Call("book_table", {"people": 2, "time": "20:00"})


def test_a_table_that_is_taken_is_not_offered() -> None:
    messages = after("free_table", "no, all are taken", "Is there a table free at eight?")
    assert answer(messages, RECEPTION) == Say(f"No, all are taken. {brain.ANYTHING_ELSE}")


def test_a_lookup_is_told() -> None:
    messages = after("todays_menu", "today we have soup", "the menu please")
    assert answer(messages, RECEPTION) == Say(f"Today we have soup. {brain.ANYTHING_ELSE}")


def test_an_error_is_apologised_for() -> None:
    messages = after("transfer_to_person", "error: nobody is here", "Can I speak to a person?")
    assert answer(messages, RECEPTION) == Say(f"I am sorry. Nobody is here. {brain.ANYTHING_ELSE}")


def test_nothing_else_is_a_goodbye() -> None:
    assert answer(conversation("hi", brain.ANYTHING_ELSE, "No, thank you."), RECEPTION) == Call("hang_up", {}, GOODBYE)


# A time stamp before the words


STAMP = "2026-03-01T19:30:05+00:00\n"


def test_a_stamp_is_not_taken_for_what_was_said() -> None:
    assert answer(conversation(f"{STAMP}What is on the menu?"), BOOK) == Say(brain.MENU)
    assert details(f"{STAMP}For two.") == Details(people=2)
    assert answer(conversation(f"{STAMP}Sorry?", "Hello.", f"{STAMP}What?"), BOOK) == Say("I said: Hello.")


def test_asked_for_the_time_it_reads_the_stamp() -> None:
    assert answer(conversation(f"{STAMP}What time is it?"), BOOK) == Say("It is 19:30 by the stamp on your words.")
    assert answer(conversation("What time is it?"), BOOK) == Say(brain.NO_CLOCK)


@asynccontextmanager
async def served(first_token_s: float = 0.0) -> AsyncIterator[str]:
    """The endpoint on a real socket, without speech models; gives its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_app, Speech().app(Completions(first_token_s)), listener, stop.wait)
        yield url
        stop.set()


async def test_the_openai_package_streams_a_tool_call() -> None:
    messages: list[Any] = [{"role": "user", "content": "A table for four at seven thirty"}]
    names, arguments, reasons, usage = [], "", [], []
    async with served() as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
        tools: Any = [{"type": "function", "function": msgspec.to_builtins(BOOK_TABLE)}]
        async with await client.chat.completions.create(
            model="any-name", messages=messages, tools=tools, stream=True, stream_options={"include_usage": True}
        ) as stream:
            async for chunk in stream:
                assert chunk.model == "any-name"
                usage.append(chunk.usage)
                for choice in chunk.choices:
                    reasons.append(choice.finish_reason)
                    for call in choice.delta.tool_calls or ():
                        assert call.function is not None
                        names.append(call.function.name)
                        arguments += call.function.arguments or ""
    assert json.loads(arguments) == {"people": 4, "time": "19:30"}
    assert len(names) > 2
    assert [name for name in names if name] == ["book_table"]
    assert reasons[-1] == "tool_calls"
    assert usage[-1] is not None
    assert usage[-1].total_tokens > 0


async def test_the_openai_package_streams_words() -> None:
    messages: list[Any] = [{"role": "user", "content": "When do you open?"}]
    async with (
        served() as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client,
        await client.chat.completions.create(model="m", messages=messages, stream=True) as stream,
    ):
        pieces = [choice.delta.content async for chunk in stream for choice in chunk.choices]
    assert "".join(piece or "" for piece in pieces) == brain.HOURS
    assert len(pieces) > 10


async def test_an_answer_can_be_had_in_one_piece() -> None:
    async with served() as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
        whole = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "who are you"}])
    assert whole.choices[0].message.content == brain.WHO
    assert whole.choices[0].finish_reason == "stop"


async def test_the_model_is_listed_as_a_script() -> None:
    async with served() as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as client:
        assert [model.id async for model in client.models.list()] == ["scripted-receptionist"]


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"{}", 401),
        ({"Authorization": "Basic x"}, b"{}", 401),
        ({"Authorization": "Bearer x"}, b"{not json", 400),
        ({"Authorization": "Bearer x"}, b'{"model": "m"}', 400),
        ({"Authorization": "Bearer x"}, b'{"model": "m", "messages": []}', 400),
    ],
)
async def test_a_bad_request_is_refused_in_openais_form(headers: dict[str, str], body: bytes, status: int) -> None:
    async with served() as url, httpx.AsyncClient(trust_env=False) as client:
        response = await client.post(f"{url}/v1/chat/completions", headers=headers, content=body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
