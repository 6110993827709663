"""New code is tried on a share of the callers, promoted by itself when it does well, and rolled back when it does not."""

import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import Dialogd, write_agent
from tests.e2e.scrape import scrape
from tests.e2e.test_reload import Desk
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs

CALLS = 3  # that must go well
FIRST = "version 0"
MANY = int(os.environ.get("DIALOG_MANY_RELOADS", "2"))  # each takes most of a second; two hundred are a thorough check

CANARY = '''
"""An echo that tells its version, and crashes or fails in a turn when asked to, or always."""

import os
import time

from dialog_worker import Agent, Media, Message, VoIP
from protocol.messages import Turn

while os.path.exists({hold!r}):
    time.sleep(0.01)
VERSION, CRASHES, FAILS = {version!r}, {crashes!r}, {fails!r}


class Canary(Agent):
    """Says back what it hears."""

    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def on_streaming_started(self, started) -> None:
        if CRASHES and not self.voip.metadata.call_id.startswith("probe-"):
            os._exit(7)

    async def on_dtmf(self, dtmf) -> None:
        if dtmf.digit == "1":
            self.voip.trace("version", VERSION)
        elif dtmf.digit == "2":
            os._exit(7)
        elif dtmf.digit == "3":
            self.voip.report(Turn("failed" if FAILS else "answered"))


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    return Canary(voip=voip)
'''


def write(directory: Path, version: str, *, crashes: bool = False, fails: bool = False) -> Path:
    """Write a version of the agent."""
    hold = str(directory.with_name("hold"))  # while there is such a file, the import takes its time
    return write_agent(directory, CANARY.format(version=version, crashes=crashes, fails=fails, hold=hold))


class Line:
    """A number whose calls are answered by one dialogd; half of them go to a canary, if there is one."""

    def __init__(self, dialogd: Dialogd, agent: Path, shelf: Path) -> None:
        self.dialogd = dialogd
        self.desk = Desk(dialogd, agent, shelf)
        self.agent = agent
        self.hold = agent.with_name("hold")
        self._versions: dict[str, str] = {}  # by generation
        self._meant = {"old": FIRST, "new": ""}

    async def reload(self, **faults: bool) -> dict[str, Any]:
        """Write a version, and put it on trial: it is the new one from now on, and the current one is the old."""
        version = f"version {time.monotonic()}"
        write(self.agent, version, **faults)
        found: dict[str, Any] = await self.dialogd.ask("/reload", "POST")
        assert found["canary"] == 50
        self._versions[found["generation"]] = version
        self._meant = {"old": self._versions.get(found["previous"], FIRST), "new": version}
        return found

    async def refusal(self, path: str) -> str:
        """Return why dialogd does not do something."""
        with pytest.raises(httpx.HTTPStatusError) as caught:
            await self.dialogd.ask(path, "POST")
        return str(caught.value.response.json()["error"])

    @asynccontextmanager
    async def call(self, version: str) -> AsyncIterator[PhoneCall]:
        """Place a call that is answered by the "old" or the "new" version of the agent."""
        async with Twilio(self.dialogd) as twilio:
            async with twilio.streaming() as call:
                assert await self.version_of(call) == version
                yield call
            await self.dialogd.ended(call.sid)

    async def version_of(self, call: PhoneCall, number: int = 1) -> str:
        """Ask a call for its version, "old" or "new", for the first time or the one of that number."""
        await call.press("1")
        found = (await self.dialogd.steps(call.sid, number, kind="version"))[-1]["text"]
        return next(name for name, version in self._meant.items() if version == found)

    async def versions(self, *versions: str) -> None:
        """Place calls that are answered by these versions, one after the other, and end well."""
        for version in versions:
            async with self.call(version):
                pass

    async def crash_in_vain(self, generation: str) -> None:
        """Place a call that crashes again and again, and is given the fallback."""
        async with Twilio(self.dialogd) as twilio:
            call = PhoneCall(twilio)
            await call.ring()
            async with call.stream():
                assert (await self.dialogd.ask(f"/calls/{call.sid}"))["generation"] == generation
                assert await call.closed() == 1000
                assert verbs(await call.after()) == ["Say", "Hangup"]
            await self.dialogd.ended(call.sid)

    async def states(self) -> dict[str, str]:
        """Return the generations' states by name."""
        return {one["generation"]: one["state"] for one in await self.dialogd.ask("/generations")}

    async def trial(self) -> dict[str, Any]:
        """Return the figures of the trial under way."""
        [trial] = [one["trial"] for one in await self.dialogd.ask("/generations") if one["trial"]]
        found: dict[str, Any] = trial
        return found

    async def end_trial(self) -> None:
        """Have no canary, whatever there is."""
        if (await self.dialogd.ask("/status"))["canary"]:
            await self.dialogd.ask("/rollback", "POST")


@pytest.fixture(scope="module")
def shared(start_shared_dialogd: StartDialogd, tmp_path_factory: pytest.TempPathFactory) -> Line:
    directory = tmp_path_factory.mktemp("canary")
    agent = write(directory / "agent", FIRST)
    (shelf := directory / "shelf").mkdir()
    keys = {"canary": 50, "canary_calls": CALLS}
    return Line(start_shared_dialogd(agent=agent, agent_keys=keys, environ={"TMPDIR": str(shelf)}), agent, shelf)


@pytest.fixture
async def line(shared: Line) -> AsyncIterator[Line]:
    """The line as the test before left it, but for its canary."""
    yield shared
    await shared.end_trial()


# A share of the calls


async def test_every_other_call_gets_the_canary_and_keeps_it(line: Line) -> None:
    found = await line.reload()
    async with line.call("old") as first, line.call("new") as second, line.call("old"), line.call("new"):
        await line.end_trial()
        assert [await line.version_of(first, 2), await line.version_of(second, 2)] == ["old", "new"]
        assert (await line.states())[found["generation"]] == "retiring"
        await line.versions("old", "old")
    assert found["generation"] not in await line.states()


async def test_a_canary_is_shown_with_its_figures(line: Line) -> None:
    found = await line.reload()
    await line.versions("old", "new", "old")
    trial = await line.trial()
    assert (trial["share"], trial["calls"], trial["margin"]) == (50, CALLS, 5.0)
    assert (trial["new"]["begun"], trial["new"]["well"], trial["old"]["begun"]) == (1, 1, 2)
    status = await line.dialogd.ask("/status")
    assert (status["generation"], status["canary"]) == (found["previous"], found["generation"])
    for command in ("status", "generations"):
        shown = (await line.dialogd.ctl(command)).stdout
        assert "it takes 50 of 100 new calls, until 3 went well: 1 have\n" in shown
        assert "canary since then: 1 begun, 0 crashed; 0 of 0 turns failed\n" in shown
        assert "old code since then: 2 begun, 0 crashed; 0 of 0 turns failed; margin 5 of 100\n" in shown


# By itself


async def test_a_canary_that_does_well_is_promoted(line: Line) -> None:
    found = await line.reload()
    await line.versions(*["old", "new"] * CALLS, "new", "new")
    promoted = await line.dialogd.logged(event="canary promoted", generation=found["generation"])
    assert promoted["reason"] == "3 calls of it went well (agent.canary_calls = 3)"
    assert (promoted["previous"], promoted["trial"]["new"]["well"]) == (found["previous"], CALLS)
    assert await line.states() == {found["previous"]: "previous", found["generation"]: "current"}
    assert (await line.dialogd.ask("/rollback", "POST"))["generation"] == found["previous"]
    await line.versions("old")


async def test_a_canary_that_crashes_each_call_is_rolled_back_and_the_next_calls_get_the_old(line: Line) -> None:
    found = await line.reload(crashes=True)
    for _ in range(2):
        await line.versions("old")
        await line.crash_in_vain(found["generation"])
    back = await line.dialogd.logged(event="canary rolled back", generation=found["generation"])
    reason = "2 of 2 calls crashed, and 0 of 2 calls crashed on the old code (agent.canary_margin = 5)"
    assert (back["level"], back["current"], back["reason"]) == ("error", found["previous"], reason)
    assert back["trial"]["new"]["crashes"] == 5  # four of the first call, and one of the second
    assert "call" not in back
    assert (await scrape(line.dialogd)).value("dialog_trials_total", verdict="rolled_back") >= 1
    await line.versions("old", "old", "old")
    assert (await line.dialogd.ask("/status"))["canary"] is None


async def test_a_caller_whose_call_rolls_a_canary_back_goes_on_talking_on_its_code(line: Line) -> None:
    found = await line.reload()
    async with line.call("old"), line.call("new") as first, line.call("old"), line.call("new") as second:
        for call in (first, second):
            await call.press("2")
            await line.dialogd.logged(event="worker died in mid-call, and another takes over", call=call.sid)
        await line.dialogd.logged(event="canary rolled back", generation=found["generation"])
        for call in (first, second):
            await call.echo()
            assert await line.version_of(call, 2) == "new"
    await line.versions("old", "old")


async def test_a_canary_whose_turns_fail_is_rolled_back(line: Line) -> None:
    found = await line.reload(fails=True)
    async with line.call("old") as one, line.call("new") as two, line.call("old") as three, line.call("new") as four:
        for call in (one, two, three, four):
            await call.press("3")
        back = await line.dialogd.logged(event="canary rolled back", generation=found["generation"])
    assert back["reason"].startswith("2 of 2 turns failed, and ")
    await line.versions("old", "old")


# By command


async def test_promote_does_not_wait_for_more_calls(line: Line) -> None:
    found = await line.reload()
    done = await line.dialogd.ctl("promote")
    assert done.stdout.startswith(f"generation {found['generation']} serves the next calls, after {found['previous']}; ")
    await line.versions("new", "new")
    assert await line.states() == {found["previous"]: "previous", found["generation"]: "current"}


async def test_rollback_ends_the_canary_alone_and_says_so(line: Line) -> None:
    before = await line.states()
    found = await line.reload()
    done = await line.dialogd.ctl("rollback")
    assert done.stdout.splitlines()[0] == (
        f"the canary {found['generation']} has ended: its calls finish on its code, and no more begin on it"
    )
    await line.versions("old", "old")
    assert await line.states() == before


async def test_without_a_canary_there_is_none_to_promote(line: Line) -> None:
    done = await line.dialogd.ctl("promote")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no canary is on trial; dialogctl generations shows what there is" in done.stderr


async def test_a_second_reload_replaces_the_canary(line: Line) -> None:
    first = await line.reload()
    async with line.call("old"), line.call("new") as call:
        second = json.loads((await line.dialogd.ctl("reload", "--json")).stdout)
        assert (second["canary"], second["ended"]) == (50, first["generation"])
        assert await line.states() == {
            **{name: "previous" for name, state in (await line.states()).items() if state == "previous"},
            first["previous"]: "current",
            first["generation"]: "retiring",
            second["generation"]: "canary",
        }
        await line.versions("old", "new")
        assert await line.version_of(call, 2) == "new"
        assert (await line.trial())["new"]["begun"] == 1


async def test_sighup_puts_code_on_trial_too(line: Line) -> None:
    line.dialogd.signal(signal.SIGHUP)
    with trio.fail_after(PATIENCE_S):
        while (await line.dialogd.ask("/status"))["canary"] is None:  # noqa: ASYNC110 - another process's doing
            await trio.sleep(0.02)


async def test_code_that_fails_its_probe_leaves_the_canary_before_it_on_trial(line: Line) -> None:
    found = await line.reload()
    write_agent(line.agent, "def create(voip):\n    no_such_name()\n")
    line.dialogd.expects_traceback = True  # the author's
    assert "NameError" in await line.refusal("/reload")
    assert (await line.dialogd.ask("/status"))["canary"] == found["generation"]
    await line.versions("old", "new")


# At length, and at the end


async def test_while_the_canarys_template_is_mended_its_calls_go_to_the_old_and_count_against_it(line: Line) -> None:
    found = await line.reload()
    [template] = [pid for pid in line.dialogd.children() if found["generation"] in command_of(pid)]
    line.hold.touch()
    os.kill(template, signal.SIGKILL)
    died = "the template process died and is started again; calls under way go on"
    await line.dialogd.logged(event=died, generation=found["generation"])
    await line.versions("old", "old")
    new = (await line.trial())["new"]
    assert (new["begun"], new["crashed"]) == (1, 1)
    line.hold.unlink()
    await line.dialogd.logged(event="the template process runs again", generation=found["generation"])
    await line.versions("old", "new")


def command_of(pid: int) -> str:
    """Return a process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


async def test_canaries_one_after_another_leave_nothing_behind(line: Line) -> None:
    await line.reload()
    await line.dialogd.ask("/promote", "POST")  # from now on there is a previous one
    await line.desk.settled()
    before = line.desk.size()
    await line.reload()
    async with line.call("old") as call:
        for _ in range(MANY):
            await line.reload()
            await call.echo()
        await line.end_trial()
    await line.desk.settled()
    with trio.fail_after(PATIENCE_S):
        while line.desk.size() != before:  # noqa: ASYNC110 - another process's children
            await trio.sleep(0.02)


async def test_a_dialogd_that_stops_during_a_trial_leaves_nothing_behind(
    start_dialogd: StartDialogd, tmp_path: Path
) -> None:
    agent = write(tmp_path / "agent", FIRST)
    (shelf := tmp_path / "shelf").mkdir()
    dialogd = start_dialogd(agent=agent, agent_keys={"canary": 100}, environ={"TMPDIR": str(shelf)})
    await dialogd.ask("/reload", "POST")
    async with Twilio(dialogd) as twilio, twilio.streaming() as call:
        await call.echo()
        dialogd.signal(signal.SIGTERM)
        await dialogd.logged(event="stopping")
        await call.echo()
    assert await dialogd.exited() == 0
    assert [*shelf.glob("*/*")] == []
