"""`scripts/bench turns`: our own share of a conversation's turn, measured from outside, the providers' time subtracted.

A dialogd serves calls of an ordinary OpenAI agent. The bench plays the carrier and, on their wire protocols, the ear
(Deepgram), the model (chat completions, with TLS) and the voice (Cartesia); so all dates are of one clock, each taken just
before something is written, or by the kernel when something arrives.
"""

import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated

import cyclopts
import msgspec
import trio
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from dialog_local.load.wire import Target
from dialog_local.outcome import first_of
from scripts.benches.stage import TOKEN, BenchFailed, free_port
from scripts.benches.turn_line import Line
from scripts.benches.turn_model import Model
from scripts.benches.turn_real import converse
from scripts.benches.turn_shares import Figure, Share, Shares, figure
from scripts.benches.turn_site import ACCOUNT, Addresses, certificate, dialogd
from scripts.benches.turn_sockets import LATENESS, DatedConnection, accepted, serve
from scripts.benches.turn_speech import Ears, Voice
from scripts.benches.turn_talk import Delays, Talk

RAMP_S = 0.113  # between two calls; no multiple of a frame's 20 ms, as on a real line
REASONS = 5  # that are shown when turns fail
CONTROL_S = 0.01  # between two messages of the control
ECHO = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    while data := connection.recv(65536):
        connection.sendall(data)
"""
QUIET_MS = 0.5  # p99 of the control on a machine with nothing else to do
CONTROL_BYTES = 400  # about as many as a frame on the carrier's socket has
app = cyclopts.App(name="scripts/bench turns", help=__doc__)


class Result(Struct, frozen=True):
    """What was measured. Figures are in milliseconds. `control`: the way through a process that only echoes.

    In real speech audio without its like cannot be told apart, and what an interruption throws away leaves nothing to find;
    so there `missing` is not known. `first`: the requests of each call's first turn.
    """

    mode: str
    calls: int
    turns: int
    shares: dict[str, Figure]
    first: Figure | None
    missing: dict[str, int]
    cold_turns: int | None
    connections: int | None
    handshakes: int | None
    control: Figure
    lateness: Figure
    failures: list[str]

    def faults(self) -> list[str]:
        """Return what goes beyond its goal or went wrong, in words."""
        faults = list(self.failures)
        for share in Share:
            found = self.shares[share.name]
            if not found.count:
                faults.append(f"{share.meaning}: not measured")
            elif found.p99 > share.goal_ms:
                faults.append(f"{share.meaning}: p99 {found.p99:.1f} ms, goal {share.goal_ms:g} ms")
            if missing := self.missing.get(share.name, 0):
                faults.append(f"{share.meaning}: {missing} times nothing came")
        if self.cold_turns:
            faults.append(f"{self.cold_turns} of {self.turns} turns waited for a handshake with the model")
        return faults


@dataclass(frozen=True)
class Plan:
    """What is to be measured. `pause_s`: how long a caller is silent once. `secure`: the model speaks TLS."""

    calls: int = 20
    turns: int = 10
    delays: Delays = field(default_factory=Delays)
    pause_s: float = 6.0
    secure: bool = True
    seed: int = 1


@app.default
def main(
    *,
    calls: int = Plan.calls,
    turns: int = Plan.turns,
    model_ms: float = Delays.model_ms,
    token_ms: float = Delays.token_ms,
    voice_ms: float = Delays.voice_ms,
    pause: float = Plan.pause_s,
    plain: Annotated[bool, cyclopts.Parameter(negative=())] = False,
    speech: int = 0,
    seed: int = Plan.seed,
    as_json: Annotated[bool, cyclopts.Parameter(name="--json", negative=())] = False,
) -> int:
    """Measure turns. Exit with 1 when a turn failed or a goal was missed.

    Parameters
    ----------
    calls
        How many callers talk at the same time.
    turns
        How many turns each of them takes. Of four, two answers are interrupted.
    model_ms
        How long the model takes until its first token.
    token_ms
        And from each token to the next.
    voice_ms
        How long the voice takes until its first audio.
    pause
        How many seconds a caller is silent once, before its fourth turn.
    plain
        Have the model speak without TLS.
    speech
        Instead of all that, have so many real conversations through dialog_local. Two cores carry two or three.
    seed
        Of the callers' pauses.
    as_json
        Print the figures as JSON, and nothing else on stdout.
    """
    plan = Plan(calls, turns, Delays(model_ms, token_ms, voice_ms), pause, not plain, seed)
    with tempfile.TemporaryDirectory(prefix="dialog-turns-") as temporary:
        try:
            result = trio.run(_real, Path(temporary), speech) if speech else trio.run(_injected, Path(temporary), plan)
        except* BenchFailed as failed:
            sys.exit(f"bench: {first_of(failed)}")
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(result)).decode())
    else:
        show(result)
    return 1 if result.faults() else 0


async def _injected(directory: Path, plan: Plan) -> Result:
    """Play the providers and the carrier."""
    shares, random, control = Shares(), Random(plan.seed), list[float]()
    talks = [Talk(number, shares, random, plan.pause_s) for number in range(plan.calls)]
    by_sid = {talk.sid: talk for talk in talks}
    tls, trusted = certificate(directory) if plan.secure else (None, None)
    model = Model(by_sid, plan.delays, tls)
    async with trio.open_nursery() as serving:
        ear = await serving.start(serve, Ears(by_sid).serve)
        voice = await serving.start(serve, Voice(by_sid, plan.delays).serve)
        brain = await serving.start(serve, model.serve)
        port = free_port()
        listen, scheme = f"127.0.0.1:{port}", "https" if plan.secure else "http"
        addresses = Addresses(listen, listen, ear, voice, f"{scheme}://{brain}")
        target = Target(f"http://{listen}/twilio/voice", ("127.0.0.1", port), ACCOUNT, TOKEN)
        async with dialogd(directory, addresses, "", *([f"SSL_CERT_FILE={trusted}"] if trusted else ())):
            connections, handshakes = model.connections, model.handshakes  # of the call that a new version is tried with
            serving.start_soon(_control, control)
            LATENESS.clear()
            async with trio.open_nursery() as talking:
                for number, talk in enumerate(talks):
                    talking.start_soon(_later, number * RAMP_S, Line(target, talk), plan.turns)
        serving.cancel_scope.cancel()
    return Result(
        mode="injected delays",
        calls=plan.calls,
        turns=model.turns,
        shares={share.name: shares.figure(share) for share in Share},
        first=figure([talk.first_s for talk in talks if not math.isnan(talk.first_s)]),
        missing={share.name: shares.missing(share) for share in Share},
        cold_turns=sum(talk.cold_turns for talk in talks),
        connections=model.connections - connections,
        handshakes=model.handshakes - handshakes,
        control=figure(control),
        lateness=figure(LATENESS),
        failures=[failure for talk in talks for failure in talk.failures],
    )


async def _real(directory: Path, calls: int) -> Result:
    """Have real conversations, and look at the wires."""
    shares, control = Shares(), list[float]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_control, control)
        LATENESS.clear()
        failures = await converse(directory, shares, calls)
        nursery.cancel_scope.cancel()
    return Result(
        mode=f"real speech through dialog_local, {calls} calls at once",
        calls=calls,
        turns=len(shares.taken[Share.REQUEST]),
        shares={share.name: shares.figure(share) for share in Share},
        first=None,
        missing={},
        cold_turns=None,
        connections=None,
        handshakes=None,
        control=figure(control),
        lateness=figure(LATENESS),
        failures=failures,
    )


async def _later(delay_s: float, line: Line, turns: int) -> None:
    await trio.sleep(delay_s)
    await line.run(turns)


async def _control(taken: list[float]) -> None:
    """Measure what a figure has of the machine: the way through a process that only sends back what it gets."""
    send, receive = trio.open_memory_channel[DatedConnection](1)

    async def keep(stream: trio.SocketStream) -> None:
        await send.send(accepted(stream))
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        address = await nursery.start(serve, keep)
        echo = [sys.executable, "-c", ECHO, *address.split(":")]
        nursery.start_soon(partial(trio.run_process, echo, check=False, stderr=subprocess.DEVNULL))
        connection = await receive.receive()
        with connection:
            while True:
                sent_at = connection.send(b"." * CONTROL_BYTES)
                await connection.receive()
                taken.append(connection.arrived_at - sent_at)
                await trio.sleep(CONTROL_S)


def show(result: Result) -> None:
    """Print the table, and what else there is to know."""
    table = Table("our share", "goal", "p50", "p95", "p99", "worst", "of", "", title=f"{result.mode}; milliseconds")
    for share in Share:
        one = result.shares[share.name]
        met = "met" if one.count and one.p99 <= share.goal_ms else "NOT MET"
        figures = [f"{value:.2f}" for value in (one.p50, one.p95, one.p99, one.worst)]
        table.add_row(share.meaning, f"{share.goal_ms:g}", *figures, str(one.count), met)
    if result.cold_turns is not None:
        met = "NOT MET" if result.cold_turns else "met"
        table.add_row("turns that waited for a handshake", "0", "", "", "", str(result.cold_turns), str(result.turns), met)
    Console(width=140).print(table)
    control, late = result.control, result.lateness
    busy = "; OTHERS USE THIS MACHINE, measure again" if control.p99 > QUIET_MS else ""
    print(f"bench: through a process that echoes: p50 {control.p50:.2f}, p99 {control.p99:.2f} ms of {control.count}{busy}")
    print(f"bench: from an arrival until the bench read it, in no figure: p50 {late.p50:.2f}, p99 {late.p99:.2f} ms")
    if first := result.first:
        print(f"bench: each call's first request: p50 {first.p50:.2f}, p99 {first.p99:.2f} ms of {first.count}")
    if result.connections is not None:
        print(
            f"bench: {result.connections} connections to the model, {result.handshakes} TLS handshakes, {result.calls} calls"
        )
    for fault in result.faults()[:REASONS]:
        print(f"bench: FAILED; {fault}")


if __name__ == "__main__":
    sys.exit(app(result_action="return_value"))
