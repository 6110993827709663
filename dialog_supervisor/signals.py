"""Signals as something to read, signalfd(2): blocked in every thread, none is lost while dialogd executes itself anew.

What a handler has been told of is gone with the program that the handler belongs to, and a signal that the kernel hands to
another thread cannot be held back by the main one. A blocked signal waits, also through an exec, until somebody reads it.
"""

import ctypes
import os
import signal
import struct
import sys
from collections.abc import Sequence

import trio

_libc = ctypes.CDLL(None, use_errno=True)
_SIGSET_BYTES = 128  # of glibc's sigset_t, of which the kernel reads the first word
_WORD_BYTES = 8
_INFO_BYTES = 128  # of a signalfd_siginfo, which begins with the signal's number
_NEW = -1


class Signals:
    """Some signals of this process, an asynchronous iterator, to be closed by leaving its block.

    They stay blocked afterwards, so that what comes last cuts nothing short. Make it before there is a thread: threads and
    children inherit what is blocked. Raises OSError.
    """

    def __init__(self, numbers: Sequence[signal.Signals]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:  # of one that is ignored, as by nohup or in a job of a shell's, what waits may be dropped
            signal.signal(number, lambda *_: None)
        word = sum(1 << (number - 1) for number in numbers)
        mask = word.to_bytes(_WORD_BYTES, sys.byteorder).ljust(_SIGSET_BYTES, b"\0")
        self._fd = int(_libc.signalfd(_NEW, mask, os.O_CLOEXEC | os.O_NONBLOCK))
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), f"signalfd: {os.strerror(ctypes.get_errno())}")

    def __enter__(self) -> "Signals":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def __aiter__(self) -> "Signals":
        return self

    async def __anext__(self) -> signal.Signals:
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                info = os.read(self._fd, _INFO_BYTES)
            except BlockingIOError:
                continue
            (number,) = struct.unpack_from("=I", info)
            return signal.Signals(number)
