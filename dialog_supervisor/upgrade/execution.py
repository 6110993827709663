"""Replacing dialogd's own code without a gap: the process re-executes itself, and what it holds goes through a memfd.

An exec keeps the process: its id, its children, the descriptors that it is told to keep, and what the kernel has buffered in
them. So nobody at the other end of a socket notices, and nothing has to be sent from one process to another.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import msgspec
import trio
from msgspec import Struct

from dialog_supervisor.confinement import orphans
from dialog_supervisor.upgrade.handover import VERSION, Handover
from protocol.messages import PROTOCOL_VERSION

HANDOVER_OPTION, CHECK_OPTION = "--handover", "--check-handover"  # of dialogd; each is followed by a descriptor
CHECK_TIMEOUT_S = 60.0  # for the new version to be imported, and to read what it would be handed
STILL_TIMEOUT_S = 15.0  # for what is under way with a carrier to be done: its API is given ten seconds
_POLL_S = 0.02
_STDERR_FD = 2


class UpgradeFailed(Exception):
    """The process goes on as it is; the message says why, and what to do."""


class _Head(Struct):
    """What any version can read of a handover."""

    version: int
    protocol: int


def write(handover: Handover) -> int:
    """Return a memfd with the state. Raises OSError."""
    fd = os.memfd_create("dialogd-handover", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(msgspec.msgpack.encode(handover, enc_hook=str))  # a Path
    return fd


def read(fd: int) -> Handover:
    """Return the state in a memfd. Raises `UpgradeFailed` when this version cannot go on with it."""
    try:
        data = os.pread(fd, os.fstat(fd).st_size, 0)
        head = msgspec.msgpack.decode(data, type=_Head)
        if (head.version, head.protocol) == (VERSION, PROTOCOL_VERSION):
            return msgspec.msgpack.decode(data, type=Handover, dec_hook=lambda kind, value: kind(value))
    except (OSError, msgspec.MsgspecError) as error:
        raise UpgradeFailed(f"the state of the calls cannot be read by this version of dialogd: {error}") from None
    raise UpgradeFailed(
        f"calls under way are in versions {head.version} (state) and {head.protocol} (pipe), and this dialogd speaks "
        f"{VERSION} and {PROTOCOL_VERSION}; restart it instead: the calls are then resumed from the store"
    )


def command(option: str, fd: int) -> list[str]:
    """Return how this process was started, with an option instead of the one it may have been handed its state with."""
    arguments = iter(sys.orig_argv[1:])
    kept = []
    for argument in arguments:
        if argument == HANDOVER_OPTION:
            next(arguments, None)
        else:
            kept.append(argument)
    return [sys.executable, *kept, option, str(fd)]


async def check(handover: Handover) -> None:
    """Have the version that is installed now read the state, and do nothing with it. Raises `UpgradeFailed`."""
    fd = write(handover)
    try:
        with trio.fail_after(CHECK_TIMEOUT_S):
            code, said = await _run(command(CHECK_OPTION, fd), fd)
    except OSError as error:
        raise UpgradeFailed(f"{sys.executable} cannot be run: {error.strerror}") from None
    except trio.TooSlowError:
        raise UpgradeFailed(f"the installed version did not read the state within {CHECK_TIMEOUT_S:g} s") from None
    finally:
        os.close(fd)
    if code != 0:
        reason = said.strip().removeprefix("dialogd: ") or f"it ended with exit code {code}"
        raise UpgradeFailed(f"the installed version refuses: {reason}")


async def _run(arguments: list[str], fd: int) -> tuple[int, str]:
    """Run a child that gets a descriptor, and return its exit code and what it wrote to stderr."""
    nothing = subprocess.DEVNULL
    async with orphans.starting():
        process = await trio.lowlevel.open_process(
            arguments, stdin=nothing, stdout=nothing, stderr=subprocess.PIPE, pass_fds=[fd]
        )
        orphans.expect(process.pid)
    assert process.stderr is not None
    try:
        async with process.stderr:
            said = b"".join([chunk async for chunk in process.stderr])
        return await process.wait(), said.decode(errors="replace")
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        orphans.forget(process.pid)


async def still(capture: Callable[[], Handover | str]) -> Handover:
    """Return the state as soon as it can be told, without a checkpoint after that. Raises `UpgradeFailed`.

    `capture` returns it, or says what stands in the way.
    """
    give_up_at = trio.current_time() + STILL_TIMEOUT_S
    while True:
        await trio.sleep(_POLL_S)  # also at first: what has come until now is dealt with
        if not isinstance(found := capture(), str):
            return found
        if trio.current_time() > give_up_at:
            raise UpgradeFailed(f"after {STILL_TIMEOUT_S:g} s still {found}; try again")


def execute(handover: Handover) -> NoReturn:
    """Become the version that is installed now, for which blocked signals wait. Raises `UpgradeFailed`."""
    try:
        fd = write(handover)
    except OSError as error:
        raise UpgradeFailed(f"the state cannot be written: {error.strerror}") from None
    with _kept([*handover.descriptors(), fd]):
        try:
            os.execv(sys.executable, command(HANDOVER_OPTION, fd))
        except OSError as error:
            os.close(fd)
            raise UpgradeFailed(f"{sys.executable} cannot be run: {error.strerror}") from None


@contextmanager
def _kept(fds: Collection[int]) -> Iterator[None]:
    """Inside, an exec keeps these descriptors."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > _STDERR_FD:
            with suppress(OSError):  # the listing's own
                os.set_inheritable(fd, fd in fds)  # some libraries leave theirs so, Hypercorn for one
    try:
        yield
    finally:
        for fd in fds:
            with suppress(OSError):  # the state's own is closed
                os.set_inheritable(fd, False)


def receive(fd: int) -> Handover:
    """After the exec: return the state, and keep its descriptors from children. Raises `UpgradeFailed`."""
    handover = read(fd)
    os.close(fd)
    for one in handover.descriptors():
        try:
            os.set_inheritable(one, False)
        except OSError as error:
            raise UpgradeFailed(f"descriptor {one} is not there ({error.strerror}); use dialogctl upgrade") from None
    return handover
