"""What is kept of the turns of a generation's calls."""

from dialog_supervisor.tally import Tally, turn_fields
from protocol.messages import Turn


def test_turns_are_counted_by_outcome() -> None:
    tally = Tally()
    for turn in (Turn("answered"), Turn("failed"), Turn("interrupted"), Turn("failed")):
        tally.turn(turn)
    assert (tally.turns.total(), tally.failed_turns) == (4, 2)


def test_a_step_has_the_times_that_there_were() -> None:
    assert turn_fields(Turn("interrupted", None, 3)) == {"queued_ms": "3"}
    assert turn_fields(Turn("answered", 900, 0, 400, 500)) == {
        "delay_ms": "900",
        "queued_ms": "0",
        "thinking_ms": "400",
        "voicing_ms": "500",
    }
