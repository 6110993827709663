"""What dialogd hands itself when it re-executes: the lines, the calls and the code that they run on.

Times are in seconds from the handing over on, or back from it. A descriptor is its number: it is the same one afterwards.
"""

from msgspec import Struct

from dialog_supervisor.admission import Objection
from dialog_supervisor.carriers.base import LegState
from dialog_supervisor.generations import GenerationsState
from dialog_supervisor.recovery import CallState
from dialog_supervisor.requests import RequestsState
from dialog_supervisor.steps import Step
from dialog_supervisor.store.lease import LeaseState
from dialog_supervisor.telemetry.metrics import Party
from dialog_supervisor.worker import WorkerState
from protocol.messages import PROTOCOL_VERSION, Metadata

VERSION = 1  # of everything here; raised when a field changes its meaning, while new ones only need a default


class Ending(Struct, frozen=True, forbid_unknown_fields=True):
    """How a conversation was ended whose call is not over. `told`: the worker has been."""

    reason: str
    by: Party
    fallback: bool
    released: bool
    told: bool


class WorkerLegInTransit(Struct, frozen=True, forbid_unknown_fields=True):
    """A call's worker, what it waits for, and what its successor would have to know."""

    worker: WorkerState
    requests: RequestsState
    known: CallState
    media_dropped: int


class CallInTransit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call under way."""

    metadata: Metadata
    generation: str
    token: str
    age_s: float
    state: str
    deadline_in_s: float
    ending: Ending | None
    farewell_told: bool
    asked_in_vain: bool
    streams: int
    steps: tuple[Step, ...]
    leg: LegState
    worker_leg: WorkerLegInTransit


class Handover(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that one dialogd hands the next. `at` is on the machine's monotonic clock."""

    version: int = VERSION
    protocol: int = PROTOCOL_VERSION
    at: float
    uptime_s: float
    upgrades: int
    listener: int
    connections: tuple[int, ...]
    draining: bool
    refused: dict[Objection, int]
    lease: LeaseState | None
    generations: GenerationsState
    calls: tuple[CallInTransit, ...]

    def descriptors(self) -> list[int]:
        """Return every descriptor that goes along."""
        fds = [self.listener, *self.connections, *self.generations.descriptors()]
        if self.lease is not None:
            fds.append(self.lease.descriptor)
        for call in self.calls:
            fds += call.worker_leg.worker.descriptors()
            if call.leg.socket is not None:
                fds.append(call.leg.socket.fd)
        return fds
