"""The playout ledger: which audio the carrier has been sent, which of it the caller has heard, which was thrown away.

A carrier plays what it is sent in order and in real time, and returns a mark when everything before the mark was played.
After a `clear` it returns all marks at once, as if played. So between marks the ledger counts time itself, and what a
`clear` discarded it reports at once, by its own count, and ignores the marks that come back for it.

No I/O here: whoever calls passes the time, and sends what is returned.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Self

from msgspec import Struct

from protocol.messages import MessageDispatched

BYTES_PER_MS = 8  # mu-law at 8 kHz
_BYTE_S = 1 / BYTES_PER_MS / 1000
_REMEMBERED = 256  # aborted utterances whose late audio is still to be refused


@dataclass(slots=True)
class Utterance:
    """One message on its way to the caller's ear. Times in seconds, on the caller's clock of the ledger."""

    uuid: str
    mark: str
    total_bytes: int = 0
    done: bool = False
    chunks: deque[tuple[float, bytes]] = field(default_factory=deque)  # not yet played: when each ends, and its audio

    @property
    def total_ms(self) -> int:
        """How long it is, as far as it is known."""
        return self.total_bytes // BYTES_PER_MS

    def unplayed(self, now: float) -> bytes:
        """Return what the caller has not heard yet, cutting the chunk that is being played."""
        rest = bytearray()
        for end, audio in self.chunks:
            remaining = min(len(audio), max(0, round((end - now) * 1000)) * BYTES_PER_MS)
            rest += audio[len(audio) - remaining :]
        return bytes(rest)


class OnTheWay(Struct, frozen=True, array_like=True):
    """How much of an utterance the caller has heard, of how much; `done` when its last piece has come."""

    uuid: str
    played_ms: int
    total_ms: int
    done: bool


@dataclass(frozen=True)
class Cut:
    """What to do after an abort: tell `dispatched`, send `clear`, then send again what others had still to say."""

    dispatched: MessageDispatched
    resend: list[tuple[str, bytes]]  # audio, each with the mark to send behind it, or ""


class UtteranceState(Struct, frozen=True, forbid_unknown_fields=True):
    """An utterance in a ledger that another process takes over: its chunks as (seconds until it will have ended, audio)."""

    uuid: str
    mark: str
    total_bytes: int
    done: bool
    chunks: tuple[tuple[float, bytes], ...]


class PlayoutState(Struct, frozen=True, forbid_unknown_fields=True):
    """A ledger on its way to a process that takes it over; `ends_in_s` from now on, `paused_s` until now."""

    utterances: tuple[UtteranceState, ...] = ()
    aborted: tuple[str, ...] = ()
    resent: int = 0
    ends_in_s: float = 0.0
    paused_s: float | None = None


class Playout:
    """The ledger of one call's line."""

    __slots__ = ("_aborted", "_paused_at", "_resent", "_utterances", "ends_at")

    def __init__(self) -> None:
        self._utterances: OrderedDict[str, Utterance] = OrderedDict()
        self._aborted: OrderedDict[str, None] = OrderedDict()
        self._resent = 0
        self._paused_at: float | None = None  # since when there is no line, and nothing is being played
        self.ends_at = 0.0  # when the carrier will have played everything

    @classmethod
    def taken_over(cls, state: PlayoutState, now: float) -> Self:
        """Return the ledger that another process kept; `now` is when it was handed over."""
        playout = cls()
        for one in state.utterances:
            chunks = deque((now + ends_in_s, audio) for ends_in_s, audio in one.chunks)
            playout._utterances[one.uuid] = Utterance(one.uuid, one.mark, one.total_bytes, one.done, chunks)
        playout._aborted.update(dict.fromkeys(state.aborted))
        playout._resent, playout.ends_at = state.resent, now + state.ends_in_s
        playout._paused_at = None if state.paused_s is None else now - state.paused_s
        return playout

    def hand_over(self, now: float) -> PlayoutState:
        """Return the ledger for another process to go on with."""
        utterances = tuple(
            UtteranceState(
                one.uuid, one.mark, one.total_bytes, one.done, tuple((end - now, audio) for end, audio in one.chunks)
            )
            for one in self._utterances.values()
        )
        paused_s = None if self._paused_at is None else now - self._paused_at
        return PlayoutState(utterances, tuple(self._aborted), self._resent, self.ends_at - now, paused_s)

    def __bool__(self) -> bool:
        """Whether something is still to be heard, or its mark still to come."""
        return bool(self._utterances)

    @property
    def paused(self) -> bool:
        """Whether there is no line at the moment."""
        return self._paused_at is not None

    def refuses(self, uuid: str) -> bool:
        """Whether an utterance was aborted, so that nothing more of it is taken."""
        return uuid in self._aborted

    def buffered_s(self, now: float) -> float:
        """Seconds of audio that the carrier has and the caller has not heard."""
        return max(0.0, self.ends_at - now)

    def post(self, uuid: str, audio: bytes, *, done: bool, now: float) -> str | None:
        """Enter a piece of an utterance. Return the mark to send behind it ("" if none), or None to drop it."""
        utterance = self._utterances.get(uuid)
        if utterance is None:
            if uuid in self._aborted:
                return None
            utterance = self._utterances[uuid] = Utterance(uuid, mark=uuid)
        chunks = utterance.chunks
        while chunks and chunks[0][0] <= now:
            chunks.popleft()  # it was played
        if audio:
            begins_at = self.ends_at if self.ends_at > now else now
            self.ends_at = ends_at = begins_at + len(audio) * _BYTE_S
            chunks.append((ends_at, audio))
            utterance.total_bytes += len(audio)
        if not done:
            return ""
        utterance.done = True
        return utterance.mark

    def on_the_way(self) -> dict[str, int]:
        """Return each utterance that is still to be heard to its end, with its length in ms as far as it is known."""
        return {utterance.uuid: utterance.total_ms for utterance in self._utterances.values()}

    def still_to_hear(self, now: float) -> tuple[OnTheWay, ...]:
        """Return each utterance that is still to be heard to its end, in the order in which they are played."""
        return tuple(
            OnTheWay(one.uuid, self._heard(one, now).played_ms, one.total_ms, one.done) for one in self._utterances.values()
        )

    def unfinished(self) -> list[str]:
        """Return the utterances whose last piece has not come."""
        return [utterance.uuid for utterance in self._utterances.values() if not utterance.done]

    def marked(self, mark: str, now: float) -> MessageDispatched | None:
        """Enter a mark's return. Return what to tell, unless the mark stands for something that was cut, or is unknown."""
        utterance = next((one for one in self._utterances.values() if one.mark == mark), None)
        if utterance is None:
            return None
        del self._utterances[utterance.uuid]
        if not self._utterances:
            self.ends_at = min(self.ends_at, now)
        return MessageDispatched(utterance.uuid, utterance.total_ms, utterance.total_ms, interrupted=False)

    def abort(self, uuid: str, now: float) -> Cut | None:
        """Cut an utterance. Return what follows, or None if nothing of it is with the carrier."""
        self._refuse_from_now(uuid)
        utterance = self._utterances.pop(uuid, None)
        if utterance is None:
            return None
        dispatched = self._heard(utterance, now)
        return Cut(dispatched, [] if self.paused else self._all_again(now))

    def pause(self, now: float) -> None:
        """The line is gone, perhaps for a moment only, and with it what the carrier had not played."""
        if not self.paused:
            self._paused_at, self.ends_at = now, min(self.ends_at, now)

    def resume(self, now: float) -> list[tuple[str, bytes]]:
        """There is a line again: return what to send of what the caller had still to hear, as `Cut.resend`."""
        again = self._all_again(now) if self.paused else []
        self._paused_at = None
        return again

    def _all_again(self, now: float) -> list[tuple[str, bytes]]:
        self.ends_at = now
        return [self._again(utterance, now) for utterance in self._utterances.values()]

    def _refuse_from_now(self, uuid: str) -> None:
        self._aborted[uuid] = None
        if len(self._aborted) > _REMEMBERED:
            self._aborted.popitem(last=False)

    def _again(self, utterance: Utterance, now: float) -> tuple[str, bytes]:
        """Enter anew what of an utterance a `clear`, or the loss of the line, took from the carrier."""
        audio = utterance.unplayed(self._clock(now))
        self._resent += 1
        utterance.mark = f"{utterance.uuid}#{self._resent}"  # a new name: the old one comes back too, and means nothing
        utterance.chunks.clear()
        if audio:
            self.ends_at += len(audio) / BYTES_PER_MS / 1000
            utterance.chunks.append((self.ends_at, audio))
        return (utterance.mark if utterance.done else "", audio)

    def _clock(self, now: float) -> float:
        return now if self._paused_at is None else self._paused_at

    def _heard(self, utterance: Utterance, now: float) -> MessageDispatched:
        played_ms = utterance.total_ms - len(utterance.unplayed(self._clock(now))) // BYTES_PER_MS
        whole = utterance.done and played_ms >= utterance.total_ms
        return MessageDispatched(utterance.uuid, played_ms, utterance.total_ms, interrupted=not whole)

    def stop(self, now: float) -> list[MessageDispatched]:
        """The line is gone: say what was heard of everything that was still to be heard."""
        told = [self._heard(utterance, now) for utterance in self._utterances.values()]
        self._utterances.clear()
        self.ends_at = min(self.ends_at, now)
        return told
