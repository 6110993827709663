"""The store in a file: what it keeps, whose it is, and what it makes of a file that is full, damaged, locked or gone."""

import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dialog_supervisor.carriers.playout import OnTheWay
from dialog_supervisor.recovery import CallState
from dialog_supervisor.store.base import Changes, Elsewhere, Fault, StoreFailed
from dialog_supervisor.store.lease import Lease
from dialog_supervisor.store.records import Line, Record
from dialog_supervisor.store.sqlite import SCHEMA_VERSION, SqliteStore, files_of
from protocol.messages import Metadata

HOUR_S = 3600.0


def record(call_id: str, checkpoint: bytes = b"state", at: float = 100.0) -> Record:
    metadata = Metadata(call_id, "twilio", "+14155550123", "+14155550199")
    return Record(at=at, state=CallState(metadata=metadata, checkpoint=checkpoint), generation="g.1", age_s=30.0)


def changes(*calls: str, at: float = 100.0, whole: bool = False, gone: tuple[str, ...] = (), **lines: Line) -> Changes:
    records = {call: record(call, at=at) for call in calls}
    return Changes(at, records, {call: Line(at) for call in calls} | lines, frozenset(gone), whole)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "calls.sqlite"


@pytest.fixture
def store(file: Path) -> SqliteStore:
    return SqliteStore(file)


@pytest.fixture
def next_store(file: Path) -> SqliteStore:
    return SqliteStore(file)


def die(store: SqliteStore) -> None:
    """Have its owner be dead, as the kernel does: the lock is gone, and everything else is left as it is."""
    os.close(store.lease.descriptor)
    store.lease.descriptor = -1


def rows(file: Path, table: str = "calls") -> int:
    with sqlite3.connect(file) as connection:
        (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    connection.close()
    found: int = count
    return found


async def test_a_call_whose_owner_died_is_taken_as_it_was(store: SqliteStore, next_store: SqliteStore) -> None:
    await store.write(changes("CA1", "CA2", whole=True))
    die(store)
    assert await next_store.take("CA1", 5.0) == record("CA1")


async def test_a_call_is_taken_once(store: SqliteStore, next_store: SqliteStore, file: Path) -> None:
    await store.write(changes("CA1", whole=True))
    die(store)
    assert await next_store.take("CA1", 5.0)
    assert await next_store.take("CA1", 5.0) is None
    assert await SqliteStore(file).take("CA1", 5.0) == Elsewhere()


async def test_a_call_that_nobody_knows_is_none(store: SqliteStore) -> None:
    assert await store.take("CA1", 5.0) is None


async def test_a_call_of_a_living_owner_is_not_given_away(store: SqliteStore, next_store: SqliteStore) -> None:
    await store.write(changes("CA1", whole=True))
    assert await next_store.take("CA1", 5.0) == Elsewhere()
    await next_store.forget("CA1")
    assert await next_store.take("CA1", 5.0) == Elsewhere()


async def test_that_it_was_taken_is_kept_as_a_death(store: SqliteStore, next_store: SqliteStore, file: Path) -> None:
    await store.write(changes("CA1", whole=True))
    die(store)
    for number, at in enumerate((5.0, 6.0)):
        taken = await next_store.take("CA1", at)
        assert isinstance(taken, Record)
        assert len(taken.state.deaths) == number
        die(next_store)
        next_store = SqliteStore(file)


async def test_what_was_heard_is_counted_up_to_the_last_write_of_any_call(
    store: SqliteStore, next_store: SqliteStore
) -> None:
    await store.write(changes("CA1", whole=True, CA1=Line(100.0, (OnTheWay("u1", 0, 5000, done=True),))))
    await store.write(changes(at=102.0))
    die(store)
    taken = await next_store.take("CA1", 5.0)
    assert isinstance(taken, Record)
    assert [report.played_ms for report in taken.state.reports] == [2000]
    assert taken.age_s == 32.0


async def test_a_newer_record_or_line_takes_the_place_of_the_older(store: SqliteStore, next_store: SqliteStore) -> None:
    await store.write(changes("CA1", whole=True, CA1=Line(100.0, (OnTheWay("u1", 0, 5000, done=True),))))
    await store.write(Changes(101.0, {"CA1": record("CA1", b"newer", 101.0)}, {"CA1": Line(101.0)}))
    die(store)
    taken = await next_store.take("CA1", 5.0)
    assert taken == record("CA1", b"newer", 101.0)


async def test_an_ended_call_leaves_nothing_in_the_file(store: SqliteStore, file: Path) -> None:
    await store.write(Changes(100.0, {"CA1": record("CA1", b"a secret word " * 500)}, {"CA1": Line(100.0)}, whole=True))
    await store.write(changes(gone=("CA1",)))
    assert (rows(file), rows(file, "lines")) == (0, 0)
    await store.tidy(HOUR_S)
    for path in filter(Path.is_file, files_of(file)):
        assert b"YSBzZWNyZXQ" not in path.read_bytes()  # "a secret", in base64


async def test_a_whole_write_leaves_of_this_owner_nothing_else(
    store: SqliteStore, next_store: SqliteStore, file: Path
) -> None:
    await store.write(changes("CA1", "CA2", whole=True))
    await next_store.write(changes("CA3", whole=True))
    await store.write(changes("CA2", whole=True))
    assert (rows(file), rows(file, "lines")) == (2, 2)


async def test_a_whole_write_leaves_what_was_taken_while_it_was_prepared(
    store: SqliteStore, next_store: SqliteStore, file: Path
) -> None:
    await store.write(changes("CA1", "CA2", whole=True))
    die(store)
    for call_id in ("CA1", "CA2"):
        assert await next_store.take(call_id, 5.0)
    await next_store.write(changes("CA2", whole=True))
    assert rows(file) == 2
    await next_store.write(changes("CA1", "CA2"))
    await next_store.write(changes("CA2", whole=True))
    assert rows(file) == 1


async def test_a_call_that_was_taken_and_is_over_is_deleted(store: SqliteStore, next_store: SqliteStore, file: Path) -> None:
    await store.write(changes("CA1", whole=True))
    die(store)
    assert await next_store.take("CA1", 5.0)
    await next_store.write(changes(whole=True, gone=("CA1",)))
    assert rows(file) == 0


async def test_who_closes_takes_its_calls_along_and_nobody_elses(
    store: SqliteStore, next_store: SqliteStore, file: Path
) -> None:
    await store.write(changes("CA1", whole=True))
    await next_store.write(changes("CA2", whole=True))
    await store.close()
    assert (rows(file), rows(file, "owners")) == (1, 1)
    await next_store.close()
    assert (rows(file), rows(file, "owners")) == (0, 0)
    assert sorted(path.name for path in file.parent.rglob("*")) == ["calls.sqlite", "calls.sqlite.owners"]


async def test_who_has_closed_writes_nothing_any_more(store: SqliteStore, next_store: SqliteStore, file: Path) -> None:
    await next_store.write(changes("CA2", whole=True))
    die(next_store)
    await store.write(changes("CA1", whole=True))
    await store.close()
    assert await failed(store, changes("CA1", whole=True)) is Fault.LEFT
    with pytest.raises(StoreFailed):
        await store.take("CA2", 5.0)
    assert (rows(file), rows(file, "owners")) == (1, 1)
    assert os.listdir(file.with_name("calls.sqlite.owners")) == [next_store.lease.owner]


async def test_only_its_user_may_read_it(store: SqliteStore, file: Path) -> None:
    await store.write(changes("CA1", whole=True))
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in files_of(file)[:3]} == {0o600}


# What others left


async def test_a_dead_owners_calls_are_kept_until_they_are_old(
    store: SqliteStore, next_store: SqliteStore, file: Path
) -> None:
    await store.write(changes("CA1", whole=True))
    die(store)
    assert await next_store.tidy(HOUR_S) == 0
    assert await next_store.tidy(0.0) == 1
    assert (rows(file), rows(file, "owners")) == (0, 0)
    assert next_store.lease.others() == []


async def test_a_living_owners_calls_are_never_old(store: SqliteStore, next_store: SqliteStore) -> None:
    await store.write(changes("CA1", whole=True))
    assert await next_store.tidy(0.0) == 0


async def test_a_dead_owner_without_a_call_is_forgotten(store: SqliteStore, next_store: SqliteStore, file: Path) -> None:
    await store.write(changes(whole=True))
    die(store)
    assert await next_store.tidy(HOUR_S) == 0
    assert rows(file, "owners") == 0
    assert next_store.lease.others() == []


async def test_a_dead_owners_call_that_is_over_is_forgotten(store: SqliteStore, next_store: SqliteStore, file: Path) -> None:
    await store.write(changes("CA1", whole=True))
    die(store)
    await next_store.forget("CA1")
    assert (rows(file), rows(file, "lines")) == (0, 0)


async def test_a_record_that_cannot_be_read_is_no_call(store: SqliteStore, next_store: SqliteStore, file: Path) -> None:
    await store.write(changes("CA1", whole=True))
    die(store)
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE calls SET record = ?", (b"\xff{",))
    connection.close()
    assert await next_store.take("CA1", 5.0) is None
    assert rows(file) == 0


# Faults


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def failed(store: SqliteStore, what: Changes) -> Fault:
    with pytest.raises(StoreFailed) as raised:
        await store.write(what)
    return raised.value.fault


async def test_a_full_disk_is_told_and_is_no_matter_once_there_is_room(store: SqliteStore, next_store: SqliteStore) -> None:
    await store.write(changes("CA1", whole=True))
    with no_file_over(4096):
        assert await failed(store, changes("CA2")) in (Fault.FULL, Fault.FAILED)
    await store.write(changes("CA1", "CA2", whole=True))
    die(store)
    assert await next_store.take("CA2", 5.0)


async def test_who_closes_on_a_full_disk_leaves_nothing_either(store: SqliteStore, file: Path) -> None:
    await store.write(changes("CA1", whole=True))
    with no_file_over(0):
        await store.close()
    assert [path.name for path in file.parent.rglob("*")] == ["calls.sqlite.owners"]


async def test_who_closes_on_a_full_disk_leaves_other_peoples_calls(
    store: SqliteStore, next_store: SqliteStore, file: Path
) -> None:
    await next_store.write(changes("CA2", whole=True))
    await store.write(changes("CA1", whole=True))
    with no_file_over(0), pytest.raises(StoreFailed):
        await store.close()
    assert rows(file) == 2


async def test_a_full_disk_at_the_start_is_told(store: SqliteStore) -> None:
    with no_file_over(0):
        assert await failed(store, changes(whole=True)) in (Fault.FULL, Fault.FAILED)
    await store.write(changes(whole=True))


def fill(file: Path, content: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(content)


def damage(file: Path) -> None:
    """Write nonsense over all pages but the first."""
    with file.open("r+b") as damaged:
        damaged.seek(4096)
        damaged.write(b"\xff" * (file.stat().st_size - 4096))


def make_a_directory(path: Path) -> None:
    path.mkdir(parents=True)


def delete(file: Path) -> None:
    for path in files_of(file)[:3]:
        path.unlink(missing_ok=True)


def replace(file: Path) -> None:
    other = file.with_name("other.sqlite")
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    other.replace(file)


def delete_the_directory(file: Path) -> None:
    for path in (*files_of(file)[:3], *(file.parent / "calls.sqlite.owners").iterdir()):
        path.unlink()
    (file.parent / "calls.sqlite.owners").rmdir()
    file.parent.rmdir()


@pytest.mark.parametrize("how", [delete, replace, delete_the_directory], ids=lambda how: how.__name__)
async def test_a_file_that_is_gone_is_noticed_and_written_anew(
    store: SqliteStore, next_store: SqliteStore, file: Path, how: Callable[[Path], None]
) -> None:
    await store.write(changes("CA1", whole=True))
    how(file)
    assert await failed(store, changes("CA2")) is Fault.REPLACED
    await store.write(changes("CA1", "CA2", whole=True))
    assert await next_store.take("CA1", 5.0) == Elsewhere()
    die(store)
    assert await next_store.take("CA1", 5.0)


@pytest.mark.parametrize("garbage", [b"not a database, " * 500, b"SQLite format 3\x00" + b"\xff" * 5000])
async def test_a_damaged_file_is_moved_aside_and_another_begun(store: SqliteStore, file: Path, garbage: bytes) -> None:
    fill(file, garbage)
    assert await failed(store, changes(whole=True)) is Fault.CORRUPT
    await store.write(changes("CA1", whole=True))
    assert file.with_name("calls.sqlite.damaged").read_bytes() == garbage
    assert rows(file) == 1


async def test_a_file_that_is_damaged_behind_its_head_is_moved_aside(
    store: SqliteStore, next_store: SqliteStore, file: Path
) -> None:
    await store.write(changes(*(f"CA{number}" for number in range(200)), whole=True))
    await store.tidy(HOUR_S)
    die(store)
    damage(file)
    with pytest.raises(StoreFailed) as raised:
        await next_store.take("CA7", 5.0)
    assert raised.value.fault is Fault.CORRUPT
    await next_store.write(changes("CA7", whole=True))
    assert rows(file) == 1


async def test_a_file_that_is_locked_for_long_is_told(store: SqliteStore, file: Path) -> None:
    await store.write(changes(whole=True))
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    assert await failed(store, changes("CA1")) is Fault.LOCKED
    connection.execute("ROLLBACK")
    connection.close()
    await store.write(changes("CA1", whole=True))


async def test_a_file_of_a_newer_dialogd_is_left_as_it_is(store: SqliteStore, file: Path) -> None:
    file.parent.mkdir()
    with sqlite3.connect(file) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    assert await failed(store, changes(whole=True)) is Fault.NEWER


async def test_a_directory_in_the_place_of_the_file_is_told(store: SqliteStore, file: Path) -> None:
    make_a_directory(file)
    assert await failed(store, changes(whole=True)) is Fault.NO_PLACE


async def test_a_file_in_the_place_of_the_directory_is_told(store: SqliteStore, file: Path) -> None:
    file.parent.write_text("in the way")
    assert await failed(store, changes(whole=True)) is Fault.NO_PLACE


async def test_an_owner_whose_lease_was_deleted_has_it_again_with_the_next_write(store: SqliteStore, file: Path) -> None:
    await store.write(changes("CA1", whole=True))
    store.lease.bury(store.lease.owner)
    await store.write(changes("CA2"))
    assert Lease(file.with_name("calls.sqlite.owners")).lives(store.lease.owner)
