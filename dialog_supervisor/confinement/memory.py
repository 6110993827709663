"""How much memory workers have, for whoever asks: reading that of one takes half a millisecond, so nobody does unasked."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from resource import getpagesize
from typing import Any, Literal, NamedTuple

from dialog_supervisor.threads import in_thread
from dialog_supervisor.worker import Worker

Kind = Literal["pss", "cgroup", "rss"]


class Memory(NamedTuple):
    """Bytes, and what was counted.

    `pss`: of pages that the process shares with its template and other workers, its share; together that is what all really
    have. Only root sees that of a process that may not be looked into (`core_dumps = false`). `cgroup`: what its control
    group is charged with, the programs that it started too, and shared pages not. `rss`: every page, shared or not.
    """

    bytes: int
    kind: Kind


def measure(pid: int, group: Path | None = None) -> Memory | None:
    """Return how much memory a worker has, by the best count that there is; None when it is gone."""
    process = Path("/proc") / str(pid)
    with suppress(OSError, ValueError):
        [pss] = (line for line in (process / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        return Memory(int(pss.split()[1]) * 1024, "pss")  # in kB, proc_pid_smaps(5)
    if group is not None:
        with suppress(OSError):
            return Memory(int((group / "memory.current").read_text()), "cgroup")
    with suppress(OSError):
        return Memory(int((process / "statm").read_text().split()[1]) * getpagesize(), "rss")
    return None


async def measure_all(workers: Sequence[Worker]) -> list[Memory | None]:
    """Return how much memory each of them has, without holding up the loop."""
    wanted = [(worker.pid, worker.group.path if worker.group else None) for worker in workers]
    try:
        return await in_thread(lambda: [measure(pid, group) if pid else None for pid, group in wanted])
    except OSError:  # no thread: whoever asks has other questions now
        return [None for _ in wanted]


def describe(found: Iterable[Memory | None]) -> dict[str, Any]:
    """Return the sum for dialogctl, and what was counted."""
    known = [memory for memory in found if memory is not None]
    kinds = sorted({memory.kind for memory in known})
    return {"memory": sum(memory.bytes for memory in known) if known else None, "memory_kind": "+".join(kinds) or None}
