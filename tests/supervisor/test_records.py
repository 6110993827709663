"""What holds of a call whose dialogd died: how much of each utterance its caller heard, and how old it is."""

import msgspec
import pytest

from dialog_supervisor.carriers.playout import OnTheWay, Playout
from dialog_supervisor.recovery import CallState
from dialog_supervisor.store.records import Line, Record, outlived, resumed
from protocol.messages import MessageDispatched, Metadata

METADATA = Metadata("CA1", "twilio", "+14155550123", "+14155550199")
SECOND = b"\x55" * 8000


def record(**state: object) -> Record:
    return Record(at=100.0, state=CallState(metadata=METADATA, **state), generation="g.1", age_s=30.0)  # type: ignore[arg-type]  # by field name


def heard(line: Line, alive_at: float) -> list[tuple[str, int, bool]]:
    """Return each utterance, how many ms of it were heard, and whether it was broken off."""
    reports = outlived(record(), line, alive_at).state.reports
    return [(report.uuid, report.played_ms, report.interrupted) for report in reports]


TWO = (OnTheWay("u1", 500, 2000, done=True), OnTheWay("u2", 0, 1000, done=True))


@pytest.mark.parametrize(
    ("alive_at", "expected"),
    [
        (100.0, [("u1", 500, True), ("u2", 0, True)]),
        (101.0, [("u1", 1500, True), ("u2", 0, True)]),
        (101.5, [("u1", 2000, False), ("u2", 0, True)]),
        (102.0, [("u1", 2000, False), ("u2", 500, True)]),
        (102.5, [("u1", 2000, False), ("u2", 1000, False)]),
        (900.0, [("u1", 2000, False), ("u2", 1000, False)]),
        (99.0, [("u1", 500, True), ("u2", 0, True)]),
    ],
)
def test_a_caller_hears_one_utterance_after_another_until_the_last_sign_of_life(
    alive_at: float, expected: list[tuple[str, int, bool]]
) -> None:
    assert heard(Line(100.0, TWO), alive_at) == expected


def test_without_a_stream_nothing_is_heard() -> None:
    assert heard(Line(100.0, TWO, open=False), 110.0) == [("u1", 500, True), ("u2", 0, True)]


def test_an_utterance_whose_end_had_not_come_is_broken_off_however_much_was_heard() -> None:
    assert heard(Line(100.0, (OnTheWay("u1", 0, 1000, done=False),)), 110.0) == [("u1", 1000, True)]


def test_the_line_may_have_been_written_after_the_rest() -> None:
    assert heard(Line(101.0, (OnTheWay("u1", 0, 2000, done=True),)), 101.5) == [("u1", 500, True)]


def test_what_was_told_of_before_is_not_told_again() -> None:
    told = MessageDispatched("u1", 700, 2000, interrupted=True)
    found = outlived(record(reports=(told,)), Line(100.0, TWO), 101.0)
    assert [report.uuid for report in found.state.reports] == ["u1", "u2"]
    assert found.state.reports[0] == told


def test_time_passes_for_a_call_until_the_last_sign_of_life() -> None:
    found = outlived(record(deaths=(1.0,)), Line(100.0), 105.0)
    assert (found.age_s, found.state.deaths, found.at) == (35.0, (6.0,), 105.0)


def test_to_be_taken_up_counts_as_a_death_on_the_clock_of_whoever_does_it() -> None:
    found = resumed(record(deaths=(1.0,)), 7.0)
    assert (found.state.deaths, found.at) == ((1.0, 0.0), 7.0)


def test_a_ledger_tells_what_is_still_to_be_heard_in_the_order_of_its_playing() -> None:
    ledger = Playout()
    ledger.post("u1", SECOND * 2, done=True, now=10.0)
    ledger.post("u2", SECOND, done=False, now=10.0)
    assert ledger.still_to_hear(10.5) == (OnTheWay("u1", 500, 2000, done=True), OnTheWay("u2", 0, 1000, done=False))


def test_a_ledger_written_at_one_moment_tells_what_it_would_have_told_at_another() -> None:
    ledger = Playout()
    ledger.post("u1", SECOND * 2, done=True, now=10.0)
    ledger.post("u2", SECOND, done=True, now=10.0)
    line = Line(100.5, ledger.still_to_hear(10.5))
    assert list(outlived(record(), line, 102.3).state.reports) == ledger.stop(12.3)


def test_a_record_is_the_same_after_it_was_written_and_read() -> None:
    full = record(checkpoint=b"\x00\xff", reports=(MessageDispatched("u1", 1, 2, interrupted=True),), deaths=(1.5,))
    assert msgspec.json.decode(msgspec.json.encode(full), type=Record) == full
