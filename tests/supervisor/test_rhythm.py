"""Whoever looks at something again and again wakes together with the others."""

import pytest
import trio
from trio.testing import MockClock

from dialog_supervisor.rhythm import BEAT_S, beat_after, next_beat


@pytest.mark.parametrize(("at", "beat"), [(0.0, 0.25), (0.1, 0.25), (0.25, 0.5), (0.26, 0.5), (1e9 + 0.3, 1e9 + 0.5)])
def test_a_beat_is_later_than_what_it_follows(at: float, beat: float) -> None:
    assert beat_after(at) == beat


async def test_those_who_began_at_different_times_wake_at_the_same(autojump_clock: MockClock) -> None:
    woken: list[float] = []

    async def look(begins_after_s: float) -> None:
        await trio.sleep(begins_after_s)
        for _ in range(3):
            await next_beat()
            woken.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(look, number * BEAT_S / 10)
    assert sorted(set(woken)) == [beat * BEAT_S for beat in (1, 2, 3)]
    assert len(woken) == 15
