"""One version of the agent's code: the template process that has imported it, and the workers forked from it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import msgspec
import structlog
import trio
from msgspec import Struct

from dialog_supervisor import metrics, orphans
from dialog_supervisor.config import Config
from dialog_supervisor.confinement import confinement, remove_scratch
from dialog_supervisor.snapshot import GenerationFailed, Snapshot
from dialog_supervisor.tally import Tally, TallyState
from dialog_supervisor.template import MAX_PACKET_BYTES, Exited, Failed, Fork, Forked, ForkFailed, Ping, Ready, Report
from dialog_supervisor.worker import Worker
from protocol.messages import PROTOCOL_VERSION

START_TIMEOUT_S = 60.0  # for the agent's imports
WORKER_TIMEOUT_S = 15.0  # for a fork, also where the template has to be started again first: callers wait so long
PING_S = 1.0
ANSWER_TIMEOUT_S = 3.0  # for a template, which answers within milliseconds, or within as many as a busy machine takes
_RESTART_PAUSE_S = 1.0  # between two starts
_TEMPLATE = ("-P", "-m", "dialog_supervisor.template")  # -P: nothing is imported from dialogd's own working directory

log = structlog.get_logger("generation")
_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


class NoWorker(Exception):
    """No worker could be forked."""


class TemplateState(Struct, frozen=True, forbid_unknown_fields=True):
    """A template process: a child of the process that goes on with it, as it was of the one before."""

    pid: int
    control_fd: int


class GenerationState(Struct, frozen=True, forbid_unknown_fields=True):
    """A generation that another process goes on with, and its template, if that runs."""

    snapshot: Snapshot
    age_s: float
    tally: TallyState
    retired: bool
    template: TemplateState | None


class Generation:
    """The agent's code as it was when this generation began, able to fork a worker for a call.

    Its template runs while the generation is current, is a canary or has calls; once it is retired, it ends with the last of
    them. `counted` is called when something was added to its tally.
    """

    def __init__(self, config: Config, snapshot: Snapshot, counted: Callable[[], None] = lambda: None) -> None:
        self.snapshot = snapshot
        self.began_at = trio.current_time()
        self.tally = Tally(counted)
        self._config = config
        self._inherited: TemplateState | None = None  # from the process that had this generation before
        self._process: trio.Process | Inherited
        self._control: socket.socket | None = None
        self._serving = trio.Event()  # there is a template that forks
        self._heard_at = 0.0  # from the template
        self._forking: dict[str, _Pending] = {}
        self._workers: dict[int, Worker] = {}
        self._retired = False
        self._life: trio.CancelScope | None = None
        self.ended = trio.Event()  # its template does not run
        self.ended.set()

    def hand_over(self, now: float) -> GenerationState | None:
        """Return what another process needs to go on with it: nothing while its template starts, ends or forks."""
        settled = self._life is None or (self._control is not None and self.running)
        if not settled or self._forking:
            return None
        template = None if self._control is None else TemplateState(self._process.pid, self._control.fileno())
        return GenerationState(self.snapshot, now - self.began_at, self.tally.hand_over(), self._retired, template)

    def take_over(self, state: GenerationState, handed_over_at: float) -> None:
        """Go on where another process left it: before `run`, if its template is alive."""
        self.began_at, self._inherited = handed_over_at - state.age_s, state.template
        self._retired = state.retired
        self.tally.take_over(state.tally)

    @property
    def inherited(self) -> bool:
        """Whether its template is another process's, and to be gone on with by `run`."""
        return self._inherited is not None

    def know(self, worker: Worker) -> None:
        """A worker was forked for another process; what the template tells of it is for this one."""
        self._workers[worker.pid] = worker

    @property
    def name(self) -> str:
        """What operators call it: its snapshot's name."""
        return self.snapshot.name

    @property
    def workers(self) -> int:
        """How many workers of this generation are alive."""
        return len(self._workers)

    @property
    def calls(self) -> int:
        """How many calls it has, which keep it alive."""
        return self.tally.under_way

    @property
    def running(self) -> bool:
        """Whether its template runs, and is not about to end."""
        return self._life is not None and not self._life.cancel_called

    @property
    def ready(self) -> bool:
        """Whether its template can fork a worker now."""
        return self._control is not None

    def hold(self, call_id: str) -> None:
        """A call begins on this code, and stays on it."""
        self.tally.begin(call_id)

    def let_go(self, call_id: str) -> None:
        """A call has ended."""
        self.tally.end(call_id)
        self._end_when_idle()

    def promote(self) -> None:
        """It gets calls: it lives until `retire`."""
        self._retired = False

    def retire(self) -> None:
        """No more calls will begin on this code."""
        self._retired = True
        self._end_when_idle()

    def _end_when_idle(self) -> None:
        if self._retired and not self.calls and self._life is not None:
            self._life.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a template alive until `retire` has been called and the last call has ended; may then be run again.

        Raises `GenerationFailed` if its first start fails; later deaths are mended.
        """
        self._retired, self.ended = self._retired and self._inherited is not None, trio.Event()
        try:
            with trio.CancelScope() as self._life:
                self._end_when_idle()
                await self._live(task_status)
        finally:
            self._life = None
            self.ended.set()

    async def _live(self, task_status: trio.TaskStatus[None]) -> None:
        started_at = trio.current_time()
        async with self._template() as control:
            task_status.started()
            await self._serve(control)
        while True:
            log.error("the template process died and is started again; calls under way go on", generation=self.name)
            await trio.sleep_until(started_at + _RESTART_PAUSE_S)
            started_at = trio.current_time()
            try:
                async with self._template() as control:
                    log.info("the template process runs again", generation=self.name)
                    await self._serve(control)
            except GenerationFailed as error:
                log.error("the agent's code cannot be imported any more", reason=str(error))

    @asynccontextmanager
    async def _template(self) -> AsyncIterator[socket.socket]:
        """Start a template, yield its control socket when the agent is imported, and end it."""
        inherited, self._inherited = self._inherited, None
        self._process, control = await self._start() if inherited is None else _adopt(inherited)
        with control:
            try:
                if inherited is None:
                    await self._ready(control)
                self._control = control
                self._serving.set()
                yield control
            finally:
                self._control, self._serving = None, trio.Event()
                self._abandon()
                trio.lowlevel.notify_closing(control)
                self._process.kill()
                with trio.CancelScope(shield=True):
                    await self._process.wait()
                orphans.forget(self._process.pid)

    async def _start(self) -> tuple[trio.Process, socket.socket]:
        """Return a new template process, and our end of the socket that it is spoken to over."""
        agent = self._config.agent
        python = str(self._config.file.parent / agent.python) if agent.python else sys.executable
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        told = [_json(self._config.workers), _json(confinement(self._config, self.snapshot))]
        arguments = [str(theirs.fileno()), str(self.snapshot.directory), agent.entry, self.name, *told]
        try:
            with theirs:
                return await self._spawn([python, *_TEMPLATE, *arguments], theirs.fileno()), ours
        except BaseException:
            ours.close()
            raise

    async def _serve(self, control: socket.socket) -> None:
        """Take a template's reports, until it is gone or answers no more."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ping, control, nursery.cancel_scope)
            await self._listen(control)
            nursery.cancel_scope.cancel()

    async def _ping(self, control: socket.socket, serving: trio.CancelScope) -> None:
        """Give up a template that is stopped, or hangs, before a caller has to wait for it."""
        self._heard_at = asked_at = trio.current_time()
        while self._heard_at >= asked_at or trio.current_time() < asked_at + ANSWER_TIMEOUT_S:
            if self._heard_at >= asked_at:
                asked_at = trio.current_time()
                with suppress(OSError):  # a full socket was not read, and a closed one is noticed where it is read
                    control.send(msgspec.msgpack.encode(Ping()))
            await trio.sleep(PING_S)
        log.error("the template process does not answer and is killed", generation=self.name, silent_s=ANSWER_TIMEOUT_S)
        serving.cancel()

    async def _spawn(self, command: list[str], control_fd: int) -> trio.Process:
        environ = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | self._config.agent_environ()
        try:
            async with orphans.starting():
                process = await trio.lowlevel.open_process(
                    command, stdin=subprocess.DEVNULL, env=environ, pass_fds=[control_fd], start_new_session=True
                )
                orphans.expect(process.pid)
        except OSError as error:
            raise GenerationFailed(f"agent.python: {command[0]} cannot be run: {error.strerror}") from None
        return process

    async def _ready(self, control: socket.socket) -> None:
        report = None
        with trio.move_on_after(START_TIMEOUT_S) as patience:
            report, _ = await _receive(control)
        if patience.cancelled_caught:
            raise GenerationFailed(f"importing {self._config.agent.entry} takes over {START_TIMEOUT_S:g} s")
        match report:
            case Ready(version=version) if version == PROTOCOL_VERSION:
                return
            case Ready(version=version):
                raise GenerationFailed(
                    f"the agent's interpreter has protocol version {version}, dialogd {PROTOCOL_VERSION}; "
                    "install the same dialog-supervisor in both"
                )
            case Failed(reason=reason):
                raise GenerationFailed(self.snapshot.as_written(reason))
            case _:
                raise GenerationFailed("the template process ended before it was ready; its last words are above")

    async def _listen(self, control: socket.socket) -> None:
        while True:
            report, fds = await _receive(control)
            self._heard_at = trio.current_time()
            match report:
                case Forked(call_id=call_id, pid=pid) if pending := self._forking.pop(call_id, None):
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

    def _abandon(self) -> None:
        """Have those who wait for a fork ask the next template."""
        for pending in self._forking.values():
            pending.done.set()

    @asynccontextmanager
    async def worker(self, worker: Worker) -> AsyncIterator[None]:
        """Fork the process of `worker`, and be its supervisor inside the block. Raises `NoWorker`."""
        try:
            with metrics.forking():
                await self._fork(worker)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.run)
                yield
                nursery.cancel_scope.cancel()
        finally:
            self._workers.pop(worker.pid, None)
            await remove_scratch(self._config, self.snapshot, worker.pid)

    async def _fork(self, worker: Worker) -> None:
        """Have the template fork, or, where that dies or does not answer, the one that is started after it."""
        with trio.move_on_after(WORKER_TIMEOUT_S):
            while worker.pid == 0:
                if self._control is None:  # also where a template died while somebody was being woken for it
                    await self._serving.wait()
                else:
                    await self._try_to_fork(self._control, worker)
            return
        raise NoWorker(f"no template process could fork one within {WORKER_TIMEOUT_S:g} s")

    async def _try_to_fork(self, control: socket.socket, worker: Worker) -> None:
        pending = self._forking[worker.call_id] = _Pending(worker)
        try:
            with suppress(ConnectionError, trio.ClosedResourceError):  # the template has died, and whoever waits is told
                await self._ask(control, worker)
            await pending.done.wait()
        except OSError as error:
            raise NoWorker(f"the template process cannot be asked for one: {error.strerror}") from error
        finally:
            self._forking.pop(worker.call_id, None)
        if pending.failure:
            raise NoWorker(pending.failure)

    async def _ask(self, control: socket.socket, worker: Worker) -> None:
        packet = msgspec.msgpack.encode(Fork(worker.call_id))
        while True:
            try:
                socket.send_fds(control, [packet], worker.theirs)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(control.fileno())
            else:
                return


def _json(value: object) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()  # the hook: for paths


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


def _adopt(state: TemplateState) -> tuple[Inherited, socket.socket]:
    control = socket.socket(fileno=state.control_fd)
    control.setblocking(False)
    return Inherited(state.pid), control


class _Pending:
    """A fork asked for and not yet answered."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.done = trio.Event()
        self.failure = ""


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
