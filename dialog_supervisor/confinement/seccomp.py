"""The system calls that sandboxed processes do not have: a filter for seccomp(2), as the program that the kernel runs.

Everything is permitted but what reaches out of the process: to other processes, the machine's settings, more privileges, and
the kernel's less travelled parts. Numbers: the kernel's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2  # prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)


class Machine(NamedTuple):
    """A processor architecture, as the kernel's audit calls it, and its column in the tables below."""

    audit_arch: int
    column: int


MACHINES = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}

_NONE = -1  # this machine has no such call
DENIED: dict[str, tuple[int, int]] = {
    # Looking into, and reaching into, other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Mounts and namespaces; of `clone`, see below
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    # Other users, and privileges
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setreuid": (113, 145),
    "setregid": (114, 143),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "setfsuid": (122, 151),
    "setfsgid": (123, 152),
    "setgroups": (116, 159),
    "capset": (126, 91),
    # The machine
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "iopl": (172, _NONE),
    "ioperm": (173, _NONE),
    "modify_ldt": (154, _NONE),
    "personality": (135, 92),
    # Parts of the kernel that agents have no use for, and that its holes have been found in
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
}
OWN_ONLY: dict[str, tuple[int, int, int]] = {  # the third: which argument names a process; 0 is the one that calls
    "prlimit64": (302, 261, 0),
    "setpriority": (141, 140, 1),
    "ioprio_set": (251, 30, 1),
    "sched_setscheduler": (144, 119, 0),
    "sched_setparam": (142, 118, 0),
    "sched_setattr": (314, 274, 0),
}
SIGNALLING: dict[str, tuple[int, int]] = {  # the first argument names a process or, negative, a group
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
}
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)  # the last: what name resolution asks for addresses
_EVERYBODY = -1  # to kill(2)
_NEW_NAMESPACES = 0x7E020000 | 0x80  # the CLONE_NEW… flags of clone(2)
_X32 = 0x40000000  # the other numbers that x86_64 has for the same calls

# Classic BPF, Documentation/networking/filter.rst; what it loads from, struct seccomp_data in linux/seccomp.h
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
ALLOW, KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


class Op(NamedTuple):
    """An instruction: its code, how many to skip when true and when false, and its operand."""

    code: int
    true: int
    false: int
    operand: int


def fail(number: int) -> int:
    """Return the filter's verdict that has a system call fail so."""
    return _ERRNO | number


def program(machine: Machine, protected: Iterable[int]) -> list[Op]:
    """Return the filter. `protected`: the processes that must not be sent signals."""
    column = machine.column
    forbidden = [one & 0xFFFFFFFF for pid in protected for one in (pid, -pid)] + [_EVERYBODY & 0xFFFFFFFF]
    ops = [_load(_ARCH_AT), *_unless_equal(machine.audit_arch, _verdict(KILL)), _load(_NUMBER_AT)]
    ops += [Op(_AT_LEAST, 0, 1, _X32), _verdict(fail(errno.ENOSYS))]
    for numbers in DENIED.values():
        if numbers[column] != _NONE:
            ops += _on(numbers[column], [_verdict(fail(errno.EPERM))])
    for *both, argument in OWN_ONLY.values():
        ops += _on(both[column], [_argument(argument), *_unless_equal(0, _verdict(fail(errno.EPERM))), _verdict(ALLOW)])
    for numbers in SIGNALLING.values():
        ops += _on(numbers[column], [_argument(0), *_one_of(forbidden, fail(errno.EPERM)), _verdict(ALLOW)])
    ops += _on(
        CLONE[column], [_argument(0), Op(_ANY_BIT, 0, 1, _NEW_NAMESPACES), _verdict(fail(errno.EPERM)), _verdict(ALLOW)]
    )
    ops += _on(
        CLONE3[column], [_verdict(fail(errno.ENOSYS))]
    )  # its flags are in memory, out of sight; callers turn to clone
    ops += _on(SOCKET[column], [_argument(0), *_one_of(FAMILIES, ALLOW), _verdict(fail(errno.EAFNOSUPPORT))])
    return [*ops, _verdict(ALLOW)]


def _load(offset: int) -> Op:
    return Op(_LOAD, 0, 0, offset)


def _argument(index: int) -> Op:
    return _load(_ARGUMENTS_AT + 8 * index)  # its lower half: both machines are little-endian


def _verdict(value: int) -> Op:
    return Op(_RETURN, 0, 0, value)


def _unless_equal(value: int, op: Op) -> list[Op]:
    return [Op(_EQUAL, 1, 0, value), op]


def _one_of(values: Sequence[int], verdict: int) -> Iterator[Op]:
    for value in values:
        yield from (Op(_EQUAL, 0, 1, value), _verdict(verdict))


def _on(number: int, ops: Sequence[Op]) -> list[Op]:
    """Return what runs `ops`, which come to a verdict, when it is this call."""
    return [Op(_EQUAL, 0, len(ops), number), *ops]


def this_machine() -> Machine | None:
    """Return the machine that this process runs on, when the tables have it."""
    return MACHINES.get(os.uname().machine)


def supported() -> bool:
    """Whether this kernel takes filters: without one to read it then says EFAULT, and EINVAL otherwise (prctl(2))."""
    return _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0) == -1 and ctypes.get_errno() == errno.EFAULT


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("ops", ctypes.c_char_p))


def install(protected: Iterable[int]) -> None:
    """Filter this process's calls, and of all that it will start. Raises OSError. It needs PR_SET_NO_NEW_PRIVS."""
    machine = this_machine()
    if machine is None:
        raise OSError(errno.ENOSYS, f"there is no table of system calls for {os.uname().machine}")
    ops = program(machine, protected)
    code = b"".join(struct.pack("=HBBI", *op) for op in ops)
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(ops), code)), 0, 0) == -1:
        raise OSError(ctypes.get_errno(), "the filter of system calls is not accepted")
