"""One call: the carrier's leg, the worker's process, and what happens when either ends.

A call goes `ringing` (its webhook is being answered), `connecting` (the carrier is to open a media socket), `streaming`,
`ending` (one side is done, the other is given time) and `ended`. Every state but the last has a deadline.
"""

import math
import secrets
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from functools import partial

import structlog
import trio

from dialog_supervisor import logs, metrics
from dialog_supervisor.carriers.base import CarrierError, Leg, StreamEnd, Unsettled
from dialog_supervisor.event_logs import EventLogs
from dialog_supervisor.flow import Flow
from dialog_supervisor.generation import Generation, NoWorker
from dialog_supervisor.metrics import Party
from dialog_supervisor.recovery import CallState, Recovery
from dialog_supervisor.requests import Requests
from dialog_supervisor.sections import CallsConfig, TransferConfig
from dialog_supervisor.steps import Step, Steps
from dialog_supervisor.tally import turn_fields
from dialog_supervisor.websocket import MediaSocket
from dialog_supervisor.worker import Worker
from protocol.framing import ProtocolError
from protocol.link import LinkClosed, OutboxFull
from protocol.messages import (
    Abort,
    Checkpoint,
    Command,
    Error,
    Event,
    Heartbeat,
    Media,
    Metadata,
    Post,
    Request,
    StreamingStopped,
    TimeLimit,
    Trace,
    Turn,
)

_LAST_WORDS_S = 0.5  # for what an ended worker still had in the pipe

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
    """A call from its webhook to the last trace of it."""

    def __init__(
        self,
        metadata: Metadata,
        make_leg: Callable[[Callable[[Event], None]], Leg],
        generation: Generation,
        config: CallsConfig,
        transfer: TransferConfig,
        *,
        event_logs: EventLogs,
        note: Callable[[str], None] = lambda call_id: None,
    ) -> None:
        self.id = metadata.call_id
        self.metadata = metadata
        self.generation = generation.name
        self.started_at = trio.current_time()
        self.seconds = 0.0  # that it lasted, once it is over
        self.token = secrets.token_urlsafe(24)
        self.leg = make_leg(self._tell)
        self.worker = Worker(generation.name, self.id)
        self.state = State.RINGING
        self.reason = ""
        self.ended_by: Party = "dialogd"
        self._steps = Steps(event_logs.begin(self.id, self.generation, self.leg.counts))
        self._transfer = transfer
        self._requests = self._new_requests()
        self._note = partial(note, self.id)  # that what a successor must know is different
        self._recovery = Recovery(metadata, config.restarts, config.restart_window, self._note)
        self._taken_up = False
        self._config = config
        self._generation = generation
        self._deadline = math.inf
        self._changed = trio.Event()
        self._over = trio.Event()  # the conversation is over
        self._released = trio.Event()  # the carrier needs nothing more from us
        self._worked = trio.Event()  # the worker is gone and all it said is read
        self._asked_in_vain = False  # the carrier has had its time to ask what comes after a lost stream
        self._fallback = False
        self._streams = 0
        self._lost = False  # the last of them
        self.media_dropped = 0  # frames of the caller's that workers were too slow for
        self._dropped = 0  # of them, by the present one
        self._enter(State.RINGING, config.connect_timeout)

    def take_up(self, state: CallState, unsettled: Unsettled, age_s: float) -> None:
        """Before `run`: go on where a dialogd that died has left this call."""
        self._taken_up = True
        self.started_at -= age_s
        self.leg.introduced = state.started is not None
        self.leg.take_up(unsettled)
        self._recovery.take_up(state, trio.current_time())
        self._recovery.may_resume(trio.current_time())  # which counts the death

    def recovery_state(self, *, audio: bool) -> CallState:
        """Return what another dialogd has to know to take this call up. `audio`: also what the caller said lately."""
        return self._recovery.state(trio.current_time(), audio=audio)

    @property
    def over(self) -> bool:
        """Whether the conversation is over."""
        return self._over.is_set()

    @property
    def owes_fallback(self) -> bool:
        """Whether the conversation is over, and the caller still there, to be given the fallback."""
        return self._fallback and not self._released.is_set()

    # Its states

    def _enter(self, state: State, timeout: float = math.inf) -> None:
        self.state = state
        self._deadline = trio.current_time() + timeout
        self._changed.set()
        self._changed = trio.Event()
        self._steps.add("state", state.value)

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
        parting = self._requests.parting
        self.end(parting or reason, by="agent" if parting else "caller", released=True)

    def next_step(self) -> Next:
        """Answer the carrier's question what to do with the caller."""
        if not self._over.is_set():
            return Next.CONNECT
        self._released.set()
        return Next.FALLBACK if self._fallback else Next.HANGUP

    async def run(self) -> None:
        """Live. Returns when nothing of the call is left."""
        with structlog.contextvars.bound_contextvars(call=self.id), logs.heard_by(self.id, self._steps.logged):
            log.info("call begins", caller=self.metadata.caller, callee=self.metadata.callee, generation=self.generation)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._work)
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
                log.info("call ended", reason=self.reason, seconds=self.seconds, media_dropped=self.media_dropped, **counts)
                self._steps.close()

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
        log.warning("the call has reached its permitted length", remaining_s=farewell, max_duration=limit)
        self._tell(TimeLimit(farewell))
        await trio.sleep_until(self.started_at + limit)
        self.end(f"it lasted {limit:g} s (calls.max_duration)")

    async def _close(self) -> None:
        """Take leave of both sides at once: the carrier within `ending_timeout`, the worker within its grace.

        What the carrier has still to tell of the call comes before that, for it is the worker's to hear.
        """
        self.leg.interrupted()
        self._tell(StreamingStopped(self.reason))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._dismiss_worker)
            self.leg.release()
            await self._release_line()
        with trio.move_on_after(_LAST_WORDS_S):
            await self._worked.wait()

    async def _dismiss_worker(self) -> None:
        with trio.move_on_after(self._config.callbacks_timeout) as scope:
            await self.leg.settled()
        if scope.cancelled_caught:
            log.warning(
                "the carrier has not told the end of every recording and transcription",
                timeout_s=self._config.callbacks_timeout,
                missing=self.leg.owed,
            )
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
            if mine != self._streams:
                return
            if end is StreamEnd.STOPPED and self._requests.returning:
                self._requests.returning = False
                self._enter(State.CONNECTING, self._config.connect_timeout)
            elif end is StreamEnd.STOPPED:
                self._hung_up("the carrier stopped the stream")
            elif self.state is State.STREAMING:
                log.warning("media socket lost; waiting for the carrier to ask what now")
                self._lost = True
                metrics.MEDIA_LOST.inc()
                self._enter(State.CONNECTING, self._config.reconnect_timeout)

    def _tell(self, event: Event) -> None:
        """Pass an event to the worker. Speech that it does not take in time is dropped, oldest first."""
        self._recovery.told(event)
        link, audio = self.worker.link, isinstance(event, Media)
        if not audio:
            self._steps.told(event, self.worker.pid)
        try:
            link.post(event, droppable=audio)
        except LinkClosed:  # the worker's end is noticed, and acted on, where its process is watched
            self._recovery.missed(event)
            return
        except OutboxFull as error:
            log.error("worker does not read and is killed", reason=str(error))
            self.worker.kill("unread")
        if link.dropped != self._dropped:
            self.media_dropped += link.dropped - self._dropped
            self._dropped = link.dropped
            if self._dropped % 50 == 1:
                log.warning("worker is behind; its oldest audio is dropped", frames=self._dropped)
                with suppress(LinkClosed, OutboxFull):
                    link.post(Error("media_dropped", f"{self._dropped} frames of the caller's audio were dropped"))

    # The worker's side

    async def _work(self) -> None:
        """Fork a worker and do what it asks for; when it dies in mid-call, another takes over, and so on."""
        if self._taken_up:
            self._introduce()
        else:
            self._tell(self.metadata)
        try:
            await self._serve_worker()
            while not self._over.is_set() and self._replace_worker():
                await self._serve_worker()
        except NoWorker as error:
            log.error("no worker for this call", reason=str(error))
            self._generation.tally.crash(self.id)
            self.end("no worker", fallback=True)
        except Exception:  # the call's boundary on this side
            log.exception("what the worker asked for failed")
            self.end("internal error", fallback=True)
        self._worked.set()

    async def _serve_worker(self) -> None:
        """Return when the worker is gone, and all it said was done; what it did not live to see is given up."""
        async with self._generation.worker(self.worker), trio.open_nursery() as nursery:
            await self._obey(nursery)
            await self.worker.exited.wait()
            nursery.cancel_scope.cancel()

    async def _obey(self, nursery: trio.Nursery) -> None:
        try:
            await self.worker.link.introduced()
            self._steps.add("worker", "ready", {"pid": str(self.worker.pid)})
            flow = Flow(trio.current_time)
            async for command in self.worker.link:
                await self._do(command, nursery)
                if pause := flow.took():
                    with self.worker.held_back():
                        await trio.sleep(pause)
        except (ProtocolError, LinkClosed) as error:
            if not self._over.is_set():
                log.error("worker breaks the protocol and is killed", error=type(error).__name__, reason=str(error))
            self.worker.kill("protocol" if isinstance(error, ProtocolError) else None)

    def _replace_worker(self) -> bool:
        """A worker died in mid-call: have another take over, or the caller given the fallback when that was often."""
        dead, code = self.worker, self.worker.exit_code
        cause, status = dead.death
        metrics.WORKER_DEATHS.labels(cause, status).inc()
        self._generation.tally.crash(self.id)
        if not self._recovery.may_restart(trio.current_time()):
            log.error("worker died in mid-call", pid=dead.pid, exit_code=code)
            self.end(f"worker died ({code})", fallback=True)
            return False
        log.error("worker died in mid-call, and another takes over", pid=dead.pid, exit_code=code)
        self.worker, self._dropped = Worker(self.generation, self.id), 0
        metrics.WORKER_RESTARTS.labels(cause).inc()
        dead.close()
        self._requests = self._new_requests()
        self._introduce()
        return True

    def _introduce(self) -> None:
        """Tell a new worker what its predecessor knew."""
        for event in list(self._recovery.introduction(self.leg.orphaned())):
            self._steps.told(event, self.worker.pid)
            with suppress(LinkClosed, OutboxFull):
                self.worker.link.post(event, droppable=isinstance(event, Media))

    def _new_requests(self) -> Requests:
        return Requests(self.leg, self._transfer, self._tell, self.end)

    async def _do(self, command: Command, nursery: trio.Nursery) -> None:
        if isinstance(command, Post):
            self.leg.post(command.message)
            if not self.leg.has_room:
                with self.worker.held_back():
                    await self.leg.room()
        elif isinstance(command, Heartbeat):
            self.worker.heartbeat(command.lag_ms)
        else:
            self._do_now(command, nursery)

    def _do_now(self, command: Command, nursery: trio.Nursery) -> None:
        self._steps.asked(command, self.worker.pid)
        if isinstance(command, Abort):
            self.leg.abort(command.uuid)
        elif isinstance(command, Trace):
            self._trace(command)
        elif isinstance(command, Turn):
            self._turn(command)
        elif isinstance(command, Checkpoint):
            self._recovery.saved(command)
        elif isinstance(command, Request):
            self._steps.add("request", type(command).__name__)
            self._requests.take(command, nursery)

    def _trace(self, trace: Trace) -> None:
        if trace.kind == "log":
            level = trace.fields.get("level", "info")
            say = getattr(log, level if level in ("debug", "info", "warning", "error") else "info")
            say(trace.text, logger=trace.fields.get("logger", "agent"))
            return
        if trace.text:
            log.info(trace.kind, text=trace.text, speech=True)
        self._steps.traced(trace)

    def _turn(self, turn: Turn) -> None:
        self._generation.tally.turn(self.id, turn)
        metrics.turn(turn)
        self._steps.add("turn", turn.outcome, turn_fields(turn))

    def watch(self, *, follow: bool = True) -> trio.MemoryReceiveChannel[Step]:
        """Return a channel of the call's steps, from those still remembered on; it ends with the call, or with those."""
        return self._steps.watch(follow=follow)
