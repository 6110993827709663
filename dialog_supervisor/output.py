"""What a worker's process writes past its link: what any code prints in it, and the stack that it is asked for."""

import math
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from typing import Self

import structlog
import trio
from msgspec import Struct

LINES_PER_S = 100  # of one stream in the log; an agent that prints more does so by mistake
LINE_BYTES = 4_000  # of one entry; a longer line becomes several
_READ_BYTES = 64 << 10  # a pipe's capacity, pipe(7)
_PAUSE_S = 0.05  # after each read: 1.3 MB a second at most; whoever prints more is slowed down, and nobody else
_STACK_BYTES = 64 << 10  # faulthandler prints 100 frames at most
_STACK_WAIT_S = 0.3  # for a process that runs at all to have printed it
_STACK_POLL_S = 0.05

log = structlog.get_logger("output")


class OutputState(Struct, frozen=True, forbid_unknown_fields=True):
    """Our ends of what a worker writes to, on their way to another process, with what came of unfinished lines."""

    out: int
    err: int
    stack: int
    unfinished: tuple[bytes, bytes] = (b"", b"")


class Lines:
    """Bytes that were printed, turned into lines for the log, and no more of them than it should take. No I/O."""

    def __init__(self, unfinished: bytes = b"") -> None:
        self.unfinished = unfinished
        self._second_ends = -math.inf
        self._taken = 0  # in this second
        self._dropped = 0

    @property
    def due(self) -> float:
        """When `dropped` has something to tell; never, while nothing is dropped."""
        return self._second_ends if self._dropped else math.inf

    def feed(self, data: bytes, now: float) -> list[str]:
        """Return the lines that `data` completes and the log should have. Blank ones are left out."""
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        if len(self.unfinished) > LINE_BYTES:
            lines.append(self.unfinished)
            self.unfinished = b""
        return [piece for line in lines for piece in _pieces(line) if self._may_take(now)]

    def end(self) -> list[str]:
        """Return what was printed last without an end of line, if anything."""
        rest, self.unfinished = self.unfinished, b""
        return list(_pieces(rest))

    def dropped(self, now: float, *, last: bool = False) -> int:
        """Return how many lines were too many in a second, once it is over; with `last`, now."""
        if not self._dropped or (now < self._second_ends and not last):
            return 0
        count, self._dropped = self._dropped, 0
        return count

    def _may_take(self, now: float) -> bool:
        if now >= self._second_ends:
            self._second_ends, self._taken = now + 1, 0
        self._taken += 1
        self._dropped += self._taken > LINES_PER_S
        return self._taken <= LINES_PER_S


def _pieces(line: bytes) -> Iterator[str]:
    for at in range(0, len(line), LINE_BYTES):
        if text := line[at : at + LINE_BYTES].decode(errors="replace").rstrip():
            yield text


class Stream:
    """The reading end of a worker's standard output or error. `say` logs a line."""

    def __init__(self, fd: int, name: str, say: Callable[..., object], unfinished: bytes) -> None:
        self._fd = fd
        self._name = name
        self._say = say
        self._lines = Lines(unfinished)

    @property
    def unfinished(self) -> bytes:
        """What came of a line whose end has not."""
        return self._lines.unfinished

    async def run(self) -> None:
        """Log what is printed, until nobody is left who could print, or until cancelled."""
        while True:
            with trio.move_on_at(self._lines.due):
                await trio.lowlevel.wait_readable(self._fd)
            if not self._read():
                return
            await trio.sleep(_PAUSE_S)

    def _read(self) -> bool:
        """Log what there is to read; return whether there may be more, now or later."""
        data: bytes | None = None
        with suppress(BlockingIOError):
            data = os.read(self._fd, _READ_BYTES)
        now = trio.current_time()
        self._tell_of_dropped(self._lines.dropped(now))
        for line in self._lines.feed(data or b"", now):
            self._say(line, logger=self._name)
        return data != b""

    def finish(self) -> None:
        """The process is gone: log its last words, and no more than a pipe holds, whoever else may have its end."""
        self._read()
        for line in self._lines.end():
            self._say(line, logger=self._name)
        self._tell_of_dropped(self._lines.dropped(trio.current_time(), last=True))

    def _tell_of_dropped(self, count: int) -> None:
        if count:
            log.warning(f"{count} lines dropped", logger=self._name, lines_per_s=LINES_PER_S)


class Output:
    """The descriptors that a worker's process writes to, from before it exists until after it is gone.

    `ours` are the ends that are read here, `writing` those of standard output and error that the process is to inherit.
    """

    def __init__(self, ours: OutputState, writing: Collection[int] = ()) -> None:
        self.theirs = (*writing, ours.stack)
        self._ours = ours
        self._streams = (
            Stream(ours.out, "stdout", log.info, ours.unfinished[0]),
            Stream(ours.err, "stderr", log.warning, ours.unfinished[1]),
        )
        self._writing, self._opened = ExitStack(), ExitStack()
        for fd in writing:
            self._writing.callback(os.close, fd)
        for fd in (ours.out, ours.err, ours.stack):
            self._opened.callback(os.close, fd)

    @classmethod
    def opened(cls) -> Self:
        """Open them. Raises OSError, and leaves nothing open then."""
        with ExitStack() as failing:
            out, err = _pipe(failing), _pipe(failing)
            stack = os.memfd_create("stack", os.MFD_CLOEXEC)
            failing.pop_all()
        return cls(OutputState(out[0], err[0], stack), (out[1], err[1]))

    def hand_over(self) -> OutputState:
        """Return what another process needs to go on reading."""
        out, err = self._streams
        return OutputState(self._ours.out, self._ours.err, self._ours.stack, (out.unfinished, err.unfinished))

    def inherited(self) -> None:
        """The process has its own copies of `theirs` by now, or there will be none."""
        self._writing.close()

    async def run(self) -> None:
        """Log what the process prints, until it is gone or this is cancelled."""
        async with trio.open_nursery() as nursery:
            for stream in self._streams:
                nursery.start_soon(stream.run)

    def finish(self) -> None:
        """The process is gone: log what it printed last."""
        for stream in self._streams:
            stream.finish()

    async def stack(self, ask: Callable[[], None]) -> str:
        """Have the process print its main thread's stack and return it, "" when it does not. `ask` sends it the signal."""
        os.ftruncate(self._ours.stack, 0)
        os.lseek(self._ours.stack, 0, os.SEEK_SET)  # the process writes where this open file description is
        ask()
        before, printed = b"", b""
        with trio.move_on_after(_STACK_WAIT_S):
            while not printed or printed != before:  # nothing tells that it is complete but that no more is added
                before = printed
                await trio.sleep(_STACK_POLL_S)
                printed = os.pread(self._ours.stack, _STACK_BYTES, 0)
        return printed.decode(errors="replace").rstrip()

    def close(self) -> None:
        """Give back every descriptor."""
        self._writing.close()
        self._opened.close()


def _pipe(failing: ExitStack) -> tuple[int, int]:
    """Return a pipe's ends: the reading one does not block; the other does, as programs expect."""
    reading, writing = os.pipe()
    failing.callback(os.close, reading)
    failing.callback(os.close, writing)
    os.set_blocking(reading, False)
    return reading, writing
