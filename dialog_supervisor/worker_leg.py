"""A call's other leg: the worker of the moment, what it is told and asks for, and who follows it when it dies."""

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import structlog
import trio

from dialog_supervisor.carriers.base import Leg
from dialog_supervisor.flow import Flow, Reminder
from dialog_supervisor.generation import Generation
from dialog_supervisor.recovery import CallState, Recovery
from dialog_supervisor.requests import Requests
from dialog_supervisor.sections import CallsConfig, TransferConfig
from dialog_supervisor.steps import Steps
from dialog_supervisor.tally import turn_fields
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.telemetry.metrics import Party
from dialog_supervisor.template_process import NoWorker
from dialog_supervisor.upgrade.handover import WorkerLegInTransit
from dialog_supervisor.worker import Worker, WorkerState
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
    Trace,
    Turn,
)

log = structlog.get_logger("call")


class Conversation(Protocol):
    """What a worker's leg has to know of its call."""

    id: str
    metadata: Metadata
    leg: Leg
    steps: Steps

    @property
    def over(self) -> bool:
        """Whether the conversation is over."""

    def end(self, reason: str, *, by: Party = "dialogd", fallback: bool = False, released: bool = False) -> None:
        """End the conversation; see `Call.end`."""


class WorkerLeg:
    """One call's worker, and the next when that dies in mid-call.

    `note` is told when what a successor must know has changed. With `taken_over`, the worker was another process's, and
    `take_over` says the rest of it.
    """

    __slots__ = (
        "_behind",
        "_call",
        "_dropped",
        "_generation",
        "_in_transit",
        "_recovery",
        "_requests",
        "_taken_up",
        "_transfer",
        "gone",
        "media_dropped",
        "worker",
    )

    def __init__(
        self,
        call: Conversation,
        generation: Generation,
        config: CallsConfig,
        transfer: TransferConfig,
        *,
        note: Callable[[], None],
        taken_over: WorkerState | None,
    ) -> None:
        self.worker = Worker(generation.name, call.id, taken_over)
        self.media_dropped = 0  # frames of the caller's that workers were too slow for
        self.gone = trio.Event()  # the last worker is, and all it said is read
        self._call = call
        self._generation = generation
        self._transfer = transfer
        self._recovery = Recovery(call.metadata, config.restarts, config.restart_window, note)
        self._requests: Requests | None = None
        self._taken_up = False
        self._in_transit: WorkerLegInTransit | None = None
        self._dropped = 0  # of `media_dropped`, by the present worker
        self._behind = Reminder(trio.current_time)

    @property
    def requests(self) -> Requests:
        """What the present worker asks of the line."""
        if self._requests is None:  # the line comes into being after this
            self._requests = Requests(self._call.leg, self._transfer, self.tell, self._call.end)
        return self._requests

    # From one process to another

    def take_up(self, state: CallState) -> None:
        """Begin with what a dialogd that died has left."""
        self._taken_up = True
        self._recovery.take_up(state, trio.current_time())
        self._recovery.may_resume(trio.current_time())  # which counts the death

    def recovery_state(self, *, audio: bool) -> CallState:
        """Return what a worker of another dialogd has to know. `audio`: also what the caller said lately."""
        return self._recovery.state(trio.current_time(), audio=audio)

    def hand_over(self, now: float) -> WorkerLegInTransit | None:
        """Return what another process needs to go on with the worker: nothing while it begins, ends, or asks the carrier."""
        worker, requests = self.worker.hand_over(), self.requests.hand_over(now)
        if worker is None or requests is None:
            return None
        return WorkerLegInTransit(worker, requests, self._recovery.state(now, audio=True), self.media_dropped)

    def take_over(self, transit: WorkerLegInTransit, handed_over_at: float) -> None:
        """Go on with the worker as another process left it."""
        self._in_transit = transit
        self._recovery.take_up(transit.known, handed_over_at)
        self.media_dropped, self._dropped = transit.media_dropped, transit.worker.link.dropped

    # What it is told

    def tell(self, event: Event) -> None:
        """Pass an event to the worker. Speech that it does not take in time is dropped, oldest first."""
        link, audio = self.worker.link, False
        if isinstance(event, Media):
            audio = True
            self._recovery.heard(event)
        else:
            self._recovery.told(event)
            self._call.steps.told(event, self.worker.pid)
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
            if self._behind.due():
                log.warning("worker is behind; its oldest audio is dropped", frames=self._dropped)
                with suppress(LinkClosed, OutboxFull):
                    link.post(Error("media_dropped", f"{self._dropped} frames of the caller's audio were dropped"))

    # What it asks for

    async def run(self) -> None:
        """Fork a worker and do what it asks for; when it dies in mid-call, another takes over, and so on."""
        if self._taken_up:
            self._introduce()
        elif self._in_transit is None:
            self.tell(self._call.metadata)
        try:
            await self._serve_worker()
            while not self._call.over and self._replace_worker():
                await self._serve_worker()
        except NoWorker as error:
            log.error("no worker for this call", reason=str(error))
            self._generation.tally.crash(self._call.id)
            self._call.end("no worker", fallback=True)
        except Exception:  # the call's boundary on this side
            log.exception("what the worker asked for failed")
            self._call.end("internal error", fallback=True)
        self.gone.set()

    async def _serve_worker(self) -> None:
        """Return when the worker is gone, and all it said was done; what it did not live to see is given up."""
        async with self._generation.worker(self.worker), trio.open_nursery() as nursery:
            if self._in_transit is not None and self._in_transit.worker.pid == self.worker.pid:
                self.requests.take_over(self._in_transit.requests, nursery)
            await self._obey(nursery)
            await self.worker.exited.wait()
            nursery.cancel_scope.cancel()

    async def _obey(self, nursery: trio.Nursery) -> None:
        try:
            await self.worker.ready()
            self._call.steps.add("worker", "ready", {"pid": str(self.worker.pid)})
            await self._obey_each(nursery)
        except (ProtocolError, LinkClosed) as error:
            if not self._call.over:
                log.error("worker breaks the protocol and is killed", error=type(error).__name__, reason=str(error))
            self.worker.kill("protocol" if isinstance(error, ProtocolError) else None)

    async def _obey_each(self, nursery: trio.Nursery) -> None:
        """Do what it asks for as it comes; whenever that is more than the carrier or others can bear, read on later."""
        flow, link, leg, pause = Flow(trio.current_time), self.worker.link, self._call.leg, 0.0

        def take(command: Command) -> bool:
            nonlocal pause
            pause = flow.took()
            if isinstance(command, Post):
                leg.post(command.message)
                return pause > 0 or not leg.has_room
            self._do(command, nursery)
            return pause > 0

        while True:
            await link.each(take)
            if link.ended:
                return
            with self.worker.held_back():
                await leg.room()
                await trio.sleep(pause)

    def _replace_worker(self) -> bool:
        """A worker died in mid-call: have another take over, or the caller given the fallback when that was often."""
        dead, code = self.worker, self.worker.exit_code
        cause, status = dead.death
        metrics.WORKER_DEATHS.labels(cause, status).inc()
        self._generation.tally.crash(self._call.id)
        if not self._recovery.may_restart(trio.current_time()):
            log.error("worker died in mid-call", pid=dead.pid, exit_code=code)
            self._call.end(f"worker died ({code})", fallback=True)
            return False
        log.error("worker died in mid-call, and another takes over", pid=dead.pid, exit_code=code)
        self.worker, self._dropped = Worker(self._generation.name, self._call.id), 0
        metrics.WORKER_RESTARTS.labels(cause).inc()
        dead.close()
        self._requests = None
        self._introduce()
        return True

    def _introduce(self) -> None:
        """Tell a new worker what its predecessor knew."""
        for event in list(self._recovery.introduction(self._call.leg.orphaned())):
            self._call.steps.told(event, self.worker.pid)
            with suppress(LinkClosed, OutboxFull):
                self.worker.link.post(event, droppable=isinstance(event, Media))

    def _do(self, command: Command, nursery: trio.Nursery) -> None:
        if isinstance(command, Heartbeat):
            self.worker.heartbeat(command.lag_ms)
            return
        self._call.steps.asked(command, self.worker.pid)
        if isinstance(command, Abort):
            self._call.leg.abort(command.uuid)
        elif isinstance(command, Trace):
            self._trace(command)
        elif isinstance(command, Turn):
            self._turn(command)
        elif isinstance(command, Checkpoint):
            self._recovery.saved(command)
        elif isinstance(command, Request):
            self._call.steps.add("request", type(command).__name__)
            self.requests.take(command, nursery)

    def _trace(self, trace: Trace) -> None:
        if trace.kind == "log":
            level = trace.fields.get("level", "info")
            say = getattr(log, level if level in ("debug", "info", "warning", "error") else "info")
            say(trace.text, logger=trace.fields.get("logger", "agent"))
            return
        if trace.text:
            log.info(trace.kind, text=trace.text, speech=True)
        self._call.steps.traced(trace)

    def _turn(self, turn: Turn) -> None:
        self._generation.tally.turn(self._call.id, turn)
        metrics.turn(turn)
        self._call.steps.add("turn", turn.outcome, turn_fields(turn))
