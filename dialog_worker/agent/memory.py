"""What an OpenAI agent must not forget when its worker dies: the conversation, and what was just being said. No I/O."""

from typing import Any

import msgspec
from msgspec import Struct

from dialog_worker.agent.utterance import heard_text
from dialog_worker.participant import Word

LOST_RESULT = "error: the result was lost; find out whether it was done before you do it again"


class Saying(Struct, frozen=True):
    """An utterance under way: its place in the history, its text so far, and when its words are said."""

    uuid: str
    entry: int
    text: str
    words: tuple[Word, ...] = ()

    def voiced(self, ms: int) -> str:
        """Return what of its text is said in so many ms; a word that is cut is not."""
        return heard_text(self.text, list(self.words), ms, share=1.0)

    def rest(self, ms: int) -> str:
        """Return what is still to be said after that."""
        voiced = self.voiced(ms)
        return self.text[self.text.find(voiced) + len(voiced) :].strip()


class Memory(Struct, frozen=True):
    """The state of a conversation, as a checkpoint has it."""

    history: list[dict[str, Any]] = []
    saying: tuple[Saying, ...] = ()

    def encode(self) -> bytes:
        """Return it as bytes."""
        return msgspec.msgpack.encode(self)


def recall(checkpoint: bytes) -> Memory:
    """Return what a checkpoint has, nothing for none. Raises `msgspec.DecodeError` for one of another kind."""
    return msgspec.msgpack.decode(checkpoint, type=Memory) if checkpoint else Memory()


def with_every_result(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a history in which each tool call has a result: those that a worker took along to its end are said to be lost.

    A model refuses a call without one, and calling the tool again might book the table twice.
    """
    answered = {entry.get("tool_call_id") for entry in history if entry["role"] == "tool"}
    complete: list[dict[str, Any]] = []
    for entry in history:
        complete.append(entry)
        for call in entry.get("tool_calls") or ():
            if call["id"] not in answered:
                complete.append({"role": "tool", "tool_call_id": call["id"], "content": LOST_RESULT})
    return complete
