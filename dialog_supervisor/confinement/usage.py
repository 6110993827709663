"""What workers take of the CPU and how many processes they have: one task looks at all in turn, and acts on excess."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Literal, NamedTuple

import structlog
import trio

from dialog_supervisor.confinement.orphans import descendants
from dialog_supervisor.confinement.proc import read_small
from dialog_supervisor.rhythm import next_beat
from dialog_supervisor.sections import WorkersConfig
from dialog_supervisor.template import STACKS_SIGNAL
from dialog_supervisor.worker import Worker

WINDOW_S = 60.0
PASS_S = 2.0  # between two looks at the same worker, when there are few
GOES_ON_S = 5.0  # from the warning until a worker that uses as much as before is killed
_AT_ONCE = 8  # workers, which takes a third of a millisecond
_PAUSE_S = 0.03  # then: the task takes a fiftieth of the loop at most, however many there are
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Verdict = Literal["warn", "kill"]

log = structlog.get_logger("usage")


class Usage(NamedTuple):
    """CPU time in seconds since the start, and processes or threads now, of a worker with all that it has started."""

    cpu_s: float
    tasks: int


class Budget:
    """One worker's CPU time over a sliding minute; what it had before the first sample counts if it was `new`. No I/O."""

    def __init__(self, limit_s: float, *, new: bool = True) -> None:
        self._limit_s = limit_s
        self._new = new
        self._samples: deque[tuple[float, float]] = deque()  # when, and how much since the start
        self._warned: tuple[float, float] | None = None

    @property
    def used_s(self) -> float:
        """CPU time in the minute before the last sample."""
        return self._samples[-1][1] - self._samples[0][1] if self._samples else 0.0

    def take(self, now: float, cpu_s: float) -> Verdict | None:
        """Take a sample, and say what it calls for: first a warning; then, unless the worker has slowed down, its end."""
        if not self._samples:
            self._samples.append((now - PASS_S, 0.0 if self._new else cpu_s))
        self._samples.append((now, cpu_s))
        while self._samples[1][0] <= now - WINDOW_S:
            self._samples.popleft()
        if self.used_s <= self._limit_s:
            self._warned = None
            return None
        if self._warned is None:
            self._warned = now, cpu_s
            return "warn"
        since, before_s = self._warned
        if now - since < GOES_ON_S:
            return None
        self._warned = now, cpu_s
        return "kill" if (cpu_s - before_s) / (now - since) > self._limit_s / WINDOW_S else None


def usage(worker: Worker) -> Usage:
    """Look at a worker: at its control group, or at its processes. Raises OSError when it is gone, or not to be seen."""
    if worker.group:
        return Usage(worker.group.cpu_s(), worker.group.tasks())
    own = of_process(worker.pid)
    family = [own]
    for pid in descendants(worker.pid):
        with suppress(OSError):  # it ended meanwhile, and its parent has its time
            family.append(of_process(pid))
    return Usage(sum(one.cpu_s for one in family), sum(one.tasks for one in family))


def of_process(pid: int) -> Usage:
    """Return what /proc/PID/stat says: of the process, and of the children that it has waited for (proc_pid_stat(5))."""
    fields = read_small(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return Usage(sum(map(int, fields[11:15])) / _TICKS_PER_S, int(fields[17]))


class Meter:
    """Looks at workers in turn. `tasks` tells how many there are on the machine: a sudden rise is looked into at once."""

    def __init__(
        self, limits: WorkersConfig, workers: Callable[[], Iterable[Worker]], tasks: Callable[[], int | None]
    ) -> None:
        self._limits = limits
        self._workers = workers
        self._tasks = tasks
        self._budgets: dict[Worker, Budget] = {}
        self._unseen = False

    async def run(self) -> None:
        """Look until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                began_at, tasks = trio.current_time(), self._tasks()
                await self._look_at_all(nursery)
                while trio.current_time() < began_at + PASS_S and not self._flooded(tasks):  # noqa: ASYNC110 - a count that changes
                    await trio.sleep_until(next_beat())

    def _flooded(self, before: int | None) -> bool:
        now = self._tasks()
        return before is not None and now is not None and now - before > self._limits.processes

    async def _look_at_all(self, nursery: trio.Nursery) -> None:
        workers = [worker for worker in self._workers() if worker.pid]
        self._budgets = {worker: self._budgets.get(worker) or self._budget(worker) for worker in workers}
        for number, (worker, budget) in enumerate(self._budgets.items(), 1):
            if not worker.exited.is_set():
                self._look_at(worker, budget, nursery)
            if number % _AT_ONCE == 0:
                await trio.sleep(_PAUSE_S)

    def _budget(self, worker: Worker) -> Budget:
        return Budget(self._limits.cpu_seconds_per_minute, new=not worker.taken_over)

    def _look_at(self, worker: Worker, budget: Budget, nursery: trio.Nursery) -> None:
        try:
            used = usage(worker)
        except OSError as error:
            self._not_seen(worker, error)
            return
        if used.tasks > self._limits.processes:
            limit = self._limits.processes
            log.error(
                "worker has too many processes and is killed",
                call=worker.call_id,
                pid=worker.pid,
                count=used.tasks,
                limit=limit,
            )
            worker.kill("processes")
            return
        verdict = budget.take(trio.current_time(), used.cpu_s)
        if verdict == "warn":
            nursery.start_soon(self._warn, worker, budget.used_s)
        elif verdict == "kill":
            log.error("worker uses too much CPU and is killed", **self._figures(worker, budget.used_s))
            worker.kill("cpu")

    async def _warn(self, worker: Worker, used_s: float) -> None:
        figures = self._figures(worker, used_s)
        log.warning("worker uses too much CPU", stack=await worker.stack(STACKS_SIGNAL), **figures)

    def _figures(self, worker: Worker, used_s: float) -> dict[str, object]:
        return {
            "call": worker.call_id,
            "pid": worker.pid,
            "cpu_s": round(used_s, 1),
            "cpu_seconds_per_minute": self._limits.cpu_seconds_per_minute,
        }

    def _not_seen(self, worker: Worker, error: OSError) -> None:
        """A worker that has just ended has no figures; one that lives, and has none, is hidden: say so once."""
        if worker.alive and not self._unseen:
            self._unseen = True
            log.warning("workers' use of CPU cannot be seen, and is not limited", reason=str(error))
