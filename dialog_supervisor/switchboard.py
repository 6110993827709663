"""The switchboard: which calls there are. It admits them, takes up what a dead dialogd left, and runs each in its task."""

from collections import Counter
from collections.abc import Callable, Sequence

import structlog
import trio

from dialog_supervisor.admission import REMEDIES, Admission, Objection
from dialog_supervisor.call import Call, MakeLeg, State
from dialog_supervisor.config import Config
from dialog_supervisor.generation import Generation
from dialog_supervisor.generations import Generations
from dialog_supervisor.machine import Machine
from dialog_supervisor.recovery import may_take_up
from dialog_supervisor.store.base import Store
from dialog_supervisor.store.keeper import Keeper, Missing
from dialog_supervisor.store.records import Record
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.telemetry.event_logs import EventLogs
from dialog_supervisor.upgrade.handover import CallInTransit
from protocol.messages import Metadata

log = structlog.get_logger("dialogd")


class Switchboard:
    """Knows calls by their id and by the token of their media socket. `over` is told of each that is."""

    def __init__(
        self, config: Config, generations: Generations, machine: Machine, store: Store | None, over: Callable[[Call], None]
    ) -> None:
        self.admission = Admission(config.calls.max_calls)
        self.events = EventLogs(config.events)
        self.calls: dict[str, Call] = {}
        self.keeper = Keeper(store, self.calls, config.calls.max_duration)
        self._config = config
        self._generations = generations
        self._machine = machine
        self._over = over
        self._nursery: trio.Nursery | None = None
        self._call_ended = trio.Event()

    def open(self, nursery: trio.Nursery) -> None:
        """Take calls from now on; they live in `nursery`."""
        self._nursery, self.admission.started = nursery, True

    @property
    def objection(self) -> Objection | None:
        """Why another call would not be taken now, or None when one would."""
        return self.admission.objection(len(self.calls)) or self._machine.lack

    def states(self) -> dict[str, int]:
        """Return how many calls are in each state."""
        counts = Counter(call.state.value for call in self.calls.values())
        return {state.value: counts[state.value] for state in State if state is not State.ENDED}

    # For the gateways

    def find(self, call_id: str) -> Call | None:
        """Return the call of this id, if it has not ended."""
        return self.calls.get(call_id)

    def claim(self, token: str) -> Call | None:
        """Return the call whose media socket this token opens, once."""
        return next((call for call in self.calls.values() if call.claim(token)), None)

    def admit(self, metadata: Metadata, make_leg: MakeLeg) -> Call | None:
        """Begin a call, or return None when none is taken now."""
        return self._begin(metadata, make_leg, None)

    async def resume(self, call_id: str, line: Callable[[Metadata], MakeLeg], timeout_s: float) -> Call | Missing:
        """Go on with a call that a dead dialogd left, or say why not."""
        async with self.keeper.taking(call_id):
            if (call := self.find(call_id)) is not None:
                return call
            record = await self.keeper.take(call_id, timeout_s)
            if isinstance(record, Missing):
                return record
            metadata = record.state.metadata
            may = not record.fallback and self._may_take_up(record)
            begun = self._begin(metadata, line(metadata), record) if may else None
            if begun is None:
                self.keeper.ended(call_id)
                return Missing.REFUSED
            log.warning("a call is taken up that another dialogd left", call=call_id, generation_before=record.generation)
            return begun

    def _may_take_up(self, record: Record) -> bool:
        calls = self._config.calls
        if may_take_up(record.state, calls.restarts, calls.restart_window):
            return True
        call_id = record.state.metadata.call_id
        log.error("dialogd has died too often during this call, which gets the fallback", call=call_id)
        return False

    async def forget(self, call_id: str) -> None:
        """A call that is not under way here is over, as the carrier says."""
        await self.keeper.forget(call_id)

    def _begin(self, metadata: Metadata, make_leg: MakeLeg, record: Record | None) -> Call | None:
        # What goes on had its share of the machine before, and the average has it still.
        why = self.admission.objection(len(self.calls)) if record else self.objection
        if why is not None or self._nursery is None:
            self._refuse(metadata.call_id, why or "draining")
            return None
        generation = self._generations.current if record else self._generations.for_next_call()
        try:
            call = self._make(metadata, make_leg, generation)
        except OSError as error:
            log.error("a call cannot be taken", call=metadata.call_id, reason=error.strerror, remedy="raise LimitNOFILE")
            self.admission.refuse(metadata.call_id, "system")
            return None
        if record is not None:
            call.take_up(record.state, record.unsettled, record.age_s)
            metrics.CALLS_TAKEN_UP.inc()
        metrics.CALLS_BEGUN.inc()
        generation.hold(call.id)
        self._run(call, generation)
        return call

    def _make(
        self, metadata: Metadata, make_leg: MakeLeg, generation: Generation, transit: CallInTransit | None = None
    ) -> Call:
        calls, transfer = self._config.calls, self._config.transfer
        worker = None if transit is None else transit.worker_leg.worker
        note, events = self.keeper.note, self.events
        return Call(metadata, make_leg, generation, calls, transfer, event_logs=events, note=note, taken_over=worker)

    def _refuse(self, call_id: str, why: Objection) -> None:
        if self.admission.refuse(call_id, why):
            figures = self._machine.describe() | {"calls": len(self.calls)}
            log.warning("call refused", call=call_id, reason=why, remedy=REMEDIES[why], **figures)

    def _run(self, call: Call, generation: Generation) -> None:
        assert self._nursery is not None
        self.calls[call.id] = call
        self.keeper.note(call.id)
        self._nursery.start_soon(self._run_call, call, generation)

    async def _run_call(self, call: Call, generation: Generation) -> None:
        try:
            await call.run()
        except Exception:  # a call's boundary: what goes wrong in one must not end the others
            log.exception("call failed", call=call.id)
        finally:
            del self.calls[call.id]
            self._over(call)
            generation.let_go(call.id)
            self._call_ended.set()
        self.keeper.ended(call.id)  # not when cancelled: who cancels calls closes the store, or is about to die

    # From one process to the next

    def take_over(self, transit: CallInTransit, make_leg: MakeLeg, handed_over_at: float) -> Call:
        """Return a call as another process left it; `go_on` brings it to life. Its generation is held by it already."""
        generation = self._generations.named(transit.generation)
        call = self._make(transit.metadata, make_leg, generation, transit)
        call.take_over(transit, handed_over_at)
        generation.know(call.worker)
        return call

    def go_on(self, calls: Sequence[Call]) -> None:
        """Have calls that were taken over live on."""
        for call in calls:
            self._run(call, self._generations.named(call.generation))

    # When dialogd stops

    async def drain(self, timeout_s: float) -> None:
        """Return when no call is left: each may end by itself for so long, and is then made to.

        From then on the carrier's last reports, of a recording for one, have as long as it has to follow a call's end.
        """
        with trio.move_on_after(timeout_s):
            await self._until_quiet()
        for call in tuple(self.calls.values()):
            self._force(call, timeout_s)
        with trio.move_on_after(self._config.calls.ending_timeout):
            await self._until_quiet()
        for call in tuple(self.calls.values()):
            self._forgo_reports(call)
        await self._until_quiet()

    async def _until_quiet(self) -> None:
        while self.calls:
            self._call_ended = trio.Event()
            await self._call_ended.wait()

    @staticmethod
    def _force(call: Call, timeout_s: float) -> None:
        if call.state is not State.ENDING:
            log.warning("call is forced to end", call=call.id, state=call.state.value, drain_timeout=timeout_s)
            metrics.CALLS_FORCED.inc()
            call.end("dialogd is stopping", fallback=True)

    @staticmethod
    def _forgo_reports(call: Call) -> None:
        """Have a call not wait any longer for what the carrier still owes it."""
        if call.leg.owed:
            log.warning("the carrier's last reports are not waited for", call=call.id, missing=call.leg.owed)
        for name in call.leg.owed:
            call.leg.paid(name)
