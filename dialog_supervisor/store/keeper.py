"""Keeps the store true to the calls under way, and takes up those that a dead dialogd left.

One task writes; a call that has changed says so and goes on. What the store does not take is told once, counted, and written
as soon as it can be.
"""

import math
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import structlog
import trio

from dialog_supervisor.call import Call
from dialog_supervisor.carriers.base import Leg, Unsettled
from dialog_supervisor.recovery import CallState
from dialog_supervisor.sections import StoreConfig
from dialog_supervisor.store.base import REMEDIES, Changes, Elsewhere, Fault, Store, StoreFailed
from dialog_supervisor.store.lease import LeaseState
from dialog_supervisor.store.records import Line, Record
from dialog_supervisor.store.sqlite import SqliteStore

ALIVE_INTERVAL_S = 0.5  # while there are calls; what a caller heard is known as exactly as this
_MENDED = frozenset({Fault.CORRUPT, Fault.REPLACED})  # there is another file by then
_PAUSE_S = 0.05  # between two writes, so that what comes in quick succession is one
_RETRY_S, _MAX_RETRY_S = 0.5, 15.0  # after a failure, doubled each time
_TIDY_INTERVAL_S = 60.0
_START_TIMEOUT_S = 5.0  # a disk that does not answer keeps nobody from taking calls
_FORGET_TIMEOUT_S = 1.0
_STALLED_S = 2.0  # without an answer; a machine that is only busy takes a second, and what waits is written then
_CLOSE_TIMEOUT_S = 2.0
_GONE_KEPT = 10_000  # ended calls not yet deleted, beyond which everything is written anew

log = structlog.get_logger("store")


class Missing(Enum):
    """Why a call that the carrier asks about cannot be gone on with here."""

    UNKNOWN = "there is no such call"
    ELSEWHERE = "another dialogd, which is alive, has it"
    UNREADABLE = "the store cannot be asked"
    REFUSED = "it may not go on, or there is no room for it"


def open_store(config: StoreConfig, lease: LeaseState | None = None) -> Store | None:
    """Return the store that is configured, if any; with a lease, that which another process held. Nothing is opened yet."""
    if not config.enabled:
        return None
    if config.path == Path():
        log.warning(
            "calls are not kept for another dialogd",
            reason="there is no home directory for the file",
            remedy="set store.path, or store.enabled = false",
        )
        return None
    return SqliteStore(config.path, lease)


class Keeper:
    """Writes what calls note, in `run`. Without a store it does nothing, and there is never a call to be taken up."""

    def __init__(self, store: Store | None, calls: Mapping[str, Call], max_age_s: float) -> None:
        self._store = store
        self._calls = calls
        self._max_age_s = max_age_s
        self._changed: set[str] = set()
        self._gone: set[str] = set()
        self._whole = True  # everything is to be written
        self._sent: dict[str, tuple[int, bool]] = {}  # to each caller, when what it was hearing was last written
        self._unsettled: dict[str, Unsettled] = {}  # of each call, when it was last written
        self._news = trio.Event()
        self._look_at = 0.0
        self._faults: set[Fault] = set()  # since it last went well
        self._lost = 0
        self._writing_since = math.inf
        self._taking: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()

    @property
    def lease(self) -> LeaseState | None:
        """What tells others that this owner lives, for the process that goes on as it."""
        return None if self._store is None else self._store.hand_over()

    def describe(self) -> dict[str, Any]:
        """Return it for `dialogctl status`."""
        return {"enabled": self._store is not None, "ok": not self._faults, "lost": self._lost}

    # What calls say

    def note(self, call_id: str) -> None:
        """Something about a call is different, or it has just begun."""
        if self._store is not None:
            self._changed.add(call_id)
            self._news.set()

    def ended(self, call_id: str) -> None:
        """A call is over, and nobody is to take it up."""
        self._changed.discard(call_id)
        self._sent.pop(call_id, None)
        self._unsettled.pop(call_id, None)
        if self._store is not None:
            self._gone.add(call_id)
            if len(self._gone) > _GONE_KEPT:
                self._whole = True
                self._gone.clear()
            self._news.set()

    # Writing

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write until cancelled."""
        if self._store is None:
            task_status.started()
            return
        with trio.move_on_after(_START_TIMEOUT_S):
            await self._tidy(self._store)
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_news, self._store)
            nursery.start_soon(self._keep_tidy, self._store)

    async def _write_news(self, store: Store) -> None:
        retry_s = _RETRY_S
        while True:
            if await self._write(store):
                retry_s = _RETRY_S
                await trio.sleep(_PAUSE_S)
            else:
                await trio.sleep(retry_s)
                retry_s = min(2 * retry_s, _MAX_RETRY_S)
            with trio.move_on_after(ALIVE_INTERVAL_S if self._calls or self._faults else math.inf):
                await self._news.wait()

    async def _write(self, store: Store) -> bool:
        """Write what there is; a file that was begun anew is written again at once, with everything."""
        for mendable in (_MENDED, frozenset[Fault]()):
            changes = self._collect()
            self._writing_since = trio.current_time()
            try:
                await store.write(changes)
            except StoreFailed as error:
                self._tell(error)
                self._gone |= changes.gone
                if error.fault not in mendable:
                    self._lost += len(changes)
                    return False
            else:
                break
            finally:
                self._writing_since = math.inf
        if self._faults:
            log.info("the store is written again", lost=self._lost)
            self._faults.clear()
        return True

    def _collect(self) -> Changes:
        """Return what is to be written now, and begin anew to note what is next."""
        now, whole = time.monotonic(), self._whole  # a clock that goes on when this process becomes another program
        hearing = self._look()
        changed = set(self._calls) if whole else self._changed & self._calls.keys()
        gone = frozenset(self._gone)
        self._changed, self._gone, self._whole, self._news = set(), set(), False, trio.Event()
        records = {name: record for name in changed if (record := _record(self._calls[name], now)) is not None}
        lines = {name: self._line(name, now) for name in {*records, *hearing}}
        for name, record in records.items():
            self._unsettled[name] = record.unsettled
        return Changes(now, records, lines, gone | (changed - records.keys()), whole)

    def _look(self) -> list[str]:
        """Twice a second, see what calls do not note. Return those whose callers hear something else than was written."""
        if trio.current_time() < self._look_at:
            return []
        self._look_at = trio.current_time() + ALIVE_INTERVAL_S
        live = {name: call.leg for name, call in self._calls.items() if not call.over}
        self._changed |= {name for name, leg in live.items() if leg.unsettled() != self._unsettled.get(name)}
        return [name for name, leg in live.items() if _sent(leg) != self._sent.get(name)]

    def _line(self, name: str, now: float) -> Line:
        leg = self._calls[name].leg
        self._sent[name] = _sent(leg)
        return Line(now, leg.still_to_hear(), leg.open)

    def _tell(self, error: StoreFailed) -> None:
        self._whole = True
        if error.fault is not Fault.LEFT and error.fault not in self._faults:
            self._faults.add(error.fault)
            log.error(
                "calls are not kept for another dialogd; they go on",
                reason=error.fault.value,
                detail=str(error),
                remedy=REMEDIES[error.fault],
            )

    async def _keep_tidy(self, store: Store) -> None:
        while True:
            await trio.sleep(_TIDY_INTERVAL_S)
            await self._tidy(store)

    async def _tidy(self, store: Store) -> None:
        try:
            if forgotten := await store.tidy(self._max_age_s):
                log.info("calls that nobody took up are forgotten", calls=forgotten, max_duration=self._max_age_s)
        except StoreFailed as error:
            self._tell(error)

    async def close(self) -> None:
        """All calls are over: leave nothing in the store."""
        if self._store is None:
            return
        with trio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
            try:
                await self._store.close()
            except StoreFailed as error:
                self._tell(error)

    # Taking up

    def taking(self, call_id: str) -> trio.Lock:
        """Return the lock to hold while a call is taken up: carriers ask twice."""
        return self._taking.setdefault(call_id, trio.Lock())

    async def take(self, call_id: str, timeout_s: float) -> Record | Missing:
        """Take up a call that a dead dialogd left."""
        if self._store is None:
            return Missing.UNKNOWN
        try:
            with trio.fail_after(timeout_s):
                found = await self._store.take(call_id, time.monotonic())
        except StoreFailed as error:
            self._tell(error)
            return Missing.UNREADABLE
        except trio.TooSlowError:
            if max(timeout_s, trio.current_time() - self._writing_since) >= _STALLED_S:
                self._tell(StoreFailed(Fault.SLOW, f"no answer within {timeout_s:g} s"))
            return Missing.UNREADABLE
        if isinstance(found, Elsewhere):
            return Missing.ELSEWHERE
        return found or Missing.UNKNOWN

    async def forget(self, call_id: str) -> None:
        """A call that is not under way here is over, as the carrier says."""
        if self._store is None:
            return
        with trio.move_on_after(_FORGET_TIMEOUT_S):
            try:
                await self._store.forget(call_id)
            except StoreFailed as error:
                self._tell(error)


def _record(call: Call, now: float) -> Record | None:
    """Return what is to be kept of a call: nothing if it is over, unless its caller waits for the fallback."""
    if call.over and not call.owes_fallback:
        return None
    return Record(
        at=now,
        state=CallState(metadata=call.metadata) if call.over else call.worker_leg.recovery_state(audio=False),
        generation=call.generation,
        age_s=trio.current_time() - call.started_at,
        unsettled=call.leg.unsettled(),
        fallback=call.over,
    )


def _sent(leg: Leg) -> tuple[int, bool]:
    """Return what differs when a caller is hearing something else than time alone would have it."""
    return leg.counts.get("frames_out", 0), leg.open
