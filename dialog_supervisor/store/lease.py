"""The proof that a dialogd lives: a locked file (flock(2)), which the kernel unlocks however the process ends."""

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

_PRIVATE, _PRIVATE_DIRECTORY = 0o600, 0o700


class LeaseState(Struct, frozen=True, forbid_unknown_fields=True):
    """A lease that goes on when its process executes itself anew: the owner's name, and the locked file."""

    directory: str
    owner: str
    descriptor: int


class Lease:
    """One owner's file in a directory of owners, held from `hold` to `release`; with `taken_over`, held already.

    Blocking calls, all short. What fails raises OSError.
    """

    def __init__(self, directory: Path, taken_over: LeaseState | None = None) -> None:
        self.owner = secrets.token_hex(8)
        self.descriptor = -1
        self._directory = directory
        if taken_over is None:
            return
        if taken_over.directory == str(directory):
            self.owner, self.descriptor = taken_over.owner, taken_over.descriptor
        else:
            os.close(taken_over.descriptor)  # the configuration names another place now

    def hand_over(self) -> LeaseState | None:
        """Return what another process needs to be the same owner; nothing while it is not held."""
        return None if self.descriptor == -1 else LeaseState(str(self._directory), self.owner, self.descriptor)

    def hold(self) -> None:
        """Lock the file, unless it is; make it again when somebody deleted it."""
        while self.descriptor == -1 or not os.fstat(self.descriptor).st_nlink:
            self._let_go()
            self._directory.mkdir(mode=_PRIVATE_DIRECTORY, parents=True, exist_ok=True)
            self.descriptor = os.open(self._file(self.owner), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, _PRIVATE)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)  # whoever looks whether it is locked has it for a moment

    def lives(self, owner: str) -> bool:
        """Whether that owner's process is alive."""
        if owner == self.owner:
            return self.descriptor != -1
        try:
            seen = os.open(self._file(owner), os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(seen, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(seen)
        return False

    def others(self) -> list[str]:
        """Return all owners but this one that have a file, dead or alive."""
        with suppress(FileNotFoundError):
            return [name for name in os.listdir(self._directory) if name != self.owner]
        return []

    def bury(self, owner: str) -> None:
        """Delete a dead owner's file."""
        self._file(owner).unlink(missing_ok=True)

    def release(self) -> None:
        """Be dead."""
        if self.descriptor != -1:
            self.bury(self.owner)
        self._let_go()

    def _let_go(self) -> None:
        if self.descriptor != -1:
            os.close(self.descriptor)
            self.descriptor = -1

    def _file(self, owner: str) -> Path:
        return self._directory / owner
