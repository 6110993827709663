"""How the faults are done: to one call, or before it comes."""

import os
import signal
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import trio

from dialog_local.carrier.phonecall import Call
from tests.chaos.stage import Stage

Strike: TypeAlias = Callable[[Stage, Call], Awaitable[None]]

_SAVED_S = 0.15  # after a question was heard, until the supervisor has it
_BROKEN = "def create(voip)  # no colon\n"
_CRASHING = """

class Doomed(Clerk):
    async def inference(self, message):
        raise RuntimeError("it has been like that since the last change")


Clerk = Doomed
"""


def send(number: signal.Signals) -> Strike:
    """Return a strike that sends a signal to a call's worker."""

    async def strike(stage: Stage, call: Call) -> None:
        os.kill(await stage.worker(call), number)

    return strike


def send_in_thought(number: signal.Signals) -> Strike:
    """Return one that waits until the worker has heard a question, and has not begun to answer."""

    async def strike(stage: Stage, call: Call) -> None:
        worker = await stage.worker(call)
        await stage.next_line(event="heard", call=call.sid)
        await trio.sleep(_SAVED_S)
        stage.struck(call)
        os.kill(worker, number)

    return strike


def press(key: str) -> Strike:
    """Return a strike in which the caller presses a key, and the agent does what it stands for."""

    async def strike(_stage: Stage, call: Call) -> None:
        call.caller.press(key)

    return strike


def signal_template(number: signal.Signals) -> Strike:
    """Return a strike that sends a signal to the template."""

    async def strike(stage: Stage, _call: Call) -> None:
        os.kill(await stage.template(), number)

    return strike


async def load_broken_code(stage: Stage, _call: Call) -> None:
    """Reload code with a mistake in it, and be told so."""
    (stage.agent / "agent.py").write_text(_BROKEN)
    done = await stage.dialogd.ctl("reload")
    if done.returncode != 1 or "SyntaxError" not in done.stderr:
        stage.complain(f"dialogctl reload of broken code exited {done.returncode}: {done.stderr}")


async def load_crashing_code(stage: Stage, _call: Call) -> None:
    """Reload, once, code that crashes as soon as a caller says something."""
    source = (stage.agent / "agent.py").read_text()
    if _CRASHING not in source:
        (stage.agent / "agent.py").write_text(source + _CRASHING)
        await _reload(stage)


async def kill_and_reload(stage: Stage, call: Call) -> None:
    """Kill a worker while the agent's code is loaded anew."""
    worker = await stage.worker(call)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_reload, stage)
        await trio.sleep(0.1)
        os.kill(worker, signal.SIGKILL)


async def _reload(stage: Stage) -> None:
    done = await stage.dialogd.ctl("reload")
    if done.returncode != 0:
        stage.complain(f"dialogctl reload exited {done.returncode}: {done.stderr}")


async def cut(_stage: Stage, call: Call) -> None:
    """Lose the carrier's media socket without a closing handshake."""
    assert call.socket is not None
    await call.socket.drop()


async def mute(_stage: Stage, call: Call) -> None:
    """Have the carrier send nothing more on a socket that stays open."""
    assert call.socket is not None
    call.socket.muted = True


_TEN = (send(signal.SIGKILL), send(signal.SIGSEGV), send(signal.SIGSTOP), cut, *map(press, "125789"))


async def one_of_ten(stage: Stage, call: Call) -> None:
    """Do to each of ten calls something else."""
    await _TEN[stage.number(call) % len(_TEN)](stage, call)
