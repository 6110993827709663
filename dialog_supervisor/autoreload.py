"""`dialogd --watch`, for development: what changes in the agent's directory is loaded as soon as it has come to rest.

The directory is looked at again and again, in a thread. To be told by the kernel instead (inotify) would need a library, and
would miss what changes on the other side of a network file system or a container's mount.
"""

import os
import re
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
import trio

from dialog_supervisor.snapshot import FILES_LIMIT, PREFIX, GenerationFailed, wanted

LOOK_EVERY_S = 0.3  # two looks that agree make a reload: editors and tools write several files within that
_REST = 10  # times as long as a look took: a large directory takes a tenth of a core at most
_FILES_NAMED = 5
_SCRATCH = re.compile(  # what editors and the desktop leave beside a file for a moment, or for good
    r".*~ | \#.*\# | \.\#.* | \..*\.sw[a-z] | 4913 | .*\.tmp | .*___jb_(tmp|old)___ | \.goutputstream-.* | \..*\.kate-swp"
    r" | \.DS_Store | " + re.escape(PREFIX) + r".*",
    re.VERBOSE,
)

Stamp = tuple[int, int, int, int]  # a file's inode, size, time of its last change in ns, and mode
Look = dict[str, Stamp]  # by path below the directory

log = structlog.get_logger("autoreload")


def look(directory: Path, leave_out: Collection[Path]) -> Look:
    """Return the files that a snapshot would copy, but for editors' own. What cannot be read is not there."""
    found: Look = {}
    _look_into(directory.resolve(), "", {path.resolve() for path in leave_out}, found, frozenset())
    return found


def _look_into(
    directory: Path, name: str, leave_out: Collection[Path], found: Look, within: frozenset[tuple[int, int]]
) -> None:
    """Add what is in a directory that is found inside the directories `within`, as (device, inode)."""
    with suppress(OSError):
        status = os.stat(directory)
        here = (status.st_dev, status.st_ino)
        if here in within:
            return
        with os.scandir(directory) as entries:
            for entry in entries:
                if len(found) < FILES_LIMIT and wanted(entry, leave_out) and not _SCRATCH.fullmatch(entry.name):
                    _look_at(entry, f"{name}{entry.name}", leave_out, found, within | {here})


def _look_at(
    entry: os.DirEntry[str], name: str, leave_out: Collection[Path], found: Look, within: frozenset[tuple[int, int]]
) -> None:
    with suppress(OSError):  # gone meanwhile, or a link to what may not be looked at: that is no reason to miss the others
        if entry.is_dir():
            _look_into(Path(entry.path), f"{name}/", leave_out, found, within)
        elif entry.is_file():
            status = entry.stat()
            found[name] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode)


class Settling:
    """Tells, look by look, when a directory has changed and come to rest. No I/O."""

    def __init__(self, loaded: Look) -> None:
        self._loaded = self._last = loaded

    def changed(self, found: Look) -> list[str]:
        """Return the files to load again for: what differs from what was loaded, if this look is as the one before.

        A directory that is empty, or gone, is somebody's between two steps, and not a version.
        """
        rested, self._last = found == self._last, found
        if not rested or not found or found == self._loaded:
            return []
        before, self._loaded = self._loaded, found
        return sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))


class Watch:
    """Watches one directory, from `begin` on."""

    def __init__(self, directory: Path, leave_out: Collection[Path]) -> None:
        self._directory = directory
        self._leave_out = leave_out
        self._settling = Settling({})

    async def begin(self) -> None:
        """Take the directory as it is for loaded: call this before it is."""
        self._settling = Settling(await self._look())

    async def run(self, reload: Callable[[], Awaitable[Any]]) -> None:
        """Reload whenever something has changed, until cancelled. What fails is logged there, and not tried again."""
        while True:
            began_at = trio.current_time()
            found = await self._look()
            pause_s = max(LOOK_EVERY_S, _REST * (trio.current_time() - began_at))
            if changed := self._settling.changed(found):
                log.info("the agent's directory has changed", files=changed[:_FILES_NAMED], more=len(changed[_FILES_NAMED:]))
                with suppress(GenerationFailed):
                    await reload()
            await trio.sleep(pause_s)

    async def _look(self) -> Look:
        return await trio.to_thread.run_sync(look, self._directory, self._leave_out, abandon_on_cancel=True)
