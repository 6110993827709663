"""A template process seen from outside: started, spoken to over its socket, watched whether it answers, and ended."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager, suppress

import msgspec
import structlog
import trio
from msgspec import Struct

from dialog_supervisor.config import Config
from dialog_supervisor.confinement import orphans
from dialog_supervisor.confinement.agents import confinement
from dialog_supervisor.confinement.proc import state_of
from dialog_supervisor.rhythm import next_beat
from dialog_supervisor.snapshot import GenerationFailed, Snapshot
from dialog_supervisor.template import MAX_PACKET_BYTES, Exited, Failed, Fork, Forked, ForkFailed, Ping, Ready, Report
from dialog_supervisor.worker import Worker
from protocol.messages import PROTOCOL_VERSION

START_TIMEOUT_S = 60.0  # for the agent's imports
PING_S = 1.0
ANSWER_TIMEOUT_S = 3.0  # for a template, which answers within milliseconds, or within as many as a busy machine takes
_STOPPED = "T"  # a state of proc_pid_stat(5)
_TEMPLATE = ("-P", "-m", "dialog_supervisor.template")  # -P: nothing is imported from dialogd's own working directory

log = structlog.get_logger("generation")
_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


class NoWorker(Exception):
    """No worker could be forked."""


class TemplateState(Struct, frozen=True, forbid_unknown_fields=True):
    """A template process: a child of the process that goes on with it, as it was of the one before."""

    pid: int
    control_fd: int


class Inherited:
    """A child of this process that it started before it was executed anew."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def kill(self) -> None:
        """End it now."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> None:
        """Wait until it has ended."""
        await trio.lowlevel.wait_readable(self._pidfd)
        self._reap()

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)


class TemplateProcess:
    """One template. `workers` are its generation's, by pid: it enters those that it forks, and tells them how they ended."""

    def __init__(
        self, process: trio.Process | Inherited, control: socket.socket, name: str, workers: MutableMapping[int, Worker]
    ) -> None:
        self._process = process
        self._control = control
        self._name = name
        self._workers = workers
        self._forking: dict[str, _Pending] = {}
        self._heard_at = 0.0

    @classmethod
    async def started(cls, config: Config, snapshot: Snapshot, workers: MutableMapping[int, Worker]) -> "TemplateProcess":
        """Start one; `ready` tells when it can fork. Raises `GenerationFailed`."""
        python = str(config.file.parent / config.agent.python) if config.agent.python else sys.executable
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        told = [_json(config.workers), _json(confinement(config, snapshot))]
        arguments = [str(theirs.fileno()), str(snapshot.directory), config.agent.entry, snapshot.name, *told]
        try:
            with theirs:
                process = await _spawn(config, [python, *_TEMPLATE, *arguments], theirs.fileno())
        except BaseException:
            ours.close()
            raise
        return cls(process, ours, snapshot.name, workers)

    @classmethod
    def taken_over(cls, state: TemplateState, name: str, workers: MutableMapping[int, Worker]) -> "TemplateProcess":
        """Return one that was started before this process was executed anew. It is ready."""
        control = socket.socket(fileno=state.control_fd)
        control.setblocking(False)
        return cls(Inherited(state.pid), control, name, workers)

    def hand_over(self) -> TemplateState | None:
        """Return what another process needs to go on with it: nothing while it forks."""
        return None if self._forking else TemplateState(self._process.pid, self._control.fileno())

    async def ready(self, config: Config, snapshot: Snapshot) -> None:
        """Wait until it has imported the agent. Raises `GenerationFailed`."""
        report = None
        with trio.move_on_after(START_TIMEOUT_S) as patience:
            report = await self._first_report()
        if patience.cancelled_caught:
            raise GenerationFailed(f"importing {config.agent.entry} takes over {START_TIMEOUT_S:g} s")
        match report:
            case Ready(version=version) if version == PROTOCOL_VERSION:
                return
            case Ready(version=version):
                raise GenerationFailed(
                    f"the agent's interpreter has protocol version {version}, dialogd {PROTOCOL_VERSION}; "
                    "install the same dialog-supervisor in both"
                )
            case Failed(reason=reason):
                raise GenerationFailed(snapshot.as_written(reason))
            case _:
                raise GenerationFailed("the template process ended before it was ready; its last words are above")

    async def _first_report(self) -> Report | None:
        """Return what it says when it has started. Raises `GenerationFailed` if it was stopped: imports take their time."""
        stopped_s = 0.0
        while stopped_s < ANSWER_TIMEOUT_S:
            with trio.move_on_after(PING_S):
                report, _ = await _receive(self._control)
                return report
            stopped = False
            with suppress(OSError):
                stopped = state_of(self._process.pid) == _STOPPED
            stopped_s = stopped_s + PING_S if stopped else 0.0
        raise GenerationFailed(f"a signal has stopped the template process in its start, {ANSWER_TIMEOUT_S:g} s ago")

    async def serve(self) -> None:
        """Take its reports, until it is gone or answers no more."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ping, nursery.cancel_scope)
            await self._listen()
            nursery.cancel_scope.cancel()

    async def _ping(self, serving: trio.CancelScope) -> None:
        """Give up a template that is stopped, or hangs, before a caller has to wait for it."""
        self._heard_at = asked_at = trio.current_time()
        while self._heard_at >= asked_at or trio.current_time() < asked_at + ANSWER_TIMEOUT_S:
            if self._heard_at >= asked_at:
                asked_at = trio.current_time()
                with suppress(OSError):  # a full socket was not read, and a closed one is noticed where it is read
                    self._control.send(msgspec.msgpack.encode(Ping()))
            await trio.sleep_until(next_beat(PING_S))
        log.error("the template process does not answer and is killed", generation=self._name, silent_s=ANSWER_TIMEOUT_S)
        serving.cancel()

    async def _listen(self) -> None:
        while True:
            report, fds = await _receive(self._control)
            self._heard_at = trio.current_time()
            match report:
                case Forked(call_id=call_id) if not fds and (pending := self._forking.pop(call_id, None)):
                    pending.failure = "there is no descriptor left for it; raise LimitNOFILE"  # its link's end ends it
                    pending.done.set()
                case Forked(call_id=call_id, pid=pid) if fds and (pending := self._forking.pop(call_id, None)):
                    pending.worker.forked(pid, fds.pop())
                    self._workers[pid] = pending.worker
                    pending.done.set()
                case ForkFailed(call_id=call_id, reason=reason) if pending := self._forking.pop(call_id, None):
                    pending.failure = reason
                    pending.done.set()
                case Exited(pid=pid, code=code) if worker := self._workers.get(pid):
                    worker.reported(code)
                case None:
                    return
            for fd in fds:  # of a fork that nobody waits for any more
                os.close(fd)

    async def fork(self, worker: Worker) -> None:
        """Have it fork a worker's process; when it ends meanwhile, there is none. Raises `NoWorker`."""
        pending = self._forking[worker.call_id] = _Pending(worker)
        try:
            with suppress(ConnectionError, trio.ClosedResourceError):  # it has died, and whoever waits is told
                await self._ask(worker)
            await pending.done.wait()
        except OSError as error:
            raise NoWorker(f"the template process cannot be asked for one: {error.strerror}") from error
        finally:
            self._forking.pop(worker.call_id, None)
        if pending.failure:
            raise NoWorker(pending.failure)

    async def _ask(self, worker: Worker) -> None:
        packet = msgspec.msgpack.encode(Fork(worker.call_id))
        while True:
            try:
                socket.send_fds(self._control, [packet], worker.theirs)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._control.fileno())
            else:
                return

    @asynccontextmanager
    async def ending(self) -> AsyncIterator[None]:
        """End it when the block is left, and tell those who wait for a fork."""
        try:
            yield
        finally:
            for pending in self._forking.values():
                pending.done.set()
            trio.lowlevel.notify_closing(self._control)
            self._control.close()
            self._process.kill()
            with trio.CancelScope(shield=True):
                await self._process.wait()
            orphans.forget(self._process.pid)


class _Pending:
    """A fork asked for and not yet answered."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.done = trio.Event()
        self.failure = ""


async def _spawn(config: Config, command: list[str], control_fd: int) -> trio.Process:
    environ = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | config.agent_environ()
    try:
        async with orphans.starting():
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.DEVNULL, env=environ, pass_fds=[control_fd], start_new_session=True
            )
            orphans.expect(process.pid)
    except OSError as error:
        raise GenerationFailed(f"agent.python: {command[0]} cannot be run: {error.strerror}") from None
    return process


async def _receive(control: socket.socket) -> tuple[Report | None, list[int]]:
    """Return the next report and the descriptors that came with it; None when the template is gone."""
    while True:
        await trio.lowlevel.wait_readable(control.fileno())
        try:
            data, fds, _, _ = socket.recv_fds(control, MAX_PACKET_BYTES, 1)
        except BlockingIOError:
            continue
        except ConnectionError:
            return None, []
        return (_decoder.decode(data) if data else None), fds


def _json(value: object) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()  # the hook: for paths
