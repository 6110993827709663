"""What a generation's calls came to, in figures that only grow."""

from collections import Counter

from protocol.messages import Turn


class Tally:
    """One generation's count."""

    def __init__(self) -> None:
        self.turns: Counter[str] = Counter()  # by outcome

    def turn(self, turn: Turn) -> None:
        """A worker has finished a turn."""
        self.turns[turn.outcome] += 1

    @property
    def failed_turns(self) -> int:
        """How many turns failed, of `turns.total()`."""
        return self.turns["failed"]


def turn_fields(turn: Turn) -> dict[str, str]:
    """Return a turn's times as a step's fields; those that there were."""
    times = {
        "delay_ms": turn.delay_ms,
        "queued_ms": turn.queued_ms,
        "thinking_ms": turn.thinking_ms,
        "voicing_ms": turn.voicing_ms,
    }
    return {name: str(ms) for name, ms in times.items() if ms is not None}
