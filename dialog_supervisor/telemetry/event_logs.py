"""The event logs of all calls: written beside the calls by one task, in a thread, and removed when they are old.

Nothing here makes a call wait. What cannot be written, on a full disk say, is lost, counted and said once.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import quote

import structlog
import trio

from dialog_supervisor.sections import EventsConfig
from dialog_supervisor.telemetry import metrics
from dialog_supervisor.telemetry.call_log import CallLog
from dialog_supervisor.threads import in_thread
from protocol.record import RECORD_VERSION, SUFFIX, Header

_WRITE_S = 1.0  # between two writes, while no call ends
_PRUNE_S = 3_600.0
_LAST_WRITE_S = 2.0  # for what is left when dialogd stops; a disk that hangs is not waited for
_DAY_S = 86_400.0
_ID_CHARACTERS = 100  # of a call's id, in a file's name
_NAME = re.compile(r"\d{8}T\d{6}\.\d{3}Z-.+\.jsonl")

log = structlog.get_logger("events")


class EventLogs:
    """Opens a log for each call, writes them all. With no directory, or none to be kept, a call has no log."""

    def __init__(self, config: EventsConfig) -> None:
        self._config = config
        self._open: list[CallLog] = []
        self._filled = trio.Event()
        self._complaints: set[str] = set()

    @property
    def kept(self) -> bool:
        """Whether there are event logs at all."""
        return self._config.directory != Path() and self._config.keep_calls > 0

    def begin(self, call_id: str, generation: str, counts: Mapping[str, int]) -> CallLog | None:
        """Return a log for a call that begins now, to be closed by the call. `counts` are its leg's."""
        if not self.kept:
            return None
        began = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        header = Header(RECORD_VERSION, call_id, generation, began, self._config.transcripts)
        file = self._config.directory / f"{re.sub('[-:]', '', began)}-{file_part(call_id)}{SUFFIX}"
        begun = CallLog(file, header, counts, self._wake, size_limit=self._config.size_limit)
        self._open.append(begun)
        return begun

    def _wake(self) -> None:
        self._filled.set()

    async def run(self) -> None:
        """Write and prune until cancelled, and write once more."""
        if not self.kept:
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._prune)
                while True:
                    with trio.move_on_after(_WRITE_S):
                        await self._filled.wait()
                    self._filled = trio.Event()
                    for one in self._open:
                        one.tick()
                    await self._write()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _LAST_WRITE_S):
                await self._write()

    async def _write(self) -> None:
        taken = [(one, *one.take()) for one in self._open]
        self._open = [one for one in self._open if not one.closed]
        waiting = [(one, lines, entries) for one, lines, entries in taken if lines]
        if waiting:
            try:
                await in_thread(partial(self._append_all, waiting), abandon_on_cancel=True)
            except OSError as error:
                metrics.EVENTS_LOST.inc(sum(entries for _, _, entries in waiting))
                self._complain(error)

    def _append_all(self, waiting: Sequence[tuple[CallLog, bytes, int]]) -> None:
        """In a thread: append to each file. One that cannot be written is no reason to leave out the others."""
        failed = False
        for one, lines, entries in waiting:
            try:
                self._append(one.file, one.header, lines)
            except OSError as error:
                failed = True
                metrics.EVENTS_LOST.inc(entries)
                self._complain(error)
        if not failed and self._complaints:
            self._complaints.clear()
            log.info("event logs are written again", directory=str(self._config.directory))

    def _append(self, file: Path, header: bytes, lines: bytes) -> None:
        """Append whole lines or nothing; whatever became of the file since the last time."""
        self._config.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            try:
                rest = lines if size else header + lines
                while rest:
                    rest = rest[os.write(fd, rest) :]
            except OSError:
                os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)

    def _complain(self, error: OSError) -> None:
        """Say once what is wrong, until it is mended."""
        reason = error.strerror or str(error)
        if reason not in self._complaints:
            self._complaints.add(reason)
            remedy = "make room, or give events.directory another place; calls go on"
            log.error("event logs cannot be written", directory=str(self._config.directory), reason=reason, remedy=remedy)

    async def _prune(self) -> None:
        while True:
            try:
                await in_thread(self.remove_old, abandon_on_cancel=True)
            except OSError as error:
                self._complain(error)
            await trio.sleep(_PRUNE_S)

    def remove_old(self) -> None:
        """Remove the event logs that are too old or too many."""
        limit = partial(expired, keep_s=self._config.keep_days * _DAY_S, keep_calls=self._config.keep_calls)
        try:
            for file in limit(list(_dated(self._config.directory)), time.time()):
                file.unlink(missing_ok=True)
        except OSError as error:
            self._complain(error)


def expired(files: Iterable[tuple[float, Path]], now: float, *, keep_s: float, keep_calls: int) -> list[Path]:
    """Return which event logs are to go: those last written to too long ago, and of the rest the oldest beyond so many."""
    newest_first = sorted(files, reverse=True)
    return [
        file for number, (written_at, file) in enumerate(newest_first) if number >= keep_calls or now - written_at > keep_s
    ]


def find(directory: Path, call_id: str) -> list[Path]:
    """Return the event logs of a call, the oldest first: more than one where dialogd was started anew during it."""
    return sorted(file for _, file in _dated(directory) if file.name.endswith(f"Z-{file_part(call_id)}{SUFFIX}"))


def file_part(call_id: str) -> str:
    """Return a call's id as a file's name may have it."""
    return quote(call_id, safe="").replace(".", "%2E")[:_ID_CHARACTERS]


def _dated(directory: Path) -> Iterator[tuple[float, Path]]:
    """Yield the event logs in a directory and when each was last written to."""
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False).st_mtime, Path(entry.path)
