"""Telephone audio for tests: noise as loud as speech, silence, and what was understood."""

import random

from dialog_worker.stt.base import Final, Hearing

SILENT = b"\xff"  # mu-law
FRAME = 160  # bytes in 20 ms
SECOND = 8000


def speech(seconds: float, loudness: int = 0x20) -> bytes:
    """Noise as loud as speech: mu-law codes of both signs around a magnitude; 0x20 is about -17 dB of full scale."""
    chance = random.Random(7)
    return bytes(loudness + chance.randrange(16) + chance.choice((0, 128)) for _ in range(int(seconds * SECOND)))


def silence(seconds: float) -> bytes:
    return SILENT * int(seconds * SECOND)


def texts(events: list[Hearing]) -> list[str]:
    return [event.text for event in events if isinstance(event, Final)]
