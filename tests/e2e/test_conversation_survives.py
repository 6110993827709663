"""A conversation survives its worker, killed while it greets, answers or listens, and dialogd, killed while it answers."""

import os
import signal
import wave
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from dialog_local.call.report import words
from tests.e2e.daemon import Dialogd
from tests.examples.desk import place_call, remembered, serving, successive

GREETING = "Bella's, good evening. How can I help?"
DIALOGD = "dialogd"  # is killed, not the worker
OPEN = "We are open from Tuesday to Sunday, from noon until ten in the evening. On Mondays we are closed."
Moment = Callable[[Dialogd, str], Awaitable[object]]


async def the_call(dialogd: Dialogd) -> str:
    """Return the id of the call under way, when there is one."""
    with trio.fail_after(20):
        while not (calls := await dialogd.ask("/calls")):  # noqa: ASYNC110 - another process
            await trio.sleep(0.02)
    found: str = calls[0]["id"]
    return found


async def in_the_greeting(dialogd: Dialogd, call: str) -> None:
    await dialogd.steps(call, 1, kind="saying")
    await trio.sleep(0.9)


async def in_the_answer(dialogd: Dialogd, call: str) -> None:
    await dialogd.steps(call, 2, kind="saying")
    await trio.sleep(1.2)


async def in_the_callers_sentence(dialogd: Dialogd, call: str) -> None:
    await dialogd.steps(call, 1, kind="speech_started")
    await trio.sleep(0.4)


async def kill(dialogd: Dialogd, moment: Moment, told: list[str]) -> None:
    call = await the_call(dialogd)
    await moment(dialogd, call)
    worker = (await dialogd.ask(f"/calls/{call}"))["worker_pid"]
    os.kill(worker, signal.SIGKILL)
    await dialogd.logged(event="worker died in mid-call, and another takes over", call=call)
    told.append(call)


async def survive(server: str, directory: Path, moment: Moment) -> dict[str, Any]:
    """Place a call whose agent is killed at a moment, and return the call's summary."""
    summaries: list[dict[str, Any]] = []
    told: list[str] = []
    with serving("minimal", directory, server) as dialogd:

        async def talk() -> None:
            summaries.append(await place_call(dialogd, server, "--say", "When are you open?"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk)
            nursery.start_soon(kill, dialogd, moment, told)
    [summary] = summaries
    assert told == [summary["call"]]
    return summary


async def survive_dialogd(server: str, directory: Path) -> dict[str, Any]:
    """Place a call whose dialogd is killed in mid-answer, and followed by another. Return the call's summary."""
    summaries: list[dict[str, Any]] = []
    with wave.open(str(pause := directory / "pause.wav"), "wb") as silence:
        silence.setparams((1, 2, 8000, 0, "NONE", ""))
        silence.writeframes(bytes(2 * 4000))
    with successive("minimal", directory, server) as start:
        async with trio.open_nursery() as nursery:

            async def talk(first: Dialogd) -> None:
                asking = ("--say", "When are you open?", "--wav", str(pause))  # a caller who does not hang up in the gap
                summaries.append(await place_call(first, server, *asking, check=False))

            with start() as first:
                nursery.start_soon(talk, first)
                call = await the_call(first)
                await in_the_answer(first, call)
                await first.killed()
            with start() as second:
                await the_call(second)
                steps = await nursery.start(second.watch, call)
                while not summaries:  # noqa: ASYNC110 - another process places the call
                    await trio.sleep(0.05)
                await second.ended(call)
    [summary] = summaries
    return summary | {"history": next(step["text"] for step in reversed(steps) if step["kind"] == "history")}


@pytest.fixture(scope="module")
def survived(server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[Moment | str, dict[str, Any]]:
    """A call for each moment, all at once, because a call takes its time."""
    summaries: dict[Moment | str, dict[str, Any]] = {}

    async def one(moment: Moment) -> None:
        summaries[moment] = await survive(server, tmp_path_factory.mktemp(moment.__name__), moment)

    async def dialogd() -> None:
        summaries[DIALOGD] = await survive_dialogd(server, tmp_path_factory.mktemp("dialogd"))

    async def all_of_them() -> None:
        with trio.fail_after(90):
            async with trio.open_nursery() as nursery:
                for moment in MOMENTS:
                    nursery.start_soon(one, moment)
                nursery.start_soon(dialogd)

    trio.run(all_of_them)
    return summaries


MOMENTS: tuple[Moment, ...] = (in_the_greeting, in_the_callers_sentence, in_the_answer)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_conversation_goes_on_and_nothing_is_said_twice(
    survived: dict[Moment | str, dict[str, Any]], moment: Moment
) -> None:
    summary = survived[moment]
    assert [words(asked) for asked in remembered(summary, "user")] == [["when", "are", "you", "open"]]
    assert remembered(summary, "assistant") == [GREETING, OPEN]
    recognised = str(summary["words"]["recognised"]).lower()
    assert recognised.count("evening") == 2  # in the greeting, and in the answer
    assert recognised.count("monday") == 1


def test_a_conversation_goes_on_under_another_dialogd_with_a_word_or_two_said_twice(
    survived: dict[Moment | str, dict[str, Any]],
) -> None:
    summary = survived[DIALOGD]
    assert [words(asked) for asked in remembered(summary, "user")] == [["when", "are", "you", "open"]]
    assert remembered(summary, "assistant") == [GREETING, OPEN]
    recognised = str(summary["words"]["recognised"]).lower()
    assert recognised.count("monday") == 1
    assert len(words(recognised)) <= len(words(f"{GREETING} {OPEN}")) + 3
