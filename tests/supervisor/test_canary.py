"""The canary's rules: which calls it gets, and on what evidence it is promoted or rolled back."""

import math
import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from dialog_supervisor.canary import CALLS_BELIEVED, Rules, Trial, Verdict, chance, judge
from dialog_supervisor.tally import Figures
from tests.docs.page import DOCS

RULES = Rules(share=10, calls=20, margin=5.0)
shares = st.integers(0, 100)


def of_calls(begun: int, crashed: int = 0) -> Figures:
    """The figures of calls that have all ended."""
    return Figures(begun=begun, ended=begun, well=begun - crashed, crashed=crashed, crashes=crashed)


def of_turns(turns: int, failed: int, failing: int, calls: int = 5) -> Figures:
    """The figures of good calls with some failed turns in them."""
    return replace(of_calls(calls), turns=turns, failed_turns=failed, failing=failing)


@st.composite
def figures(draw: st.DrawFn) -> Figures:
    """Any count that there can be."""
    begun = draw(st.integers(0, 200))
    ended = draw(st.integers(0, begun))
    crashed = draw(st.integers(0, begun))
    turns = draw(st.integers(0, 1000)) if begun else 0
    failed = draw(st.integers(0, turns))
    return Figures(
        begun=begun,
        ended=ended,
        well=draw(st.integers(0, min(ended, begun - crashed))),
        crashed=crashed,
        crashes=crashed * 2,
        turns=turns,
        failed_turns=failed,
        failing=draw(st.integers(min(1, failed), min(failed, begun))),
    )


rules = st.builds(Rules, share=shares, calls=st.integers(1, 100), margin=st.floats(0, 100))


def turned_away(new: Figures, old: Figures, rules: Rules = RULES) -> bool:
    verdict = judge(new, old, rules)
    return verdict is not None and not verdict.promoted


# Which calls


@given(shares)
def test_of_a_hundred_calls_it_takes_its_share(share: int) -> None:
    trial = Trial("new", Rules(share, 20, 5.0))
    assert sum(trial.takes_next() for _ in range(100)) == share


@given(shares, st.integers(0, 300), st.integers(1, 300))
def test_its_calls_are_spread_evenly(share: int, first: int, count: int) -> None:
    trial = Trial("new", Rules(share, 20, 5.0))
    taken = [trial.takes_next() for _ in range(first + count)][first:]
    assert abs(sum(taken) - count * share / 100) < 1


def test_its_first_call_comes_last_of_as_many_as_it_takes_one_of() -> None:
    trial = Trial("new", RULES)
    assert list(islice(iter(trial.takes_next, None), 20)) == [*[False] * 9, True, *[False] * 9, True]


# Rolled back


def test_two_calls_of_two_that_crash_are_enough() -> None:
    assert judge(of_calls(2, 2), of_calls(18), RULES) == Verdict(
        False, "2 of 2 calls crashed, and 0 of 18 calls crashed on the old code (agent.canary_margin = 5)"
    )


@pytest.mark.parametrize(("crashed", "begun"), [(2, 3), (3, 9), (4, 17)])
def test_beside_old_code_without_a_fault_so_many_are_enough_and_one_less_is_not(crashed: int, begun: int) -> None:
    assert turned_away(of_calls(begun, crashed), of_calls(9 * begun))
    assert not turned_away(of_calls(begun + 1, crashed), of_calls(9 * begun))
    assert not turned_away(of_calls(begun, crashed - 1), of_calls(9 * begun))


def test_an_old_generation_without_calls_is_one_without_faults() -> None:
    assert turned_away(of_calls(2, 2), Figures())


def test_failed_turns_are_as_bad_as_crashes() -> None:
    assert judge(of_turns(10, 4, failing=2), of_turns(400, 8, failing=5), RULES) == Verdict(
        False, "4 of 10 turns failed, and 8 of 400 turns failed on the old code (agent.canary_margin = 5)"
    )


def test_the_first_call_alone_never_decides() -> None:
    crashing = Figures(begun=1, ended=1, crashed=1, crashes=4)
    failing = Figures(begun=1, turns=9, failed_turns=9, failing=1)
    assert judge(crashing, of_calls(9), RULES) is None
    assert judge(failing, of_turns(90, 0, failing=0), RULES) is None


def test_an_old_generation_that_crashes_as_often_keeps_it_on_trial() -> None:
    assert judge(of_calls(10, 10), of_calls(90, 90), RULES) is None


def test_its_reason_is_as_the_operations_page_quotes_it() -> None:
    verdict = judge(of_calls(7, 3), of_calls(63, 1), RULES)
    assert verdict is not None
    assert f'"reason": "{verdict.reason}"' in (DOCS / "operations.md").read_text(encoding="utf-8")


def test_a_crash_in_ten_is_noise_beside_one_in_a_hundred() -> None:
    assert not turned_away(of_calls(20, 2), of_calls(180, 2))
    assert turned_away(of_calls(20, 6), of_calls(180, 2))


@given(figures(), figures(), rules)
def test_it_is_rolled_back_only_for_what_exceeds_the_margin_in_two_calls_or_more(
    new: Figures, old: Figures, rules: Rules
) -> None:
    if turned_away(new, old, rules):
        crashes = new.crashed / new.begun - old.crashed / max(1, old.begun)
        failures = new.failed_turns / max(1, new.turns) - old.failed_turns / max(1, old.turns)
        assert max(crashes, failures) * 100 > rules.margin - 1e-9
        assert max(new.crashed, new.failing) >= CALLS_BELIEVED


@given(figures(), figures(), rules)
def test_another_bad_call_never_saves_it(new: Figures, old: Figures, rules: Rules) -> None:
    worse = replace(new, begun=new.begun + 1, ended=new.ended + 1, crashed=new.crashed + 1)
    if turned_away(new, old, rules):
        assert turned_away(worse, old, rules)


@given(figures(), rules)
def test_it_is_never_rolled_back_for_being_like_the_old(both: Figures, rules: Rules) -> None:
    assert not turned_away(both, both, rules)


def test_a_false_alarm_is_rare_also_when_the_figures_are_looked_at_after_every_call() -> None:
    chances, alarms, trials = random.Random(4), 0, 300
    for _ in range(trials):
        new, old = Figures(), Figures()
        while (verdict := judge(new, old, RULES)) is None:
            old = of_calls(old.begun + 9, old.crashed + sum(chances.random() < 0.03 for _ in range(9)))
            new = of_calls(new.begun + 1, new.crashed + (chances.random() < 0.03))
        alarms += not verdict.promoted
    assert alarms <= trials * 0.02


# Promoted


def test_enough_calls_that_went_well_promote_it() -> None:
    assert judge(of_calls(20), of_calls(180), RULES) == Verdict(True, "20 calls of it went well (agent.canary_calls = 20)")


def test_one_call_less_does_not() -> None:
    assert judge(of_calls(19), of_calls(180), RULES) is None


def test_a_call_that_crashed_did_not_go_well() -> None:
    assert judge(of_calls(20, 1), of_calls(180), RULES) is None


def test_a_rate_over_the_margin_that_may_be_chance_is_waited_for() -> None:
    assert judge(of_calls(22, 2), of_calls(180), RULES) is None
    assert judge(of_calls(40, 2), of_calls(180), RULES) == Verdict(
        True, "38 calls of it went well (agent.canary_calls = 20)"
    )


@given(figures(), figures(), rules)
def test_it_is_promoted_only_when_it_is_within_the_margin(new: Figures, old: Figures, rules: Rules) -> None:
    if (verdict := judge(new, old, rules)) and verdict.promoted:
        assert new.well >= rules.calls
        assert new.crashed / new.begun * 100 <= old.crashed / max(1, old.begun) * 100 + rules.margin + 1e-9


# The figures


@given(st.integers(1, 60).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))), st.floats(0.001, 0.999))
def test_the_chance_is_the_tail_of_the_binomial_distribution(event: tuple[int, int], rate: float) -> None:
    bad, of = event
    tail = sum(math.comb(of, count) * rate**count * (1 - rate) ** (of - count) for count in range(bad, of + 1))
    if bad / of > rate:
        assert math.isclose(chance(bad, of, rate), tail, rel_tol=1e-3)


def test_the_chance_is_found_at_once_for_a_million_calls() -> None:
    assert 0 < chance(51_000, 1_000_000, 0.05) < 1e-4


def test_the_trial_tells_the_rules_and_both_sides_of_the_time_since_it_began() -> None:
    trial = Trial("new", RULES, of_calls(100, 3))
    told = trial.describe(of_calls(2), of_calls(118, 4))
    assert (told["share"], told["calls"], told["margin"]) == (10, 20, 5.0)
    assert (told["new"]["begun"], told["old"]["begun"], told["old"]["crashed"]) == (2, 18, 1)
    assert trial.verdict(of_calls(20), of_calls(280, 4)) is not None
