"""Calls of our own before any fork: what code leaves in memory when it runs is then every worker's, and not each one's own.

The first runs of a function specialise its bytecode and fill caches; libraries import parts of themselves, and pydantic
builds its models, when they are first used. In a worker, each of these would copy pages that all workers share, and take
time while a caller waits. Only code of ours is run: nothing of the agent's author's happens before there is a call for it.
"""

import importlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dialog_worker.agent.base import Agent
from dialog_worker.main import run
from protocol.framing import encode
from protocol.messages import (
    PROTOCOL_VERSION,
    Event,
    Hello,
    Media,
    Message,
    Metadata,
    Shutdown,
    StreamingStarted,
    StreamingStopped,
)

TIMES = 10  # CPython 3.11 specialises a function's bytecode when it is run for the 8th time
CALL_ID, GENERATION = "rehearsal", "rehearsal"
_MEDIA_MS = 200
_FRAME_MS, _FRAME = 20, bytes(160)
_TALKING = ("dialog_worker.agent.openai", "dialog_worker.stt.streaming", "dialog_worker.tts.streaming")
_THREAD_S = 15.0  # trio keeps an idle thread for 10 s

BEGINNING: tuple[Event, ...] = (
    Hello(PROTOCOL_VERSION, GENERATION, CALL_ID),
    Metadata(CALL_ID, "", "", ""),
    StreamingStarted(CALL_ID),
    *(Media(at, _FRAME) for at in range(0, _MEDIA_MS, _FRAME_MS)),
)
END: tuple[Event, ...] = (StreamingStopped(CALL_ID), Shutdown(CALL_ID, 1.0))


class Echo(Agent):
    """Deals with audio itself."""

    def on_media(self, media: Media) -> None:
        """Post the audio back."""
        self.voip.post(Message(CALL_ID, media.payload))


def rehearse() -> bool:
    """Serve calls that nobody makes, with what is imported of models, ears and voices. Return whether all went well.

    When it returns, the process may fork if it might before: no thread of the rehearsal's runs, and nothing of it is open.
    """
    before = threading.enumerate()
    try:
        went_well = [_echo() for _ in range(TIMES)]
        if any(name in sys.modules for name in _TALKING):
            stage = importlib.import_module("dialog_worker.rehearsal.stage")
            went_well += [_talk(stage.Stage(number)) for number in range(stage.PLAYS)]
        if completion := sys.modules.get("dialog_worker.agent.completion"):
            completion.lay_in()
    except OSError:  # no descriptors, or no network
        return False
    for thread in threading.enumerate():  # a library may have used one
        if thread not in before:
            thread.join(_THREAD_S)
    return all(went_well)


def _echo() -> bool:
    with line() as (theirs, tell):
        tell(*END)
        return run(theirs, lambda voip: Echo(voip=voip), GENERATION, CALL_ID) == 0


def _talk(stage: Any) -> bool:
    with line() as (theirs, tell), stage.opened(tell):
        return run(theirs, stage.talker, GENERATION, CALL_ID) == 0 and not stage.missing


@contextmanager
def line() -> Iterator[tuple[socket.socket, Callable[..., None]]]:
    """Yield a worker's end of a link, on which a call has begun, and a function that has more happen in it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def tell(*events: Event) -> None:
            ours.sendall(b"".join(map(encode, events)))

        tell(*BEGINNING)
        yield theirs, tell
