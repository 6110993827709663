"""The long runs: calls that last, and many that do not, at a dialogd that is watched for whatever it does not give back.

Exit code 0: everything flat, back to what it was, and not one error; 1: not so; 2: usage.
"""

import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated

import msgspec
import trio
from cyclopts import App, Parameter
from msgspec import Struct

from dialog_local.load.command import Percentiles, percentiles
from scripts.benches.soak_calls import Line
from scripts.benches.soak_samples import Dialogd, running
from scripts.benches.soak_verdict import FIGURES, Row, Sample, judge

WARM_UP_S = 2.0  # calls before the idle figures are taken, so that what is imported and opened once is there
SETTLE_S = 15.0  # after the last call: idle threads of trio's end after 10 s

Flag = Annotated[bool, Parameter(negative=())]


class Calls(Struct, frozen=True):
    """What a run is to place."""

    count: int
    at_once: int
    seconds: float


class Run(Struct, frozen=True):
    """One run: what was placed, what went wrong, and how each figure did. Counts of frames are of all calls."""

    name: str
    seconds: float
    calls: int
    failed: int
    faults: dict[str, int]
    complaints: dict[str, int]
    frames_sent: int
    frames_lost: int
    echo_ms: Percentiles | None
    webhook_ms: Percentiles | None
    rows: list[Row]
    samples: list[Sample]

    @property
    def good(self) -> bool:
        """Whether nothing grew, stayed or failed."""
        return not (self.failed or self.frames_lost or self.complaints) and all(row.good for row in self.rows)


async def _watched(dialogd: Dialogd, every: float, work: Callable[[], Awaitable[None]], began_at: float) -> list[Sample]:
    """Do the work, and return what was sampled meanwhile."""
    samples: list[Sample] = []

    async def watch() -> None:
        while True:
            await trio.sleep(every)
            samples.append(await trio.to_thread.run_sync(dialogd.sample, began_at))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await work()
        nursery.cancel_scope.cancel()
    return samples


async def _run(wanted: Calls, dialogd: Dialogd, line: Line, every: float) -> Run:
    await trio.sleep(SETTLE_S)
    known, began_at = dialogd.complaints(), time.monotonic()
    idle = dialogd.sample(began_at)
    samples = await _watched(dialogd, every, partial(line.hold, wanted.count, wanted.at_once, wanted.seconds), began_at)
    seconds = time.monotonic() - began_at
    await trio.sleep(SETTLE_S)
    after, meter = dialogd.sample(began_at), line.meter
    return Run(
        name=f"{wanted.count} calls of {wanted.seconds:g} s, {wanted.at_once} at a time",
        seconds=round(seconds, 1),
        calls=line.placed,
        failed=line.faults.total(),
        faults=dict(line.faults),
        complaints=dict(dialogd.complaints() - known),
        frames_sent=meter.sent,
        frames_lost=meter.lost,
        echo_ms=percentiles(meter.echoes),
        webhook_ms=percentiles(meter.webhooks),
        rows=[judge(figure, idle, samples, after) for figure in FIGURES],
        samples=[idle, *samples, after],
    )


def describe(run: Run) -> str:
    """Return a run as a table for people."""
    lines = [
        f"{run.name}: {run.calls} calls in {run.seconds:g} s, {run.failed} failed; "
        f"{run.frames_sent} frames, {run.frames_lost} lost; echo {_milliseconds(run.echo_ms)}",
        f"  {'':44}{'idle':>9}{'half':>9}{'end':>9}{'rise':>9}{'limit':>9}{'after':>9}",
    ]
    for row in run.rows:
        figures = (row.idle, row.early, row.late, row.rise, row.limit, row.after)
        shown = "".join(f"{figure:>9.2f}" if row.unit else f"{figure:>9.4g}" for figure in figures)
        lines.append(f"  {row.title + (', MB' if row.unit else ''):44}{shown}  {row.verdict}")
    for what in (run.faults, run.complaints):
        lines += [f"  {count} x {reason}" for reason, count in Counter(what).most_common()]
    return "\n".join([*lines, f"  {'flat, and not one error' if run.good else 'FAILED'}"])


def _milliseconds(found: Percentiles | None) -> str:
    return f"p50 {found.p50:g} p99 {found.p99:g} ms" if found else "-"


async def _soak(long: Calls, short: Calls, every: float, *, json: bool) -> list[Run]:
    runs: list[Run] = []
    with running() as dialogd:
        target = await trio.to_thread.run_sync(dialogd.ready)
        await Line(target).hold(3 * short.at_once, short.at_once, WARM_UP_S)
        for wanted in (long, short):
            if wanted.count and wanted.seconds:
                runs.append(await _run(wanted, dialogd, Line(target), every))
                print(describe(runs[-1]), file=sys.stderr if json else sys.stdout, flush=True)
    return runs


app = App(name="scripts/soak", help_format="plaintext")


@app.default
def soak(
    *,
    calls: int = 20,
    minutes: float = 20.0,
    short_calls: int = 3_000,
    short_seconds: float = 2.0,
    at_once: int = 15,
    every: float = 10.0,
    json: Flag = False,
) -> int:
    """Hold calls for long, then place many short ones, and say of each figure of dialogd's whether it stayed flat.

    Parameters
    ----------
    calls
        How many calls the first run holds at the same time.
    minutes
        How long it holds them; 0 leaves it out.
    short_calls
        How many calls the second run places; 0 leaves it out.
    short_seconds
        How long each of them talks.
    at_once
        How many of them there are at a time.
    every
        Seconds from one sample to the next.
    json
        Print everything as JSON, every sample too; the tables go to stderr.
    """
    if min(calls, at_once) < 1 or min(minutes, short_calls, short_seconds) < 0 or every <= 0:
        print("scripts/soak: --calls, --at-once and --every must be positive, and nothing negative", file=sys.stderr)
        return 2
    long, short = Calls(calls, calls, minutes * 60), Calls(short_calls, at_once, short_seconds)
    runs = trio.run(partial(_soak, long, short, every, json=json))
    if json:
        print(msgspec.json.format(msgspec.json.encode(runs)).decode())
    return 0 if all(run.good for run in runs) else 1


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
