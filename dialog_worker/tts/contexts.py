"""Utterances on their way through a provider that speaks in contexts: what to send it next, and what to tell the agent.

No I/O here. Utterances are said in the order in which they came; a second one may be generated while the first is said,
and is held until then. Times are a monotonic clock's seconds, given by the caller.
"""

import math
from collections import deque

from msgspec import Struct

from dialog_worker.participant import ProviderError, Word
from dialog_worker.tts.base import Speaking, WordTimings
from protocol.messages import Message

AHEAD = 2  # utterances with a context at a time: providers count and sell active contexts
CLOSING_S = 1.0  # for a context that is probably over to say so


class Line(Struct, frozen=True):
    """Text for a context; `last` closes it."""

    context_id: str
    text: str
    last: bool


class Cancel(Struct, frozen=True):
    """A context whose speech nobody wants any more."""

    context_id: str


class Utterance:
    """One utterance: its text so far, how much of it a provider has, and what came back."""

    def __init__(self, uuid: str, now: float) -> None:
        self.uuid = uuid
        self.pieces: list[str] = []
        self.complete = False  # its text is all here
        self.finished = False  # its audio is all here, or will never be
        self.sent = 0  # pieces
        self.closed = False  # the provider knows that the text is complete
        self.closing_at = math.inf  # when a context that was probably over was closed
        self.context: Context | None = None
        self.contexts = 0
        self.received = 0  # bytes of audio
        self.touched_at = now
        self.held: deque[Speaking] = deque()

    def unsent(self) -> str:
        """The text that the provider does not have."""
        return "".join(self.pieces[self.sent :])

    def is_pending(self) -> bool:
        """Whether the provider has yet to be told something."""
        return not self.finished and (self.sent < len(self.pieces) or (self.complete and not self.closed))

    def is_owed(self) -> bool:
        """Whether the provider has something of it to say."""
        return self.context is not None or bool(self.unsent().strip())


class Context:
    """One context of an utterance, which needs another when the provider has ended the one before for want of text."""

    def __init__(self, context_id: str, utterance: Utterance, now: float) -> None:
        self.id = context_id
        self.utterance = utterance
        self.first_piece = utterance.sent
        self.base = utterance.received
        self.sent_at = now
        self.heard_at = -math.inf

    def has_audio(self) -> bool:
        """Whether any of it was heard."""
        return self.heard_at > -math.inf

    def is_idle(self, now: float, idle_s: float) -> bool:
        """Whether all that it was given seems to be said, and the provider to have ended it."""
        return self.heard_at >= self.sent_at and now - self.heard_at > idle_s


class Contexts:
    """The utterances of one call, from text to audio.

    `timeout_s`: silence after which a complete utterance is given up. `idle_s`: silence after which a provider is taken
    to have ended a context.
    """

    def __init__(self, provider: str, bytes_per_second: int, *, timeout_s: float, idle_s: float) -> None:
        self._provider = provider
        self._rate = bytes_per_second
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._queue: dict[str, Utterance] = {}
        self._contexts: dict[str, Context] = {}
        self._cancels: deque[Cancel] = deque()
        self._aborted: set[str] = set()  # utterances whose text still comes
        self._lost: ProviderError | None = None

    @property
    def busy(self) -> bool:
        """Whether anything was asked of the provider that it still owes."""
        return any(utterance.is_owed() for utterance in self._queue.values())

    def post(self, message: Message[str], now: float) -> None:
        """Add a piece of text."""
        if message.uuid in self._aborted:
            if message.done:
                self._aborted.discard(message.uuid)
            return
        utterance = self._queue.setdefault(message.uuid, Utterance(message.uuid, now))
        if message.data:
            utterance.pieces.append(message.data)
        utterance.complete |= message.done
        utterance.touched_at = now
        if self._lost and not utterance.finished:
            self._fail(utterance, self._lost.message, self._lost.code)

    def abort(self, uuid: str, now: float) -> None:
        """Forget an utterance."""
        if utterance := self._queue.get(uuid):
            self._remove(utterance, now, cancel=True)
            if not utterance.complete:
                self._aborted.add(uuid)

    def due(self, now: float, *, may_open: bool = True) -> Line | Cancel | None:
        """What to send next, taken as sent; without `may_open`, nothing that needs another context."""
        if self._cancels:
            return self._cancels.popleft()
        for utterance in list(self._queue.values())[:AHEAD]:
            if utterance.is_pending() and (line := self._line(utterance, now, may_open=may_open)):
                return line
        return None

    def audio(self, context_id: str, data: bytes, now: float) -> None:
        """Audio arrived; late audio of contexts that are gone is dropped."""
        context = self._contexts.get(context_id)
        if context is None or not data:
            return
        utterance = context.utterance
        if context is utterance.context and not context.has_audio():
            context.base = utterance.received
            for older in [c for c in self._contexts.values() if c.utterance is utterance and c is not context]:
                del self._contexts[older.id]
        context.heard_at = utterance.touched_at = now
        utterance.closing_at = math.inf  # it was not over
        utterance.received += len(data)
        utterance.held.append(Message(utterance.uuid, data))

    def words(self, context_id: str, words: list[tuple[str, float, float]]) -> None:
        """Word timings arrived: text, start and end in seconds of the context's audio."""
        if (context := self._contexts.get(context_id)) and words:
            base_ms = context.base * 1000 / self._rate
            timed = tuple(Word(text, round(base_ms + 1000 * a), round(base_ms + 1000 * b)) for text, a, b in words)
            context.utterance.held.append(WordTimings(context.utterance.uuid, timed))

    def done(self, context_id: str) -> None:
        """The provider has said all of a context."""
        if context := self._contexts.pop(context_id, None):
            utterance = context.utterance
            if context is utterance.context:
                utterance.context = None

    def failed(self, context_id: str | None, message: str, code: str) -> ProviderError | None:
        """The provider reports an error. Returns it if no one utterance can be blamed."""
        if not context_id:
            active = [utterance for utterance in self._queue.values() if utterance.context]
            if len(active) != 1:
                return ProviderError(message, code=code)
            self._fail(active[0], message, code)
        elif context := self._contexts.get(context_id):
            if context.utterance.closing_at < math.inf:
                self.done(context_id)  # it was over, as supposed
            else:
                self._fail(context.utterance, message, code)
        return None

    def disconnected(self, now: float) -> None:
        """The connection is gone, and its contexts with it: say again what has not begun, end what was cut off."""
        self._cancels.clear()
        for utterance in self._queue.values():
            context, utterance.context = utterance.context, None
            if context is None:
                continue
            if not context.has_audio():
                utterance.sent, utterance.closed = context.first_piece, False
            elif not context.is_idle(now, self._idle_s):
                text = f"{self._provider}: the connection was lost in the middle of an utterance"
                self._fail(utterance, text, "cut_off")
        self._contexts.clear()

    def give_up(self, error: ProviderError) -> None:
        """There will be no connection any more: end what there is and what comes."""
        self._lost = error
        for utterance in self._queue.values():
            if not utterance.finished:
                self._fail(utterance, error.message, error.code)

    def next_event(self, now: float) -> Speaking | None:
        """The next thing to tell the agent."""
        while head := next(iter(self._queue.values()), None):
            if head.held:
                return head.held.popleft()
            if now >= head.closing_at + CLOSING_S or (head.complete and not head.is_owed()):
                head.finished = True
            elif now >= self.deadline():
                self._fail(head, f"{self._provider} fell silent for {self._timeout_s:g} s", "timeout", cancel=True)
                continue
            if not (head.complete and head.finished):
                return None
            self._remove(head, now, cancel=False)
            return Message(head.uuid, b"", done=True)
        return None

    def deadline(self) -> float:
        """When to ask for the next event although nothing happened."""
        head = next(iter(self._queue.values()), None)
        if head is None or head.finished or not head.complete:
            return math.inf
        return min(head.closing_at + CLOSING_S, head.touched_at + self._timeout_s)

    def _remove(self, utterance: Utterance, now: float, *, cancel: bool) -> None:
        self._drop_contexts(utterance, cancel=cancel)
        del self._queue[utterance.uuid]
        for following in list(self._queue.values())[:AHEAD]:
            following.touched_at = max(following.touched_at, now)  # its turn begins here, and so does our patience

    def _line(self, utterance: Utterance, now: float, *, may_open: bool) -> Line | None:
        text = utterance.unsent()
        context = utterance.context
        idle = context is not None and context.is_idle(now, self._idle_s)
        if context is None or (idle and text.strip()):
            if not text.strip() or not may_open:
                return None  # for nothing to say, no context is opened
            context = self._open(utterance, now)
        elif idle and utterance.complete:
            utterance.closing_at = now
        utterance.sent, utterance.closed = len(utterance.pieces), utterance.complete
        context.sent_at = utterance.touched_at = now
        return Line(context.id, text, utterance.complete)

    def _open(self, utterance: Utterance, now: float) -> Context:
        utterance.contexts += 1
        utterance.context = Context(f"{utterance.uuid}-{utterance.contexts}", utterance, now)
        self._contexts[utterance.context.id] = utterance.context
        return utterance.context

    def _fail(self, utterance: Utterance, message: str, code: str, *, cancel: bool = False) -> None:
        self._drop_contexts(utterance, cancel=cancel)
        utterance.finished = True
        utterance.held.append(ProviderError(message, code=code, uuid=utterance.uuid))

    def _drop_contexts(self, utterance: Utterance, *, cancel: bool) -> None:
        if cancel and utterance.context:
            self._cancels.append(Cancel(utterance.context.id))
        utterance.context = None
        for context in [c for c in self._contexts.values() if c.utterance is utterance]:
            del self._contexts[context.id]
