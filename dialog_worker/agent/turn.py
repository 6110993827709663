"""One inference under way: whether it was cut short or failed, and how long the caller waited for its first word."""

import math

import trio

from dialog_worker.agent.utterance import Utterance
from protocol import messages
from protocol.messages import Message

_MS = 1000


class Question:
    """Something that the caller said, and when that was known: the moment from which a caller waits for an answer."""

    def __init__(self, message: Message[str]) -> None:
        self.message = message
        self.asked_at = trio.current_time()


class Turn:
    """One inference under way. `aborted`: the caller has begun to speak again, and what it says now is not heard."""

    def __init__(self, scope: trio.CancelScope, asked_at: float) -> None:
        self.scope = scope
        self.aborted = False
        self.failed = False
        self._asked_at = asked_at
        self._began_at = trio.current_time()
        self._utterances: list[Utterance] = []

    def answers_with(self, utterance: Utterance) -> None:
        """The answer, or a part of it, is being said."""
        self._utterances.append(utterance)

    def report(self, *, complete: bool) -> messages.Turn:
        """Return what the supervisor is told of it. Not `complete`: the call ended before the inference did."""
        written_at = min((one.written_at for one in self._utterances), default=math.inf)
        voiced_at = min((one.voiced_at for one in self._utterances), default=math.inf)
        cut = self.aborted or (not complete and voiced_at == math.inf)
        return messages.Turn(
            "failed" if self.failed else "interrupted" if cut else "answered",
            delay_ms=_ms(voiced_at - self._asked_at),
            queued_ms=_ms(self._began_at - self._asked_at),
            thinking_ms=_ms(written_at - self._began_at),
            voicing_ms=_ms(voiced_at - written_at) if written_at < math.inf else None,
        )


def _ms(seconds: float) -> int | None:
    return max(0, round(seconds * _MS)) if seconds < math.inf else None
