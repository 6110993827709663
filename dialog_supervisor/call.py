"""One call: the carrier's leg, the worker's process, and what happens when either ends.

A call goes `ringing` (its webhook is being answered), `connecting` (the carrier is to open a media socket), `streaming`,
`ending` (one side is done, the other is given time) and `ended`. Every state but the last has a deadline.
"""

import math
import secrets
from collections.abc import Callable
from enum import StrEnum
from functools import partial

import structlog
import trio

from dialog_supervisor import logs
from dialog_supervisor.carriers.base import CarrierError, Leg, StreamEnd, Unsettled
from dialog_supervisor.generation import Generation
from dialog_supervisor.recovery import CallState
from dialog_supervisor.sections import CallsConfig, TransferConfig
from dialog_supervisor.steps import Step, Steps
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.telemetry.event_logs import EventLogs
from dialog_supervisor.telemetry.metrics import Party
from dialog_supervisor.upgrade.handover import CallInTransit, Ending
from dialog_supervisor.websocket import MediaSocket
from dialog_supervisor.worker import Worker, WorkerState
from dialog_supervisor.worker_leg import WorkerLeg
from protocol.messages import (
    Event,
    Metadata,
    StreamingStopped,
    TimeLimit,
)

_LAST_WORDS_S = 0.5  # for what an ended worker still had in the pipe

MakeLeg = Callable[[Callable[[Event], None]], Leg]

log = structlog.get_logger("call")


class State(StrEnum):
    """Where a call is."""

    RINGING = "ringing"
    CONNECTING = "connecting"
    STREAMING = "streaming"
    ENDING = "ending"
    ENDED = "ended"


class Next(StrEnum):
    """What the carrier shall do with a caller."""

    CONNECT = "connect"
    FALLBACK = "fallback"
    HANGUP = "hangup"


class Call:
    """A call from its webhook to the last trace of it; with `taken_over`, from where another process had to leave it."""

    def __init__(
        self,
        metadata: Metadata,
        make_leg: MakeLeg,
        generation: Generation,
        config: CallsConfig,
        transfer: TransferConfig,
        *,
        event_logs: EventLogs,
        note: Callable[[str], None] = lambda call_id: None,
        taken_over: WorkerState | None = None,
    ) -> None:
        self.id = metadata.call_id
        self.metadata = metadata
        self.generation = generation.name
        self.started_at = trio.current_time()
        self.seconds = 0.0  # that it lasted, once it is over
        self.token = secrets.token_urlsafe(24)
        self.steps = Steps()
        self._note = partial(note, self.id)  # that what a successor must know is different
        self.worker_leg = WorkerLeg(self, generation, config, transfer, note=self._note, taken_over=taken_over)
        self.leg = make_leg(self.worker_leg.tell)
        self.steps.keep_in(event_logs.begin(self.id, self.generation, self.leg.counts))
        self.state = State.RINGING
        self.reason = ""
        self.ended_by: Party = "dialogd"
        self._in_transit: CallInTransit | None = None
        self._config = config
        self._deadline = math.inf
        self._changed = trio.Event()
        self._over = trio.Event()  # the conversation is over
        self._released = trio.Event()  # the carrier needs nothing more from us
        self._farewell_told = False
        self._goodbye_told = False
        self._asked_in_vain = False  # the carrier has had its time to ask what comes after a lost stream
        self._fallback = False
        self._streams = 0
        self._lost = False  # the last of them
        self._enter(State.RINGING, config.connect_timeout)

    @property
    def worker(self) -> Worker:
        """The worker of the moment."""
        return self.worker_leg.worker

    def take_up(self, state: CallState, unsettled: Unsettled, age_s: float) -> None:
        """Before `run`: go on where a dialogd that died has left this call."""
        self.started_at -= age_s
        self.leg.introduced = state.started is not None
        self.leg.take_up(unsettled)
        self.worker_leg.take_up(state)

    @property
    def over(self) -> bool:
        """Whether the conversation is over."""
        return self._over.is_set()

    @property
    def owes_fallback(self) -> bool:
        """Whether the conversation is over, and the caller still there, to be given the fallback."""
        return self._fallback and not self._released.is_set()

    def hand_over(self, now: float) -> CallInTransit | None:
        """Return all of it for another process: nothing at moments that cannot be told, which pass by themselves."""
        leg, worker_leg = self.leg.hand_over(now), self.worker_leg.hand_over(now)
        if leg is None or worker_leg is None or self.state is State.ENDED:
            return None
        how = self.reason, self.ended_by, self._fallback, self._released.is_set(), self._goodbye_told
        return CallInTransit(
            metadata=self.metadata,
            generation=self.generation,
            token=self.token,
            age_s=now - self.started_at,
            state=self.state.value,
            deadline_in_s=self._deadline - now,
            ending=Ending(*how) if self._over.is_set() else None,
            farewell_told=self._farewell_told,
            asked_in_vain=self._asked_in_vain,
            streams=self._streams,
            steps=self.steps.kept,
            leg=leg,
            worker_leg=worker_leg,
        )

    def take_over(self, transit: CallInTransit, handed_over_at: float) -> None:
        """Before `run`: go on where another process had to leave it, with the same worker."""
        self._in_transit = transit
        self.leg.take_over(transit.leg, handed_over_at)
        self.worker_leg.take_over(transit.worker_leg, handed_over_at)
        self.token, self.started_at = transit.token, handed_over_at - transit.age_s
        self.state, self._deadline = State(transit.state), handed_over_at + transit.deadline_in_s
        self._farewell_told, self._asked_in_vain = transit.farewell_told, transit.asked_in_vain
        self._streams = transit.streams
        self.steps.take_over(self.started_at, transit.steps)
        if (ending := transit.ending) is not None:
            self.reason, self.ended_by, self._fallback = ending.reason, ending.by, ending.fallback
            self._goodbye_told = ending.told
            self._over.set()
            if ending.released:
                self._released.set()

    # Its states

    def _enter(self, state: State, timeout: float = math.inf) -> None:
        self.state = state
        self._deadline = trio.current_time() + timeout
        self._changed.set()
        self._changed = trio.Event()
        self.steps.add("state", state.value)

    def answered(self) -> str:
        """The carrier is being told to connect: return the one-use token of the media socket that it will open."""
        if self.state is State.RINGING:
            self._enter(State.CONNECTING, self._config.connect_timeout)
        return self.token

    def claim(self, token: str) -> bool:
        """Use up the token. Return False when it is not this call's, or was used, or the call is over."""
        if self._over.is_set() or not secrets.compare_digest(token, self.token):
            return False
        self.token = secrets.token_urlsafe(24)
        return True

    def end(self, reason: str, *, by: Party = "dialogd", fallback: bool = False, released: bool = False) -> None:
        """The conversation is over. With `fallback`, the caller is still there and must not be left in silence.

        `released`: the carrier needs nothing more from us.
        """
        if released:
            self._released.set()
        if self._over.is_set():
            return
        self.reason, self.ended_by, self._fallback = reason, by, fallback
        self._enter(State.ENDING)
        self._over.set()
        self._note()

    def stream_ended(self, *, gone: bool) -> None:
        """The carrier says that its stream is no more. `gone`: nor is the caller."""
        if gone:
            self._fallback = False
            self._hung_up("the caller hung up")
        else:
            self.leg.release()

    @property
    def fallback(self) -> bool:
        """Whether it ended with a caller who was given the fallback."""
        return self._fallback

    def _hung_up(self, reason: str) -> None:
        """The line has ended, by itself unless the agent had asked for it."""
        parting = self.worker_leg.requests.parting
        self.end(parting or reason, by="agent" if parting else "caller", released=True)

    def next_step(self) -> Next:
        """Answer the carrier's question what to do with the caller."""
        if not self._over.is_set():
            return Next.CONNECT
        self._released.set()
        return Next.FALLBACK if self._fallback else Next.HANGUP

    async def run(self) -> None:
        """Live. Returns when nothing of the call is left."""
        with structlog.contextvars.bound_contextvars(call=self.id), logs.heard_by(self.id, self.steps.logged):
            begins = "call begins" if self._in_transit is None else "call goes on"
            log.info(begins, caller=self.metadata.caller, callee=self.metadata.callee, generation=self.generation)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.worker_leg.run)
                    nursery.start_soon(self._keep_deadlines)
                    nursery.start_soon(self._limit_length)
                    nursery.start_soon(self.leg.run_errands)
                    await self._over.wait()
                    await self._close()
                    nursery.cancel_scope.cancel()
            finally:
                self.leg.release()
                self.worker.close()
                self._enter(State.ENDED)
                self.seconds = round(trio.current_time() - self.started_at, 1)
                counts = self.leg.counts
                log.info(
                    "call ended",
                    reason=self.reason,
                    seconds=self.seconds,
                    media_dropped=self.worker_leg.media_dropped,
                    **counts,
                )
                self.steps.close()

    async def _keep_deadlines(self) -> None:
        while not self._over.is_set():
            changed, state = self._changed, self.state
            with trio.move_on_at(self._deadline) as scope:
                await changed.wait()
            if scope.cancelled_caught:
                self._asked_in_vain = self._streams > 0
                self.end(f"no media socket was opened in time while {state}", fallback=True)

    async def _limit_length(self) -> None:
        """End a call that has reached its permitted length, after time to say goodbye."""
        limit, farewell = self._config.max_duration, min(self._config.farewell_time, self._config.max_duration)
        with trio.move_on_at(self.started_at + limit - farewell):
            await self._over.wait()
            return
        if not self._farewell_told:
            self._farewell_told = True
            log.warning("the call has reached its permitted length", remaining_s=farewell, max_duration=limit)
            self.worker_leg.tell(TimeLimit(farewell))
        await trio.sleep_until(self.started_at + limit)
        self.end(f"it lasted {limit:g} s (calls.max_duration)")

    async def _close(self) -> None:
        """Take leave of both sides at once: the carrier within `ending_timeout`, the worker within its grace.

        What the carrier has still to tell of the call comes before that, for it is the worker's to hear.
        """
        self.leg.interrupted()
        if not self._goodbye_told:
            self._goodbye_told = True
            self.worker_leg.tell(StreamingStopped(self.reason))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._dismiss_worker)
            self.leg.release()
            await self._release_line()
        with trio.move_on_after(_LAST_WORDS_S):
            await self.worker_leg.gone.wait()

    async def _dismiss_worker(self) -> None:
        with trio.move_on_after(self._config.callbacks_timeout) as scope:
            await self.leg.settled()
        if scope.cancelled_caught:
            log.warning(
                "the carrier has not told the end of every recording and transcription",
                timeout_s=self._config.callbacks_timeout,
                missing=self.leg.owed,
            )
        with trio.move_on_after(self._config.ending_timeout):  # the stream may end before what ended it is answered
            await self.worker_leg.requests.answered()
        await self.worker.stop(self.reason, self._config.shutdown_grace)

    async def _release_line(self) -> None:
        """Wait until the carrier has asked what comes after the stream; if it does not ask, end the call by its API."""
        with trio.move_on_after(0 if self._asked_in_vain else self._config.ending_timeout):
            if self._streams or self._fallback:
                await self._released.wait()
            return
        try:
            with trio.fail_after(self._config.ending_timeout):
                await self.leg.hangup()
        except (CarrierError, trio.TooSlowError) as error:
            log.warning("the carrier neither asked what comes after the stream, nor could be told", reason=str(error))

    # The carrier's side

    async def stream(self, socket: MediaSocket) -> None:
        """Serve a media socket of this call until it ends."""
        if self._over.is_set():
            return
        with structlog.contextvars.bound_contextvars(call=self.id):
            self._streams += 1
            self._enter(State.STREAMING)
            mine = self._streams
            if self._lost:
                self._lost = False
                metrics.MEDIA_RESUMED.inc()
            try:
                end = await self.leg.stream(socket)
            except Exception:  # the call's boundary on this side
                log.exception("media stream failed")
                self.end("media stream failed", fallback=True)
                return
            returning = self.worker_leg.requests.returned()
            if mine != self._streams:
                return
            if returning and not self._over.is_set():
                self._enter(State.CONNECTING, self._config.connect_timeout)
            elif end is StreamEnd.STOPPED:
                self._hung_up("the carrier stopped the stream")
            elif self.state is State.STREAMING:
                log.warning("media socket lost; waiting for the carrier to ask what now")
                self._lost = True
                metrics.MEDIA_LOST.inc()
                self._enter(State.CONNECTING, self._config.reconnect_timeout)

    def watch(self, *, follow: bool = True) -> trio.MemoryReceiveChannel[Step]:
        """Return a channel of the call's steps, from those still remembered on; it ends with the call, or with those."""
        return self.steps.watch(follow=follow)
