"""Tasks that look at something again and again do it on the same beats: waking up costs more than most looks do."""

import math

import trio

BEAT_S = 0.25


def beat(at: float) -> float:
    """Return the first beat that is not before `at`, by trio's clock."""
    return math.ceil(at / BEAT_S) * BEAT_S


def next_beat(after_s: float = BEAT_S) -> float:
    """Return the one that comes so much later than the present one."""
    return beat(trio.current_time() + after_s - BEAT_S / 2)  # whoever is woken by a beat is a little late
