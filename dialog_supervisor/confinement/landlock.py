"""Landlock (landlock(7)): what a process, and all that it will start, may do with files. It takes no privileges."""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path
from typing import NamedTuple

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # of every machine
_ASK_VERSION = 1
_PATH_BENEATH = 1
_TRUNCATE_SINCE, _IOCTL_SINCE, _SCOPES_SINCE = 3, 5, 6  # versions of the interface
_SCOPES = 0b11  # abstract unix sockets and signals: none to processes outside
_libc = ctypes.CDLL(None, use_errno=True)


class Right(IntFlag):
    """What may be permitted of a file or of everything in a directory (linux/landlock.h)."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ = Right.READ_FILE | Right.READ_DIR | Right.EXECUTE
WRITE = (
    Right.WRITE_FILE | Right.TRUNCATE | Right.REMOVE_DIR | Right.REMOVE_FILE
    | Right.MAKE_DIR | Right.MAKE_REG | Right.MAKE_SOCK | Right.MAKE_FIFO | Right.MAKE_SYM
)  # fmt: skip
EVERYTHING = READ | WRITE | Right.MAKE_CHAR | Right.MAKE_BLOCK | Right.IOCTL_DEV
_OF_A_FILE = Right.EXECUTE | Right.WRITE_FILE | Right.READ_FILE | Right.TRUNCATE | Right.IOCTL_DEV


class Rule(NamedTuple):
    """What is permitted below a path, which is open."""

    fd: int
    rights: int


def version() -> int:
    """Return the version of the interface that this kernel has; 0 is none, or switched off at boot."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _ASK_VERSION)))


def rule(path: Path, rights: Right) -> Rule:
    """Open a path for a rule; of a file, only what a file can have. Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        rights &= _OF_A_FILE
    return Rule(fd, int(rights & known(version())))


def known(abi: int) -> Right:
    """Return the rights that a version of the interface knows."""
    newer = Right.REFER  # in `EVERYTHING` of none: files do not move between directories with different rights
    if abi < _TRUNCATE_SINCE:
        newer |= Right.TRUNCATE
    if abi < _IOCTL_SINCE:
        newer |= Right.IOCTL_DEV
    return ~newer


def restrict(handled: Right, rules: Iterable[Rule]) -> None:
    """Permit, of the rights that are `handled`, those of the rules alone; other restrictions stay. Raises OSError.

    It needs PR_SET_NO_NEW_PRIVS.
    """
    abi = version()
    attributes = struct.pack("=QQQ", handled & known(abi), 0, _SCOPES if abi >= _SCOPES_SINCE else 0)
    size = ctypes.c_size_t(len(attributes) if abi >= _SCOPES_SINCE else 8)  # older ones know the first field alone
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, attributes, size, 0))
    try:
        for fd, rights in rules:
            if wanted := rights & handled:
                _checked(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", wanted, fd), 0))
        _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _checked(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return int(result)
