"""The same shares in real conversations: `dialog_local` hears, thinks and speaks, `dialogctl call` speaks and listens."""

import sys
from functools import partial
from pathlib import Path

import msgspec
import trio

from scripts.benches.stage import DIALOGCTL, TOKEN, free_port, process, wait_ready
from scripts.benches.turn_shares import Shares
from scripts.benches.turn_site import ACCOUNT, Addresses, dialogd
from scripts.benches.turn_sockets import serve
from scripts.benches.turn_taps import Calls, EarTap, LineTap, ModelTap, VoiceTap, Wire

GREETING = "Bella's, good evening. How can I help?"
HUNG_UP = "the caller hung up"  # the end of a conversation in which everything was said
RAMP_S = 1.3  # between two calls, so that their callers do not speak in chorus
SCRIPT = """A table for four at seven thirty.
What is on the menu?
! Do you have a table outside?
When are you open on Sunday?
! What is on the menu today?
Is there a place to park the car?
Thank you, bye.
"""


async def converse(directory: Path, shares: Shares, calls: int) -> list[str]:
    """Have so many conversations at the same time. Return what failed."""
    speech, listen = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    known, failures = Calls(shares), list[str]()
    script, log = directory / "script.txt", directory / "speech.log"
    script.write_text(SCRIPT)
    with process(log, sys.executable, "-m", "dialog_local", "--listen", speech) as local:
        await trio.to_thread.run_sync(wait_ready, f"http://{speech}/healthz", local, log)
        async with trio.open_nursery() as serving:
            ear = await serving.start(serve, Wire(speech, partial(EarTap, known)).serve)
            voice = await serving.start(serve, Wire(speech, partial(VoiceTap, known)).serve)
            model = await serving.start(serve, Wire(speech, partial(ModelTap, known)).serve)
            line = await serving.start(serve, Wire(listen, partial(LineTap, known), to_dialogd=True).serve)
            addresses = Addresses(listen, line, ear, voice, f"http://{model}")
            async with dialogd(directory, addresses, GREETING), trio.open_nursery() as talking:
                for number in range(calls):
                    talking.start_soon(_call, number, line, script, speech, failures)
            serving.cancel_scope.cancel()
    return failures


async def _call(number: int, line: str, script: Path, speech: str, failures: list[str]) -> None:
    await trio.sleep(number * RAMP_S)
    options = ["--url", f"http://{line}/twilio/voice", "--token", TOKEN, "--account-sid", ACCOUNT, "--script", str(script)]
    command = ["env", f"DIALOG_LOCAL_URL=http://{speech}", DIALOGCTL, "call", "--json", *options]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    ended = msgspec.json.decode(done.stdout)["ended"] if done.stdout else done.stderr.decode().strip()
    if not ended.startswith(HUNG_UP):
        failures.append(f"call {number}: {ended[-300:]}")
