"""The benches' judgement: which goals are met, what several rounds come to, what a comparison says. Nothing is measured."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import cyclopts
import msgspec
import pytest
from rich.console import Console
from rich.table import Table

from dialog_local.load.command import Cost, Percentiles, Result
from scripts.benches import fairness, goals, peers, results, tables
from scripts.benches.goals import Goal, Verdict
from scripts.benches.options import Numbers, complaint
from scripts.benches.results import Machine, Run
from scripts.benches.tables import changes_table, comparison_head, figures_table, missed

MACHINE = Machine("Z80", cores=1, memory_gb=1, kernel="6.1", python="3.11.2")
RUN = Run("2026-11-25 21:00 UTC", "abc", rounds=1, seconds=5, load_average=0)
LOAD = Result(
    calls=40,
    answered=40,
    failed=0,
    reasons=[],
    seconds=5,
    frames_sent=10000,
    frames_echoed=10000,
    frames_lost=0,
    echo_ms=Percentiles(1, 2, 3, 4),
    webhook_ms=None,
    first_echo_ms=None,
    cost=Cost(supervisor_cpu_ms=2, tree_cpu_ms=6, idle_mb=80, loaded_mb=240, per_call_mb=4, processes=42),
    generator_cpu_ms=4,
)


def text(table: Table) -> list[str]:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def line(table: Table, beginning: str) -> str:
    return next(found for found in text(table) if found.startswith(beginning))


def test_the_figures_of_a_load_have_their_names() -> None:
    found = results.figures(LOAD)
    assert (found["echo_ms.p99"], found["cost.tree_cpu_ms"], found["frames_lost"]) == (3, 6, 0)
    assert not any(name.startswith("webhook_ms") for name in found)  # nothing was measured


def test_several_rounds_come_to_their_median_but_what_is_lost_is_never_forgotten() -> None:
    rounds = [{"echo_ms.p50": 1.0, "frames_lost": 0}, {"echo_ms.p50": 9.0, "frames_lost": 3}, {"echo_ms.p50": 2.0}]
    assert results.combined(rounds) == {"echo_ms.p50": 2.0, "frames_lost": 3}


@pytest.mark.parametrize(("value", "answer"), [(6.0, Verdict.MET), (6.1, Verdict.MISSED)])
def test_a_goal_is_met_up_to_its_limit(value: float, answer: Verdict) -> None:
    assert goals.verdict(Goal("echo_ms.p99", 6, 40), {"echo_ms.p99": value}) is answer


def test_a_goal_whose_figure_was_not_measured_is_neither_met_nor_missed() -> None:
    assert goals.verdict(Goal("echo_ms.p99", 6, 40), {}) is None
    assert list(goals.judged({10: {"echo_ms.p99": 99}}, {})) == []


def test_the_cost_of_a_call_at_the_most_calls_is_held_against_that_at_ten() -> None:
    cost = "cost.tree_cpu_ms"
    assert goals.growth({1: {cost: 20}, 10: {cost: 10}, 150: {cost: 12}}) == 1.2
    assert goals.growth({10: {cost: 10}}) is None
    assert goals.growth({40: {cost: 10}, 150: {cost: 12}}) is None


def test_the_table_marks_what_has_a_goal_at_this_number_of_calls() -> None:
    table = figures_table({10: {"echo_ms.p99": 9}, 40: {"echo_ms.p99": 9}, 100: {"echo_ms.p99": 9}}, {"idle.mb": 91})
    assert line(table, "echo p99").split()[3:] == ["9", "9", "✗", "9", "✓", "6", "at", "40,", "40", "at", "100"]
    assert line(table, "idle dialogd with its template, MB").split()[-3:] == ["91", "✗", "90"]


def test_a_missed_goal_is_told_with_its_figure() -> None:
    assert missed({40: {"echo_ms.p99": 9.51}}, {"idle.mb": 80}) == ["echo p99, ms at 40 calls: 9.51, at most 6"]


def test_every_goal_has_a_label() -> None:
    assert {goal.figure for goal in goals.LOAD} <= tables.LOAD_LABELS.keys()
    assert {goal.figure for goal in goals.ONCE} <= tables.ONCE_LABELS.keys()
    assert {*peers.SHOWN, *(goal.figure for goal in peers.GOALS)} <= tables.LOAD_LABELS.keys()


def test_changes_are_told_of_what_both_runs_measured() -> None:
    then = {10: {"echo_ms.p50": 2.0}, 40: {"echo_ms.p50": 4.0}}, {"idle.mb": 80.0}
    now = {40: {"echo_ms.p50": 3.0}, 100: {"echo_ms.p50": 9.0}}, {"idle.mb": 88.0}
    rows = [row.split() for row in text(changes_table(then, now))[1:]]
    assert [row[-3:] for row in rows] == [["3", "-25", "%"], ["88", "+10", "%"]]


def test_results_of_another_machine_are_not_compared_silently() -> None:
    other = msgspec.structs.replace(MACHINE, cores=64)
    assert len(comparison_head((MACHINE, RUN), MACHINE)) == 1
    assert "ANOTHER MACHINE: 64 cores of Z80" in comparison_head((other, RUN), MACHINE)[1]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = results.Results(MACHINE, RUN, {40: results.figures(LOAD)}, {"idle.mb": 80.5})
    results.write(tmp_path / "new" / "results.json", written)
    assert msgspec.json.decode((tmp_path / "new" / "results.json").read_bytes(), type=results.Results) == written


def git(directory: Path, *command: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    subprocess.run(["git", *author, *command], cwd=directory, check=True, capture_output=True)


def test_the_yardstick_is_what_was_committed_whatever_lies_there_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "KEPT", tmp_path / "docs")
    git(tmp_path, "init")
    assert results.committed("results.json", results.Results) is None
    then = results.Results(MACHINE, RUN, {}, {"idle.mb": 80})
    results.write(tmp_path / "docs" / "results.json", then)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "measured")
    results.write(tmp_path / "docs" / "results.json", msgspec.structs.replace(then, once={}))
    assert results.committed("results.json", results.Results) == then


def test_results_of_a_bench_that_measured_other_things_are_no_yardstick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "KEPT", tmp_path)
    (tmp_path / "results.json").write_text('{"seconds": 5}')
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "measured")
    assert results.committed("results.json", results.Results) is None


def test_a_peers_ratio_is_to_all_of_its_processes() -> None:
    ours = {"cost.tree_cpu_ms": 6.0, "cost.supervisor_cpu_ms": 3.0, "echo_ms.p50": 1.0}
    theirs = {"cost.tree_cpu_ms": 20.0, "cost.supervisor_cpu_ms": 20.0}
    answers = peers.judged(peers.Sides(ours, theirs, [ours], [theirs]))
    assert [(answer.value, answer.met) for answer in answers] == [(0.3, True), (0.15, True), (1.0, True)]
    assert str(answers[1]) == "CPU of the supervisor, ms per call and s: 0.15 times Pipecat's, at most 0.2"


def test_a_quiet_call_that_is_delayed_beside_a_loud_one_is_a_missed_goal() -> None:
    found = {"frames_lost": 0, "failed": 0, "echo_ms.p99": 5.0}
    cases = {"alone": found, "carrier sends": found | {"echo_ms.p99": 7.5, "frames_lost": 2}}
    assert fairness.missed_goals(cases) == [
        "carrier sends: echo p99, ms 7.5, at most 6",
        "carrier sends: frames lost 2, at most 0",
    ]
    assert fairness.missed_goals({fairness.TORRENT: found | {"echo_ms.p99": 19}}) == []


def read(*options: str) -> tuple[int, ...]:
    app = cyclopts.App()

    @app.default
    def command(*, calls: Numbers = (1,)) -> tuple[int, ...]:
        return calls

    called: Callable[..., tuple[int, ...]] = app
    return called([*options], exit_on_error=False, result_action="return_value")


def test_numbers_of_calls_are_given_in_one_word() -> None:
    assert read("--calls", "40,10,40") == (10, 40)
    assert read() == (1,)


def test_options_that_cannot_be_are_named() -> None:
    assert complaint((0, 10), 5, 1) == "--calls 0,10 --seconds 5 --rounds 1: must be positive"
    assert complaint((1,), 5, 1) == ""
