"""Tasks that look at something again and again do it on the same beats: waking up costs more than most looks do."""

import math

import trio

BEAT_S = 0.25


def beat(at: float) -> float:
    """Return the first beat that is not before `at`, by trio's clock."""
    return math.ceil(at / BEAT_S) * BEAT_S


def next_beat() -> float:
    """Return the one that follows the present one."""
    return beat(trio.current_time() + BEAT_S / 2)
