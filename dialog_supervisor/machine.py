"""What the machine has left for another call: looked at four times a second, so that a webhook need not."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import structlog
import trio

from dialog_supervisor.rhythm import next_beat
from dialog_supervisor.sections import CallsConfig

LOAD_WINDOW_S = 5.0  # the load average's time constant: shorter than the kernel's minute, longer than a burst of webhooks
_PROC = Path("/proc")
_UNLIMITED = "max"  # of a control group, Documentation/admin-guide/cgroup-v2.rst

Lack = Literal["memory", "load"]
_Figure = TypeVar("_Figure", int, float)

log = structlog.get_logger("machine")


def available_memory(meminfo: str) -> int:
    """Return the bytes that /proc/meminfo says can be had without swapping (proc(5), MemAvailable)."""
    [kb] = (line.split()[1] for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    return int(kb) * 1024


def runnable(loadavg: str) -> int:
    """Return how many tasks run or wait for a CPU by /proc/loadavg, less the one that asks (proc(5), the fourth field)."""
    return max(0, int(loadavg.split()[3].partition("/")[0]) - 1)


def total(loadavg: str) -> int:
    """Return how many tasks there are."""
    return int(loadavg.split()[3].partition("/")[2])


def left_in(group: Path) -> int | None:
    """Return how many bytes a control group (v2) may still take, or None when it has no limit. Raises OSError.

    Cached files that were not used for a while count as free: the kernel drops them before it refuses memory.
    """
    limit = (group / "memory.max").read_text().strip()
    if limit == _UNLIMITED:
        return None
    taken = int((group / "memory.current").read_text())
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(limit) - taken + int(stat.get("inactive_file", 0))


class Machine:
    """The last sample of free memory and of the load, and whether they suffice for another call.

    `groups`: the control groups that dialogd is in, whose memory may be limited.
    """

    def __init__(self, config: CallsConfig, groups: Sequence[Path] = (), proc: Path = _PROC) -> None:
        self.free_memory: int | None = None  # bytes; None where the machine does not tell
        self.tasks: int | None = None  # processes and threads there are
        self.load: float | None = None  # tasks for each CPU that run or wait for it
        self._config = config
        self._groups = tuple(group for group in groups if (group / "memory.max").exists())
        self._proc = proc
        self._cpus = len(os.sched_getaffinity(0))
        self._sampled_at = -math.inf
        self._untold: set[str] = set()

    @property
    def lack(self) -> Lack | None:
        """What there is too little of for another call."""
        if self.free_memory is not None and self.free_memory < self._config.min_free_memory:
            return "memory"
        if self.load is not None and 0 < self._config.max_load < self.load:
            return "load"
        return None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take samples until cancelled; it has started when there is one."""
        self.sample()
        task_status.started()
        while True:
            await trio.sleep_until(next_beat())  # until when a few dozen workers may have been forked
            self.sample()

    def sample(self) -> None:
        """Look. What cannot be read is told once, and does not keep calls away."""
        now = trio.current_time()
        self.free_memory = self._read("free memory", self._free)
        current = self._read("load", self._runnable_for_each_cpu)
        if current is not None and self.load is not None:
            current += (self.load - current) * math.exp((self._sampled_at - now) / LOAD_WINDOW_S)
        self.load, self._sampled_at = current, now

    def _runnable_for_each_cpu(self) -> float:
        loadavg = (self._proc / "loadavg").read_text()
        self.tasks = total(loadavg)
        return runnable(loadavg) / self._cpus

    def _free(self) -> int:
        limits = [left for group in self._groups if (left := left_in(group)) is not None]
        return max(0, min([available_memory((self._proc / "meminfo").read_text()), *limits]))

    def _read(self, what: str, read: Callable[[], _Figure]) -> _Figure | None:
        try:
            return read()
        except (OSError, ValueError, IndexError) as error:
            if what not in self._untold:
                self._untold.add(what)
                log.warning(f"the machine's {what} is unknown, and calls are taken whatever it is", reason=str(error))
            return None

    def describe(self) -> dict[str, Any]:
        """Return it for `dialogctl status` and the log."""
        return {"free_memory": self.free_memory, "load": None if self.load is None else round(self.load, 2)}
