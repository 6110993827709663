"""What a worker may take of the machine. Applied by the forked child to itself, before any of the agent's code runs in it.

It needs no more than the template does: the standard library and msgspec.
"""

import ctypes
import errno
import math
import os
import resource
from contextlib import suppress
from pathlib import Path

from dialog_supervisor.sections import WorkersConfig

_OOM_SCORE_ADDED = 500  # of 1000: far enough from the supervisor, whatever either's size
_OOM_SCORE_MAX = 1000
_FIGURE_BYTES = 32
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36  # prctl(2)
_OWN = Path("/proc/self")
_OOM_SCORE = "/proc/self/oom_score_adj"
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def data_bytes() -> int:
    """Return how much private memory this process has, as RLIMIT_DATA counts it: mapped and writable, used or not."""
    pages = (_OWN / "statm").read_text().split()[5]  # "data + stack", proc(5)
    return int(pages) * resource.getpagesize()


def too_large_for(limits: WorkersConfig) -> str:
    """Return why this process could not fork workers that keep to `limits`, or "" when it can."""
    if (taken := data_bytes()) < limits.memory:
        return ""
    mb, permitted_mb = math.ceil(taken / 1e6), limits.memory // 1_000_000
    return f"importing the agent takes {mb} MB of memory, and workers.memory permits {permitted_mb}; raise it"


def why_not_forked(error: Exception) -> str:
    """Return why there is no worker, in an operator's terms."""
    if not isinstance(error, OSError):
        return str(error)
    remedy = {
        errno.EAGAIN: "; raise TasksMax, or whatever else limits processes and threads",
        errno.ENOMEM: "; the machine, or dialogd's control group, has no memory for it",
        errno.EMFILE: "; raise LimitNOFILE",
    }.get(error.errno or 0, "")
    return f"it cannot be forked: {error.strerror}{remedy}"


def become_subreaper() -> None:
    """Have the kernel give this process, from now on, what descends from it and loses its parent (prctl(2))."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def enter_group(procs: int) -> None:
    """Move this process into the control group whose `cgroup.procs` is open for writing. Raises OSError."""
    os.write(procs, b"0")  # the process that writes


def apply(limits: WorkersConfig) -> None:
    """Limit this process, and all that it will start. It cannot be undone."""
    become_subreaper()  # so that whatever it starts stays below it, and is found when it has ended
    with suppress(OSError):  # before it is undumpable: after, these files are root's
        _volunteer_to_the_kernel()
    _lower(resource.RLIMIT_DATA, limits.memory)
    _lower(resource.RLIMIT_NOFILE, limits.open_files)
    if not limits.core_dumps:
        _lower(resource.RLIMIT_CORE, 0)
        _prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # a core_pattern that is a pipe heeds no RLIMIT_CORE, core(5)


def _lower(kind: int, limit: int) -> None:
    """Set a limit, where the process has not a lower one already."""
    _, most = resource.getrlimit(kind)
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(kind, (limit, limit))


def _volunteer_to_the_kernel() -> None:
    """Have the kernel, when the machine is out of memory, end this process rather than the one that it descends from.

    By bare system calls: pathlib and text files would make half a megabyte of shared memory each worker's own.
    """
    fd = os.open(_OOM_SCORE, os.O_RDWR | os.O_CLOEXEC)
    try:
        score = int(os.read(fd, _FIGURE_BYTES))
        os.pwrite(fd, b"%d" % min(_OOM_SCORE_MAX, score + _OOM_SCORE_ADDED), 0)
    finally:
        os.close(fd)
