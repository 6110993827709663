"""The tree: one nursery holds the listeners, the generations and the calls, and ends them in the right order."""

import gc
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any

import httpx
import structlog
import trio

from dialog_supervisor import descriptors
from dialog_supervisor.autoreload import Watch
from dialog_supervisor.call import Call
from dialog_supervisor.carriers.twilio.addresses import PREFIX as TWILIO_PREFIX
from dialog_supervisor.carriers.twilio.addresses import Addresses
from dialog_supervisor.carriers.twilio.gateway import TwilioGateway
from dialog_supervisor.carriers.twilio.rest import TwilioRest
from dialog_supervisor.config import Config
from dialog_supervisor.confinement import orphans
from dialog_supervisor.confinement.agents import check_sandbox
from dialog_supervisor.confinement.cgroups import GROUPS, ancestry
from dialog_supervisor.confinement.usage import Meter
from dialog_supervisor.connections import Listener
from dialog_supervisor.control.app import Controlled, Refused, serve_control
from dialog_supervisor.control.scrape import serve_figures
from dialog_supervisor.generations import Generations, no_code
from dialog_supervisor.http import Request, Response, Upgrade
from dialog_supervisor.listening import listen, tls
from dialog_supervisor.machine import Machine
from dialog_supervisor.signals import Signals
from dialog_supervisor.snapshot import GenerationFailed
from dialog_supervisor.store.keeper import open_store
from dialog_supervisor.switchboard import Switchboard
from dialog_supervisor.systemd import ServiceNotifier, inherited_listener
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.telemetry.figures import Figures
from dialog_supervisor.upgrade.handover import Handover
from dialog_supervisor.upgrade.succession import Succession
from dialog_supervisor.worker import Worker
from protocol.readiness import Readers

log = structlog.get_logger("dialogd")


class Supervisor(Controlled):
    """Owns the phone lines, from the first listener to the last call, and answers the control API.

    With `watch`, the agent's code is loaded again whenever it has changed. `handed` is what another version of this process
    has left for it.
    """

    def __init__(self, config: Config, *, watch: bool = False, handed: Handover | None = None) -> None:
        self._config = config
        self._handed = handed
        self._generations = Generations(config)
        self._watch = Watch(config.agent_path, no_code(config)) if watch else None
        self._machine = Machine(config.calls, ancestry())
        self._figures = Figures(self)
        lease = None if handed is None else handed.lease
        store = open_store(config.store, lease)
        self._switchboard = Switchboard(config, self._generations, self._machine, store, self._figures.ended)
        self._admission = self._switchboard.admission
        self._succession = Succession(self._switchboard, self._generations, handed)
        self._addresses = Addresses(config.gateway)
        self._listener: Listener | None = None
        self._probes = {"/healthz": self._health, "/readyz": self._readiness}
        self._upgrade_wanted = trio.Event()
        self._service = ServiceNotifier(config.environ, self._summary)

    async def run(self) -> None:
        """Serve until told to stop. Raises `ConfigError` or `GenerationFailed` when it cannot start."""
        check_sandbox(self._config)
        descriptors.permit(self._config)
        context, listening = tls(self._config), self._listen()
        hangups, stops = Signals([signal.SIGHUP]), Signals([signal.SIGTERM, signal.SIGINT])
        with hangups, stops, listening:
            async with httpx.AsyncClient() as http, trio.open_nursery() as nursery:
                starting = await nursery.start(self._stop_in_the_start, stops, nursery.cancel_scope)
                await nursery.start(Readers().run)
                nursery.start_soon(self._switchboard.events.run)
                await GROUPS.enter(self._config.workers)
                await nursery.start(orphans.run)
                await nursery.start(self._machine.run)
                if self._watch is not None:
                    await self._watch.begin()
                gateway = TwilioGateway(self._config, self._switchboard, TwilioRest(self._config.twilio, http))
                self._succession.take_over(lambda metadata: partial(gateway.leg, metadata))
                nursery.start_soon(Meter(self._config.workers, self._workers, lambda: self._machine.tasks).run)
                await nursery.start(self._generations.run)
                self._listener = Listener(self._config.gateway, partial(self._handle, gateway), context)
                await nursery.start(serve_control, self, self._config.control.socket)
                await nursery.start(serve_figures, self._config, self.render_figures, self._probes)
                nursery.start_soon(metrics.watch_loop)
                starting.cancel()
                async with trio.open_nursery() as calls:
                    self._switchboard.open(calls)
                    await nursery.start(self._listener.serve, listening)  # who connected before waits in the backlog
                    self._succession.go_on(self._listener)
                    await nursery.start(self._switchboard.keeper.run)  # to which a call not there by now has ended
                    nursery.start_soon(self._reload_on, hangups)
                    nursery.start_soon(self._upgrade_when_wanted, self._listener)
                    if self._watch is not None:
                        nursery.start_soon(self._watch.run, self.reload)
                    _forget_what_stays()
                    self._say_ready(listening)
                    nursery.start_soon(self._service.run)
                    await self._until_told_to_stop(stops, calls)
                await self._switchboard.keeper.close()
                nursery.cancel_scope.cancel()
        log.info("stopped")

    async def _stop_in_the_start(
        self, stops: Signals, everything: trio.CancelScope, *, task_status: trio.TaskStatus[trio.CancelScope]
    ) -> None:
        """End at a signal, until what this starts with is cancelled; a dialogd with calls takes them over first."""
        with trio.CancelScope() as starting:
            task_status.started(starting)
            if self._handed is None:
                number = await anext(stops)
                log.info("stopping before it was ready", signal=number.name)
                everything.cancel()

    def _listen(self) -> socket.socket:
        if self._handed is not None:
            return socket.socket(fileno=self._handed.listener)
        config = self._config
        return inherited_listener(config.environ, os.getpid()) or listen(config, "gateway.listen", config.gateway.listen)

    def _say_ready(self, listening: socket.socket) -> None:
        host, port = listening.getsockname()[:2]
        gateway = self._config.gateway
        node = {"node": gateway.node} if gateway.node else {}
        log.info("ready", listen=f"{host}:{port}", public_url=gateway.public_url, pid=os.getpid(), **node)
        GROUPS.tell()
        self._service.ready()

    def _summary(self) -> str:
        doing = "taking calls" if self._admission.open else "not taking calls"
        canary = f", canary {self._generations.canary}" if self._generations.canary else ""
        return f"{doing}; {len(self._switchboard.calls)} under way; generation {self._generations.current.name}{canary}"

    async def _handle(self, gateway: TwilioGateway, request: Request) -> Response | Upgrade:
        path = self._addresses.here(request.path)
        with metrics.webhook(path) as answered:
            answer = await self._route(gateway, request, path)
            answered(101 if isinstance(answer, Upgrade) else answer.status)
            return answer

    async def _route(self, gateway: TwilioGateway, request: Request, path: str) -> Response | Upgrade:
        if path.startswith(TWILIO_PREFIX):
            return await gateway.handle(request)
        if path in self._probes and request.method in ("GET", "HEAD"):
            return self._probes[path]()
        return Response(404, "there is nothing here\n")

    def _health(self) -> Response:
        if self._admission.open:
            return Response(200, "ok\n")
        return Response(503, "stopping\n" if self._admission.stopping else "draining\n")

    def _readiness(self) -> Response:
        why = self._switchboard.objection
        return Response(200, "ok\n") if why is None else Response(503, f"{why}\n")

    async def _reload_on(self, hangups: Signals) -> None:
        async for _ in hangups:
            with suppress(GenerationFailed):  # logged where it happened
                await self.reload()

    async def _until_told_to_stop(self, signals: Signals, calls: trio.Nursery) -> None:
        """Wait for a signal, let the calls end, and return; a second signal ends them at once.

        SIGTERM leaves the calls `drain_timeout`; SIGINT, which is somebody at the keyboard, brings them the fallback now.
        """
        number = await anext(signals)
        self._admission.stopping = True
        timeout_s = 0.0 if number == signal.SIGINT else self._config.calls.drain_timeout
        log.info("stopping", signal=number.name, calls=len(self._switchboard.calls), drain_timeout=timeout_s)
        self._service.stopping()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain, timeout_s, nursery.cancel_scope)
            number = await anext(signals)
            log.warning("stopping now", signal=number.name, calls=len(self._switchboard.calls))
            calls.cancel_scope.cancel()

    async def _drain(self, timeout_s: float, scope: trio.CancelScope) -> None:
        await self._switchboard.drain(timeout_s)
        scope.cancel()

    def _workers(self) -> list[Worker]:
        return [call.worker for call in self._switchboard.calls.values()]

    # For the control API

    def find(self, call_id: str) -> Call | None:
        """Return the call of this id, if it has not ended."""
        return self._switchboard.find(call_id)

    def calls(self) -> Sequence[Call]:
        """Return the calls that have not ended."""
        return tuple(self._switchboard.calls.values())

    def status(self) -> dict[str, Any]:
        """Return dialogd's state in figures."""
        return {
            "version": version("dialog-supervisor"),
            "pid": os.getpid(),
            "uptime_s": round(trio.current_time() - self._succession.began_at, 1),
            "upgrades": self._succession.count,
            "upgrade_failed": self._succession.failed,
            "away_ms": self._succession.away_ms,
            **self._admission.describe(),
            "calls": len(self._switchboard.calls),
            "states": self._switchboard.states(),
            "workers": self._generations.workers,
            "machine": self._machine.describe(),
            "store": self._switchboard.keeper.describe(),
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
            log.info("draining", calls=len(self._switchboard.calls))
        return self._admission.describe() | {"calls": len(self._switchboard.calls)}

    def undrain(self) -> dict[str, Any]:
        """Take calls again. Raises `Refused` when dialogd is stopping."""
        if self._admission.stopping:
            raise Refused("dialogd is stopping, and takes no calls any more; start another")
        if self._admission.draining:
            self._admission.draining = False
            log.info("taking calls again", calls=len(self._switchboard.calls))
        return self._admission.describe() | {"calls": len(self._switchboard.calls)}

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

    async def upgrade(self) -> dict[str, Any]:
        """Go on as the version that is installed now, soon after this has returned. Raises `Refused` or `UpgradeFailed`."""
        if self._admission.stopping or self._listener is None:
            raise Refused("dialogd is stopping, and goes on as it is")
        if self._succession.under_way:
            raise Refused("another upgrade is under way")
        if self._config.gateway.certificate is not None:
            raise Refused(
                "TLS ends in dialogd, and its sessions cannot be handed over; let a proxy do TLS, or restart dialogd"
            )
        await self._succession.try_out(self._listener)
        self._upgrade_wanted.set()
        return {"upgrades": self._succession.count}

    async def _upgrade_when_wanted(self, listener: Listener) -> None:
        while True:
            await self._upgrade_wanted.wait()
            self._upgrade_wanted = trio.Event()
            await self._succession.run(listener)

    def _refuse_when_stopping(self, what: str) -> None:
        if self._admission.stopping:
            log.warning(f"no {what}, because dialogd is stopping")
            raise GenerationFailed(f"dialogd is stopping, and does not {what} any more")


def _forget_what_stays() -> None:
    """Have the collector look only at what calls make from now on: all that is here by now stays."""
    gc.collect()
    gc.freeze()
