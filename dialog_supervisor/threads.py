"""Work in threads. That the system permits dialogd no other thread is an OSError here, as it is for a process or a file.

What waits for a disk runs in a thread, and nothing of it is worth a call: whoever asks has an answer to OSError already.
"""

import errno
from collections.abc import Callable
from typing import TypeVar

import trio

_REFUSED = "can't start new thread"  # RuntimeError's words, in CPython's thread_PyThread_start_new_thread
Result = TypeVar("Result")


async def in_thread(
    work: Callable[[], Result], *, abandon_on_cancel: bool = False, limiter: trio.CapacityLimiter | None = None
) -> Result:
    """Do some work in a thread and return its result. Raises OSError when there can be no thread, and what `work` raises."""
    try:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
    except RuntimeError as error:
        if str(error) != _REFUSED:
            raise
        raise OSError(errno.EAGAIN, "the system permits no other thread; raise TasksMax") from error
