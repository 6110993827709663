"""`examples/custom_agent`: a time stamp before the caller's words, a history of what was heard, a greeting to the end."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from examples.custom_agent.agent import Timekeeper
from tests.e2e.daemon import NOWHERE
from tests.examples.desk import place_call, rehearsal, remembered, serving

STAMPED = re.compile(r"(?P<stamp>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00)\n(?P<words>.+)")


async def test_on_the_phone_the_model_is_told_when_a_thing_was_said(server: str, tmp_path: Path) -> None:
    with serving("custom_agent", tmp_path, server) as dialogd:
        summary = await place_call(dialogd, server, "--say", "What time is it?")
    *_, words = remembered(summary, "user")  # the recogniser may hear the question's first word twice
    asked = STAMPED.fullmatch(words)
    assert asked is not None
    assert "time is it" in asked["words"].lower()
    asked_at = datetime.fromisoformat(asked["stamp"])
    assert abs(datetime.now(UTC) - asked_at) < timedelta(minutes=2)
    # The scripted model has no clock: it can only have read the time in what it was sent.
    greeting, *_, answer = remembered(summary, "assistant")
    assert greeting == Timekeeper.greeting
    assert answer == f"It is {asked_at:%H:%M} by the stamp on your words."
    assert summary["ended"] == "the caller hung up"


async def test_the_greeting_is_not_interrupted() -> None:
    async with rehearsal(Timekeeper) as (call, _):
        await call.until("saying")
        await call.caller_speaks()
        assert await call.next_said() == Timekeeper.greeting


async def test_the_history_has_what_was_heard_of_an_answer() -> None:
    async with rehearsal(Timekeeper) as (call, agent):
        assert await call.next_said() == Timekeeper.greeting
        await call.caller_says("What is on the menu?")
        while (saying := await call.until("saying")).text == Timekeeper.greeting:
            pass
        assert saying.text == "With pleasure: there is a soup with white beans."
        await trio.sleep(0.8)
        await call.caller_says("Thank you, bye.")
        heard = await call.next_said()
        assert await call.next_said() == "Goodbye, and thank you for calling."
    said = [entry["content"] for entry in agent.history if entry["role"] == "assistant" and entry["content"]]
    assert heard.startswith("With pleasure")
    assert "beans" not in heard
    assert said == [Timekeeper.greeting, heard, "Goodbye, and thank you for calling."]


@pytest.mark.usefixtures("quick_voice")
async def test_a_model_that_fails_is_apologised_for() -> None:
    async with rehearsal(Timekeeper, base_url=NOWHERE) as (call, agent):
        assert await call.next_said() == Timekeeper.greeting
        await call.caller_says("What time is it?")
        assert await call.next_said() == agent.apology
