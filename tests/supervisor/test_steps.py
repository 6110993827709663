"""A call's steps: told to whoever watches, from the first that is remembered to the call's end."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from dialog_supervisor.steps import STEPS_KEPT, TEXT_KEPT, Step, Steps


async def read(watching: trio.MemoryReceiveChannel[Step]) -> list[str]:
    """Return the texts of all steps until the end."""
    return [step.text async for step in watching]


async def test_a_step_has_its_time_since_the_call_began(autojump_clock: MockClock) -> None:
    steps = Steps()
    await trio.sleep(1.5)
    steps.add("tool", "book_table", {"people": "4"})
    assert await steps.watch().receive() == Step(1.5, "tool", "book_table", {"people": "4"})


async def test_who_comes_late_is_told_what_was_before() -> None:
    steps = Steps()
    steps.add("said", "before")
    watching = steps.watch()
    steps.add("said", "after")
    steps.close()
    assert await read(watching) == ["before", "after"]


async def test_everyone_is_told_everything() -> None:
    steps = Steps()
    watchers = [steps.watch() for _ in range(3)]
    steps.add("said", "hello")
    steps.close()
    assert [await read(watching) for watching in watchers] == [["hello"]] * 3


async def test_only_the_last_steps_are_remembered() -> None:
    steps = Steps()
    for number in range(STEPS_KEPT + 10):
        steps.add("said", str(number))
    watching = steps.watch()
    steps.close()
    assert await read(watching) == [str(number) for number in range(10, STEPS_KEPT + 10)]


async def test_who_waits_for_a_step_is_told_of_the_calls_end(nursery: trio.Nursery) -> None:
    steps = Steps()
    watching = steps.watch()
    nursery.start_soon(read, watching)
    await wait_all_tasks_blocked()
    steps.close()
    with pytest.raises(trio.EndOfChannel):
        await watching.receive()


async def test_who_does_not_read_is_told_no_more_and_holds_up_nobody() -> None:
    steps = Steps()
    asleep, awake = steps.watch(), steps.watch()
    heard = 0
    for number in range(3000):
        steps.add("said", str(number))
        heard += int(awake.receive_nowait().text == str(number))
    assert heard == 3000
    assert len(await read(asleep)) < 3000


async def test_who_has_gone_is_forgotten() -> None:
    steps = Steps()
    gone = steps.watch()
    gone.close()
    steps.add("said", "hello")
    steps.close()
    assert steps._watchers == set()


async def test_long_texts_are_remembered_only_as_far_as_memory_allows() -> None:
    steps = Steps()
    for number in range(10):
        steps.add("said", f"{number}" + "x" * (TEXT_KEPT // 4))
    watching = steps.watch()
    steps.close()
    assert [text[0] for text in await read(watching)] == ["7", "8", "9"]


async def test_the_last_step_is_remembered_however_long() -> None:
    steps = Steps()
    steps.add("said", "before")
    steps.add("history", "x" * (2 * TEXT_KEPT))
    watching = steps.watch()
    steps.close()
    assert [len(text) for text in await read(watching)] == [2 * TEXT_KEPT]
