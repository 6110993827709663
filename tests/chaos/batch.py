"""Plays one fault: calls that talk, the blows, and the row of the table that comes of it."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import trio
from msgspec import Struct

from dialog_local.carrier.events import AgentAudioBegan, Ended, Said
from dialog_local.carrier.phonecall import Call
from tests.chaos.caller import Caller, Voices
from tests.chaos.faults import Fault
from tests.chaos.stage import Stage
from tests.chaos.verdict import CONCERNED, Record, broken, disturbed, handed_over, unexpected

CALLS = 10
BYSTANDERS = 5  # who talk while the next calls come
ARRIVE_APART_S = 0.4
STRIKE_PATIENCE_S = 20.0  # for a moment at which to strike
STRIKE_APART_S = 2.5  # while one call recovers, others are being struck
LONGEST_S = 240.0  # of a batch; none that is right takes half as long


class Row(Struct, frozen=True):
    """What came of a fault. `shares_ms`: of each struck call's gap, what was neither the providers' nor the caller's."""

    fault: str
    outcome: str
    struck: int
    disturbed: int
    as_promised: int
    silence_s: float
    leftovers: tuple[str, ...]
    complaints: tuple[str, ...]
    seconds: float
    shares_ms: tuple[float, ...] = ()
    played: int = 1

    @classmethod
    def not_played(cls, fault: Fault, why: str) -> "Row":
        """Return the row of a fault that could not be played."""
        return cls(fault.name, fault.outcome, 0, 0, 0, 0.0, (), (f"not played: {why}",), 0.0)

    @property
    def right(self) -> bool:
        """Whether everything was as it has to be."""
        return not self.complaints and not self.leftovers

    def cells(self) -> tuple[str, ...]:
        """Return the row for people."""
        if not self.struck:
            return (self.fault, "not played", "", "", "", "")
        return (
            self.fault,
            str(self.disturbed),
            f"{self.as_promised}/{self.struck}" + (" fallback" if self.outcome == "fallback" else ""),
            f"{self.silence_s:.1f} s",
            ", ".join(self.leftovers) or "none",
            "" if self.played == 1 else f"(played {self.played} times)",
        )


class Talk:
    """One call with its caller."""

    def __init__(self, stage: Stage, call: Call, caller: Caller) -> None:
        self.call = call
        self.caller = caller
        self._stage = stage

    @property
    def clock(self) -> float:
        """When the call began, on the machine's monotonic clock."""
        return time.monotonic() - self.call.now()

    @property
    def struck_at(self) -> float:
        """When it was struck, in its seconds; never, as it were, if it was not."""
        return self._stage.struck_at.get(self.call.sid, math.inf) - self.clock

    async def run(self) -> None:
        """Place the call and talk."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, nursery.cancel_scope)
            await anext(aiter(self.call.log))  # it has been answered, or it has failed
            await self.caller.run()

    async def over_it(self) -> None:
        """Wait until the fault cannot show any more."""
        before = sum(one.answered_at is not None and one.answered_at < self.struck_at for one in self.caller.exchanges)
        await self.caller.until_through(before + CONCERNED)

    async def leave_when_over_it(self) -> None:
        """Have the caller hang up then."""
        await self.over_it()
        self.caller.enough.set()

    async def _carry(self, scope: trio.CancelScope) -> None:
        await self.call.run()
        scope.cancel()


class Batch:
    """Ten calls on one dialogd, and a fault."""

    def __init__(self, fault: Fault, stage: Stage, voices: Voices, struck: int, calls: int) -> None:
        self._calls = calls
        self._fault = fault
        self._stage = stage
        self._voices = voices
        self._count = struck
        self._talks: list[Talk] = []
        self._plays = {
            "each": self._strike_each,
            "all": self._strike_all,
            "own": self._strike_each_at_its_moment,
            "dialogd": self._strike_dialogd,
            "next": self._strike_before_each,
        }

    async def run(self) -> Row:
        """Play it."""
        began_at = trio.current_time()
        before = await self._stage.traces()
        play = self._plays[self._fault.scope]
        with trio.move_on_after(LONGEST_S) as patience:
            async with trio.open_nursery() as calls:
                for _ in range(self._calls):
                    self._begin(calls)
                    await trio.sleep(ARRIVE_APART_S)
                await play(calls)
                for talk in self._talks:
                    talk.caller.enough.set()
            await self._stage.all_ended()
        if patience.cancelled_caught:
            self._stage.complain(f"it was not over after {LONGEST_S:g} s")
        left = await self._stage.leftovers(before) + await self._stage.stop()
        return self._row(left, trio.current_time() - began_at)

    def _begin(self, calls: trio.Nursery) -> Talk:
        call = self._stage.call()
        caller = Caller(call, self._voices, self._stage.number(call), repeats=self._fault.may_repeat)
        talk = Talk(self._stage, call, caller)
        self._talks.append(talk)
        calls.start_soon(talk.run)
        return talk

    async def _all_talk(self) -> None:
        for talk in self._talks:
            await talk.caller.until_through(1)

    async def _strike_each(self, _calls: trio.Nursery) -> None:
        await self._all_talk()
        victims = self._talks[: self._count]
        for talk in victims:
            await self._strike(talk)
            await trio.sleep(STRIKE_APART_S)
        for talk in victims:
            await talk.over_it()

    async def _strike_all(self, calls: trio.Nursery) -> None:
        await self._all_talk()
        await self._strike_each_at_its_moment(calls)

    async def _strike_each_at_its_moment(self, _calls: trio.Nursery) -> None:
        async with trio.open_nursery() as blows:
            for talk in self._talks:
                blows.start_soon(self._strike, talk)
        for talk in self._talks:
            await talk.over_it()

    async def _strike_dialogd(self, _calls: trio.Nursery) -> None:
        await self._all_talk()
        for talk in self._talks:
            self._stage.struck(talk.call)
        await self._fault.strike(self._stage, self._talks[0].call)
        for talk in self._talks:
            await talk.over_it()

    async def _strike_before_each(self, calls: trio.Nursery) -> None:
        await self._all_talk()
        async with trio.open_nursery() as leaving:
            for _ in range(self._count):
                await self._fault.strike(self._stage, self._talks[0].call)
                talk = self._begin(calls)
                self._stage.struck(talk.call)
                leaving.start_soon(talk.leave_when_over_it)
                await trio.sleep(2 * STRIKE_APART_S)

    async def _strike(self, talk: Talk) -> None:
        self._stage.struck(talk.call)
        try:
            with trio.fail_after(STRIKE_PATIENCE_S):
                await self._fault.strike(self._stage, talk.call)
        except (trio.TooSlowError, httpx.HTTPError, OSError) as error:  # it is over, or has no worker
            self._stage.complain(f"call {self._stage.number(talk.call)} could not be struck: {error!r}")

    def _row(self, left: Sequence[str], seconds: float) -> Row:
        records = [self._record(talk) for talk in self._talks]
        struck = [record for record in records if record.struck_at < math.inf]
        judge = handed_over if self._fault.outcome == "fallback" else broken
        noticed = [disturbed(record) for record in records]
        went_wrong = [judge(record) if record in struck else [] for record in records]
        complaints = [
            f"call {number}: {one}" for found in (noticed, went_wrong) for number, each in enumerate(found) for one in each
        ]
        return Row(
            self._fault.name,
            self._fault.outcome,
            len(struck),
            sum(map(bool, noticed)),
            len(struck) - sum(map(bool, went_wrong)),
            max((record.silence_s for record in struck), default=0.0),
            tuple(one for one in left if one not in self._fault.may_leave),
            (*complaints, *self._stage.complaints, *unexpected(self._stage.own_log(), self._fault.may_say)),
            round(seconds, 1),
            tuple(share for talk in self._talks if (share := self._share_ms(talk)) is not None),
        )

    def _record(self, talk: Talk) -> Record:
        [ended] = [event.reason for event in talk.call.log.history if isinstance(event, Ended)] or ["it did not"]
        said = tuple(event.text for event in talk.call.log.history if isinstance(event, Said))
        log = self._stage.log(call=talk.call.sid)
        may_log = self._fault.may_log if talk.struck_at < math.inf else ()
        return Record(talk.caller.exchanges, ended, log, talk.struck_at, may_log, self._fault.may_repeat, said)

    def _share_ms(self, talk: Talk) -> float | None:
        """Return our own part of a struck call's gap: from the kill to the question put to the model, and from the voice to
        the line. None where the next worker did not have to answer at once.
        """
        if not (self._fault.timed and math.isfinite(talk.struck_at)):
            return None
        struck_at = self._stage.struck_at[talk.call.sid]
        thought, voiced = (
            min((at for at in self._stage.times(name, talk.call) if at > struck_at), default=math.inf)
            for name in ("thinks", "voiced")
        )
        began = (event.at + talk.clock for event in talk.call.log.history if isinstance(event, AgentAudioBegan))
        heard = min((at for at in began if at >= voiced), default=math.inf)
        share_ms = 1000 * (thought - struck_at + heard - voiced)
        return round(share_ms, 1) if math.isfinite(share_ms) else None


async def play(fault: Fault, directory: Path, server: str, voices: Voices, *, struck: int, calls: int = 0) -> Row:
    """Play a fault on a dialogd of its own, where so many calls talk, as many as usual with 0."""
    async with Stage.set_up(directory, server, fault.props) as stage:
        return await Batch(fault, stage, voices, struck, calls or (BYSTANDERS if fault.scope == "next" else CALLS)).run()
