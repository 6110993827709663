"""The tree: one nursery holds the listeners, the generation and the calls, and ends them in the right order."""

import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any

import httpx
import structlog
import trio

from dialog_supervisor import metrics, orphans
from dialog_supervisor.admission import REMEDIES, Admission, Objection
from dialog_supervisor.autoreload import Watch
from dialog_supervisor.call import Call, State
from dialog_supervisor.carriers.twilio.addresses import PREFIX as TWILIO_PREFIX
from dialog_supervisor.carriers.twilio.gateway import MakeLeg, TwilioGateway
from dialog_supervisor.carriers.twilio.rest import TwilioRest
from dialog_supervisor.cgroups import GROUPS, ancestry
from dialog_supervisor.config import Config
from dialog_supervisor.confinement import check_sandbox
from dialog_supervisor.control.app import Controlled, Refused, serve_control
from dialog_supervisor.control.scrape import serve_figures
from dialog_supervisor.event_logs import EventLogs
from dialog_supervisor.figures import Figures
from dialog_supervisor.generation import Generation
from dialog_supervisor.generations import Generations, no_code
from dialog_supervisor.http import Listener, Request, Response, Upgrade
from dialog_supervisor.keeper import Keeper, Missing, open_store
from dialog_supervisor.listening import listen, tls
from dialog_supervisor.machine import Machine
from dialog_supervisor.records import Record
from dialog_supervisor.recovery import may_take_up
from dialog_supervisor.snapshot import GenerationFailed
from dialog_supervisor.systemd import ServiceNotifier, inherited_listener
from dialog_supervisor.usage import Meter
from dialog_supervisor.worker import Worker
from protocol.messages import Metadata

log = structlog.get_logger("dialogd")


class Supervisor(Controlled):
    """Owns the phone lines: admits calls, knows them by id and by token, and runs each in a task of its own.

    With `watch`, the agent's code is loaded again whenever it has changed.
    """

    def __init__(self, config: Config, *, watch: bool = False) -> None:
        self._config = config
        self._calls: dict[str, Call] = {}
        self._generations = Generations(config)
        self._watch = Watch(config.agent_path, no_code(config)) if watch else None
        self._nursery: trio.Nursery | None = None
        self._admission = Admission(config.calls.max_calls)
        self._machine = Machine(config.calls, ancestry())
        self._keeper = Keeper(open_store(config.store), self._calls, config.calls.max_duration)
        self._call_ended = trio.Event()
        self._started_at = trio.current_time()
        self._listener: Listener | None = None
        self._figures = Figures(self)
        self._events = EventLogs(config.events)
        self._service = ServiceNotifier(config.environ, self._summary)

    async def run(self) -> None:
        """Serve until told to stop. Raises `ConfigError` or `GenerationFailed` when it cannot start."""
        check_sandbox(self._config)
        context = tls(self._config)
        address = self._config.gateway.listen
        listening = inherited_listener(self._config.environ, os.getpid()) or listen(self._config, "gateway.listen", address)
        async with httpx.AsyncClient() as http, trio.open_nursery() as nursery:
            nursery.start_soon(self._events.run)
            with listening, trio.open_signal_receiver(signal.SIGHUP) as hangups:
                await GROUPS.enter(self._config.workers)
                await nursery.start(orphans.run)
                await nursery.start(self._machine.run)
                await nursery.start(self._keeper.run)
                if self._watch is not None:
                    await self._watch.begin()
                nursery.start_soon(Meter(self._config.workers, self._workers, lambda: self._machine.tasks).run)
                await nursery.start(self._generations.run)
                gateway = TwilioGateway(self._config, self, TwilioRest(self._config.twilio, http))
                self._listener = Listener(self._config.gateway, partial(self._handle, gateway), context)
                await nursery.start(serve_control, self, self._config.control.socket)
                await nursery.start(serve_figures, self._config, self.render_figures, self._health)
                nursery.start_soon(metrics.watch_loop)
                with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                    async with trio.open_nursery() as calls:
                        self._nursery, self._admission.started = calls, True
                        nursery.start_soon(self._listener.serve, listening)  # who connected before waits in the backlog
                        nursery.start_soon(self._reload_on, hangups)
                        if self._watch is not None:
                            nursery.start_soon(self._watch.run, self.reload)
                        self._say_ready(listening)
                        nursery.start_soon(self._service.run)
                        await self._until_told_to_stop(signals, calls)
                await self._keeper.close()
                nursery.cancel_scope.cancel()
        log.info("stopped")

    def _say_ready(self, listening: socket.socket) -> None:
        host, port = listening.getsockname()[:2]
        log.info("ready", listen=f"{host}:{port}", public_url=self._config.gateway.public_url, pid=os.getpid())
        self._service.ready()

    def _summary(self) -> str:
        doing = "taking calls" if self._admission.open else "not taking calls"
        canary = f", canary {self._generations.canary}" if self._generations.canary else ""
        return f"{doing}; {len(self._calls)} under way; generation {self._generations.current.name}{canary}"

    async def _handle(self, gateway: TwilioGateway, request: Request) -> Response | Upgrade:
        with metrics.webhook(request.path) as answered:
            answer = await self._route(gateway, request)
            answered(101 if isinstance(answer, Upgrade) else answer.status)
            return answer

    async def _route(self, gateway: TwilioGateway, request: Request) -> Response | Upgrade:
        if request.path.startswith(TWILIO_PREFIX):
            return await gateway.handle(request)
        if request.path == "/healthz" and request.method in ("GET", "HEAD"):
            return self._health()
        return Response(404, "there is nothing here\n")

    def _health(self) -> Response:
        if self._admission.open:
            return Response(200, "ok\n")
        return Response(503, "stopping\n" if self._admission.stopping else "draining\n")

    async def _reload_on(self, hangups: AsyncIterator[int]) -> None:
        async for _ in hangups:
            with suppress(GenerationFailed):  # logged where it happened
                await self.reload()

    async def _until_told_to_stop(self, signals: AsyncIterator[int], calls: trio.Nursery) -> None:
        """Wait for a signal, let the calls end, and return; a second signal ends them at once.

        SIGTERM leaves the calls `drain_timeout`; SIGINT, which is somebody at the keyboard, brings them the fallback now.
        """
        number = await anext(signals)
        self._admission.stopping = True
        timeout_s = 0.0 if number == signal.SIGINT else self._config.calls.drain_timeout
        log.info("stopping", signal=signal.Signals(number).name, calls=len(self._calls), drain_timeout=timeout_s)
        self._service.stopping()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain, timeout_s, nursery.cancel_scope)
            number = await anext(signals)
            log.warning("stopping now", signal=signal.Signals(number).name, calls=len(self._calls))
            calls.cancel_scope.cancel()

    async def _drain(self, timeout_s: float, scope: trio.CancelScope) -> None:
        """Cancel `scope` when no call is left: each may end by itself for so long, and is then made to.

        From then on the carrier's last reports, of a recording for one, have as long as it has to follow a call's end.
        """
        with trio.move_on_after(timeout_s):
            await self._until_quiet()
        for call in tuple(self._calls.values()):
            self._force(call, timeout_s)
        with trio.move_on_after(self._config.calls.ending_timeout):
            await self._until_quiet()
        for call in tuple(self._calls.values()):
            self._forgo_reports(call)
        await self._until_quiet()
        scope.cancel()

    async def _until_quiet(self) -> None:
        while self._calls:
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

    # For the gateways

    def admit(self, metadata: Metadata, make_leg: MakeLeg) -> Call | None:
        """Begin a call, or return None when none is taken now."""
        return self._begin(metadata, make_leg, None)

    async def resume(self, call_id: str, line: Callable[[Metadata], MakeLeg], timeout_s: float) -> Call | Missing:
        """Go on with a call that a dead dialogd left, or say why not."""
        async with self._keeper.taking(call_id):
            if (call := self.find(call_id)) is not None:
                return call
            record = await self._keeper.take(call_id, timeout_s)
            if isinstance(record, Missing):
                return record
            metadata = record.state.metadata
            may = not record.fallback and self._may_take_up(record)
            begun = self._begin(metadata, line(metadata), record) if may else None
            if begun is None:
                self._keeper.ended(call_id)
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
        await self._keeper.forget(call_id)

    def _begin(self, metadata: Metadata, make_leg: MakeLeg, record: Record | None) -> Call | None:
        why = self._admission.objection(len(self._calls)) or self._machine.lack
        if why is not None or self._nursery is None:
            self._refuse(metadata.call_id, why or "draining")
            return None
        generation, keeper = self._generations.for_next_call(), self._keeper
        try:
            call = Call(
                metadata,
                make_leg,
                generation,
                self._config.calls,
                self._config.transfer,
                event_logs=self._events,
                note=keeper.note,
            )
        except OSError as error:
            log.error("a call cannot be taken", call=metadata.call_id, reason=error.strerror, remedy="raise LimitNOFILE")
            self._admission.refuse(metadata.call_id, "system")
            return None
        if record is not None:
            call.take_up(record.state, record.unsettled, record.age_s)
        self._calls[call.id] = call
        metrics.CALLS_BEGUN.inc()
        generation.hold(call.id)
        keeper.note(call.id)
        self._nursery.start_soon(self._run_call, call, generation)
        return call

    def _refuse(self, call_id: str, why: Objection) -> None:
        if self._admission.refuse(call_id, why):
            figures = self._machine.describe() | {"calls": len(self._calls)}
            log.warning("call refused", call=call_id, reason=why, remedy=REMEDIES[why], **figures)

    async def _run_call(self, call: Call, generation: Generation) -> None:
        try:
            await call.run()
        except Exception:  # a call's boundary: what goes wrong in one must not end the others
            log.exception("call failed", call=call.id)
        finally:
            del self._calls[call.id]
            self._figures.ended(call)
            generation.let_go(call.id)
            self._call_ended.set()
        self._keeper.ended(call.id)  # not when cancelled: who cancels calls closes the store, or is about to die

    def find(self, call_id: str) -> Call | None:
        """Return the call of this id, if it has not ended."""
        return self._calls.get(call_id)

    def claim(self, token: str) -> Call | None:
        """Return the call whose media socket this token opens, once."""
        return next((call for call in self._calls.values() if call.claim(token)), None)

    def _workers(self) -> list[Worker]:
        return [call.worker for call in self._calls.values()]

    # For the control API

    def calls(self) -> Sequence[Call]:
        """Return the calls that have not ended."""
        return tuple(self._calls.values())

    def status(self) -> dict[str, Any]:
        """Return dialogd's state in figures."""
        states = Counter(call.state.value for call in self._calls.values())
        return {
            "version": version("dialog-supervisor"),
            "pid": os.getpid(),
            "uptime_s": round(trio.current_time() - self._started_at, 1),
            **self._admission.describe(),
            "calls": len(self._calls),
            "states": {state.value: states[state.value] for state in State if state is not State.ENDED},
            "workers": self._generations.workers,
            "machine": self._machine.describe(),
            "store": self._keeper.describe(),
            "cgroup": GROUPS.describe(),
            "connections": self._listener.connections if self._listener else 0,
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "generation": self._generations.current.name,
            "canary": self._generations.canary,
            "generations": self._generations.describe(),
        }

    def render_figures(self) -> str:
        """Return all figures as Prometheus reads them."""
        return self._figures.render()

    def generations(self) -> Sequence[dict[str, Any]]:
        """Return the versions of the agent's code, the oldest first."""
        return self._generations.describe()

    def drain(self) -> dict[str, Any]:
        """Take no other call; those under way go on, and nothing else changes."""
        if not self._admission.draining:
            self._admission.draining = True
            log.info("draining", calls=len(self._calls))
        return self._admission.describe() | {"calls": len(self._calls)}

    def undrain(self) -> dict[str, Any]:
        """Take calls again. Raises `Refused` when dialogd is stopping."""
        if self._admission.stopping:
            raise Refused("dialogd is stopping, and takes no calls any more; start another")
        if self._admission.draining:
            self._admission.draining = False
            log.info("taking calls again", calls=len(self._calls))
        return self._admission.describe() | {"calls": len(self._calls)}

    async def reload(self) -> dict[str, Any]:
        """Have the next call use the agent's code as it is now. Raises `GenerationFailed`."""
        self._refuse_when_stopping("reload")
        with self._service.reloading():
            return await self._generations.reload()

    async def rollback(self) -> dict[str, Any]:
        """End the canary, or have the next call use the code that was current before. Raises `GenerationFailed`."""
        self._refuse_when_stopping("rollback")
        return await self._generations.rollback()

    async def promote(self) -> dict[str, Any]:
        """Have all next calls use the canary's code. Raises `GenerationFailed`."""
        self._refuse_when_stopping("promote")
        return await self._generations.promote()

    def _refuse_when_stopping(self, what: str) -> None:
        if self._admission.stopping:
            log.warning(f"no {what}, because dialogd is stopping")
            raise GenerationFailed(f"dialogd is stopping, and does not {what} any more")
