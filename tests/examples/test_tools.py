"""`examples/tools`: lookups, a booking that is not left half done, transfers granted and refused, and the hang-up."""

from pathlib import Path

import pytest
import trio

from dialog_local.call.script import read_script
from dialog_worker import Dtmf, testing
from examples.tools.agent import NOBODY, PERSON, Receptionist
from protocol.messages import Failure, Hangup, TransferTo
from tests.examples.desk import EXAMPLES, place_call, rehearsal, remembered, serving, tool_calls

REFUSED = Failure("refused", "the number is not in [transfer] allow")
SORRY = f"I am sorry, {NOBODY}."


@pytest.fixture(autouse=True)
def quick_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say everything quickly, where a test does not ask for the usual pace."""
    monkeypatch.setattr(testing, "CHARACTER_S", 0.001)


async def test_on_the_phone_it_looks_up_a_table_and_connects_a_person(server: str, tmp_path: Path) -> None:
    with serving("tools", tmp_path, server) as dialogd:
        spoken = ["--say", "Is there a table free at eight?", "--say", "Can I speak to a person?"]
        summary = await place_call(dialogd, server, *spoken)
    assert tool_calls(summary) == [("free_table", {"time": "20:00"}), ("transfer_to_person", {})], summary
    assert remembered(summary, "tool") == ["yes, a table is free at 20:00", "the caller is being connected"]
    assert "Yes, a table is free at 20:00." in " ".join(remembered(summary, "assistant"))
    assert summary["ended"] == f"the call was handed on to {PERSON}"


async def test_the_conversation_of_the_demo_calls_every_kind_of_tool() -> None:
    async with rehearsal(Receptionist) as (call, _):
        assert await call.next_said() == Receptionist.greeting
        for line in read_script(EXAMPLES / "tools" / "conversation.txt").lines:
            await call.caller_says(line.value)
            await call.next_said()
            await call.until("tool")
            while call.requests == [] and not call.said[-1].endswith((".", "?")):
                await call.next_said()
    called = [trace.fields["name"] for trace in call.traces if trace.kind == "tool"]
    assert called == ["todays_menu", "free_table", "book_table", "transfer_to_person"]
    assert [request.destination for request in call.requests if isinstance(request, TransferTo)] == [PERSON]


async def test_a_refused_transfer_is_apologised_for() -> None:
    async with rehearsal(Receptionist) as (call, _):
        assert await call.next_said() == Receptionist.greeting
        call.failure = REFUSED
        await call.caller_says("Can I speak to a person?")
        assert await call.next_said() == "One moment, I will connect you."
        assert (await call.until("tool")).fields["result"] == f"error: {NOBODY}"
        assert await call.next_said() == "I am sorry. Nobody can take your call at the moment. Anything else?"


async def test_the_key_0_connects_a_person_and_stops_what_is_being_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "CHARACTER_S", 1 / 15)
    async with rehearsal(Receptionist) as (call, agent):
        assert await call.next_said() == agent.greeting
        await call.caller_says("What is on the menu?")
        while not (await call.until("saying")).text.startswith("Today we have"):
            pass
        await trio.sleep(0.8)
        await call.tell(Dtmf("0"))
        while not (heard := await call.next_said()):
            pass
        assert heard.startswith("Today we")
        assert "tiramisu" not in heard
    assert isinstance(call.requests[0], TransferTo)


async def test_the_key_0_is_apologised_for_when_nobody_can_be_reached() -> None:
    async with rehearsal(Receptionist) as (call, agent):
        assert await call.next_said() == agent.greeting
        call.failure = REFUSED
        await call.tell(Dtmf("0"))
        assert await call.next_said() == SORRY


async def test_another_key_does_nothing() -> None:
    async with rehearsal(Receptionist) as (call, agent):
        assert await call.next_said() == agent.greeting
        await call.tell(Dtmf("5"))
        await call.caller_says("Thank you, bye.")
        await call.next_said()
        await call.until("tool")
    assert [type(request) for request in call.requests] == [Hangup]


async def test_a_caller_who_speaks_during_a_booking_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rehearsal(Receptionist) as (call, agent):
        asked, answer = trio.Event(), trio.Event()
        look_up = agent.restaurant.free_seats

        async def slowly(time: str) -> int:
            asked.set()
            await answer.wait()
            return await look_up(time)

        monkeypatch.setattr(agent.restaurant, "free_seats", slowly)
        await call.caller_says("A table for two at eight, please.")
        await asked.wait()
        await call.caller_speaks()
        answer.set()
        assert (await call.until("tool")).fields["result"] == "booked: a table for 2 at 20:00"
        assert await look_up("20:00") == 2


@pytest.mark.parametrize(
    ("tool", "arguments", "result"),
    [
        ("opening_hours", "{}", "on Mondays we are closed, else open from noon until ten in the evening"),
        ("opening_hours", '{"day": "monday"}', "on Monday we are closed"),
        ("free_table", '{"time": "21:30"}', "no, all tables are taken at 21:30"),
        ("book_table", '{"people": 9, "time": "19:30"}', "error: there is no table for 9 at 19:30"),
    ],
)
async def test_a_lookup_has_its_answer(tool: str, arguments: str, result: str) -> None:
    async with rehearsal(Receptionist) as (call, agent):
        await call.next_said()
        assert await agent.tools[tool].call(arguments) == result
