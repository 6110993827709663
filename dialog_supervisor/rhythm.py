"""Tasks that look at something again and again do it on the same beats: waking up costs more than most looks do."""

import math

import trio

BEAT_S = 0.25


def beat_after(at: float) -> float:
    """Return the first beat later than `at`, by trio's clock."""
    return (math.floor(at / BEAT_S) + 1) * BEAT_S


async def next_beat() -> None:
    """Wait for it."""
    await trio.sleep_until(beat_after(trio.current_time()))
