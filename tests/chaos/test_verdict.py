"""What the judge of scripts/chaos lets pass, and what not."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from tests.chaos.caller import Exchange
from tests.chaos.days import DAYS, GREETING, answer, question
from tests.chaos.verdict import FALLBACK, HUNG_UP, SILENCE_LIMIT_S, TAKES_OVER, Record, broken, disturbed, handed_over

STRUCK_AT = 12.0  # in the third of the exchanges, each of which takes five seconds


def exchanged(number: int, **more: Any) -> Exchange:
    asked_at = 5.0 * number
    usual = {"said_at": asked_at + 1, "answered_at": asked_at + 4, "heard_s": 2.0, "silence_s": 0.8, "expected_s": 2.0}
    return Exchange(DAYS[number], asked_at, **(usual | more))


def remembering(days: Sequence[str]) -> dict[str, Any]:
    history = [{"role": "assistant", "content": GREETING}]
    for day in days:
        history += [{"role": "user", "content": question(day)}, {"role": "assistant", "content": answer(day)}]
    return {"event": "history", "level": "info", "text": json.dumps(history)}


def right(**more: Any) -> Record:
    """Return the record of a call that was struck and went on, but for what is said otherwise."""
    exchanges = tuple(map(exchanged, range(5)))
    history = remembering([one.day for one in exchanges])
    takes_over = {"event": TAKES_OVER, "level": "error"}
    record = Record(exchanges, HUNG_UP, (takes_over, history), STRUCK_AT, (TAKES_OVER,))
    return msgspec.structs.replace(record, **more)


def with_exchange(number: int, **more: Any) -> tuple[Exchange, ...]:
    return tuple(exchanged(each, **(more if each == number else {})) for each in range(5))


def test_a_call_that_went_on_is_neither_broken_nor_disturbed() -> None:
    assert (broken(right()), disturbed(right())) == ([], [])


def test_the_fault_may_show_in_the_exchange_that_it_struck_and_in_the_next() -> None:
    assert [one.day for one in right().concerned] == ["wednesday", "thursday"]


def test_an_answer_that_never_came_breaks_a_struck_call() -> None:
    record = right(exchanges=with_exchange(2, answered_at=None, heard_s=0.4))
    assert broken(record)[0] == "wednesday was not answered (0.4 s heard of 2.0)"


def test_an_answer_that_is_said_twice_breaks_it() -> None:
    assert broken(right(exchanges=with_exchange(3, heard_s=4.0))) == ["too much was said of thursday (4.0 s instead of 2.0)"]


def test_a_question_that_had_to_be_asked_again_breaks_it_unless_the_line_had_lost_it() -> None:
    asked_again = with_exchange(2, times=2)
    assert broken(right(exchanges=asked_again)) == ["wednesday had to be asked 2 times"]
    assert broken(right(exchanges=asked_again, may_repeat=True)) == []


def test_a_question_that_the_agent_forgot_breaks_it() -> None:
    [asked, said] = broken(right(log=(remembering(["monday", "tuesday", "thursday", "friday"]),)))
    assert asked.startswith("it remembers the questions ['monday', 'tuesday', 'thursday', 'friday'] instead of")
    assert said.startswith("it remembers to have said")


def test_an_agent_that_left_no_history_is_not_taken_at_its_word() -> None:
    assert broken(right(log=())) == ["the agent left no history"]


def test_the_carriers_end_of_a_struck_call_breaks_it() -> None:
    assert broken(right(ended="error 11200")) == ["the call ended: error 11200"]


def test_a_call_that_ended_before_the_next_question_is_broken() -> None:
    exchanges = tuple(map(exchanged, range(3)))
    record = right(exchanges=exchanges, log=(remembering([one.day for one in exchanges]),))
    assert broken(record) == ["only 1 questions could be asked from the fault on"]


def test_a_silence_where_the_fault_cannot_show_is_a_disturbance() -> None:
    record = right(exchanges=with_exchange(1, silence_s=SILENCE_LIMIT_S + 1))
    assert (broken(record), disturbed(record)) == ([], ["5.0 s of silence"])


def test_a_silence_while_the_fault_can_show_is_measured() -> None:
    record = right(exchanges=with_exchange(2, silence_s=6.1))
    assert (record.silence_s, disturbed(record)) == (6.1, [])


def test_a_bystander_is_disturbed_by_any_warning_and_by_a_restart() -> None:
    found = disturbed(right(struck_at=float("inf"), may_log=()))
    assert found == [f"logged: {TAKES_OVER}", "1 workers were replaced"]


def test_dropped_frames_are_a_disturbance() -> None:
    ended = {"event": "call ended", "level": "info", "media_dropped": 3}
    assert disturbed(right(log=(ended,))) == ["3 frames were dropped"]


def test_a_caller_who_was_handed_over_was_told_so_by_the_carrier_and_soon() -> None:
    assert handed_over(right(carrier_said=(FALLBACK,))) == []
    assert handed_over(right()) == ["the carrier said ()"]
    late = right(carrier_said=(FALLBACK,), exchanges=with_exchange(2, silence_s=11.0))
    assert handed_over(late) == ["11.0 s of silence"]
