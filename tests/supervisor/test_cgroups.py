"""Control groups as the kernel's files show them: which one is dialogd's, whether it may be changed, and what is written."""

import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from dialog_supervisor.confinement import cgroups
from dialog_supervisor.confinement.cgroups import Group, Groups, NoGroups, find_own
from dialog_supervisor.sections import WorkersConfig

UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = (
    "31 30 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
CONTAINER = "30 23 0:26 /docker/4711 /sys/fs/cgroup ro,relatime - cgroup2 cgroup rw\n"
LEGACY = "31 30 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
LIMITS = WorkersConfig(memory=300_000_000, processes=99)


@pytest.mark.parametrize(
    ("mountinfo", "membership", "found"),
    [
        (UNIFIED, "0::/system.slice/dialogd.service\n", "/sys/fs/cgroup/system.slice/dialogd.service"),
        (HYBRID, "4:memory:/x\n0::/\n", "/sys/fs/cgroup/unified"),
        (CONTAINER, "0::/docker/4711/dialogd\n", "/sys/fs/cgroup/dialogd"),
    ],
    ids=["unified", "hybrid", "a container without a namespace"],
)
def test_the_own_group_is_found_wherever_it_is_mounted(mountinfo: str, membership: str, found: str) -> None:
    assert find_own(mountinfo, membership) == Path(found)


@pytest.mark.parametrize(
    ("mountinfo", "membership"), [(LEGACY, "4:memory:/x\n"), (CONTAINER, "0::/another\n")], ids=["none", "out of sight"]
)
def test_a_machine_without_them_is_told_so(mountinfo: str, membership: str) -> None:
    with pytest.raises(NoGroups, match="the machine has no cgroup v2"):
        find_own(mountinfo, membership)


# What may be changed


class Kernel:
    """A directory that has a control group's files, and a new directory in it its own, as the kernel does it."""

    def __init__(self, path: Path, controllers: str = "cpu memory pids") -> None:
        self.path = path
        self._controllers = controllers

    def make(self, path: Path) -> None:
        os.mkdir(path)
        files = {"cgroup.type": "domain", "cgroup.procs": "", "cgroup.kill": "", "cgroup.subtree_control": ""}
        limits = {
            "memory.max": "max",
            "memory.swap.max": "max",
            "memory.oom.group": "0",
            "pids.max": "max",
            "cpu.weight": "100",
        }
        for name, text in (files | limits | {"cgroup.controllers": self._controllers}).items():
            (path / name).write_text(f"{text}\n")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path / "dialogd.service")
    kernel.make(kernel.path)

    def mkdir(path: Path, *, exist_ok: bool = False) -> None:
        if not (exist_ok and path.exists()):
            kernel.make(path)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(cgroups, "_marked", lambda _path, name: name == "user.delegate")
    return kernel


def said(path: Path) -> str:
    return path.read_text().strip()


def entered(kernel: Kernel, own: Path | None = None) -> Groups:
    groups = Groups()
    trio.run(groups.enter, LIMITS, own or kernel.path, clock=MockClock(autojump_threshold=0))
    return groups


def test_dialogd_moves_out_of_the_way_and_has_the_groups_limited(kernel: Kernel) -> None:
    assert entered(kernel).describe() == {"path": str(kernel.path), "controllers": ["memory", "pids", "cpu"]}
    assert said(kernel.path / "dialogd" / "cpu.weight") == "1000"
    assert int(said(kernel.path / "dialogd" / "cgroup.procs").split()[0]) == os.getpid()
    assert said(kernel.path / "cgroup.subtree_control") == "+cpu"  # the last that was written


def test_where_it_is_out_of_the_way_already_it_stays(kernel: Kernel) -> None:
    kernel.make(kernel.path / "dialogd")
    assert entered(kernel, kernel.path / "dialogd").describe()["path"] == str(kernel.path)


def test_a_worker_is_limited_with_all_that_it_starts(kernel: Kernel) -> None:
    group = entered(kernel).make()
    assert group is not None
    assert {name: said(group.path / name) for name in ("memory.max", "memory.swap.max", "memory.oom.group", "pids.max")} == {
        "memory.max": "300000000",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "99",
    }
    group.handed_over()


def test_a_group_with_other_processes_is_left_alone(kernel: Kernel) -> None:
    (kernel.path / "cgroup.procs").write_text(f"{os.getpid()}\n1\n")
    groups = entered(kernel)
    assert str(groups.describe()["reason"]).startswith(f"{kernel.path} has other processes than dialogd")
    assert groups.make() is None


def test_a_group_with_another_dialogd_is_left_to_it(kernel: Kernel) -> None:
    kernel.make(kernel.path / "dialogd")
    (kernel.path / "dialogd" / "cgroup.procs").write_text("1\n")
    assert str(entered(kernel).describe()["reason"]).startswith(f"{kernel.path} has another dialogd in it")


def test_the_machines_own_group_is_left_alone(kernel: Kernel) -> None:
    (kernel.path / "cgroup.type").unlink()
    assert entered(kernel).describe() == {"path": None, "reason": "dialogd is in the machine's own control group"}


def test_root_does_not_change_what_systemd_has_not_delegated(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_marked", lambda *_: False)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert "is not dialogd's to change; under systemd, Delegate= makes it so" in str(entered(kernel).describe()["reason"])


def test_what_is_written_is_what_the_kernel_counts(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 2000000\n")
    (tmp_path / "memory.events").write_text("low 0\noom 1\noom_kill 2\n")
    (tmp_path / "pids.events").write_text("max 0\n")
    (tmp_path / "cgroup.procs").write_text("12\n13\n")
    group = Group(tmp_path)
    assert (group.cpu_s(), group.tasks()) == (2.5, 2)
    assert (group.ran_out_of_memory(), group.refused_processes()) == (True, False)


def test_a_group_that_is_gone_has_no_events(tmp_path: Path) -> None:
    group = Group(tmp_path / "gone")
    assert (group.ran_out_of_memory(), group.refused_processes(), group.remove()) == (False, False, True)
