"""Two ends of a link, and Hypothesis without a stopwatch: the machine is shared, and a slow example is no wrong one."""

import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import settings

from protocol.link import Link
from protocol.messages import Command, Event

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


class Pair:
    """A supervisor's end and a worker's end; `run` of neither is running."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.supervisor: Link[Any] = Link(ours, Command)
        self.worker: Link[Any] = Link(theirs, Event)

    def close(self) -> None:
        self.supervisor.close()
        self.worker.close()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    ends = Pair()
    yield ends
    ends.close()
