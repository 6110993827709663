"""`scripts/bench fairness`: whether a loud call delays quiet ones.

Quiet calls talk to an agent that echoes, alone and then beside one loud call of each kind. All figures are the quiet calls',
but for what the loud one said and the supervisor's share of a core. The loud call is a process of its own.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import cyclopts
import msgspec
from cyclopts import Parameter
from msgspec import Struct
from rich.table import Table

from dialog_local.load.server import usage
from scripts.benches.goals import Goal, Verdict, verdict
from scripts.benches.loud import Kind, Said
from scripts.benches.options import complaint, measured
from scripts.benches.results import KEPT, Figures, Machine, Run, combined, figures, machine, run_now, write
from scripts.benches.stage import BenchFailed, Server, dialogd, load, process
from scripts.benches.tables import LOAD_LABELS, cell, console, number

RESULTS = "fairness.json"
RAMP_S = 0.207  # no whole number of frames: the quiet calls' frames are spread, and do not wait for each other
SETTLE_S = 1.0  # for the loud call to be loud
AGENT = f'''
import itertools

import trio

from dialog_worker import Agent, Media, Message, StreamingStarted, VoIP

EVERY_S, PIECES = 0.02, 38  # 1,900 messages a second; a worker may send 2,000
FRAME = b"\\xff" * 160


class Echo(Agent):
    """Echoes, and speaks a lot more to some callers."""

    async def on_streaming_started(self, message: StreamingStarted) -> None:
        if self.voip.metadata.caller == "{Kind.VOICE.value}":
            self.nursery.start_soon(self._speak)
        if self.voip.metadata.caller == "{Kind.FLOOD.value}":
            self.nursery.start_soon(self._flood)

    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def _speak(self) -> None:
        """As much as it may, and have it thrown away before the carrier has too much of it."""
        due = trio.current_time()
        for number in itertools.count():
            for _ in range(50):
                for _ in range(PIECES):
                    self.voip.post(Message(f"speech {{number}}", FRAME))
                due += EVERY_S
                await trio.sleep_until(due)
            self.voip.abort(f"speech {{number}}")

    async def _flood(self) -> None:
        while True:
            self.voip.post(Message("speech", FRAME))
            await self.voip.room()


def create(voip: VoIP) -> Agent:
    return Echo(voip=voip)
'''
ALONE = "alone"
TORRENT = "carrier sends all that the socket takes"
CASES = {
    ALONE: None,
    "carrier sends 2,000 frames a second": Kind.MANY,
    TORRENT: Kind.TORRENT,
    "agent speaks 1,900 frames a second": Kind.VOICE,
    "agent speaks more than it may": Kind.FLOOD,
    "carrier reads nothing of 2,000 frames a second": Kind.DEAF,
}
P99 = Goal("echo_ms.p99", 6)  # what is asked at forty calls: 2,000 frames a second, whoever sends them
TORRENT_P99 = Goal("echo_ms.p99", 20)  # three processes want a core each then: a frame is back before the next is due
NONE = (Goal("frames_lost", 0), Goal("failed", 0))
SHOWN = ("frames_sent", "failed", "frames_lost", "echo_ms.p50", "echo_ms.p95", "echo_ms.p99")
OTHERS = {
    "supervisor.core_percent": "supervisor, % of a core",
    "loud.sent_per_s": "loud: frames in",
    "loud.heard_per_s": "out",
}


class Results(Struct, frozen=True):
    """What one run measured, by case."""

    machine: Machine
    run: Run
    calls: int
    cases: dict[str, Figures]


app = cyclopts.App(name="scripts/bench fairness", help=__doc__, help_format="plaintext")


@app.default
def bench(
    *,
    calls: int = 10,
    seconds: float = 4.0,
    rounds: int = 3,
    json: Annotated[bool, Parameter(negative=())] = False,
    keep: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Measure quiet calls alone and beside loud ones. Exit code 1 when a goal is missed.

    Parameters
    ----------
    calls
        How many quiet calls there are.
    seconds
        How long they are measured in each case.
    rounds
        How often; the figures are medians.
    json
        Print the figures as JSON instead.
    keep
        Write the figures to docs/bench, to be committed.
    """
    results = measured(complaint((calls,), seconds, rounds), lambda: measure(calls, seconds, rounds))
    if keep:
        write(KEPT / RESULTS, results)
    if json:
        print(msgspec.json.format(msgspec.json.encode(results)).decode())
    else:
        show(results)
    missed = missed_goals(results.cases)
    for phrase in missed:
        print(f"bench: missed: {phrase}", file=sys.stderr)
    return 1 if missed else 0


def measure(calls: int, seconds: float, rounds: int) -> Results:
    """Measure every case so often, in turn. Raises `BenchFailed`."""
    run = run_now(rounds, seconds)
    found: dict[str, list[Figures]] = {case: [] for case in CASES}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dialog-bench-")))
        (directory / "agent").mkdir()
        (directory / "agent" / "agent.py").write_text(AGENT)
        server = stack.enter_context(dialogd(directory, directory / "agent"))
        for _ in range(rounds):
            for case, kind in CASES.items():
                print(f"{case}: ", end="", file=sys.stderr, flush=True)
                found[case].append(quiet(server, calls, seconds) if kind is None else beside(server, kind, calls, seconds))
    return Results(machine(), run, calls, {case: combined(each) for case, each in found.items()})


def beside(server: Server, kind: Kind, calls: int, seconds: float) -> Figures:
    """Measure the quiet calls while there is a loud one."""
    log = server.log.with_name("loud.log")
    with process(log, sys.executable, "-m", "scripts.benches.loud", kind.name, server.webhook) as loud:
        time.sleep(SETTLE_S)
        found = quiet(server, calls, seconds)
        ended = loud.poll() is not None
    if ended:
        raise BenchFailed(f"the loud call ended:\n{log.read_text()}")
    said = msgspec.json.decode(log.read_bytes(), type=Said)
    return found | {f"loud.{name}": value for name, value in figures(said).items()}


def quiet(server: Server, calls: int, seconds: float) -> Figures:
    """Measure the quiet calls, and what share of a core the supervisor has meanwhile."""
    before, began = usage([server.pid]), time.monotonic()
    found = figures(load(server, calls, seconds, RAMP_S))
    used, elapsed = usage([server.pid]).since(before), time.monotonic() - began
    return found | {"supervisor.core_percent": round(100 * used / elapsed, 1)}


def goals_of(case: str) -> Sequence[Goal]:
    """Return what is asked of the quiet calls."""
    return (TORRENT_P99 if case == TORRENT else P99, *NONE)


def missed_goals(cases: dict[str, Figures]) -> Sequence[str]:
    """Return a phrase for each goal that is not met."""
    return [
        f"{case}: {LOAD_LABELS[goal.figure]} {number(found[goal.figure])}, at most {goal}"
        for case, found in cases.items()
        for goal in goals_of(case)
        if verdict(goal, found) is Verdict.MISSED
    ]


def show(results: Results) -> None:
    """Print the figures with their goals."""
    terminal = console()
    terminal.print(f"\n{results.machine}\n{results.run}\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{results.calls} quiet calls, one loud:", no_wrap=True)
    for name in SHOWN:
        table.add_column(LOAD_LABELS[name], justify="right")
    for label in OTHERS.values():
        table.add_column(label, justify="right")
    for case, found in results.cases.items():
        goals = {goal.figure: goal for goal in goals_of(case)}
        table.add_row(case, *(_cell(found, name, goals.get(name)) for name in (*SHOWN, *OTHERS)))
    asked = {goal.figure: goal for goal in goals_of(ALONE)} | {P99.figure: f"{P99}, {TORRENT_P99}"}
    table.add_row("goal: at most", *(str(asked.get(name, "")) for name in SHOWN))
    terminal.print(table)


def _cell(found: Figures, name: str, goal: Goal | None) -> str:
    return cell(found.get(name), None if goal is None else verdict(goal, found))


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
