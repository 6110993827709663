"""The store in a file (SQLite, WAL), which several dialogds of one machine may share.

A record belongs to the dialogd that wrote it for as long as that lives, which its lease tells. Whatever happens to the file,
it is opened anew for the next thing that is asked, and begun anew where it is damaged or gone.
"""

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from dialog_supervisor.store.base import Changes, Elsewhere, Fault, StoreFailed
from dialog_supervisor.store.lease import Lease, LeaseState
from dialog_supervisor.store.records import Line, Record, outlived, resumed
from dialog_supervisor.threads import in_thread

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 1.0  # another dialogd's transaction takes milliseconds
_THREADS = 2  # one writes, one may take up calls
_PRIVATE, _PRIVATE_DIRECTORY = 0o600, 0o700  # records hold what callers said

_SCHEMA = f"""
CREATE TABLE owners (owner TEXT PRIMARY KEY, alive_at REAL NOT NULL, wall_time REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE calls (call_id TEXT PRIMARY KEY, owner TEXT NOT NULL, record BLOB NOT NULL);
CREATE INDEX calls_of ON calls (owner);
CREATE TABLE lines (call_id TEXT PRIMARY KEY, line BLOB NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
"""

_FAULTS = {  # by SQLite's primary result codes, https://sqlite.org/rescode.html
    sqlite3.SQLITE_FULL: Fault.FULL,
    sqlite3.SQLITE_READONLY: Fault.READ_ONLY,
    sqlite3.SQLITE_PERM: Fault.READ_ONLY,
    sqlite3.SQLITE_BUSY: Fault.LOCKED,
    sqlite3.SQLITE_LOCKED: Fault.LOCKED,
    sqlite3.SQLITE_CORRUPT: Fault.CORRUPT,
    sqlite3.SQLITE_NOTADB: Fault.CORRUPT,
    sqlite3.SQLITE_CANTOPEN: Fault.NO_PLACE,
}

_SYSTEM_FAULTS = {
    errno.ENOSPC: Fault.FULL,
    errno.EDQUOT: Fault.FULL,
    errno.EFBIG: Fault.FULL,
    errno.EROFS: Fault.READ_ONLY,
    errno.EACCES: Fault.READ_ONLY,
    errno.EPERM: Fault.READ_ONLY,
}

Result = TypeVar("Result")


def files_of(path: Path) -> tuple[Path, ...]:
    """Return a store's file, and whatever may be beside it or instead of it; none where there is no path."""
    if path == Path():
        return ()
    return tuple(
        path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", ".owners", ".damaged", ".damaged-wal")
    )


class SqliteStore:
    """A store in a file. Threads do the work, one at a time; who is cancelled meanwhile does not wait for his."""

    def __init__(self, path: Path, taken_over: LeaseState | None = None) -> None:
        self.lease = Lease(path.with_name(path.name + ".owners"), taken_over)
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._opened: list[tuple[int, int]] = []  # device and inode of the files that are open
        self._whole = False  # whether everything of this owner has been written to the file that is open
        self._taken: set[str] = set()  # calls, and not yet written or gone
        self._left = False
        self._lock = threading.Lock()
        self._threads = trio.CapacityLimiter(_THREADS)

    async def write(self, changes: Changes) -> None:
        """See `Store`."""
        await self._in_thread(lambda connection: self._write(connection, changes))

    async def take(self, call_id: str, at: float) -> Record | Elsewhere | None:
        """See `Store`."""
        return await self._in_thread(lambda connection: self._take(connection, call_id, at))

    async def forget(self, call_id: str) -> None:
        """See `Store`."""
        await self._in_thread(lambda connection: self._forget(connection, call_id))

    async def tidy(self, max_age_s: float) -> int:
        """See `Store`."""
        return await self._in_thread(lambda connection: self._tidy(connection, max_age_s))

    def hand_over(self) -> LeaseState | None:
        """Return what another process needs to go on as the same owner."""
        return self.lease.hand_over()

    async def close(self) -> None:
        """See `Store`."""
        await self._in_thread(self._leave)

    # In a thread

    async def _in_thread(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            return await in_thread(partial(self._work, work), abandon_on_cancel=True, limiter=self._threads)
        except OSError as error:  # the file's are told by `_work`
            raise StoreFailed(Fault.NO_THREAD, str(error.strerror)) from error

    def _work(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        with self._lock:
            if self._left:  # by who had the lock before: another write would be this owner's again
                raise StoreFailed(Fault.LEFT, str(self._path))
            try:
                return work(self._connected())
            except (sqlite3.Error, UnicodeError) as error:  # the latter of a text that is none, from wherever it came
                raise self._failed(error) from error
            except OSError as error:
                self._disconnect()
                fault = _SYSTEM_FAULTS.get(error.errno or 0, Fault.NO_PLACE)
                raise StoreFailed(fault, f"{error.filename or self._path}: {error.strerror}") from error

    def _failed(self, error: Exception) -> StoreFailed:
        """Return what went wrong, in an operator's terms; the file is opened anew for what comes next."""
        self._disconnect()
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        fault = _FAULTS.get(code & 0xFF, Fault.FAILED)
        if fault is Fault.CORRUPT:
            self._move_aside()
        return StoreFailed(fault, f"{self._path}: {error}")

    def _connected(self) -> sqlite3.Connection:
        if self._connection is not None and self._files() != self._opened:
            self._disconnect()
            self._whole = False
        if self._connection is None:
            self._connection = self._connect()
            self._opened = self._files()
        self.lease.hold()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=_PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, _PRIVATE))
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA secure_delete = ON;")
            with _transaction(connection):
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        connection.execute(statement)
                elif version != SCHEMA_VERSION:
                    raise StoreFailed(Fault.NEWER, f"{self._path} has version {version}, this dialogd {SCHEMA_VERSION}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _files(self) -> list[tuple[int, int]]:
        """Return which files are there by the names of the database and its log: what was deleted is written to in vain."""
        found = []
        for path in files_of(self._path)[:2]:
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_dev, status.st_ino))
        return found

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def _move_aside(self) -> None:
        """Keep a damaged file for whoever wants to look into it, but only the last."""
        path, log, index, _, damaged, damaged_log = files_of(self._path)
        self._whole = False
        with suppress(OSError):
            path.replace(damaged)
        with suppress(OSError):
            log.replace(damaged_log)
        with suppress(OSError):
            index.unlink()

    def _write(self, connection: sqlite3.Connection, changes: Changes) -> None:
        if not self._whole and not changes.whole:
            raise StoreFailed(Fault.REPLACED, str(self._path))
        owner = self.lease.owner
        with _transaction(connection):
            for call_id in changes.gone | (self._left_out(connection, changes) if changes.whole else frozenset()):
                _delete(connection, "call_id = ?", call_id)
            connection.execute("REPLACE INTO owners VALUES (?, ?, ?)", (owner, changes.at, time.time()))
            connection.executemany(
                "REPLACE INTO calls VALUES (?, ?, ?)",
                ((call_id, owner, msgspec.json.encode(record)) for call_id, record in changes.records.items()),
            )
            connection.executemany(
                "REPLACE INTO lines VALUES (?, ?)",
                ((call_id, msgspec.json.encode(line)) for call_id, line in changes.lines.items()),
            )
        self._whole = True
        self._taken -= changes.records.keys() | changes.gone

    def _left_out(self, connection: sqlite3.Connection, changes: Changes) -> frozenset[str]:
        """Return what this owner has here and not in `changes`, but for calls taken too lately to be in them."""
        mine = connection.execute("SELECT call_id FROM calls WHERE owner = ?", (self.lease.owner,)).fetchall()
        return frozenset(call_id for (call_id,) in mine if call_id not in changes.records) - self._taken

    def _take(self, connection: sqlite3.Connection, call_id: str, at: float) -> Record | Elsewhere | None:
        with _transaction(connection):
            found = connection.execute(
                "SELECT calls.owner, record, line, alive_at FROM calls LEFT JOIN lines USING (call_id)"
                " LEFT JOIN owners USING (owner) WHERE call_id = ?",
                (call_id,),
            ).fetchone()
            if found is None or found[0] == self.lease.owner:
                return None
            owner, record, line, alive_at = found
            if self.lease.lives(owner):
                return Elsewhere()
            taken = _read(record, line, alive_at)
            if taken is None:
                _delete(connection, "call_id = ?", call_id)
                return None
            kept = msgspec.json.encode(resumed(taken, at))
            connection.execute("UPDATE calls SET owner = ?, record = ? WHERE call_id = ?", (self.lease.owner, kept, call_id))
            connection.execute("DELETE FROM lines WHERE call_id = ?", (call_id,))
            connection.execute("REPLACE INTO owners VALUES (?, ?, ?)", (self.lease.owner, at, time.time()))
        self._taken.add(call_id)
        return taken

    def _forget(self, connection: sqlite3.Connection, call_id: str) -> None:
        with _transaction(connection):
            found = connection.execute("SELECT owner FROM calls WHERE call_id = ?", (call_id,)).fetchone()
            if found is not None and (found[0] == self.lease.owner or not self.lease.lives(found[0])):
                _delete(connection, "call_id = ?", call_id)

    def _tidy(self, connection: sqlite3.Connection, max_age_s: float) -> int:
        with _transaction(connection):
            known = dict(connection.execute("SELECT owner, wall_time FROM owners").fetchall())
            held = dict(connection.execute("SELECT owner, count(*) FROM calls GROUP BY owner").fetchall())
            dead = {owner for owner in {*known, *held, *self.lease.others()} if not self.lease.lives(owner)}
            now = time.time()
            past = {owner for owner in dead if owner not in held or abs(now - known.get(owner, 0.0)) > max_age_s}
            for owner in past:
                _delete(connection, "owner = ?", owner)
                connection.execute("DELETE FROM owners WHERE owner = ?", (owner,))
        for owner in past:
            self.lease.bury(owner)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # what was deleted is still in the log till then
        return sum(held.get(owner, 0) for owner in past)

    def _leave(self, connection: sqlite3.Connection) -> None:
        self._left = True
        owner = (self.lease.owner,)
        (of_others,) = connection.execute("SELECT count(*) FROM calls WHERE owner != ?", owner).fetchone()
        try:
            with _transaction(connection):
                _delete(connection, "owner = ?", *owner)
                connection.execute("DELETE FROM owners WHERE owner = ?", owner)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error:
            if of_others:
                raise
            for path in files_of(self._path)[:3]:  # what was said is not to stay, and a full disk lets files be deleted
                path.unlink(missing_ok=True)
        finally:
            self._disconnect()
            self.lease.release()


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def _delete(connection: sqlite3.Connection, which: str, value: str) -> None:
    """Delete the calls of which this is true, and what their callers were hearing. `which` is a constant of this file."""
    connection.execute(f"DELETE FROM lines WHERE call_id IN (SELECT call_id FROM calls WHERE {which})", (value,))
    connection.execute(f"DELETE FROM calls WHERE {which}", (value,))


def _read(record: bytes, line: bytes | None, alive_at: float | None) -> Record | None:
    """Return a call as its owner left it, or None when this version cannot read it."""
    try:
        found = msgspec.json.decode(record, type=Record)
        heard = msgspec.json.decode(line, type=Line) if line is not None else Line(found.at)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return outlived(found, heard, found.at if alive_at is None else alive_at)
