"""What a generation's calls came to, in figures that only grow."""

from collections import Counter
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import asdict, replace

from protocol.messages import Turn


class Figures(Struct, frozen=True):
    """A count, at one moment or over a while. A call that crashes four times is one bad call, and four crashes."""

    begun: int = 0
    ended: int = 0
    well: int = 0
    """Calls that have ended and had no crash."""
    crashed: int = 0
    """Calls that had a crash: a worker died in mid-call, or none could be forked."""
    crashes: int = 0
    turns: int = 0
    failed_turns: int = 0
    failing: int = 0
    """Calls that had a failed turn."""

    def since(self, before: "Figures") -> "Figures":
        """Return what has come since."""
        was = asdict(before)
        return Figures(**{name: value - was[name] for name, value in asdict(self).items()})

    def as_beginning(self) -> "Figures":
        """Return what to count from, when the calls under way now are to be counted as begun from now on."""
        return replace(self, begun=self.ended)


class Marks(Struct, forbid_unknown_fields=True):
    """What has been counted of a call under way already."""

    crashed: bool = False
    failing: bool = False


class TallyState(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A count that another process goes on with."""

    turns: dict[str, int]
    under_way: dict[str, Marks]
    ended: int
    well: int
    crashed: int
    crashes: int
    failing: int


class Tally:
    """One generation's count. `changed` is called after each change."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.turns: Counter[str] = Counter()  # by outcome
        self._changed = changed
        self._under_way: dict[str, Marks] = {}
        self._ended = self._well = self._crashed = self._crashes = self._failing = 0

    def hand_over(self) -> TallyState:
        """Return what another process needs to go on counting."""
        return TallyState(
            turns=dict(self.turns),
            under_way=self._under_way,
            ended=self._ended,
            well=self._well,
            crashed=self._crashed,
            crashes=self._crashes,
            failing=self._failing,
        )

    def take_over(self, state: TallyState) -> None:
        """Go on with another process's count; the calls under way are held by it already."""
        self.turns.update(state.turns)
        self._under_way.update(state.under_way)
        self._ended, self._well, self._crashed = state.ended, state.well, state.crashed
        self._crashes, self._failing = state.crashes, state.failing

    @property
    def under_way(self) -> int:
        """How many calls have begun and not ended."""
        return len(self._under_way)

    @property
    def failed_turns(self) -> int:
        """How many turns failed, of `turns.total()`."""
        return self.turns["failed"]

    @property
    def figures(self) -> Figures:
        """The count at this moment."""
        return Figures(
            begun=self._ended + self.under_way,
            ended=self._ended,
            well=self._well,
            crashed=self._crashed,
            crashes=self._crashes,
            turns=self.turns.total(),
            failed_turns=self.failed_turns,
            failing=self._failing,
        )

    def begin(self, call_id: str) -> None:
        """A call begins on this code."""
        self._under_way[call_id] = Marks()
        self._changed()

    def crash(self, call_id: str) -> None:
        """A worker of the call died in mid-call, or could not be forked."""
        marks = self._under_way[call_id]
        self._crashes += 1
        self._crashed += not marks.crashed
        marks.crashed = True
        self._changed()

    def turn(self, call_id: str, turn: Turn) -> None:
        """A worker of the call has finished a turn."""
        marks, failed = self._under_way[call_id], turn.outcome == "failed"
        self.turns[turn.outcome] += 1
        self._failing += failed and not marks.failing
        marks.failing |= failed
        self._changed()

    def end(self, call_id: str) -> None:
        """A call has ended."""
        if (marks := self._under_way.pop(call_id, None)) is not None:
            self._ended += 1
            self._well += not marks.crashed
            self._changed()

    def miss(self) -> None:
        """There was a call to take, and no template to fork its worker: it went elsewhere, and counts as crashed."""
        self._ended += 1
        self._crashed += 1
        self._crashes += 1
        self._changed()


def turn_fields(turn: Turn) -> dict[str, str]:
    """Return a turn's times as a step's fields; those that there were."""
    times = {
        "delay_ms": turn.delay_ms,
        "queued_ms": turn.queued_ms,
        "thinking_ms": turn.thinking_ms,
        "voicing_ms": turn.voicing_ms,
    }
    return {name: str(ms) for name, ms in times.items() if ms is not None}
