"""How the faults are done: to one call, or before it comes."""

import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeAlias

import trio

from dialog_local.carrier.events import Party, VoiceBegan
from dialog_local.carrier.media import MediaSocket
from dialog_local.carrier.phonecall import Call
from tests.chaos.stage import Stage

Strike: TypeAlias = Callable[[Stage, Call], Awaitable[None]]

_SAVED_S = 0.15  # after a question was heard, until the supervisor has it
_BLOCK = 4096
_DAY_S = 86_400
_WRONG_S = 4.0  # long enough for a question and its answer
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


def at_a_moment(strike: Strike, who: Party, number: int, after_s: float) -> Strike:
    """Return a strike that comes so many seconds after one side, caller or agent, began to speak for the nth time."""

    async def strike_then(stage: Stage, call: Call) -> None:
        begun = 0
        async for event in call.log:
            begun += isinstance(event, VoiceBegan) and event.who == who
            if begun == number:
                break
        await trio.sleep(after_s)
        stage.struck(call)
        await strike(stage, call)

    return strike_then


def when_next(strike: Strike, who: Party, after_s: float) -> Strike:
    """Return a strike that comes so many seconds after one side begins to speak again."""

    async def strike_then(stage: Stage, call: Call) -> None:
        before = sum(isinstance(event, VoiceBegan) and event.who == who for event in call.log.history)
        await at_a_moment(strike, who, before + 1, after_s)(stage, call)

    return strike_then


def one_each(*strikes: Strike) -> Strike:
    """Return a strike that does to each call something else."""

    async def strike(stage: Stage, call: Call) -> None:
        await strikes[stage.number(call) % len(strikes)](stage, call)

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
    await _open_socket(call).drop()


async def mute(_stage: Stage, call: Call) -> None:
    """Have the carrier send nothing more on a socket that stays open."""
    _open_socket(call).muted = True


def _open_socket(call: Call) -> MediaSocket:
    if call.socket is None:
        raise OSError(f"call {call.sid} has no media socket")
    return call.socket


async def kill_dialogd(stage: Stage, _call: Call) -> None:
    """Kill dialogd itself, which systemd then starts again."""
    await stage.kill()


async def upgrade_dialogd(stage: Stage, _call: Call) -> None:
    """Have dialogd execute itself anew."""
    done = await stage.dialogd.ctl("upgrade")
    if done.returncode != 0:
        stage.complain(f"dialogctl upgrade exited {done.returncode}: {done.stderr}")


async def fill_disk(stage: Stage, _call: Call) -> None:
    """Leave no room for anything, and find that new code is refused for that."""
    with (stage.disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(_BLOCK))
    done = await stage.dialogd.ctl("reload")
    if done.returncode != 1 or "No space left" not in done.stderr:
        stage.complain(f"dialogctl reload on a full disk exited {done.returncode}: {done.stderr}")


async def delete_store(stage: Stage, _call: Call) -> None:
    """Delete what dialogd keeps of its calls."""
    if not list(stage.disk.rglob("*.sqlite")):
        stage.complain("there was no store to delete")
    for path in stage.state.iterdir():
        shutil.rmtree(path)


async def step_clock(stage: Stage, _call: Call) -> None:
    """Have dialogd's clock, and its workers', be a day ahead, then a day behind, then right."""
    for wrong_by_s in (_DAY_S, -_DAY_S, 0):
        stage.set_clock(wrong_by_s)
        await trio.sleep(_WRONG_S)
