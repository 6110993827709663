"""A copy of the agent's directory as it was at one moment: no import and no data file of a call is newer than its code.

A snapshot is read-only and named by its content. What an agent reads beside its code, it reads from the snapshot, by
`__file__` or by a relative path; what it writes for good belongs elsewhere, by an absolute path.
"""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

SKIPPED = frozenset({"__pycache__", ".git", ".venv", "node_modules"})  # made from other files, or no part of the code
SIZE_LIMIT_BYTES = 1 << 30  # a directory larger than this was hardly meant; it may be copied to memory (tmpfs)
FILES_LIMIT = 50_000
_HASH_CHARACTERS = 12  # of 64: enough to tell the versions of one agent apart, and to read out
PREFIX = "dialog-generations-"
_CHUNK_BYTES = 1 << 20
_EXECUTABLE = 0o111
_READ_ONLY_FILE, _READ_ONLY_DIRECTORY = 0o444, 0o555
_PRIVATE_DIRECTORY = 0o700


class GenerationFailed(Exception):
    """The agent's code cannot serve calls; the message is for its author."""


class Snapshot(Struct, frozen=True):
    """A version of the agent's code: where the copy is, what it is a copy of, and the hash of its content."""

    directory: Path
    source: Path
    hash: str

    @property
    def name(self) -> str:
        """The hash, and the number of the snapshot among all of this dialogd: the same content may be loaded twice."""
        return self.directory.name

    def as_written(self, text: str) -> str:
        """Return a traceback with the paths that the author knows."""
        return text.replace(str(self.directory), str(self.source))

    def remove(self) -> None:
        """Delete the copy. Raises OSError."""
        _remove(self.directory)


def take(source: Path, directory: Path, number: int, leave_out: Collection[Path] = ()) -> Snapshot:
    """Copy `source` to `directory`/HASH.`number`. Raises `GenerationFailed`, and leaves nothing then.

    Left out are `SKIPPED` names, compiled modules, the paths in `leave_out`, and what is neither file nor directory.
    Links are followed, also out of the directory: a snapshot holds what they lead to, so that it changes with nothing else.
    A link that leads nowhere is left out, as an editor's locks are.
    """
    source, unnamed = source.resolve(), directory / f"copy.{number}"
    copy = _Copy(source, {path.resolve() for path in leave_out})
    try:
        copy.take_directory(source, unnamed)
        name = f"{copy.digest.hexdigest()[:_HASH_CHARACTERS]}.{number}"
        return Snapshot(unnamed.rename(directory / name), source, name.partition(".")[0])
    except OSError as error:
        _remove(unnamed)
        raise GenerationFailed(
            f"agent.path: {error.filename or source} cannot be copied: {error.strerror}; "
            "make it readable for dialogd, or move it out of the directory"
        ) from None
    except BaseException:
        _remove(unnamed)
        raise


def wanted(entry: os.DirEntry[str], leave_out: Collection[Path]) -> bool:
    """Whether what is found in the agent's directory belongs to its code."""
    return not (entry.name in SKIPPED or entry.name.endswith(".pyc") or Path(entry.path) in leave_out)


class _Copy:
    """Copies and hashes in one pass, in the order of the names, within the limits."""

    def __init__(self, source: Path, leave_out: Collection[Path]) -> None:
        self.digest = hashlib.sha256()
        self._source = source
        self._leave_out = leave_out
        self._bytes = 0
        self._files = 0

    def take_directory(self, source: Path, target: Path, within: frozenset[tuple[int, int]] = frozenset()) -> None:
        """Copy a directory that is found inside the directories `within`, as (device, inode)."""
        status = os.stat(source)
        here = (status.st_dev, status.st_ino)
        if here in within:
            raise GenerationFailed(f"agent.path: {source} leads back to a directory that it is in; remove the link")
        os.mkdir(target, _PRIVATE_DIRECTORY)
        with os.scandir(source) as entries:
            found = sorted((entry for entry in entries if wanted(entry, self._leave_out)), key=lambda entry: entry.name)
        for entry in found:
            if entry.is_dir():
                self.take_directory(Path(entry.path), target / entry.name, within | {here})
            elif entry.is_file():
                self._take_file(Path(entry.path), target / entry.name)
        os.chmod(target, _READ_ONLY_DIRECTORY)

    def _take_file(self, source: Path, target: Path) -> None:
        self._files += 1
        content = hashlib.sha256()
        with open(source, "rb") as original, open(target, "xb") as copied:
            while chunk := original.read(_CHUNK_BYTES):
                self._bytes += len(chunk)
                self._check_limits(source)
                content.update(chunk)
                copied.write(chunk)
            executable = os.fstat(original.fileno()).st_mode & _EXECUTABLE
            os.fchmod(copied.fileno(), _READ_ONLY_FILE | executable)
        name = os.fsencode(source.relative_to(self._source))
        self.digest.update(b"%d %d %s %s" % (len(name), bool(executable), name, content.digest()))

    def _check_limits(self, source: Path) -> None:
        if self._bytes > SIZE_LIMIT_BYTES or self._files > FILES_LIMIT:
            raise GenerationFailed(
                f"agent.path: {self._source} has over {SIZE_LIMIT_BYTES} bytes or {FILES_LIMIT} files, up to {source}; "
                "keep what is large elsewhere, and give the agent its path in [agent.env]"
            )


class PrivateDirectory(Struct, frozen=True, forbid_unknown_fields=True):
    """A dialogd's directory for snapshots, and the descriptor that keeps it locked."""

    path: Path
    lock_fd: int


@contextmanager
def private_directory(parent: Path, taken_over: PrivateDirectory | None = None) -> Iterator[PrivateDirectory]:
    """Make a directory for one dialogd's snapshots, for this user alone, and delete it in the end.

    With `taken_over`, go on with that which another process made. It is locked for as long as its dialogd lives (flock(2)):
    what a killed one left behind is deleted by the next.
    Raises `GenerationFailed`.
    """
    held = taken_over or _make_private_directory(parent)
    try:
        yield held
    finally:
        with suppress(OSError):  # then the next dialogd tries again
            _remove(held.path)
        os.close(held.lock_fd)


def _make_private_directory(parent: Path) -> PrivateDirectory:
    try:
        parent.mkdir(mode=_PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        _remove_forsaken(parent)
        return PrivateDirectory(*_make_locked(parent))
    except OSError as error:
        raise GenerationFailed(
            f"the agent's code cannot be copied to {parent}: {error.strerror}; have TMPDIR name a directory with room"
        ) from None


def _make_locked(parent: Path) -> tuple[Path, int]:
    """Return a new directory, and the descriptor that keeps it locked; until it is, another dialogd may remove it."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)).resolve()
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _lock(directory)
            if directory.exists():
                return directory, lock
            os.close(lock)


def _lock(directory: Path) -> int:
    """Return a descriptor that keeps the directory locked. Raises OSError, BlockingIOError when somebody else does."""
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def _remove_forsaken(parent: Path) -> None:
    for directory in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            found = directory.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                lock = _lock(directory)
                try:
                    _remove(directory)
                finally:
                    os.close(lock)


def _remove(directory: Path) -> None:
    """Delete a directory although it is read-only."""
    for path, _, _ in os.walk(directory):
        os.chmod(path, _PRIVATE_DIRECTORY)
    with suppress(FileNotFoundError):
        shutil.rmtree(directory)
