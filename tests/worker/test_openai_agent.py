"""How the agent thinks with a chat-completions model, over a real connection to a scripted one."""

import json

import pytest
import trio

from dialog_worker import OpenAIAgent
from dialog_worker.testing import scripted_call

from .desk import Desk, Receptionist, spoken
from .model_server import model_server, text, tool_call


async def test_the_answer_is_said_sentence_by_sentence() -> None:
    async with model_server() as server:
        server.scripts = [text("Good ", "day. ", 0.2, "How ", "are you?")]
        async with scripted_call(desk := Desk(server)) as call:
            await call.caller_says("hello")
            assert (await call.until("saying")).text == "Good day."
            assert await call.next_said() == "Good day. How are you?"
        assert server.requests[0]["messages"] == [
            {"role": "system", "content": "You answer the phone."},
            {"role": "user", "content": "hello"},
        ]
        assert spoken(desk.agent.history) == [("user", "hello"), ("assistant", "Good day. How are you?")]


async def test_a_greeting_is_said_first_and_remembered() -> None:
    async with model_server() as server:
        server.scripts = [text("Yes.")]

        class Greeter(Receptionist):
            greeting = "Hello!"

        async with scripted_call(lambda voip, stt, tts: Greeter(voip=voip, stt=stt, tts=tts, url=server.url)) as call:
            assert await call.next_said() == "Hello!"
            await call.caller_says("are you there")
            assert await call.next_said() == "Yes."
        assert spoken(server.requests[0]["messages"])[1:] == [("assistant", "Hello!"), ("user", "are you there")]


async def test_a_tool_is_called_with_typed_arguments_and_its_result_goes_back() -> None:
    async with model_server() as server:
        server.scripts = [tool_call("book_table", '{"people": 4,', ' "time": "19:30"}'), text("It is booked.")]
        async with scripted_call(desk := Desk(server)) as call:
            await call.caller_says("a table for four at half past seven")
            assert await call.next_said() == ""
            assert await call.next_said() == "It is booked."
        assert desk.agent.booked == [(4, "19:30")]
        result = server.requests[1]["messages"][-1]
        assert result == {"role": "tool", "tool_call_id": "call_1", "content": "booked for 4 at 19:30"}
        described = server.requests[0]["tools"][0]["function"]
        assert described["name"] == "book_table"
        assert described["parameters"]["required"] == ["people", "time"]


async def test_several_rounds_of_tools_lead_to_one_answer() -> None:
    async with model_server() as server:
        server.scripts = [
            tool_call("slow", "{}", said="One moment. "),
            tool_call("book_table", '{"people":2,"time":"20:00"}'),
            text("Done."),
        ]
        async with scripted_call(desk := Desk(server)) as call:
            await call.caller_says("book it")
            assert {await call.next_said() for _ in range(3)} == {"One moment.", "", "Done."}
        roles = [entry["role"] for entry in desk.agent.history]
        assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]


async def test_unusable_arguments_are_told_to_the_model() -> None:
    async with model_server() as server:
        server.scripts = [tool_call("book_table", '{"people": "many"}'), text("How many?")]
        async with scripted_call(desk := Desk(server)) as call:
            await call.caller_says("book it")
            await call.next_said()
            await call.next_said()
        assert "unusable arguments" in server.requests[1]["messages"][-1]["content"]
        assert desk.agent.booked == []


async def test_an_interruption_stops_the_model_and_the_history_holds_what_was_heard() -> None:
    async with model_server() as server:
        server.scripts = [text("One two three four five six seven. ", 5.0, "Eight nine ten."), text("Well.")]
        async with scripted_call(desk := Desk(server)) as call:
            await call.caller_says("count")
            await call.until("saying")
            await trio.sleep(0.8)
            await call.caller_speaks()
            heard = await call.next_said()
            assert heard.startswith("One two")
            assert "seven" not in heard
            await call.caller_says("enough")
            assert await call.next_said() == "Well."
        assert spoken(server.requests[1]["messages"]) == [
            ("system", "You answer the phone."),
            ("user", "count"),
            ("assistant", heard),
            ("user", "enough"),
        ]
        assert spoken(desk.agent.history)[-1] == ("assistant", "Well.")


async def test_an_interruption_before_the_first_word_leaves_no_answer_in_the_history() -> None:
    async with model_server() as server:
        server.scripts = [text(5.0, "Too late."), text("Yes.")]
        async with scripted_call(Desk(server)) as call:
            await call.caller_says("a table")
            await trio.sleep(0.3)
            await call.caller_says("for four")
            while await call.next_said() != "Yes.":
                pass
        assert spoken(server.requests[1]["messages"])[1:] == [("user", "a table"), ("user", "for four")]


async def test_a_tool_under_way_is_finished_although_the_caller_interrupts() -> None:
    async with model_server() as server:
        server.scripts = [tool_call("slow", "{}"), text("Yes.")]
        async with scripted_call(desk := Desk(server)) as call:
            await call.caller_says("do it")
            await trio.sleep(0.2)
            await call.caller_says("quickly")
            while await call.next_said() != "Yes.":
                pass
        assert [entry["role"] for entry in server.requests[1]["messages"]] == ["system", "user", "assistant", "tool", "user"]
        assert desk.agent.history[2]["content"] == "done"


async def test_the_history_is_told_at_the_end() -> None:
    async with model_server() as server:
        server.scripts = [text("Yes.")]
        async with scripted_call(Desk(server)) as call:
            await call.caller_says("hello")
            await call.next_said()
        told = json.loads(call.traces[-1].text)
        assert call.traces[-1].kind == "history"
        assert spoken(told) == [("user", "hello"), ("assistant", "Yes.")]


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        OpenAIAgent(voip=None, stt=None, tts=None, model="m")  # type: ignore[arg-type]  # never gets that far
