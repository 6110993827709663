"""Where calls are kept in case this process dies: what any such place must do. `sqlite.py` does it in a file.

One dialogd, an owner, writes its calls here; the next one, or another beside it, takes up those whose owner is dead.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol

from msgspec import Struct

from dialog_supervisor.store.lease import LeaseState
from dialog_supervisor.store.records import Line, Record


class Fault(StrEnum):
    """Why a store does not take or give what it should."""

    FULL = "the disk is full"
    READ_ONLY = "the file or its directory may not be written"
    LOCKED = "another process keeps the file locked"
    CORRUPT = "the file is damaged; it was moved aside, and another begun"
    REPLACED = "the file was deleted or replaced, and is written anew"
    NEWER = "the file is of a newer dialogd"
    NO_PLACE = "the file cannot be opened"
    NO_THREAD = "the system permits dialogd no other thread"
    SLOW = "the file system does not answer in time"
    FAILED = "the file cannot be read or written"
    LEFT = "dialogd stops, and has left the store already"


REMEDIES = {
    Fault.FULL: "make room on its file system, or choose another by store.path",
    Fault.READ_ONLY: "have it belong to dialogd's user, or choose another by store.path",
    Fault.LOCKED: "find the process by fuser(1), and let nothing but dialogd open the file",
    Fault.CORRUPT: "check the disk; the damaged file may be deleted",
    Fault.REPLACED: "leave the file alone while dialogd runs",
    Fault.NEWER: "choose another file by store.path, or install the newer version again",
    Fault.NO_PLACE: "choose by store.path a file in a directory of dialogd's user",
    Fault.NO_THREAD: "raise TasksMax, or whatever else limits processes and threads",
    Fault.SLOW: "check the disk, or choose another by store.path",
    Fault.FAILED: "check the disk, or choose another by store.path",
}


class StoreFailed(Exception):
    """The store could not be written or read. `fault` is which kind of failure it was."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(detail)
        self.fault = fault


class Changes(Struct, frozen=True):
    """What is different at `at`: calls that are new or changed, what callers are hearing, and calls that ended.

    With `whole`, `records` are all calls that there are, and the store is to have no others of this owner,
    but for those that it was asked to take since `at`.
    """

    at: float
    records: Mapping[str, Record] = {}
    lines: Mapping[str, Line] = {}
    gone: frozenset[str] = frozenset()
    whole: bool = False

    def __len__(self) -> int:
        return len(self.records) + len(self.gone)


class Elsewhere(Struct, frozen=True):
    """A call that is another dialogd's, which is alive."""


class Store(Protocol):
    """What is asked of a store. Every method raises `StoreFailed`, and may be cancelled."""

    async def write(self, changes: Changes) -> None:
        """Keep what has changed; also that this owner was alive at that time."""

    async def take(self, call_id: str, at: float) -> Record | Elsewhere | None:
        """Become, at `at`, the owner of a call whose owner is dead, and return it as that one left it, if there is one.

        That it was taken up is kept as a death more, before anything else is done with it.
        """

    async def forget(self, call_id: str) -> None:
        """Delete a call, unless its owner is another that is alive."""

    async def tidy(self, max_age_s: float) -> int:
        """Delete what owners left that were last alive longer ago than that. Return how many calls it was."""

    def hand_over(self) -> LeaseState | None:
        """Return what this process needs to go on as the same owner when it executes itself anew."""

    async def close(self) -> None:
        """Have nothing more of this owner here, whatever else is still asked of this store: that fails."""
