"""What an agent hears with: one STT at a time, and the next one where that fails or is replaced, without a word lost."""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from dialog_worker.participant import ProviderError
from dialog_worker.stt.base import STT, Hearing, Owed


class Ear:
    """Hears with the first of `stts`; when it fails for good, with the next. `hear` takes what is heard, one after another,
    and `lost` the error after which there is none left.
    """

    def __init__(
        self,
        stts: Sequence[STT],
        hear: Callable[[Hearing], Awaitable[None]],
        lost: Callable[[ProviderError], Awaitable[None]],
    ) -> None:
        self.stt = stts[0] if stts else None
        self._spares = deque(stts[1:])
        self._hear = hear
        self._lost = lost
        self._nursery: trio.Nursery | None = None
        self._serving = trio.CancelScope()

    def open(self, nursery: trio.Nursery) -> None:
        """Begin to hear; `nursery` is the call's."""
        self._nursery = nursery
        self._start(())

    def close(self) -> None:
        """Hear no more, until `use` and `open`."""
        self.use(None)
        self._nursery = None

    def use(self, stt: STT | None) -> None:
        """Hear with another STT, or with none, from now on.

        What the old one had understood is told, and the audio that it had not is the new one's to begin with.
        """
        old, self.stt = self.stt, stt
        if old is stt:
            return
        owed = old.retire() if old is not None else Owed()
        self._serving.cancel()
        if stt is not None and owed.audio:
            stt.post(owed.audio)
        self._start(owed.hearings)

    def _start(self, owed: tuple[Hearing, ...]) -> None:
        if self._nursery is None:
            return
        self._serving = trio.CancelScope()
        self._nursery.start_soon(self._listen, self.stt, owed)
        if self.stt is not None:
            self._nursery.start_soon(self._serve, self.stt, self._serving)

    @staticmethod
    async def _serve(stt: STT, scope: trio.CancelScope) -> None:
        with scope:
            await stt.serve()

    async def _listen(self, stt: STT | None, owed: tuple[Hearing, ...]) -> None:
        for hearing in owed:
            await self._hear(hearing)
        if stt is None:
            return
        async for hearing in stt.events:
            if stt is not self.stt:  # what is in the channel has been handed over
                return
            if not isinstance(hearing, ProviderError):
                await self._hear(hearing)
                continue
            await self._hear(msgspec.structs.replace(hearing, participant="stt"))
            if hearing.fatal and stt is self.stt:
                await self._fail_over(hearing)

    async def _fail_over(self, error: ProviderError) -> None:
        if self._spares:
            self.use(self._spares.popleft())
        else:
            await self._lost(error)
