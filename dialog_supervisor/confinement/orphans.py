"""What a worker started and left behind: it becomes dialogd's child when the worker has ended, and is killed.

A worker is the subreaper of all that descends from it (prctl(2)), and dialogd of the workers. Nothing leaves a worker while
it lives, by whatever sessions and double forks, and all of it comes here when it has ended. Whoever is a child of this
process, and was neither started nor expected by it, is an orphan. The kernel has one list of children for a process, and so
has this room.
"""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog
import trio

from dialog_supervisor.confinement.cgroups import GROUPS
from dialog_supervisor.confinement.limits import become_subreaper
from dialog_supervisor.confinement.proc import read_small

_POLL_S = 0.01  # for killed processes to be gone, and for theirs to become ours
_PATIENCE_S = 5.0  # with what the kernel cannot end now: it waits for a disk, say
_NAMES_TOLD = 10

log = structlog.get_logger("orphans")
_expected: set[int] = set()
_changing = trio.Lock()  # a process exists before whoever starts it knows its pid
_suspected = trio.Event()
_bereaved: list[str] = []  # the calls whose workers have ended since the last look


def expect(pid: int) -> None:
    """This process is, or may become, a child of ours that is no orphan."""
    _expected.add(pid)


def forget(pid: int, call_id: str = "") -> None:
    """It has ended, and whatever it left behind is an orphan; of a worker, with its call."""
    if pid in _expected:
        _expected.discard(pid)
        _bereaved.append(call_id)
        _suspected.set()


@asynccontextmanager
async def starting() -> AsyncIterator[None]:
    """Inside, a child is started, and expected before the end."""
    async with _changing:
        yield


async def run(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Adopt orphans from now on, and end them, until cancelled; then there is none left.

    Whom this process has for children already, it expects.
    """
    global _suspected  # noqa: PLW0603 - an event is set once
    _expected.update(children(os.getpid()))
    become_subreaper()
    _suspected.set()  # a predecessor may have left control groups
    task_status.started()
    try:
        while True:
            await _suspected.wait()
            _suspected = trio.Event()
            await _end_orphans()
    finally:
        with trio.CancelScope(shield=True):
            await _end_orphans()


async def _end_orphans() -> None:
    calls = sorted(set(_bereaved))
    _bereaved.clear()
    ended: dict[int, str] = {}
    async with _changing:
        with trio.move_on_after(_PATIENCE_S):
            while (found := children(os.getpid()) - _expected) or not GROUPS.tidy():
                for orphan in found:
                    ended |= _end(orphan)
                await trio.sleep(_POLL_S)
    if ended:
        names = sorted(set(ended.values()))[:_NAMES_TOLD]
        log.warning("worker left processes behind, which were killed", call=", ".join(calls), count=len(ended), names=names)
    if found:
        log.error("processes that a worker left behind do not end", call=", ".join(calls), pids=sorted(found))


def _end(orphan: int) -> dict[int, str]:
    """Kill a child of ours with all that descends from it, reap it if it is dead, and return whom that was meant for."""
    family = {pid: _name(pid) for pid in (orphan, *descendants(orphan))}
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(orphan, os.WNOHANG)
    return family


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "?"


def descendants(pid: int) -> Iterator[int]:
    """Yield the pids of what a process has started, what that has, and so on."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def children(pid: int) -> set[int]:
    """Return the pids of a process's children, zombies included. One is listed with the thread that forked it (proc(5))."""
    found: set[int] = set()
    with suppress(OSError):  # the process, or a thread of it, is gone
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                found.update(map(int, read_small(f"/proc/{pid}/task/{thread}/children").split()))
    return found
