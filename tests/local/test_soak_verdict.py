"""What a soak calls flat: figures that fluctuate, that step, that grow, and that do not come back."""

import pytest

from scripts.benches.soak_verdict import CERTAINTY, FIGURES, Figure, Row, Sample, fit, judge

MEMORY = Figure("memory", "memory", "MB", returns=False)
COUNT = Figure("count", "count")


def judged(figure: Figure, values: list[float], idle: float = 0.0, after: float = 0.0) -> Row:
    samples = [Sample(10.0 * number, {figure.key: value}) for number, value in enumerate(values)]
    return judge(figure, Sample(0.0, {figure.key: idle}), samples, Sample(0.0, {figure.key: after}))


def test_a_line_is_found_exactly() -> None:
    rise = fit([(float(at), 3.0 + 0.5 * at) for at in range(11)])
    assert rise.value == pytest.approx(5.0)
    assert rise.error == pytest.approx(0.0)


def test_a_few_points_tell_nothing() -> None:
    assert fit([(0.0, 0.0), (1.0, 100.0)]).value == 0.0


def test_what_grows_only_in_the_first_half_is_flat() -> None:
    assert judged(MEMORY, [*range(40, 60), *[60.0] * 20]).verdict == "flat"


def test_two_megabytes_in_the_second_half_are_growth() -> None:
    row = judged(MEMORY, [40.0 + number / 10 for number in range(40)])
    assert (row.verdict, row.good) == ("grows", False)
    assert row.rise == pytest.approx(1.9)


def test_of_a_large_process_one_per_cent_is_no_growth() -> None:
    assert judged(MEMORY, [400.0 + number / 10 for number in range(40)]).verdict == "flat"


def test_one_descriptor_each_minute_is_growth() -> None:
    assert judged(COUNT, [20.0 + number // 6 for number in range(60)]).verdict == "grows"


def test_calls_that_come_and_go_are_no_growth() -> None:
    values = [float(17 + number * 7919 % 11) for number in range(40)]
    row = judged(COUNT, values)
    assert row.verdict == "flat"
    assert abs(fit(list(enumerate(values))).value) < CERTAINTY * fit(list(enumerate(values))).error


def test_what_is_not_as_before_when_all_is_over_did_not_come_back() -> None:
    assert judged(COUNT, [20.0] * 10, idle=17.0, after=18.0).verdict == "did not come back"


def test_memory_need_not_come_back() -> None:
    assert judged(MEMORY, [60.0] * 10, idle=40.0, after=59.0).good


def test_every_figure_has_a_key_of_its_own() -> None:
    assert len({figure.key for figure in FIGURES}) == len(FIGURES)
