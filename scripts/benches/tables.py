"""What the echo bench prints: the figures with their goals, and how they differ from those that were committed last."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from scripts.benches.goals import Verdict, judged, of_load, of_once, verdict
from scripts.benches.results import Figures, Machine, Run

_WIDTH = 140  # where the output is no terminal, which would have one of its own
LOAD_LABELS = {
    "answered": "calls answered",
    "failed": "calls failed",
    "frames_sent": "frames sent",
    "frames_lost": "frames lost",
    "echo_ms.p50": "echo p50, ms",
    "echo_ms.p95": "echo p95, ms",
    "echo_ms.p99": "echo p99, ms",
    "webhook_ms.p50": "webhook p50, ms",
    "webhook_ms.p99": "webhook p99, ms",
    "first_echo_ms.p50": "start to first echo p50, ms",
    "first_echo_ms.p99": "start to first echo p99, ms",
    "cost.supervisor_cpu_ms": "CPU of the supervisor, ms per call and s",
    "cost.tree_cpu_ms": "CPU of all its processes, ms per call and s",
    "generator_cpu_ms": "CPU of the load generator, ms per call and s",
    "cost.per_call_mb": "memory a call, MB (PSS)",
    "cost.idle_mb": "memory before the calls, MB (PSS)",
    "cost.loaded_mb": "memory with the calls, MB (PSS)",
    "cost.processes": "processes",
}
ONCE_LABELS = {
    "growth": "CPU for each call at the most calls, by that at 10",
    "hello_ms.p50": "fork to Hello p50, ms",
    "hello_ms.p99": "fork to Hello p99, ms",
    "burst.calls": "webhooks at once",
    "burst.failed": "webhooks at once, calls that failed",
    "burst.webhook_ms.p50": "webhooks at once, half of them answered within, ms",
    "burst.webhook_ms.max": "webhooks at once, all of them answered within, ms",
    "idle.mb": "idle dialogd with its template, MB (PSS)",
    "idle.core_percent": "idle dialogd with its template, % of a core",
    "openai.per_call_mb": "memory a call, OpenAI agent, every adapter imported, MB (PSS)",
}
_COMPARED = ("echo_ms.p50", "echo_ms.p99", "cost.supervisor_cpu_ms", "cost.tree_cpu_ms", "cost.per_call_mb")
_COMPARED_ONCE = ("hello_ms.p50", "burst.webhook_ms.max", "idle.mb", "idle.core_percent", "openai.per_call_mb")


def console() -> Console:
    """Return where the tables go."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_WIDTH)


def figures_table(loads: Mapping[int, Figures], once: Figures) -> Table:
    """Return all figures with their goals: a column for each number of calls, then what does not depend on it."""
    table = _table("", *(f"{calls} calls" if calls != 1 else "1 call" for calls in loads), "goal: at most")
    for name, label in LOAD_LABELS.items():
        goals = of_load(name)
        cells = []
        for calls, found in loads.items():
            verdicts = (verdict(goal, found) for goal in goals if goal.calls == calls)
            cells.append(cell(found.get(name), next(verdicts, None)))
        table.add_row(label, *cells, ", ".join(map(str, goals)))
    table.add_row()
    blank = [""] * (len(loads) - 1)
    for name, label in ONCE_LABELS.items():
        if name in once:
            goal = of_once(name)
            table.add_row(label, *blank, cell(once[name], verdict(goal, once) if goal else None), str(goal or ""))
    return table


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right", no_wrap=True, overflow="fold")
    return table


def cell(value: float | None, answer: Verdict | None) -> str:
    """Write a figure, and whether its goal is met; None where there is no figure, or no goal."""
    if value is None:
        return "-"
    colour = {Verdict.MET: "green", Verdict.MISSED: "red", None: "default"}[answer]
    return f"[{colour}]{number(value)}{' ' + answer.value if answer else ''}[/]"


def number(value: float) -> str:
    """Write a figure with as many digits as tell something."""
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def missed(loads: Mapping[int, Figures], once: Figures) -> list[str]:
    """Return a phrase for each goal that is not met."""
    return [
        f"{LOAD_LABELS[goal.figure] if goal.calls else ONCE_LABELS[goal.figure]}"
        f"{f' at {goal.calls} calls' if goal.calls else ''}: {number(value)}, at most {goal.at_most:g}"
        for goal, value, answer in judged(loads, once)
        if answer is Verdict.MISSED
    ]


Measured = tuple[Mapping[int, Figures], Figures]


def changes_table(then: Measured, now: Measured) -> Table:
    """Return the figures that both runs have, and by how much they changed."""
    table = _table("figure", "then", "now", "change")
    for label, before, after in _pairs(then, now):
        change = f"{round(100 * (after - before) / before):+d} %" if before else "-"
        table.add_row(label, number(before), number(after), change)
    return table


def _pairs(then: Measured, now: Measured) -> Iterator[tuple[str, float, float]]:
    for name in _COMPARED:
        for calls in now[0]:
            if name in now[0][calls] and name in then[0].get(calls, {}):
                yield f"{LOAD_LABELS[name]}, at {calls}", then[0][calls][name], now[0][calls][name]
    for name in _COMPARED_ONCE:
        if name in now[1] and name in then[1]:
            yield ONCE_LABELS[name], then[1][name], now[1][name]


def comparison_head(then: tuple[Machine, Run], now: Machine) -> Sequence[str]:
    """Return what one must know before reading the changes."""
    machine, run = then
    said = [f"Compared with the committed results ({run})"]
    if machine != now:
        said.append(f"THEY ARE OF ANOTHER MACHINE: {machine}. The changes tell of the machines as well as of the code.")
    return said
