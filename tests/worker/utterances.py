"""A queue of utterances, without I/O, and how a test asks it."""

from typing import Any

from dialog_worker.tts.base import Speaking
from dialog_worker.tts.contexts import Cancel, Contexts, Limits, Line
from protocol.messages import Message


def new_contexts(**limits: Any) -> Contexts:
    contexts = Contexts("Acme", 8000, Limits(**{"timeout_s": 5, "idle_s": 0.7, **limits}))
    contexts.connected(0)
    return contexts


def drain(contexts: Contexts, now: float) -> list[Speaking]:
    events = []
    while event := contexts.next_event(now):
        events.append(event)
    return events


def say(contexts: Contexts, uuid: str, text: str, now: float, *, done: bool = False) -> Line | Cancel | None:
    contexts.post(Message(uuid, text, done), now)
    return contexts.due(now)
