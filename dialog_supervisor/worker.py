"""One call's worker process seen from outside: its link, what it prints, its heartbeat, its end."""

import math
import os
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog
import trio
from msgspec import Struct

from dialog_supervisor.confinement import orphans
from dialog_supervisor.confinement.cgroups import GROUPS
from dialog_supervisor.confinement.proc import state_of
from dialog_supervisor.output import Output, OutputState
from dialog_supervisor.rhythm import beat
from dialog_supervisor.telemetry.metrics import Cause
from dialog_supervisor.template import STACK_SIGNAL
from protocol.link import Link, LinkClosed, LinkState, OutboxFull
from protocol.messages import EXIT_WANT_OF_MEMORY, Command, Shutdown

SILENCE_WARNED_OF_S = 2.0  # of a worker that sends a heartbeat a second: its caller has noticed by now
HEARTBEAT_LIMIT_S = 5.0  # a worker sends one a second; a loop that has not turned for this long will not turn again
UNREAD_LIMIT_S = 5.0  # of a worker whose loop turns; with what the kernel holds, within what the next worker is told of
LAG_LIMIT_MS = 500  # a caller hears half a second
_STATUS_GRACE_S = 0.5  # for the template's report to follow the pidfd's
_UNANSWERING = {  # the states of a process that runs no signal handler, proc_pid_stat(5)
    "T": "none: the process was stopped by a signal",
    "t": "none: the process was stopped by a debugger",
    "D": "none: the process waits in the kernel, for a disk as a rule",
}

log = structlog.get_logger("worker")


class WorkerState(Struct, frozen=True, forbid_unknown_fields=True):
    """A worker on its way to a process that takes it over."""

    pid: int
    pidfd: int
    link: LinkState
    output: OutputState

    def descriptors(self) -> tuple[int, ...]:
        """Return those that go along."""
        return self.pidfd, self.link.fd, self.output.out, self.output.err, self.output.stack


class Worker:
    """A worker from before its process exists until after it is gone.

    The link works from the start: what is posted to it waits in the kernel for the process to be forked. Raises OSError when
    there are no descriptors left. With `taken_over`, the process exists, and another was its supervisor before.
    """

    __slots__ = (
        "_heard_at",
        "_killed_for",
        "_output",
        "_pidfd",
        "_reported",
        "_theirs",
        "call_id",
        "exit_code",
        "exited",
        "group",
        "introduced",
        "link",
        "pid",
        "taken_over",
    )

    def __init__(self, generation: str, call_id: str, taken_over: WorkerState | None = None) -> None:
        self.call_id = call_id
        self.group = GROUPS.make() if taken_over is None else GROUPS.find(taken_over.pid)
        self.pid = 0
        self.introduced = False  # it has said Hello
        self.taken_over = taken_over is not None
        self.exited = trio.Event()
        self.exit_code: int | None = None
        self._killed_for: Cause | None = None
        self._reported = trio.Event()
        self._pidfd = -1
        self._heard_at = 0.0
        self._theirs: socket.socket | None = None
        if taken_over is None:
            self._open(generation)
        else:
            self._output = Output(taken_over.output)
            self.link: Link[Command] = Link.taken_over(taken_over.link, Command)
            self.pid, self._pidfd, self.introduced = taken_over.pid, taken_over.pidfd, True
            orphans.expect(self.pid)

    def _open(self, generation: str) -> None:
        self._output = Output.opened()
        try:
            mine, self._theirs = socket.socketpair()
        except OSError:
            self._output.close()
            raise
        self.link = Link(mine, Command)
        self.link.introduce(generation, self.call_id)

    def hand_over(self) -> WorkerState | None:
        """Return what another process needs to go on with it: nothing while it begins or ends."""
        link = self.link.hand_over()
        if not self.introduced or self.exited.is_set() or link is None:
            return None
        return WorkerState(self.pid, self._pidfd, link, self._output.hand_over())

    async def ready(self) -> None:
        """Wait for the process's Hello. Raises `VersionMismatch` or `LinkClosed`."""
        if not self.introduced:
            await self.link.introduced()
            self.introduced = True

    @property
    def theirs(self) -> tuple[int, ...]:
        """The process's descriptors, in the order of a `Fork`'s: to be handed to it, and then closed here."""
        assert self._theirs is not None
        entrance = self.group.theirs if self.group else ()
        return (self._theirs.fileno(), *self._output.theirs, *entrance)

    def forked(self, pid: int, pidfd: int) -> None:
        """The process exists."""
        self.link.reader_begins()  # before anything that it says is read
        self.pid, self._pidfd = pid, pidfd
        orphans.expect(pid)
        self._inherited()

    def _inherited(self) -> None:
        """The process has its own copies of `theirs` by now, or there will be none."""
        if self.group:
            self.group.handed_over()
        if self._theirs is not None:
            self._theirs.close()
        self._output.inherited()

    def reported(self, exit_code: int) -> None:
        """The template says how the process ended."""
        self.exit_code = exit_code
        self._reported.set()

    def heartbeat(self, lag_ms: int = 0) -> None:
        """The worker's event loop turned, so much later than it meant to."""
        self._heard_at = trio.current_time()
        if lag_ms >= LAG_LIMIT_MS:
            log.warning("worker's event loop was blocked", pid=self.pid, lag_ms=lag_ms)
        if self.link.unread_s > UNREAD_LIMIT_S:
            log.error("worker does not read and is killed", pid=self.pid, unread_s=UNREAD_LIMIT_S)
            self.kill("unread")

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Inside, its link is not read: its heartbeats wait behind the audio that it is ahead with, and are not missed."""
        self._heard_at = math.inf
        try:
            yield
        finally:
            self.heartbeat()

    async def run(self) -> None:
        """Serve the link and watch the process until it is gone."""
        self.heartbeat()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.link.run)
            nursery.start_soon(self._output.run)
            nursery.start_soon(self._watch_heartbeat)
            await trio.lowlevel.wait_readable(self._pidfd)
            with trio.move_on_after(_STATUS_GRACE_S):
                await self._reported.wait()
            if self.exit_code is None:
                self._reap()
            self._tell_of_limits()
            self._end_family()
            self._output.finish()
            self.exited.set()
            nursery.cancel_scope.cancel()

    def _reap(self) -> None:
        """Collect the exit status here: the template died first, so the worker became our child."""
        with suppress(ChildProcessError):
            if found := os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG):
                self.exit_code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def _tell_of_limits(self) -> None:
        """Say what of its end, or of its troubles before, was a limit's doing: the process itself was not told."""
        if self.group and self.group.ran_out_of_memory():
            self._killed_for = self._killed_for or "memory"
            log.error("worker ran out of memory (cgroup)", pid=self.pid, remedy="raise workers.memory if it needs more")
        if self.group and self.group.refused_processes():
            log.warning(
                "worker was refused processes (cgroup)", pid=self.pid, remedy="raise workers.processes if it needs more"
            )

    def _end_family(self) -> None:
        """Kill what the worker started, at once; of what lies in other sessions, and of the dead, orphans.py takes care."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.group:
            GROUPS.end(self.group)
        orphans.forget(self.pid, self.call_id)

    async def _watch_heartbeat(self) -> None:
        while True:
            await self._silent(SILENCE_WARNED_OF_S)
            heard_at = self._heard_at
            stack = await self.stack()
            log.warning("worker's event loop does not turn", pid=self.pid, silent_s=SILENCE_WARNED_OF_S, stack=stack)
            await self._silent(HEARTBEAT_LIMIT_S, heard_at)
            if self._heard_at == heard_at:
                log.error("worker hangs and is killed", pid=self.pid, silent_s=HEARTBEAT_LIMIT_S)
                self.kill("hang")
                return

    async def _silent(self, limit_s: float, since: float | None = None) -> None:
        """Return when nothing was heard for so long; with `since`, also when something was heard after that time."""
        while since in (None, self._heard_at) and self._heard_at + limit_s > (now := trio.current_time()):
            due = min(self._heard_at + limit_s, now + SILENCE_WARNED_OF_S)  # not for ever
            await trio.sleep_until(beat(due))

    async def stack(self, asking: int = STACK_SIGNAL) -> str:
        """Return where the process's main thread is, or all threads are, or why it cannot be told."""
        return await self._output.stack(lambda: self._signal(asking)) or self._why_no_stack()

    @property
    def alive(self) -> bool:
        """Whether the process exists, and has not ended."""
        if self._pidfd == -1:
            return False
        look = select.poll()  # select() itself fails for descriptors from 1024 on
        look.register(self._pidfd, select.POLLIN)
        return not look.poll(0)

    def _why_no_stack(self) -> str:
        with suppress(OSError):
            return _UNANSWERING.get(state_of(self.pid), "none: the process does not answer")
        return "none: the process is gone"

    async def stop(self, reason: str, grace_s: float) -> None:
        """Ask the worker to leave, and kill it when it has not left within `grace_s`."""
        if self._pidfd == -1:
            return
        with suppress(LinkClosed, OutboxFull):
            self.link.post(Shutdown(reason, grace_s))
        with trio.move_on_after(grace_s):
            await self.exited.wait()
            return
        log.warning("worker did not leave and is killed", pid=self.pid, grace_s=grace_s)
        self.kill()
        await self.exited.wait()

    @property
    def death(self) -> tuple[Cause, str]:
        """Why the process ended, and its exit code or signal's name, empty if nobody knows it."""
        code = self.exit_code
        if code is None:
            return self._killed_for or "exit", ""
        if code >= 0:
            return self._killed_for or ("memory" if code == EXIT_WANT_OF_MEMORY else "exit"), str(code)
        return self._killed_for or "signal", _signal_name(-code)

    def kill(self, cause: Cause | None = None) -> None:
        """End the process now. `cause` is what it did to deserve that, where nothing else tells."""
        self._killed_for = self._killed_for or cause
        if self._pidfd != -1 and not self.exited.is_set():
            self._signal(signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # and what it started

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Give back what this end holds. A process that still lives sees its link end, and is killed."""
        self.kill()
        self.link.close()
        self._inherited()
        self._output.close()
        if self.group and not self.exited.is_set():
            GROUPS.end(self.group)
        if self._pidfd != -1:
            orphans.forget(self.pid, self.call_id)
            os.close(self._pidfd)
            self._pidfd = -1


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between the first and the last
        return str(number)
