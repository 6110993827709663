"""The units as systemd itself runs them, with every wall that they have: what an operator does, and what goes wrong."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
import trio

from tests.deploy.machine import BOOT, Machine, booted, free_port, write
from tests.e2e.daemon import ACCOUNT_SID, AUTH_TOKEN, NOWHERE, PUBLIC_URL
from tests.e2e.site import TAKEN_UP, goes_on
from tests.e2e.test_recovery import COUNTER, TAKES_OVER
from tests.e2e.twilio_client import PhoneCall, Place, Twilio, verbs

CALLS = 20

AGENT = '''
"""Counts as the other does, says back what it hears, and imports what the examples' agents import."""

import time

from counter import Counter
from dialog_worker import CartesiaTTS, DeepgramSTT, Message, OpenAIAgent, VoIP, tool

VERSION = "one"


class Desk(Counter):
    def on_media(self, media) -> None:
        super().on_media(media)
        self.voip.post(Message("echo", media.payload))

    async def on_dtmf(self, dtmf) -> None:
        if dtmf.digit == "8":
            self.voip.trace("blocked", "")
            time.sleep(600)
        elif dtmf.digit == "9":
            kept = []
            while True:
                kept.append(bytearray(1 << 20))
        elif dtmf.digit == "A":
            self.voip.trace("version", VERSION)
        else:
            await super().on_dtmf(dtmf)


def create(voip: VoIP) -> Desk:
    return Desk(voip=voip)
'''

CONFIG = f"""
[gateway]
public_url = "{PUBLIC_URL}"
[twilio]
account_sid = "{ACCOUNT_SID}"
auth_token = "credential:twilio_auth_token"
api_url = "{NOWHERE}"
[agent]
path = "/opt/dialog/agent"
[workers]
memory = 200_000_000
sandbox = true
[calls]
ending_timeout = 2
max_load = 0
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    port = free_port()
    units = "etc/systemd/system"
    files = {
        "etc/dialog/dialog.toml": CONFIG,
        "etc/dialog/twilio_auth_token": AUTH_TOKEN,
        f"{units}/dialogd@.service": (BOOT.parent / "dialogd@.service").read_text(),
        "opt/dialog/agent/agent.py": AGENT,
        "opt/dialog/agent/counter.py": COUNTER,
        f"{units}/dialogd.socket.d/port.conf": f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n",
        f"{units}/dialogd.service.d/watchdog.conf": "[Service]\nWatchdogSec=3\n",
    }
    with booted(write(tmp_path_factory.mktemp("booted"), files), port) as machine:
        yield machine


@pytest.fixture
async def twilio(machine: Machine) -> AsyncIterator[Twilio]:
    async with Twilio(machine.place) as twilio:
        yield twilio


async def worker_of(machine: Machine, call: PhoneCall) -> int:
    pid: int = (await machine.ask(f"/calls/{call.sid}"))["worker_pid"]
    return pid


async def counted(machine: Machine, call: PhoneCall) -> None:
    """Have a call's agent count, and the store know of it."""
    await call.press("3")
    await machine.until(lambda: machine.kept_calls().get(call.sid) == b"3")


def restarts(machine: Machine) -> int:
    return int(machine.show("NRestarts"))


def test_started_is_when_calls_are_taken(machine: Machine) -> None:
    assert machine.show("ActiveState") == "active"
    assert re.fullmatch(r"taking calls; 0 under way; generation \w+\.1", machine.show("StatusText"))


async def test_an_agent_works_within_the_walls(machine: Machine, twilio: Twilio) -> None:
    async with twilio.streaming() as call:
        await call.echo()
        status = await machine.does("cat", f"/proc/{await worker_of(machine, call)}/status")
        assert re.search(r"^NoNewPrivs:\s1$", status, re.MULTILINE)
        assert re.search(r"^Seccomp:\s2$", status, re.MULTILINE)
        assert re.search(r"^CapBnd:\s0+$", status, re.MULTILINE)


async def test_each_call_has_a_control_group_below_the_units(machine: Machine, twilio: Twilio) -> None:
    async with twilio.streaming() as call:
        group = await machine.does("cat", f"/proc/{await worker_of(machine, call)}/cgroup")
        assert re.search(r"^0::/.*system\.slice/dialogd\.service/worker-", group, re.MULTILINE)


def test_dialogctl_asks_it_as_root(machine: Machine) -> None:
    assert "taking calls" in machine.run("dialogctl", "status")


async def test_the_journal_is_asked_for_one_call_and_for_warnings(machine: Machine, twilio: Twilio) -> None:
    async with twilio.streaming() as one, twilio.streaming() as other:
        await one.press("0")
        await machine.logged(event=TAKES_OVER, call=one.sid)
        await other.echo()
    lines = machine.journal(f"DIALOG_CALL={one.sid}")
    assert '"call begins"' in lines
    assert TAKES_OVER in lines
    assert other.sid not in lines
    warnings = machine.journal("DIALOG_SERVICE=dialogd", "--priority=warning")
    assert TAKES_OVER in warnings
    assert '"call begins"' not in warnings


async def test_a_reload_brings_the_next_call_the_new_code(machine: Machine, twilio: Twilio) -> None:
    code = machine.root / "opt/dialog/agent/agent.py"
    code.write_text(AGENT.replace('VERSION = "one"', 'VERSION = "two"'))
    before = str((await machine.ask("/status"))["generation"])
    await machine.does("systemctl", "reload", "dialogd")
    await machine.until(lambda: "generation" in machine.show("StatusText") and before not in machine.show("StatusText"))
    async with twilio.streaming() as call:
        await call.press("A")
        assert (await machine.step(call.sid, kind="version"))["text"] == "two"


async def test_a_worker_out_of_memory_costs_nobody_else_anything(machine: Machine, twilio: Twilio) -> None:
    main = machine.show("MainPID")
    async with twilio.streaming() as victim, twilio.streaming() as other:
        await victim.press("9")
        await machine.logged(event=TAKES_OVER, call=victim.sid)
        await victim.echo()
        await other.echo()
    assert (machine.show("MainPID"), machine.show("ActiveState")) == (main, "active")


async def test_an_upgrade_is_the_same_service_for_systemd(machine: Machine, twilio: Twilio) -> None:
    main, count = machine.show("MainPID"), restarts(machine)
    async with twilio.streaming() as call:
        await call.echo()
        await machine.does("dialogctl", "upgrade")
        await call.echo()
        await machine.until(lambda: machine.show("StatusText").startswith("taking calls; 1 under way"))
        for _ in range(4):  # beats of the watchdog; together longer than it waits
            beat = machine.show("WatchdogTimestampMonotonic")
            await machine.until(lambda beat=beat: machine.show("WatchdogTimestampMonotonic") != beat)  # type: ignore[misc]
        await call.echo()
    assert (machine.show("MainPID"), restarts(machine)) == (main, count)


async def test_twenty_conversations_go_on_when_dialogd_is_killed(machine: Machine, twilio: Twilio) -> None:
    main, count = machine.show("MainPID"), restarts(machine)
    async with AsyncExitStack() as stack:
        calls = []
        for _ in range(CALLS):
            calls.append(call := PhoneCall(twilio))
            await call.ring()
            await stack.enter_async_context(call.stream())
            await call.press("3")
        await machine.until(lambda: machine.kept_calls() == {call.sid: b"3" for call in calls})
        await calls[0].press("8")
        await machine.step(calls[0].sid, kind="blocked")  # so that its worker notices nothing
        await machine.does("systemctl", "kill", "--kill-whom=main", "--signal=SIGKILL", "dialogd")
        await machine.until(lambda: machine.show("MainPID") != main)
    assert verbs(await calls[0].after()) == ["Connect"]  # systemd has the listener: this waits, and is answered
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(goes_on, machine, call)
    assert restarts(machine) == count + 1
    assert machine.journal(f"DIALOG_EVENT={TAKEN_UP}").count("\n") == CALLS


async def test_a_dialogd_whose_loop_stands_still_is_ended_by_the_watchdog(machine: Machine, twilio: Twilio) -> None:
    count = restarts(machine)
    call = PhoneCall(twilio)
    await call.ring()
    async with call.stream():
        await counted(machine, call)
        await machine.does("systemctl", "kill", "--kill-whom=main", "--signal=SIGSTOP", "dialogd")
        await machine.until(lambda: restarts(machine) == count + 1)
    await goes_on(machine, call)
    assert "Watchdog timeout" in machine.text
    assert "Fatal Python error: Aborted" in machine.text


async def test_a_stop_waits_for_the_last_call_and_leaves_nothing(machine: Machine, twilio: Twilio) -> None:
    async with twilio.streaming() as call:
        await call.echo()
        await machine.does("systemctl", "stop", "--no-block", "dialogd.socket", "dialogd")
        await machine.logged(event="stopping")
        assert verbs(await PhoneCall(twilio).ring()) == ["Say", "Hangup"]
        await call.echo()
        assert machine.show("ActiveState") == "deactivating"
    await machine.until(lambda: machine.show("ActiveState") == "inactive")
    assert (machine.show("Result"), machine.show("ExecMainStatus")) == ("success", "0")
    assert machine.processes() == []
    assert machine.kept_calls() == {}
    assert not (machine.root / "run/dialog").exists()


async def test_several_run_from_one_unit_and_keep_their_calls_in_one_store(machine: Machine) -> None:
    configured = CONFIG.replace("[gateway]", '[gateway]\nlisten = "127.0.0.1:{node}"')
    (machine.root / "etc/dialog/dialog.toml").write_text(configured)
    ports = [free_port(), free_port()]
    units = [f"dialogd@{port}" for port in ports]
    await machine.does("systemctl", "start", *units)
    async with AsyncExitStack() as stack:
        calls = []
        for port in ports:
            twilio = await stack.enter_async_context(Twilio(Place(PUBLIC_URL, port)))
            calls.append(call := await stack.enter_async_context(twilio.streaming()))
            await call.press("3")
            assert f"/n/{port}/twilio/media/" in call.stream_url
            assert f"{call.sid}  streaming" in await machine.does("dialogctl", f"@{port}", "calls")
        await machine.until(lambda: machine.kept_calls() == {call.sid: b"3" for call in calls})
        await machine.does("systemctl", "reload", "dialogd@*")
        for unit in units:
            await machine.until(lambda unit=unit: machine.show("StatusText", unit).endswith(".2"))  # type: ignore[misc]
    assert f'"node": "{ports[0]}"' in machine.journal(f"DIALOG_SERVICE={units[0]}")
    await machine.does("systemctl", "stop", "dialogd@*")
    assert [machine.show("Result", unit) for unit in units] == ["success", "success"]
    assert machine.kept_calls() == {}
