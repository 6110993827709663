"""A lease tells whether its owner lives, whatever ended it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from dialog_supervisor.store.lease import Lease

HOLDS = """
import sys
from pathlib import Path
from dialog_supervisor.store.lease import Lease

lease = Lease(Path(sys.argv[1]))
lease.hold()
print(lease.owner, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[Lease]:
    made = Lease(tmp_path / "owners")
    made.hold()
    yield made
    made.release()


def test_who_holds_it_lives_until_it_is_released(lease: Lease, tmp_path: Path) -> None:
    other = Lease(tmp_path / "owners")
    assert other.lives(lease.owner)
    lease.release()
    assert not other.lives(lease.owner)
    assert list((tmp_path / "owners").iterdir()) == []


def test_who_never_was_does_not_live(lease: Lease) -> None:
    assert not lease.lives("nobody")


def test_a_killed_owner_is_dead_at_once(lease: Lease, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "owners")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        owner = process.stdout.readline().strip()
        assert lease.lives(owner)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not lease.lives(owner)
    assert lease.others() == [owner]
    lease.bury(owner)
    assert lease.others() == []


def test_a_deleted_file_is_made_again(lease: Lease, tmp_path: Path) -> None:
    lease.bury(lease.owner)
    assert not Lease(tmp_path / "owners").lives(lease.owner)
    lease.hold()
    assert Lease(tmp_path / "owners").lives(lease.owner)


def test_to_hold_what_is_held_changes_nothing(lease: Lease) -> None:
    before = lease.descriptor
    lease.hold()
    assert lease.descriptor == before


def test_a_handed_over_descriptor_is_the_same_owner(lease: Lease, tmp_path: Path) -> None:
    descriptor = os.dup(lease.descriptor)
    state = lease.hand_over()
    assert state is not None
    successor = Lease(tmp_path / "owners", replace(state, descriptor=descriptor))
    os.close(lease.descriptor)
    lease.descriptor = -1
    successor.hold()
    assert successor.descriptor == descriptor
    assert Lease(tmp_path / "owners").lives(successor.owner)
    successor.release()


def test_a_lease_of_another_place_is_let_go(lease: Lease, tmp_path: Path) -> None:
    state = lease.hand_over()
    assert state is not None
    elsewhere = Lease(tmp_path / "elsewhere", replace(state, descriptor=os.dup(lease.descriptor)))
    assert elsewhere.hand_over() is None
    assert elsewhere.owner != lease.owner


def test_only_its_user_may_look_into_its_directory(lease: Lease, tmp_path: Path) -> None:
    assert (tmp_path / "owners").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "owners" / lease.owner).stat().st_mode & 0o777 == 0o600
