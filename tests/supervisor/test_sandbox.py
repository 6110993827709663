"""The sandbox's pure parts: what of the files is shown, and which system calls there are, on every machine."""

import errno
import struct
from pathlib import Path
from types import ModuleType

import pytest

from dialog_supervisor.confinement import landlock, sandbox, seccomp
from dialog_supervisor.confinement.landlock import EVERYTHING, READ, Right, known
from dialog_supervisor.confinement.sandbox import visible
from dialog_supervisor.confinement.seccomp import (
    ALLOW,
    CLONE,
    CLONE3,
    DENIED,
    KILL,
    MACHINES,
    OWN_ONLY,
    SIGNALLING,
    SOCKET,
    Machine,
    Op,
    fail,
    program,
)

DIALOGD, TEMPLATE, ANOTHER = 4711, 4712, 4713
X86_64, AARCH64 = MACHINES["x86_64"], MACHINES["aarch64"]
REFUSED, NO_SUCH_CALL = fail(errno.EPERM), fail(errno.ENOSYS)
READ_CALL, WRITE_CALL = (0, 63), (1, 64)
EITHER = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)


def verdict(machine: Machine, number: int, *arguments: int, arch: int | None = None) -> int:
    """Run the filter as the kernel does, on `struct seccomp_data`, and return what it comes to."""
    padded = [argument & 0xFFFFFFFFFFFFFFFF for argument in arguments] + [0] * (6 - len(arguments))
    data = struct.pack("=IIQ6Q", number, machine.audit_arch if arch is None else arch, 0, *padded)
    ops = program(machine, [DIALOGD, TEMPLATE])
    at = accumulator = 0
    while ops[at].code != Op(0x06, 0, 0, 0).code:
        code, true, false, operand = ops[at]
        at += 1
        if code == 0x20:
            [accumulator] = struct.unpack_from("=I", data, operand)
        else:
            holds = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x45: bool(accumulator & operand)}[code]
            at += true if holds else false
    return ops[at].operand


# System calls


@EITHER
def test_what_is_not_named_is_permitted(machine: Machine) -> None:
    assert verdict(machine, READ_CALL[machine.column]) == ALLOW
    assert verdict(machine, WRITE_CALL[machine.column]) == ALLOW


@EITHER
def test_what_reaches_out_is_refused_and_the_process_goes_on(machine: Machine) -> None:
    numbers = [numbers[machine.column] for numbers in DENIED.values() if numbers[machine.column] >= 0]
    assert {verdict(machine, number) for number in numbers} == {REFUSED}
    assert len(set(numbers)) == len(numbers)


@EITHER
def test_limits_and_priorities_are_a_process_own_to_change(machine: Machine) -> None:
    for *numbers, argument in OWN_ONLY.values():
        assert verdict(machine, numbers[machine.column], *[9] * argument, 0) == ALLOW
        assert verdict(machine, numbers[machine.column], *[0] * argument, ANOTHER) == REFUSED


@EITHER
def test_no_signal_is_sent_to_dialogd_to_the_template_or_to_everybody(machine: Machine) -> None:
    for numbers in SIGNALLING.values():
        for target in (DIALOGD, TEMPLATE, -DIALOGD, -TEMPLATE, -1):
            assert verdict(machine, numbers[machine.column], target) == REFUSED
        for target in (ANOTHER, -ANOTHER, 0):
            assert verdict(machine, numbers[machine.column], target) == ALLOW


@EITHER
def test_threads_and_processes_but_no_namespaces_are_made(machine: Machine) -> None:
    fork, thread, user_namespace = 17, 0x3D0F00, 0x10000000
    assert verdict(machine, CLONE[machine.column], fork) == ALLOW
    assert verdict(machine, CLONE[machine.column], thread) == ALLOW
    assert verdict(machine, CLONE[machine.column], user_namespace | fork) == REFUSED
    assert verdict(machine, CLONE3[machine.column]) == NO_SUCH_CALL


@EITHER
def test_sockets_are_for_the_network(machine: Machine) -> None:
    unix, inet, inet6, netlink, packet = 1, 2, 10, 16, 17
    assert [verdict(machine, SOCKET[machine.column], family) for family in (inet, inet6, netlink)] == [ALLOW] * 3
    assert {verdict(machine, SOCKET[machine.column], family) for family in (unix, packet)} == {fail(errno.EAFNOSUPPORT)}


def test_calls_by_other_numbers_are_no_way_around() -> None:
    assert verdict(X86_64, 0x40000000 | DENIED["ptrace"][0]) == NO_SUCH_CALL
    i386 = 0x40000003
    assert verdict(X86_64, 26, arch=i386) == KILL
    assert verdict(AARCH64, DENIED["ptrace"][1], arch=X86_64.audit_arch) == KILL


# Files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project with what an agent needs, and what it must not see."""
    for name in ("app/lib.py", "app/deep/data", "app/deep/secret/token", "app/dialog.toml", "other/file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "app" / "link").symlink_to(tmp_path / "other")
    return tmp_path


def test_a_directory_is_shown_whole_when_nothing_in_it_is_hidden(tree: Path) -> None:
    assert list(visible(tree / "app", [tree / "other"])) == [(tree / "app", READ)]


def test_a_directory_is_taken_apart_around_what_is_hidden_in_it(tree: Path) -> None:
    app = tree / "app"
    assert list(visible(app, [app / "dialog.toml", app / "deep" / "secret"])) == [
        (app, Right.READ_DIR),
        (app / "deep", Right.READ_DIR),
        (app / "deep" / "data", READ),
        (app / "lib.py", READ),
    ]


def test_what_is_hidden_is_not_shown_but_what_is_named_inside_of_it_is(tree: Path) -> None:
    assert list(visible(tree / "app", [tree / "app"])) == []
    assert list(visible(tree / "app" / "deep", [tree / "app"])) == [(tree / "app" / "deep", READ)]


def test_a_kernel_is_asked_for_nothing_that_it_does_not_know() -> None:
    first_version = 0x1FFF
    assert EVERYTHING & known(1) == first_version
    assert EVERYTHING & known(3) == first_version | Right.TRUNCATE
    assert EVERYTHING & known(5) == first_version | Right.TRUNCATE | Right.IOCTL_DEV


# The kernel


@pytest.mark.parametrize(
    ("room", "name", "value", "said"),
    [
        (landlock, "version", 0, "this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK), or lsm= "),
        (seccomp, "supported", False, "this kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)"),
        (seccomp, "this_machine", None, "there is no table of system calls for "),
    ],
)
def test_what_the_machine_lacks_is_named(
    monkeypatch: pytest.MonkeyPatch, room: ModuleType, name: str, value: object, said: str
) -> None:
    monkeypatch.setattr(room, name, lambda: value)
    assert sandbox.lacking().startswith(said)
