"""`scripts/bench peers`: Dialog and Pipecat side by side, each with an agent that sends every frame straight back.

Both run during the whole bench, and calls are placed at one after the other, round after round, so that whatever else the
machine does meets both; the figures are medians. Only the ratio of the two tells something beyond this machine.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import cyclopts
import msgspec
from cyclopts import Parameter
from msgspec import Struct
from rich.table import Table

from scripts.benches.options import Numbers, complaint, measured
from scripts.benches.results import KEPT, Figures, Machine, Run, combined, figures, machine, run_now, write
from scripts.benches.stage import RAMP_S, ROOT, Server, dialogd, load, peer
from scripts.benches.tables import LOAD_LABELS, console, number

RESULTS = "peers.json"
PEER_PYTHON = ROOT / "scripts" / "peers" / ".venv" / "bin" / "python"
PEER_SCRIPT = ROOT / "scripts" / "peers" / "pipecat_echo.py"
WARM_UP_CALLS, WARM_UP_S = 5, 1.0  # once for each: what is imported or compiled at the first call is no cost of the others
GOALS_AT = 40  # calls


class Goal(Struct, frozen=True):
    """A figure of Dialog must not be above this, or above this many times a figure of the peer's."""

    figure: str
    at_most: float
    times: str = ""

    def __str__(self) -> str:
        return f"≤ {self.at_most:g}{' × Pipecat' if self.times else ''}"


class Judged(Struct, frozen=True):
    """A goal beside what was measured: Dialog's figure, or its ratio to the peer's."""

    goal: Goal
    value: float

    @property
    def met(self) -> bool:
        """Whether it is enough."""
        return self.value <= self.goal.at_most

    def __str__(self) -> str:
        label, times = LOAD_LABELS[self.goal.figure], " times Pipecat's" if self.goal.times else ""
        return f"{label}: {number(self.value)}{times}, at most {self.goal.at_most:g}"


GOALS = (
    Goal("cost.tree_cpu_ms", 0.45, times="cost.tree_cpu_ms"),
    Goal("cost.supervisor_cpu_ms", 0.2, times="cost.tree_cpu_ms"),  # the peer has one process, which is all of it
    Goal("echo_ms.p50", 2),
    Goal("echo_ms.p99", 6),
)
SHOWN = (
    "frames_sent",
    "frames_lost",
    "failed",
    "echo_ms.p50",
    "echo_ms.p95",
    "echo_ms.p99",
    "webhook_ms.p50",
    "webhook_ms.p99",
    "first_echo_ms.p50",
    "first_echo_ms.p99",
    "cost.supervisor_cpu_ms",
    "cost.tree_cpu_ms",
    "cost.per_call_mb",
    "generator_cpu_ms",
)


class Sides(Struct, frozen=True):
    """The figures of both at one number of calls: the medians, and every round of both."""

    dialog: Figures
    pipecat: Figures
    dialog_rounds: list[Figures]
    pipecat_rounds: list[Figures]


class Results(Struct, frozen=True):
    """What one run measured, by the number of calls."""

    machine: Machine
    run: Run
    ramp_s: float
    calls: dict[int, Sides]


app = cyclopts.App(name="scripts/bench peers", help=__doc__, help_format="plaintext")


@app.default
def bench(
    *,
    calls: Numbers = (10, 40),
    seconds: float = 5.0,
    rounds: int = 3,
    ramp: float = RAMP_S,
    json: Annotated[bool, Parameter(negative=())] = False,
    keep: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Measure both in turn and print them side by side. Exit code 1 when Dialog misses a goal.

    Parameters
    ----------
    calls
        Numbers of calls at the same time, as in 10,40; the goals are for 40.
    seconds
        How long each is measured in each round.
    rounds
        How often; the figures are medians.
    ramp
        Seconds from one call's arrival to the next. At a multiple of 0.02 all callers' frames come at the same moment.
    json
        Print the figures as JSON instead.
    keep
        Write the figures to docs/bench, to be committed.
    """
    results = measured(complaint(calls, seconds, rounds), lambda: measure(calls, seconds, rounds, ramp))
    if keep:
        write(KEPT / RESULTS, results)
    if json:
        print(msgspec.json.format(msgspec.json.encode(results)).decode())
    else:
        show(results)
    missed = [goal for goal in judged(results.calls.get(GOALS_AT)) if not goal.met]
    for goal in missed:
        print(f"bench: missed at {GOALS_AT} calls: {goal}", file=sys.stderr)
    return 1 if missed else 0


def measure(calls: Sequence[int], seconds: float, rounds: int, ramp_s: float) -> Results:
    """Place calls at one and the other in turn. Raises `BenchFailed`."""
    run = run_now(rounds, seconds)
    found: dict[int, tuple[list[Figures], list[Figures]]] = {count: ([], []) for count in calls}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dialog-bench-")))
        dialog = stack.enter_context(dialogd(directory, ROOT / "examples" / "echo"))
        pipecat = stack.enter_context(peer(directory, PEER_PYTHON, PEER_SCRIPT))
        sides = (("Dialog", dialog), ("Pipecat", pipecat))
        for name, server in sides:
            _load(name, server, WARM_UP_CALLS, WARM_UP_S, ramp_s)
        for _ in range(rounds):
            for count in calls:
                for (name, server), kept in zip(sides, found[count], strict=True):
                    kept.append(_load(name, server, count, seconds, ramp_s))
    return Results(
        machine(),
        run,
        ramp_s,
        {count: Sides(combined(ours), combined(theirs), ours, theirs) for count, (ours, theirs) in found.items()},
    )


def _load(name: str, server: Server, calls: int, seconds: float, ramp_s: float) -> Figures:
    print(f"{name}: ", end="", file=sys.stderr, flush=True)
    return figures(load(server, calls, seconds, ramp_s))


def judged(sides: Sides | None) -> list[Judged]:
    """Return the goals whose figures were measured, with what they are."""
    if sides is None:
        return []
    found = [(goal, _value(goal, sides)) for goal in GOALS]
    return [Judged(goal, value) for goal, value in found if value is not None]


def _value(goal: Goal, sides: Sides) -> float | None:
    value = sides.dialog.get(goal.figure)
    return _ratio(value, sides.pipecat.get(goal.times)) if goal.times else value


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def show(results: Results) -> None:
    """Print both side by side."""
    terminal = console()
    terminal.print(f"\n{results.machine}\n{results.run}, a call each {results.ramp_s:g} s")
    for calls, sides in results.calls.items():
        goals = {answer.goal.figure: answer for answer in judged(sides)} if calls == GOALS_AT else {}
        terminal.print("", _table(f"{calls} calls", sides, goals), sep="\n")
        if lost := sides.pipecat.get("frames_lost"):
            terminal.print(
                f"Pipecat lost {number(lost)} frames in a round: it did less than it was asked, and its CPU flatters it."
            )


def _table(title: str, sides: Sides, goals: Mapping[str, Judged]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title)
    for head in ("Dialog", "Pipecat", "ratio", "goal", ""):
        table.add_column(head, justify="right", no_wrap=True)
    for name in SHOWN:
        ours, theirs, answer = sides.dialog.get(name), sides.pipecat.get(name), goals.get(name)
        times = answer.goal.times if answer and answer.goal.times else name
        ratio = _ratio(ours, sides.pipecat.get(times))
        verdict = ("[green]✓[/]" if answer.met else "[red]✗[/]") if answer else ""
        table.add_row(LOAD_LABELS[name], *map(_cell, (ours, theirs, ratio)), str(answer.goal) if answer else "", verdict)
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else number(value)


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
