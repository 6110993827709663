"""What an agent speaks with: one TTS at a time, and the next one where that fails or is replaced, even within a sentence."""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from dialog_worker.agent.utterance import Utterance
from dialog_worker.participant import ProviderError, Word
from dialog_worker.tts.base import TTS, WordTimings
from dialog_worker.voip import VoIP
from protocol.messages import Message, MessageDispatched

REPORTS_KEPT = 256  # of what no utterance here is known for; a supervisor tells a worker that takes over no more
BYTES_PER_S = 8000  # of mu-law
RESUMED_LIMIT = 1  # how often an utterance is taken up again with the voice that failed in it


class Voice:
    """Speaks with the first of `ttss`; when it fails for good, with the next. `report` is told of each failure, and `lost`
    the one after which there is no voice left.

    `utterances` are those being said, by uuid. A TTS knows an utterance by another name once it was taken up again.
    """

    def __init__(
        self,
        voip: VoIP,
        ttss: Sequence[TTS],
        report: Callable[[ProviderError], Awaitable[None]],
        lost: Callable[[ProviderError], Awaitable[None]],
    ) -> None:
        self.tts = ttss[0] if ttss else None
        self.utterances: dict[str, Utterance] = {}
        self.quiet_from = 0.0  # when the caller will have heard, or has heard, the last that was said
        self.progressed: Callable[[], None] = _nothing  # called when more is known of when words are said
        self._voip = voip
        self._spares = deque(ttss[1:])
        self._report = report
        self._lost = lost
        self._nursery: trio.Nursery | None = None
        self._scopes: dict[TTS, trio.CancelScope] = {}
        self._names: dict[str, Utterance] = {}
        self._reports: dict[str, MessageDispatched] = {}  # that came before their utterances were adopted
        self._superseded: set[str] = set()
        self._failed_for_good: TTS | None = None

    def open(self, nursery: trio.Nursery) -> None:
        """Begin to speak; `nursery` is the call's."""
        self._nursery = nursery
        self._start()

    def close(self) -> None:
        """Speak no more than what is begun, until `use` and `open`."""
        self.use(None)
        self._nursery = None

    def use(self, tts: TTS | None) -> None:
        """Speak with another TTS, or with none, from now on. What the old one has begun, it finishes."""
        if tts is self.tts:
            return
        self.tts = tts
        self._start()
        self._release_idle()

    def begin(self, uuid: str, *, interruptible: bool) -> Utterance:
        """Return a new utterance. Raises `RuntimeError` where there is no voice."""
        if self.tts is None:
            raise RuntimeError("this agent has no TTS to speak with; give it one, or post audio to self.voip")
        utterance = Utterance(uuid, self._voip, self.tts, interruptible=interruptible)
        self.utterances[uuid] = self._names[uuid] = utterance
        return utterance

    def adopt(self, uuid: str, text: str, words: tuple[Word, ...]) -> Utterance | None:
        """Return an utterance that an earlier worker's voice has said as far as here; None where there is no voice now."""
        if self.tts is None:
            return None
        utterance = self.utterances[uuid] = Utterance(uuid, self._voip, self.tts, interruptible=True)
        utterance.adopted(text, words)
        if report := self._reports.pop(uuid, None):
            utterance.report(report)
        return utterance

    def dispatched(self, report: MessageDispatched) -> None:
        """What the supervisor says of an utterance. A worker that takes over may be told before it knows which there are."""
        if utterance := self.utterances.get(report.uuid):
            utterance.report(report)
            return
        self._reports[report.uuid] = report
        if len(self._reports) > REPORTS_KEPT:
            del self._reports[next(iter(self._reports))]

    @property
    def speaking(self) -> list[Utterance]:
        """The utterances that have text and are not over."""
        return [utterance for utterance in self.utterances.values() if utterance.text and not utterance.over]

    def cut(self, utterance: Utterance) -> None:
        """Stop an utterance."""
        utterance.cut()
        self.quiet_from = trio.current_time()

    def forget(self, utterance: Utterance) -> None:
        """An utterance is over."""
        self.utterances.pop(utterance.uuid, None)
        self._names.pop(utterance.spoken_as, None)
        self._release_idle()

    def _start(self) -> None:
        if self._nursery is None or self.tts is None:
            return
        scope = self._scopes[self.tts] = trio.CancelScope()
        self._nursery.start_soon(self._serve, self.tts, scope)
        self._nursery.start_soon(self._speak, self.tts)

    def _release_idle(self) -> None:
        """Let go of replaced voices that have finished."""
        busy = [self.tts, *(utterance.tts for utterance in self.utterances.values())]
        for tts in [tts for tts in self._scopes if tts not in busy]:
            self._scopes.pop(tts).cancel()

    @staticmethod
    async def _serve(tts: TTS, scope: trio.CancelScope) -> None:
        with scope:
            await tts.serve()

    async def _speak(self, tts: TTS) -> None:
        async for speaking in tts.events:
            match speaking:
                case Message():
                    await self._say(speaking)
                case WordTimings(uuid=name, words=words):
                    if utterance := self._names.get(name):
                        utterance.timed(words)
                        self.progressed()
                case ProviderError():
                    await self._failed(tts, msgspec.structs.replace(speaking, participant="tts"))

    async def _say(self, audio: Message[bytes]) -> None:
        await self._voip.room()
        if audio.uuid in self._superseded:
            if audio.done:
                self._superseded.discard(audio.uuid)
            return
        if utterance := self._names.get(audio.uuid):
            utterance.voiced(audio.data)
            audio = Message(utterance.uuid, audio.data, audio.done)
        self.quiet_from = max(self.quiet_from, trio.current_time()) + len(audio.data) / BYTES_PER_S
        self._voip.post(audio)

    async def _failed(self, tts: TTS, error: ProviderError) -> None:
        """Take up again what a failure cost: once with the same voice, then with the next."""
        if error.uuid in self._superseded or tts is self._failed_for_good:
            return
        cost = self._names.get(error.uuid)
        if not error.fatal and (cost is None or cost.over):
            await self._report(error)
            return
        hopeless = error.fatal or (cost is not None and cost.resumed >= RESUMED_LIMIT)
        error = msgspec.structs.replace(error, fatal=hopeless)
        await self._report(error)
        if not hopeless and cost is not None and self.tts is not None:
            self._resume(cost, self.tts)
        elif hopeless:
            await self._fail_over(tts, error)

    async def _fail_over(self, failed: TTS, error: ProviderError) -> None:
        self._failed_for_good = failed
        if self.tts is failed and not self._spares:
            for utterance in list(self.utterances.values()):
                self.cut(utterance)
            await self._lost(error)
            return
        if self.tts is failed:
            self.use(self._spares.popleft())
        for utterance in list(self.utterances.values()):
            if utterance.tts is failed and not utterance.over and self.tts is not None:
                self._resume(utterance, self.tts)
        self._release_idle()

    def _resume(self, utterance: Utterance, tts: TTS) -> None:
        old, name = utterance.spoken_as, f"{utterance.uuid}~{utterance.resumed + 1}"
        self._superseded.add(old)
        self._names.pop(old, None)
        self._names[name] = utterance
        utterance.resume(tts, name)


def _nothing() -> None:
    """Nobody wants to know."""
