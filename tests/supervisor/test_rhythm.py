"""Whoever looks at something again and again wakes together with the others."""

import pytest
import trio
from trio.testing import MockClock

from dialog_supervisor.rhythm import BEAT_S, beat, next_beat


@pytest.mark.parametrize(("at", "first"), [(0.0, 0.0), (0.1, 0.25), (0.25, 0.25), (0.26, 0.5), (1e9 + 0.3, 1e9 + 0.5)])
def test_a_beat_is_not_before_what_is_due(at: float, first: float) -> None:
    assert beat(at) == first


async def test_those_who_began_at_different_times_wake_at_the_same(autojump_clock: MockClock) -> None:
    woken: list[float] = []

    async def look(begins_at: float) -> None:
        await trio.sleep(begins_at)
        for _ in range(3):
            await trio.sleep_until(next_beat())
            woken.append(trio.current_time())
            await trio.sleep(BEAT_S / 10)  # what the look itself takes

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(look, BEAT_S * (1 + number / 10))
    assert len(woken) == 15
    assert sorted(set(woken)) == [number * BEAT_S for number in (2, 3, 4)]


async def test_whoever_looks_less_often_wakes_on_the_beats_too(autojump_clock: MockClock) -> None:
    await trio.sleep(BEAT_S / 10)
    assert next_beat(1.0) == 1.0
