"""What is kept of a generation's calls and their turns."""

from dialog_supervisor.tally import Figures, Tally, turn_fields
from protocol.messages import Turn


def test_turns_are_counted_by_outcome() -> None:
    tally = Tally()
    tally.begin("call")
    for turn in (Turn("answered"), Turn("failed"), Turn("interrupted"), Turn("failed")):
        tally.turn("call", turn)
    assert (tally.turns.total(), tally.failed_turns) == (4, 2)


def test_a_call_that_crashes_and_fails_again_and_again_is_one_bad_call() -> None:
    tally = Tally()
    for call in ("bad", "good"):
        tally.begin(call)
    for _ in range(3):
        tally.crash("bad")
        tally.turn("bad", Turn("failed"))
    tally.turn("good", Turn("answered"))
    for call in ("bad", "good"):
        tally.end(call)
    expected = Figures(begun=2, ended=2, well=1, crashed=1, crashes=3, turns=4, failed_turns=3, failing=1)
    assert tally.figures == expected


def test_a_call_under_way_has_begun_and_has_not_ended() -> None:
    tally = Tally()
    tally.begin("call")
    assert (tally.under_way, tally.figures.begun, tally.figures.ended) == (1, 1, 0)


def test_the_end_of_a_call_that_never_began_is_nothing() -> None:
    tally = Tally()
    tally.end("unknown")
    assert tally.figures == Figures()


def test_a_call_that_it_could_not_take_counts_as_crashed() -> None:
    tally = Tally()
    tally.miss()
    assert tally.figures == Figures(begun=1, ended=1, crashed=1, crashes=1)


def test_every_change_is_told() -> None:
    news: list[Figures] = []
    tally = Tally(lambda: news.append(tally.figures))
    tally.begin("call")
    tally.turn("call", Turn("answered"))
    tally.crash("call")
    tally.end("call")
    tally.miss()
    assert len(news) == 5
    assert len(set(news)) == 5


def test_calls_under_way_count_as_begun_from_now_on() -> None:
    tally = Tally()
    for call in ("one", "two", "three"):
        tally.begin(call)
    tally.end("one")
    before = tally.figures.as_beginning()
    tally.begin("four")
    tally.crash("two")
    assert tally.figures.since(before) == Figures(begun=3, crashed=1, crashes=1)


def test_a_step_has_the_times_that_there_were() -> None:
    assert turn_fields(Turn("interrupted", None, 3)) == {"queued_ms": "3"}
    assert turn_fields(Turn("answered", 900, 0, 400, 500)) == {
        "delay_ms": "900",
        "queued_ms": "0",
        "thinking_ms": "400",
        "voicing_ms": "500",
    }
