"""Utterances on their way through a provider that speaks in contexts: what to send it next, and what to tell the agent.

No I/O here. Utterances are said in the order in which they came; a second one may be generated while the first is said,
and is held until then. Times are a monotonic clock's seconds, given by the caller.
"""

import math
from collections import deque

from msgspec import Struct

from dialog_worker.participant import ProviderError
from dialog_worker.tts.base import Speaking
from dialog_worker.tts.utterance import Context, Utterance
from protocol.messages import Message

TIMEOUT_S = 2.0  # ten times what a voice takes, and twice what a busy one does
AGAIN_SHARE = 0.6  # of it, when silent once more: another voice still answers within 5 s of the caller's last word
QUEUE_LIMIT = 64  # pieces: at a sentence each several minutes, more than any answer
AHEAD = 2  # utterances with a context at a time: providers count and sell active contexts
CLOSING_S = 1.0  # for a context that is probably over to say so
REFUSED_S = 1.0  # in which a provider that has no room for a context is asked again
RETRY_S = 0.25  # between two such requests


class Line(Struct, frozen=True):
    """Text for a context; `last` closes it."""

    context_id: str
    text: str
    last: bool


class Cancel(Struct, frozen=True):
    """A context whose speech nobody wants any more."""

    context_id: str


class Limits(Struct, frozen=True):
    """What a call's utterances are held to.

    `timeout_s`: silence for which an utterance that owes audio is ended. `queue_size_limit`: pieces of text posted and
    not spoken; the one beyond ends its utterance. `hesitation_s`: how long the provider may wait for more text before it
    speaks, `math.inf` if for ever. `idle_s`: silence after which it is taken to have ended a context.
    """

    timeout_s: float = TIMEOUT_S
    queue_size_limit: int = QUEUE_LIMIT
    hesitation_s: float = 0.0
    idle_s: float = math.inf


class Contexts:
    """The utterances of one call, from text to audio."""

    def __init__(self, provider: str, bytes_per_second: int, limits: Limits) -> None:
        self._provider = provider
        self._rate = bytes_per_second
        self._limits = limits
        self._queue: dict[str, Utterance] = {}
        self._contexts: dict[str, Context] = {}
        self._cancels: deque[Cancel] = deque()
        self._over: set[str] = set()  # utterances whose text still comes
        self._lost: ProviderError | None = None
        self._connected_at = math.inf
        self._fell_silent = False  # and nothing was heard of it since
        self.stalled = False  # since an utterance was given up for silence, this connection is not to be trusted

    @property
    def busy(self) -> bool:
        """Whether anything was asked of the provider that it still owes."""
        return any(utterance.is_owed() for utterance in self._queue.values())

    def waiting_since(self) -> float:
        """Since when audio is due; `math.inf` if none is."""
        head = self._head()
        return head.owed_since if head and not head.finished else math.inf

    def post(self, message: Message[str], now: float) -> None:
        """Add a piece of text."""
        if message.uuid in self._over:
            if message.done:
                self._over.discard(message.uuid)
            return
        utterance = self._queue.setdefault(message.uuid, Utterance(message.uuid))
        full = bool(message.data) and self._waiting() >= self._limits.queue_size_limit
        if message.data:
            utterance.script.add(message.data)
        utterance.complete |= message.done
        if message.done and self._limits.hesitation_s:
            utterance.owed_since = math.inf  # only now is it sure to be due
        utterance.expect(now)
        if self._lost and utterance.is_unfinished():
            self._fail(utterance, self._lost.message, self._lost.code)
        elif full:
            self._fail(utterance, self._full(), "queue_full", cancel=True)

    def abort(self, uuid: str, now: float) -> None:
        """Forget an utterance."""
        if utterance := self._queue.get(uuid):
            self._remove(utterance, now, cancel=True)

    def due(self, now: float, *, may_open: bool = True) -> Line | Cancel | None:
        """What to send next, taken as sent; without `may_open`, nothing that needs another context."""
        if self._cancels:
            return self._cancels.popleft()
        for utterance in list(self._queue.values())[:AHEAD]:
            if not utterance.is_pending() or utterance.retry_at > now:
                continue
            if line := self._line(utterance, now, may_open=may_open):
                return line
        return None

    def retry_at(self, now: float) -> float:
        """When something becomes due although nothing happens."""
        return min((u.retry_at for u in self._queue.values() if u.retry_at > now), default=math.inf)

    def audio(self, context_id: str, data: bytes, now: float) -> None:
        """Audio arrived; late audio of contexts that are gone is dropped."""
        context = self._contexts.get(context_id)
        if context is None or not data:
            return
        self._fell_silent = False
        if context is context.utterance.context and not context.has_audio():
            for older in [c for c in self._contexts.values() if c.utterance is context.utterance and c is not context]:
                del self._contexts[older.id]
        context.hear(data, now, self._rate)

    def words(self, context_id: str, words: list[tuple[str, float, float]]) -> None:
        """Word timings arrived: text, start and end in seconds of the context's audio. They are told with that audio."""
        if context := self._contexts.get(context_id):
            context.report(words, self._rate)

    def done(self, context_id: str) -> None:
        """The provider has said all of a context."""
        if context := self._contexts.pop(context_id, None):
            context.tell_words(self._rate, last=True)
            utterance = context.utterance
            if context is utterance.context:
                utterance.context = None
                utterance.script.finish()

    def failed(self, context_id: str | None, message: str, code: str) -> ProviderError | None:
        """The provider reports an error. Returns it if no one utterance can be blamed."""
        context = self._blamed(context_id)
        if context is None:
            return None if context_id else ProviderError(message, code=code)
        if context_id and context.utterance.closing_at < math.inf:
            self.done(context_id)  # it was over, as supposed
        else:
            self._fail(context.utterance, message, code)
        return None

    def refused(self, context_id: str | None, now: float) -> bool:
        """The provider has no room for a context at present. Returns whether it will be asked again; if not, it failed."""
        context = self._blamed(context_id)
        if context is None:
            return False
        utterance = context.utterance
        if utterance is self._head():  # another may wait for the room that the head takes
            utterance.refused_since = min(utterance.refused_since, now)
        if context.has_audio() or context is not utterance.context or now >= utterance.refused_since + REFUSED_S:
            return False
        del self._contexts[context.id]
        utterance.take_back(context.begin, now)
        utterance.retry_at = now + RETRY_S
        return True

    def connected(self, now: float) -> None:
        """There is a connection: from now on silence counts."""
        self._connected_at = now
        self.stalled = False

    def disconnected(self, now: float) -> None:
        """The connection is gone, and its contexts with it: what was not said is to be said on the next."""
        self._connected_at = math.inf
        self._cancels.clear()
        self._contexts.clear()
        for utterance in self._queue.values():
            if not utterance.interrupted(self._limits.idle_s, now):
                text = f"{self._provider}: the connection was lost in the middle of an utterance"
                self._fail(utterance, text, "cut_off")

    def give_up(self, error: ProviderError) -> None:
        """There will be no connection any more: end what there is and what comes."""
        self._lost = error
        for utterance in self._queue.values():
            if utterance.is_unfinished():
                self._fail(utterance, error.message, error.code)

    def next_event(self, now: float) -> Speaking | None:
        """The next thing to tell the agent."""
        while head := self._head():
            if head.held:
                return head.held.popleft()
            if now >= head.closing_at + CLOSING_S or not head.is_unfinished():
                head.finished = True
            elif now >= self.deadline():
                self._fail(head, f"{self._provider} fell silent for {self._timeout_s:g} s", "timeout", cancel=True)
                self.stalled = self._fell_silent = True
                continue
            if not head.finished:
                return None
            self._remove(head, now, cancel=False)
            return Message(head.uuid, b"", done=True)
        return None

    def deadline(self) -> float:
        """When to ask for the next event although nothing happened."""
        head = self._head()
        if head is None or head.finished:
            return math.inf
        patience_s = self._timeout_s + (0 if head.complete else self._limits.hesitation_s)
        return min(head.closing_at + CLOSING_S, max(head.owed_since, self._connected_at) + patience_s)

    @property
    def _timeout_s(self) -> float:
        return self._limits.timeout_s * (AGAIN_SHARE if self._fell_silent else 1.0)

    def _blamed(self, context_id: str | None) -> Context | None:
        """The context that a failure is of: the only one, where the provider does not say."""
        if context_id:
            return self._contexts.get(context_id)
        active = [utterance.context for utterance in self._queue.values() if utterance.context]
        return active[0] if len(active) == 1 else None

    def _head(self) -> Utterance | None:
        return next(iter(self._queue.values()), None)

    def _waiting(self) -> int:
        return sum(utterance.script.waiting for utterance in self._queue.values() if not utterance.finished)

    def _full(self) -> str:
        return (
            f"{self._provider}: {self._waiting()} pieces of text wait to be spoken, and {self._limits.queue_size_limit} may:"
            " post longer pieces, or raise queue_size_limit"
        )

    def _remove(self, utterance: Utterance, now: float, *, cancel: bool) -> None:
        self._drop_contexts(utterance, cancel=cancel)
        was_head = utterance is self._head()
        del self._queue[utterance.uuid]
        if not utterance.complete:
            self._over.add(utterance.uuid)
        if was_head and (head := self._head()):
            head.owed_since = max(head.owed_since, now)  # its turn begins here, and so does our patience

    def _line(self, utterance: Utterance, now: float, *, may_open: bool) -> Line | None:
        text = utterance.script.unsent
        context = utterance.context
        idle = context is not None and context.is_idle(now, self._limits.idle_s)
        if context is None or (idle and text.strip()):
            if not text.strip() or not may_open:
                return None  # for nothing to say, no context is opened
            context = utterance.open()
            self._contexts[context.id] = context
        elif idle and utterance.complete:
            utterance.closing_at = now
        utterance.script.sent, utterance.closed = len(utterance.script.text), utterance.complete
        context.sent_at = now
        return Line(context.id, text, utterance.complete)

    def _fail(self, utterance: Utterance, message: str, code: str, *, cancel: bool = False) -> None:
        if utterance.finished:
            return
        self._drop_contexts(utterance, cancel=cancel)
        utterance.finished = True
        utterance.held.append(ProviderError(message, code=code, uuid=utterance.uuid))

    def _drop_contexts(self, utterance: Utterance, *, cancel: bool) -> None:
        if cancel and utterance.context:
            self._cancels.append(Cancel(utterance.context.id))
        utterance.context = None
        for context in [c for c in self._contexts.values() if c.utterance is utterance]:
            del self._contexts[context.id]
