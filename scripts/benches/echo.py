"""`scripts/bench`: what a call costs dialogd, at several numbers of calls, when the agent sends every frame straight back.

It starts a dialogd of its own, on a port that is free, and places the calls with `dialogctl load`. Exit code 1 when a goal
is missed.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from dialog_local.load.server import memory, tree, usage
from scripts.benches.curves import draw
from scripts.benches.goals import growth, judged
from scripts.benches.options import Numbers, complaint, measured
from scripts.benches.results import KEPT, Figures, Results, combined, committed, figures, machine, run_now, write
from scripts.benches.stage import ROOT, Server, dialogd, load, time_workers
from scripts.benches.tables import changes_table, comparison_head, console, figures_table, missed

RESULTS, CURVES = "results.json", "curves.png"
BURST = 50  # webhooks at once
HELLOS = 30  # calls placed one after another for the time from fork to Hello
SETTLED_S = 2.0  # from dialogd's start, or from the last call's end, until it is idle
IDLE_S = 10.0  # a share of a core is seen in steps of 0.1 % then: /proc counts in hundredths of a second
OPENAI_CALLS = 10
OPENAI_AGENT = '''
from dialog_worker import CartesiaTTS, DeepgramSTT, ElevenLabsTTS, Media, Message, OpenAIAgent, OpenAISTT, VoIP

ADAPTERS = (CartesiaTTS, DeepgramSTT, ElevenLabsTTS, OpenAISTT)


class EchoingOpenAIAgent(OpenAIAgent):
    """Has all that an agent with a model has in memory, but nobody to connect to."""

    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))


def create(voip: VoIP) -> OpenAIAgent:
    return EchoingOpenAIAgent(voip=voip, stt=(), tts=(), model="none", api_key="none")
'''


app = cyclopts.App(name="scripts/bench", help=__doc__, help_format="plaintext")


@app.default
def bench(
    *,
    calls: Numbers = (1, 10, 40, 100, 150),
    seconds: float = 5.0,
    rounds: int = 1,
    keep: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Measure, print the figures beside their goals, and compare them with those that were committed last.

    Parameters
    ----------
    calls
        Numbers of calls at the same time, as in 10,40.
    seconds
        How long each number of calls is measured.
    rounds
        How often everything is measured; the figures are then medians.
    keep
        Write the results to docs/bench, to be committed, instead of to a temporary folder.
    """
    results = measured(complaint(calls, seconds, rounds), lambda: measure(calls, seconds, rounds))
    show(results)
    folder = KEPT if keep else Path(tempfile.mkdtemp(prefix="dialog-bench-"))
    write(folder / RESULTS, results)
    draw(results.calls, f"{results.machine}; {results.run}", folder / CURVES)
    print(f"the figures and their curves are in {folder}/{RESULTS} and {CURVES}")
    return conclude(results)


def measure(calls: Sequence[int], seconds: float, rounds: int) -> Results:
    """Measure everything so often. Raises `BenchFailed`."""
    run = run_now(rounds, seconds)
    loads: dict[int, list[Figures]] = {number: [] for number in calls}
    once: list[Figures] = []
    for _ in range(rounds):
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dialog-bench-")))
            server = stack.enter_context(dialogd(directory, ROOT / "examples" / "echo"))
            once.append(alone(server))
            for number in calls:
                loads[number].append(figures(load(server, number, seconds)))
        once[-1] |= openai_memory(seconds)
    medians = {number: combined(found) for number, found in loads.items()}
    single = combined(once)
    if (grown := growth(medians)) is not None:
        single["growth"] = grown
    return Results(machine(), run, medians, single)


def alone(server: Server) -> Figures:
    """Measure what does not depend on the number of calls, beginning with a dialogd that has had none."""
    found = idle(server)
    hellos = time_workers(server, HELLOS)
    found |= {f"hello_ms.{name}": value for name, value in figures(hellos.hello_ms).items()} if hellos.hello_ms else {}
    burst = figures(load(server, BURST, 1.0, ramp_s=0))
    return found | {f"burst.{name}": value for name, value in burst.items()}


def idle(server: Server) -> Figures:
    """Measure a dialogd without calls, with its template."""
    print(f"a dialogd without calls, for {IDLE_S:g} s …", file=sys.stderr)
    time.sleep(SETTLED_S)
    processes = tree([server.pid])
    before, began = usage(processes), time.monotonic()
    time.sleep(IDLE_S)
    used, elapsed = usage(processes).since(before), time.monotonic() - began
    return {"idle.mb": round(memory(processes) / 1e6, 1), "idle.core_percent": round(100 * used / elapsed, 2)}


def openai_memory(seconds: float) -> Figures:
    """Measure the memory of a call whose agent has a model's client and every adapter."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dialog-bench-")))
        (directory / "agent").mkdir()
        (directory / "agent" / "agent.py").write_text(OPENAI_AGENT)
        server = stack.enter_context(dialogd(directory, directory / "agent"))
        time.sleep(SETTLED_S)
        cost = load(server, OPENAI_CALLS, seconds).cost
    return {"openai.per_call_mb": cost.per_call_mb} if cost else {}


def show(results: Results) -> None:
    """Print the figures, and how they differ from the committed ones."""
    terminal = console()
    terminal.print(f"\n{results.machine}\n{results.run}\n")
    terminal.print(figures_table(results.calls, results.once))
    then = committed(RESULTS, Results)
    if then is None:
        terminal.print("\nThere are no committed results to compare with.")
        return
    terminal.print("", *comparison_head((then.machine, then.run), results.machine), sep="\n")
    terminal.print(changes_table((then.calls, then.once), (results.calls, results.once)))


def conclude(results: Results) -> int:
    """Say which goals are missed, and return the exit code."""
    found, of = missed(results.calls, results.once), len(list(judged(results.calls, results.once)))
    print(f"bench: {of - len(found)} of {of} goals met{''.join(f'{chr(10)}  missed: {phrase}' for phrase in found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
