"""A timer of the kernel that is waited for like a socket: a frame's time to leave costs no turn of the event loop then."""

import ctypes
import os
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

_libc = ctypes.CDLL(None, use_errno=True)  # Python itself has timerfd_create(2) from 3.13 on
_ABSOLUTE = 1  # TFD_TIMER_ABSTIME
_EXPIRATIONS_BYTES = 8


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Timer:
    """Becomes readable at a time of `time.perf_counter`, which is CLOCK_MONOTONIC on Linux. Use in `with`."""

    def __init__(self) -> None:
        self.fd: int = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd == -1:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self.fd)

    def set(self, due: float) -> None:
        """Become readable then, or at once if that is past."""
        seconds, fraction = divmod(due, 1)
        setting = _Setting(_Timespec(0, 0), _Timespec(int(seconds), int(fraction * 1e9)))
        _libc.timerfd_settime(self.fd, _ABSOLUTE, ctypes.byref(setting), None)

    def take(self) -> None:
        """Have it no longer readable, until it is set again."""
        with suppress(BlockingIOError):  # it was set anew meanwhile
            os.read(self.fd, _EXPIRATIONS_BYTES)
