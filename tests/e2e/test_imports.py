"""Importing holds up the event loop and so every caller: dialogd has done it when it is ready, or does it in a thread."""

import subprocess
import sys

from tests.conftest import StartDialogd
from tests.e2e.twilio_api import twilio_api
from tests.e2e.twilio_client import Twilio

_IMPORT = "import time:"  # begins each line of PYTHONPROFILEIMPORTTIME's
_HANGS_UP = """
import sys, threading
import httpx, trio
import dialog_supervisor.supervisor
from dialog_supervisor.carriers.twilio.rest import TwilioRest
from dialog_supervisor.sections import Secret, TwilioConfig

imported = {True: 0, False: 0}  # by the event loop's thread; by others

class Counting:
    def find_spec(self, name, path=None, target=None):
        imported[threading.current_thread() is threading.main_thread()] += 1

async def main():
    async with httpx.AsyncClient() as http:
        rest = TwilioRest(TwilioConfig(account_sid="AC1", auth_token=Secret("token"), api_url=sys.argv[1]), http)
        sys.meta_path.insert(0, Counting())
        await rest.complete("CA1")

trio.run(main)
print(imported[True], imported[False] > 50)
"""


async def test_nothing_is_imported_for_a_call_or_whoever_asks_about_it(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(environ={"PYTHONPROFILEIMPORTTIME": "1"})
    before = len(dialogd.output)
    assert any(line.startswith(_IMPORT) for line in dialogd.output)
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        await dialogd.step(call.sid, kind="state", text="streaming")  # as a stream
        for path in ("/status", "/calls", f"/calls/{call.sid}", "/generations"):
            await dialogd.ask(path)
        await call.stop()
        await dialogd.ended(call.sid)
    assert [line for line in dialogd.output[before:] if line.startswith(_IMPORT)] == []


def test_what_the_first_request_to_twilio_needs_is_imported_in_a_thread() -> None:
    with twilio_api() as api:
        done = subprocess.run(
            [sys.executable, "-c", _HANGS_UP, api.url], capture_output=True, text=True, timeout=30, check=False
        )
    assert (done.stderr, done.stdout) == ("", "0 True\n")
    assert len(api.asked) == 1
