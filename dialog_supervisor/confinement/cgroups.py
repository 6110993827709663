"""Control groups (cgroup v2), where dialogd may make some: each worker is in one, which bounds what it starts, and ends it.

That is so under systemd with `Delegate=`, and wherever else the group that dialogd is started in is its own. Processes and
groups do not mix where limits are to be set, so dialogd and its templates move into a group of their own first. Rules:
Documentation/admin-guide/cgroup-v2.rst. The kernel has one group for a process, and so has this room.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import structlog
import trio

from dialog_supervisor.confinement.proc import read_small
from dialog_supervisor.sections import WorkersConfig

OWN = "dialogd"  # also systemd's DelegateSubgroup=, where it has that
_WORKER = "worker"  # worker-<dialogd's pid>-<token>
_WANTED = ("memory", "pids", "cpu")  # controllers
_CPU_WEIGHT = 1_000  # of dialogd and its templates, where a worker with all that it starts has 100, and all others have too
_MARKS = ("user.delegate", "trusted.delegate")  # extended attributes by which systemd tells that a group is not its own
_PREDECESSOR_S, _POLL_S = 5.0, 0.05  # what a killed dialogd left notices that, and ends
_UNITS = (".service", ".scope", ".slice")

log = structlog.get_logger("cgroups")


class NoGroups(Exception):
    """There can be none; the message says why."""


def find_own(mountinfo: str, membership: str, root: Path = Path("/")) -> Path:
    """Return the directory of the group that a process is in, from its /proc/PID/mountinfo and cgroup. Raises `NoGroups`."""
    within = next((line.removeprefix("0::") for line in membership.splitlines() if line.startswith("0::")), None)
    for line in mountinfo.splitlines():
        fields, _, kind = line.partition(" - ")
        mounted, place = fields.split()[3:5]
        if kind.startswith("cgroup2 ") and within is not None and Path(within).is_relative_to(mounted):
            return root / place.lstrip("/") / Path(within).relative_to(mounted)
    raise NoGroups("the machine has no cgroup v2")


def _own() -> Path:
    process = Path("/proc/self")
    return find_own((process / "mountinfo").read_text(), (process / "cgroup").read_text())


def ancestry() -> list[Path]:
    """Return this process's group and those that it is in: each may limit it."""
    with suppress(NoGroups, OSError):
        own = _own()
        return [path for path in (own, *own.parents) if (path / "cgroup.procs").exists()]
    return []


class Group:
    """A worker's group, from before its process exists. Raises OSError when it cannot be made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._procs = -1

    def open(self, limits: WorkersConfig) -> None:
        """Make it, with its limits."""
        self.path.mkdir()
        try:
            for name, value in (
                ("memory.max", limits.memory),
                ("memory.swap.max", 0),
                ("memory.oom.group", 1),
                ("pids.max", limits.processes),
            ):
                with suppress(FileNotFoundError):  # a controller that is not there
                    _write(self.path / name, str(value))
            self._procs = os.open(self.path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            self.remove()
            raise

    @property
    def theirs(self) -> tuple[int, ...]:
        """The descriptor that the worker enters by."""
        return () if self._procs == -1 else (self._procs,)

    def handed_over(self) -> None:
        """The worker has entered, or never will."""
        if self._procs != -1:
            os.close(self._procs)
            self._procs = -1

    def cpu_s(self) -> float:
        """Return the CPU time that it has had, in seconds, also of processes that have ended. Raises OSError."""
        return int(self._figure("cpu.stat", "usage_usec")) / 1e6

    def tasks(self) -> int:
        """Return how many processes it has. Raises OSError."""
        return len(read_small(self.path / "cgroup.procs").split())

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel has killed a process of it because the group's memory was used up."""
        with suppress(OSError, KeyError):
            return int(self._figure("memory.events", "oom_kill")) > 0
        return False

    def refused_processes(self) -> bool:
        """Whether it wanted more processes than it may have."""
        with suppress(OSError, KeyError):
            return int(self._figure("pids.events", "max")) > 0
        return False

    def _figure(self, file: str, name: str) -> str:
        return dict(line.split() for line in read_small(self.path / file).decode().splitlines())[name]

    def kill(self) -> None:
        """End everything in it, at once (Linux 5.14; before, orphans.py alone sees to it)."""
        with suppress(OSError):
            _write(self.path / "cgroup.kill", "1")

    def remove(self) -> bool:
        """Remove it. Return False while something in it still ends."""
        self.handed_over()
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True


class Groups:
    """Those of one dialogd: none, until it has entered a group where it may make them."""

    def __init__(self) -> None:
        self._base: Path | None = None
        self._limits = WorkersConfig()
        self._reason = "not yet looked for"
        self._controllers: tuple[str, ...] = ()
        self._dying: list[Group] = []

    async def enter(self, limits: WorkersConfig, own: Path | None = None) -> None:
        """Move this process to where groups can be made beside it, if there is such a place; `tell` says whether."""
        self._limits = limits
        try:
            self._base = await _free_for_groups(own or _own())
            self._controllers = tuple(_enable(self._base))
            with suppress(FileNotFoundError):  # the controller is not there
                _write(self._base / OWN / "cpu.weight", str(_CPU_WEIGHT))
        except (NoGroups, OSError) as error:
            self._reason = str(error)
            return
        for forsaken in self._forsaken():
            group = Group(forsaken)
            group.kill()
            self._dying.append(group)

    def tell(self) -> None:
        """Say in the log whether there are groups."""
        if self._base is None:
            log.info("workers have no control groups of their own", reason=self._reason)
        else:
            log.info("each worker has a control group", within=str(self._base), limiting=list(self._controllers))

    def make(self) -> Group | None:
        """Return a group for a worker, or None where there are none."""
        if self._base is None:
            return None
        group = Group(self._base / f"{_WORKER}-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            group.open(self._limits)
        except OSError as error:
            log.error("a worker has no control group", reason=str(error))
            return None
        return group

    def find(self, pid: int) -> Group | None:
        """Return the group of a worker that was made before this process was executed anew."""
        for path in self._made(os.getpid()):
            with suppress(OSError):
                if str(pid) in (path / "cgroup.procs").read_text().split():
                    return Group(path)
        return None

    def end(self, group: Group) -> None:
        """End what is in a group, and the group when nothing is in it any more."""
        group.kill()
        self._dying.append(group)

    def tidy(self) -> bool:
        """Remove the groups that have ended. Return whether that was all."""
        self._dying = [group for group in self._dying if not group.remove()]
        return not self._dying

    def describe(self) -> dict[str, object]:
        """Return it for `dialogctl status`."""
        if self._base is None:
            return {"path": None, "reason": self._reason}
        return {"path": str(self._base), "controllers": list(self._controllers)}

    def _forsaken(self) -> Iterator[Path]:
        """Yield the groups of workers whose dialogd was killed."""
        assert self._base is not None
        mine = set(self._made(os.getpid()))
        yield from (path for path in self._base.glob(f"{_WORKER}-*") if path not in mine)

    def _made(self, pid: int) -> Iterator[Path]:
        if self._base is not None:
            yield from self._base.glob(f"{_WORKER}-{pid}-*")


async def _free_for_groups(own: Path) -> Path:
    """Move this process out of the group that groups are to be made in, and return that. Raises `NoGroups` and OSError."""
    base = own.parent if own.name == OWN else own
    if not (base / "cgroup.type").exists():
        raise NoGroups("dialogd is in the machine's own control group")
    if not _is_ours(base):
        raise NoGroups(f"{base} is not dialogd's to change; under systemd, Delegate= makes it so")
    if _others(base):
        raise NoGroups(f"{base} has other processes than dialogd; start it in a control group of its own, as systemd does")
    (base / OWN).mkdir(exist_ok=True)
    if own == base:
        with trio.move_on_after(_PREDECESSOR_S):
            while _others(base / OWN):  # noqa: ASYNC110 - the kernel's file
                await trio.sleep(_POLL_S)
        if _others(base / OWN):
            raise NoGroups(f"{base} has another dialogd in it; start each in a control group of its own, as systemd does")
    _write(base / OWN / "cgroup.procs", str(os.getpid()))
    return base


def _others(group: Path) -> set[int]:
    return {int(pid) for pid in (group / "cgroup.procs").read_text().split()} - {os.getpid()}


def _is_ours(base: Path) -> bool:
    """Whether this process may change it, and whoever made it meant that; root may change what is not meant for it."""
    if not all(os.access(path, os.W_OK) for path in (base, base / "cgroup.procs", base / "cgroup.subtree_control")):
        return False
    return os.getuid() != 0 or base.suffix not in _UNITS or any(_marked(base, name) for name in _MARKS)


def _marked(path: Path, name: str) -> bool:
    with suppress(OSError):
        return os.getxattr(path, name) == b"1"
    return False


def _enable(base: Path) -> Iterator[str]:
    """Have the groups limited in what there are controllers for, and yield their names."""
    available = (base / "cgroup.controllers").read_text().split()
    for name in _WANTED:
        if name in available:
            with suppress(OSError):  # it is used in another way further up
                _write(base / "cgroup.subtree_control", f"+{name}")
                yield name


def _write(file: Path, text: str) -> None:
    """Write to a kernel's file: in one go, and only if it is there."""
    fd = os.open(file, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


GROUPS = Groups()
