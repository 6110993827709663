"""What is left of a call when it is over, and what `dialogctl logs` makes of it, and of calls that are under way."""

import resource
import subprocess
from pathlib import Path

import msgspec
import pytest
import trio

from dialog_supervisor.telemetry.event_logs import find
from protocol.messages import Dtmf, StreamingStarted
from protocol.record import Entry, event_of, read
from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import AUTH_TOKEN, DIALOGCTL, Dialogd
from tests.e2e.scrape import scrape
from tests.e2e.twilio_client import CALLER, PhoneCall, Twilio


@pytest.fixture(scope="module")
def dialogd(start_shared_dialogd: StartDialogd) -> Dialogd:
    return start_shared_dialogd(events={"directory": "events", "transcripts": True})


async def record(directory: Path, call: PhoneCall) -> list[Entry]:
    """Return all that the log of a call that is over tells, when all of it is written."""
    entries: list[Entry] = []
    with trio.fail_after(PATIENCE_S):
        while not any(entry.text == "call ended" for entry in entries):
            await trio.sleep(0.02)
            entries = [entry for file in find(directory, call.sid) for entry in read(file)[1]]
    return entries


async def a_call(dialogd: Dialogd) -> PhoneCall:
    """Have a call that echoes, presses a key that kills its worker, asks for what is refused, and ends."""
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        for _ in range(3):
            await call.echo()
        await call.press("3")
        await dialogd.steps(call.sid, 2, kind="worker", text="ready")
        await call.press("*")
        await dialogd.step(call.sid, kind="failed")
        await call.stop()
        await dialogd.ended(call.sid)
    return call


async def test_an_event_log_tells_what_crossed_the_pipe(dialogd: Dialogd) -> None:
    call = await a_call(dialogd)
    entries = await record(dialogd.directory / "events", call)
    assert [entry.t for entry in entries] == sorted(entry.t for entry in entries)
    events = [entry.event for entry in entries if entry.event]
    assert events[0] == "Metadata"
    assert {"StreamingStarted", "Dtmf", "Restored", "Reply", "StreamingStopped"} <= set(events)
    assert "Media" not in events
    assert [event_of(entry) for entry in entries if entry.event == "Dtmf"] == [Dtmf("3"), Dtmf("*")]
    assert isinstance(event_of(next(entry for entry in entries if entry.event == "StreamingStarted")), StreamingStarted)
    assert [entry.fields["destination"] for entry in entries if entry.command == "TransferTo"] == ["+15557654321"]
    assert sum(entry.fields["in"] for entry in entries if entry.step == "media") == 3
    assert [entry.text for entry in entries if entry.step == "state"] == [
        *("ringing", "connecting", "streaming", "ending", "ended"),
    ]
    said = [entry.text for entry in entries if entry.step == "log"]
    assert said == ["call begins", "worker died in mid-call, and another takes over", "request failed", "call ended"]


async def test_without_transcripts_it_has_no_number_no_key_and_no_word(start_dialogd: StartDialogd, tmp_path: Path) -> None:
    dialogd = start_dialogd(environ={"STATE_DIRECTORY": str(tmp_path / "state")})
    call = await a_call(dialogd)
    await record(tmp_path / "state" / "events", call)
    [file] = find(tmp_path / "state" / "events", call.sid)
    text = file.read_text()
    assert CALLER not in text
    assert '"digit":"3"' not in text
    assert "7654321" not in text


async def test_nothing_is_kept_where_nobody_said_where(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    call = await a_call(dialogd)
    said = await dialogd.ctl("logs", call.sid)
    assert said.stderr == (
        f"dialogctl: no call {call.sid} is under way, and no event logs are kept (events.directory); see dialogctl calls\n"
    )
    assert said.returncode == 1


async def test_a_full_disk_costs_the_log_and_not_the_call(start_dialogd: StartDialogd, tmp_path: Path) -> None:
    dialogd = start_dialogd(events={"directory": str(tmp_path / "events")})
    unlimited = resource.prlimit(dialogd.pid, resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    await a_call(dialogd)
    await dialogd.logged(event="event logs cannot be written", reason="File too large")
    assert len(dialogd.find(event="event logs cannot be written")) == 1
    assert (await scrape(dialogd)).value("dialog_events_lost_total") > 0
    resource.prlimit(dialogd.pid, resource.RLIMIT_FSIZE, unlimited)
    again = await a_call(dialogd)
    await dialogd.logged(event="event logs are written again")
    assert await record(tmp_path / "events", again)


# dialogctl logs


async def test_a_call_that_is_over_is_told_from_its_event_log(dialogd: Dialogd) -> None:
    call = await a_call(dialogd)
    await record(dialogd.directory / "events", call)
    shown = (await dialogd.ctl("logs", call.sid)).stdout
    assert f"{call.sid}, begun 20" in shown
    for line in (
        "error       worker died in mid-call, and another takes over  pid=",
        "agent asks  TransferTo",
        "state       ended",
    ):
        assert line in shown
    raw = (await dialogd.ctl("logs", call.sid, "--json")).stdout.splitlines()
    assert msgspec.json.decode(raw[0])["dialog_events"] == 1
    assert len(raw) > len(shown.splitlines())


async def test_a_call_is_followed_to_its_end(dialogd: Dialogd) -> None:
    async with Twilio(dialogd) as twilio, trio.open_nursery() as nursery:
        call = PhoneCall(twilio)
        await call.ring()
        command = [str(DIALOGCTL), "-c", str(dialogd.config), "logs", call.sid, "--follow"]
        following = await trio.lowlevel.open_process(
            command, stdout=subprocess.PIPE, env={"TWILIO_AUTH_TOKEN": AUTH_TOKEN, "PATH": "/usr/bin"}
        )
        assert following.stdout is not None
        seen = b""
        while b"connecting" not in seen:
            seen += await following.stdout.receive_some()
        async with call.stream():
            await call.press("3")
            await dialogd.steps(call.sid, 2, kind="worker", text="ready")
            await call.stop()
            await call.after("completed")
        with trio.fail_after(PATIENCE_S):
            while more := await following.stdout.receive_some():
                seen += more
            assert await following.wait() == 0
        nursery.cancel_scope.cancel()
    shown = seen.decode()
    assert shown.index("connecting") < shown.index("worker died in mid-call") < shown.index("call ended")


async def test_a_call_under_way_is_told_as_far_as_it_has_come(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.press("0")
        await dialogd.step(call.sid, kind="alive")
        shown = await dialogd.ctl("logs", call.sid)
    assert shown.returncode == 0
    assert "state       streaming" in shown.stdout
    assert "alive" in shown.stdout
    assert CALLER not in shown.stdout


async def test_a_state_is_shown_again_and_again(dialogd: Dialogd) -> None:
    arguments = [str(DIALOGCTL), "-c", str(dialogd.config), "calls", "--follow"]
    environ = {"TWILIO_AUTH_TOKEN": AUTH_TOKEN, "PATH": "/usr/bin"}
    following = await trio.lowlevel.open_process(arguments, stdout=subprocess.PIPE, env=environ)
    assert following.stdout is not None
    seen = b""
    with trio.fail_after(PATIENCE_S):
        while seen.decode().count("no calls") < 2:
            seen += await following.stdout.receive_some()
        await following.stdout.aclose()  # as of `head`: whoever reads has read enough
        assert await following.wait() == 141
    assert b"\x1b" not in seen
