"""Importing holds the event loop up, and every caller with it: dialogd has imported what it needs when it is ready."""

from tests.conftest import StartDialogd
from tests.e2e.twilio_api import twilio_api
from tests.e2e.twilio_client import Twilio

_IMPORT = "import time:"  # begins each line of PYTHONPROFILEIMPORTTIME's


async def test_nothing_is_imported_while_there_are_callers(start_dialogd: StartDialogd) -> None:
    with twilio_api() as api:
        dialogd = start_dialogd(twilio={"api_url": api.url}, environ={"PYTHONPROFILEIMPORTTIME": "1"})
        before = len(dialogd.output)
        assert any(line.startswith(_IMPORT) for line in dialogd.output)
        async with Twilio(dialogd) as twilio, twilio.streaming() as call:
            await call.echo()
            await dialogd.step(call.sid, kind="state", text="streaming")
            for path in ("/status", "/calls", f"/calls/{call.sid}", "/generations"):
                await dialogd.ask(path)
            await call.press("6")  # which has dialogd ask Twilio's API to end the call
            assert await call.closed() == 1000
            await dialogd.ended(call.sid)
        assert len(api.asked) == 1
        assert [line for line in dialogd.output[before:] if line.startswith(_IMPORT)] == []
