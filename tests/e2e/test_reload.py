"""New code for the next call, while calls under way keep theirs: reload, rollback, and code that gets no caller."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import trio

from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import Dialogd, write_agent
from tests.e2e.twilio_client import PhoneCall, Twilio

MANY = int(os.environ.get("DIALOG_MANY_RELOADS", "4"))  # each takes most of a second; two hundred are a thorough check

VERSIONED = '''
"""An echo that tells on any key which version of everything it runs."""

from pathlib import Path

from dialog_worker import Agent, Dtmf, Media, Message, VoIP

VERSION = "{version}"


class Versioned(Agent):
    """Says back what it hears."""

    def on_media(self, media: Media) -> None:
        self.voip.post(Message("echo", media.payload))

    async def on_dtmf(self, dtmf: Dtmf) -> None:
        import menu

        beside = Path(__file__).with_name("dish.txt").read_text()
        relative = Path("dish.txt").read_text()
        self.voip.trace("version", VERSION, {{"module": menu.VERSION, "beside": beside, "relative": relative}})


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    return Versioned(voip=voip)
'''


def write_version(directory: Path, version: str) -> Path:
    """Write an agent that is of one version throughout: its code, a module that it imports late, and a data file."""
    write_agent(directory, VERSIONED.format(version=version))
    (directory / "menu.py").write_text(f'VERSION = "{version}"\n')
    (directory / "dish.txt").write_text(version)
    return directory


@dataclass
class Desk:
    """A dialogd, the agent that its author works on, and where its snapshots are."""

    dialogd: Dialogd
    agent: Path
    shelf: Path

    @classmethod
    def open(cls, start: StartDialogd, directory: Path, place: str = "TMPDIR", **settings: Any) -> Self:
        """Start a dialogd with version "one", and its snapshots where the variable `place` says."""
        (shelf := directory / "shelf").mkdir()
        agent = write_version(directory / "agent", "one")
        return cls(start(agent=agent, environ={place: str(shelf)}, **settings), agent, shelf)

    async def reload(self, version: str) -> dict[str, Any]:
        """Write a version and have it serve."""
        write_version(self.agent, version)
        found: dict[str, Any] = await self.dialogd.ask("/reload", "POST")
        return found

    async def refusal(self) -> str:
        """Return why the code as it is now will not serve."""
        with pytest.raises(httpx.HTTPStatusError) as caught:
            await self.dialogd.ask("/reload", "POST")
        assert caught.value.response.status_code == 409
        return str(caught.value.response.json()["error"])

    async def next_version(self, twilio: Twilio) -> str:
        """Return the version that a new call gets."""
        async with twilio.streaming() as call:
            return await self.version_of(call)

    async def version_of(self, call: PhoneCall) -> str:
        """Return the version of everything that a call runs."""
        await call.press("1")
        step = await self.dialogd.step(call.sid, kind="version")
        assert set(step["fields"].values()) == {step["text"]}
        return str(step["text"])

    async def states(self) -> list[str]:
        """Return the generations' states, the oldest first."""
        return [one["state"] for one in await self.dialogd.ask("/generations")]

    def size(self) -> dict[str, int]:
        """Return how much there is of what might be left behind."""
        return {
            "descriptors": self.dialogd.descriptors(),
            "processes": len(self.dialogd.processes()),
            "children": len(self.dialogd.children()),
            "snapshots": len(list(self.shelf.glob("*/*"))),
        }

    async def settled(self) -> None:
        """Wait until the connections to the control socket are closed: dialogd notices two seconds late that one is."""
        socket = str(self.dialogd.directory / "control.sock")
        with trio.fail_after(PATIENCE_S):
            while Path("/proc/net/unix").read_text().count(socket) > 1:  # noqa: ASYNC110, ASYNC240 - the listener alone
                await trio.sleep(0.05)


@pytest.fixture(scope="module")
def desk(start_shared_dialogd: StartDialogd, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A desk for the tests of code that changes: each begins with whatever the one before it left."""
    desk = Desk.open(start_shared_dialogd, tmp_path_factory.mktemp("desk"))
    desk.dialogd.expects_traceback = True  # where many reloads fail in between
    return desk


@pytest.fixture(scope="module")
def shared(start_shared_dialogd: StartDialogd, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A desk for the tests of code that is refused: version "one" serves throughout."""
    desk = Desk.open(start_shared_dialogd, tmp_path_factory.mktemp("shared-desk"), calls={"shutdown_grace": 0.3})
    desk.dialogd.expects_traceback = True  # the authors' own
    return desk


# Calls under way, and the next


async def test_a_call_under_way_keeps_its_code_and_data_and_the_next_gets_the_new(desk: Desk) -> None:
    async with Twilio(desk.dialogd) as twilio, twilio.streaming() as call:
        old = await desk.version_of(call)
        await desk.reload("two")
        assert await desk.version_of(call) == old == "one"
        assert await desk.next_version(twilio) == "two"
        assert await desk.states() == ["retiring", "current"]


async def test_the_same_content_loaded_again_is_another_generation_of_the_same_hash(desk: Desk) -> None:
    before = (await desk.dialogd.ask("/status"))["generation"]
    async with Twilio(desk.dialogd) as twilio, twilio.streaming() as call:
        swap = await desk.dialogd.ask("/reload", "POST")
        assert (await desk.dialogd.ask(f"/calls/{call.sid}"))["generation"] == before
        assert (await desk.dialogd.ask("/status"))["generation"] == swap["generation"]
    assert before.partition(".")[0] == swap["generation"].partition(".")[0] == swap["hash"]
    assert before == swap["previous"] != swap["generation"]


async def test_a_retired_template_ends_with_its_last_call(desk: Desk) -> None:
    async with Twilio(desk.dialogd) as twilio:
        async with twilio.streaming() as call:
            await desk.reload("three")
            assert desk.size()["processes"] == 4  # dialogd, two templates, one worker
        await desk.dialogd.ended(call.sid)
        with trio.fail_after(PATIENCE_S):
            while desk.size()["processes"] > 2:  # noqa: ASYNC110 - another process's children
                await trio.sleep(0.02)
        assert await desk.states() == ["previous", "current"]


async def test_reloads_at_once_are_done_one_after_another(desk: Desk) -> None:
    swaps = []

    async def swap() -> None:
        swaps.append(await desk.dialogd.ask("/reload", "POST"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(swap)
        nursery.start_soon(swap)
    first, second = swaps
    assert second["previous"] == first["generation"]


async def test_sighup_reloads(desk: Desk) -> None:
    before = (await desk.dialogd.ask("/status"))["generation"]
    write_version(desk.agent, "four")
    desk.dialogd.signal(signal.SIGHUP)
    with trio.fail_after(PATIENCE_S):
        while (await desk.dialogd.ask("/status"))["generation"] == before:  # noqa: ASYNC110 - another process's doing
            await trio.sleep(0.02)
    async with Twilio(desk.dialogd) as twilio:
        assert await desk.next_version(twilio) == "four"


async def test_a_sighup_that_fails_is_logged_and_changes_nothing(shared: Desk) -> None:
    write_agent(shared.agent, "import no_such_module_for_sighup\n")
    shared.dialogd.signal(signal.SIGHUP)
    with trio.fail_after(PATIENCE_S):
        while "no_such_module_for_sighup" not in shared.dialogd.text:  # noqa: ASYNC110 - another process's log
            await trio.sleep(0.02)
    async with Twilio(shared.dialogd) as twilio:
        assert await shared.next_version(twilio) == "one"


# Rollback


async def test_a_rollback_brings_the_code_before_and_another_undoes_it(desk: Desk) -> None:
    await desk.reload("five")
    async with Twilio(desk.dialogd) as twilio:
        async with twilio.streaming():
            swap = await desk.reload("six")
            assert (await desk.dialogd.ask("/rollback", "POST"))["generation"] == swap["previous"]  # which still has a call
            assert await desk.next_version(twilio) == "five"
            assert await desk.states() == ["current", "previous"]
        assert (await desk.dialogd.ask("/rollback", "POST"))["generation"] == swap["generation"]  # which had ended
        assert await desk.next_version(twilio) == "six"


async def test_without_a_generation_before_a_rollback_is_refused(shared: Desk) -> None:
    done = await shared.dialogd.ctl("rollback")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no generation has served before it" in done.stderr


async def test_dialogctl_reloads_and_lists_generations(desk: Desk) -> None:
    swap = json.loads((await desk.dialogd.ctl("reload", "--json")).stdout)
    assert swap.keys() == {"generation", "hash", "previous", "seconds", "canary", "ended"}
    assert (swap["canary"], swap["ended"]) == (None, None)
    done = await desk.dialogd.ctl("reload")
    assert done.returncode == 0
    assert f"serves the next calls, after {swap['generation']}; " in done.stdout
    listed = (await desk.dialogd.ctl("generations")).stdout.splitlines()
    assert [line.split()[1] for line in listed] == ["previous", "current"]
    assert listed[0].startswith(swap["generation"])
    assert "  0 calls  " in listed[0]
    assert listed[0].endswith("  (rollback returns to it)")


# Code that is not let near a caller


HANDLER = """
from dialog_worker import Agent

class Broken(Agent):
    async def on_streaming_started(self, started):
        raise ValueError("in a handler")

def create(voip):
    return Broken(voip=voip)
"""
LEAVES = """
from dialog_worker import Agent

class Hasty(Agent):
    async def run(self):
        pass

def create(voip):
    return Hasty(voip=voip)
"""
STAYS = """
import trio
from dialog_worker import Agent

class Stubborn(Agent):
    async def run(self):
        await trio.sleep_forever()

def create(voip):
    return Stubborn(voip=voip)
"""
BROKEN = {
    "is a syntax error": ("def create(voip)\n    pass\n", 'agent/agent.py", line 1'),
    "cannot be imported": ("import no_such_module\n", "No module named 'no_such_module'"),
    "starts no agent": ("def create(voip):\n    raise ValueError('in create')\n", "ValueError: in create"),
    "fails in a handler": (HANDLER, "ValueError: in a handler"),
    "kills its worker": ("import os\ndef create(voip):\n    os._exit(7)\n", "its worker ended with exit code 7"),
    "leaves its caller": (LEAVES, "the agent left at once, without hangup(), transfer_to() or dispose()"),
    "does not leave": (STAYS, "had not left 0.3 s after its end (calls.shutdown_grace)"),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
async def test_code_that_fails_is_refused_and_the_old_serves_on(shared: Desk, source: str, reason: str) -> None:
    write_agent(shared.agent, source)
    refusal = await shared.refusal()
    assert refusal.startswith("the reload failed, and generation ")
    assert reason in refusal
    assert str(shared.shelf) not in refusal
    assert await shared.states() == ["current"]
    async with Twilio(shared.dialogd) as twilio:
        assert await shared.next_version(twilio) == "one"


async def test_dialogctl_reload_prints_the_authors_traceback_and_exits_1(shared: Desk) -> None:
    write_agent(shared.agent, "def boom():\n    raise ValueError('my mistake')\n\nboom()\n")
    done = await shared.dialogd.ctl("reload")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dialogctl: the reload failed, and generation ")
    assert f'File "{shared.agent}/agent.py", line 2, in boom' in done.stderr
    assert done.stderr.rstrip().endswith("ValueError: my mistake")


async def test_a_directory_that_is_gone_is_refused_by_name(shared: Desk) -> None:
    away = shared.agent.rename(shared.agent.with_name("away"))
    refusal = await shared.refusal()
    away.rename(shared.agent)
    assert f"agent.path: {shared.agent} cannot be copied: No such file or directory" in refusal


# The probe call


ENDS = """
from dialog_worker import Agent

class Polite(Agent):
    async def on_metadata(self, metadata):
        assert metadata.call_id.startswith("probe-"), metadata
        assert metadata.fields["From"] == metadata.caller

    async def on_streaming_started(self, started):
        await self.voip.transfer_to("+881234567890")
        await self.voip.hangup(after_playout=False)

def create(voip):
    return Polite(voip=voip)
"""


async def test_a_probes_requests_are_granted_without_a_carrier(desk: Desk) -> None:
    write_agent(desk.agent, ENDS)
    await desk.dialogd.ask("/reload", "POST")
    assert desk.dialogd.find(event="request failed") == []


# At length, and at the end


async def test_many_reloads_with_a_call_under_way_leave_nothing_behind(desk: Desk) -> None:
    await desk.reload("seven")  # from now on there is a previous one
    await desk.settled()
    before = desk.size()
    async with Twilio(desk.dialogd) as twilio:
        async with twilio.streaming() as call:
            for number in range(MANY):
                if number % 2:
                    write_agent(desk.agent, HANDLER)
                    await desk.refusal()
                else:
                    await desk.reload("eight")
                await call.echo()
            assert await desk.version_of(call) == "seven"
            assert await desk.states() == ["retiring", *(["previous"] * (MANY > 2)), "current"]
        await desk.dialogd.ended(call.sid)
    await desk.settled()
    assert desk.size() == before


async def test_a_dialogd_that_stops_reloads_no_more_and_leaves_no_directory(
    start_dialogd: StartDialogd, tmp_path: Path
) -> None:
    (directory := tmp_path / "desk").mkdir()
    desk = Desk.open(start_dialogd, directory, "RUNTIME_DIRECTORY", calls={"ending_timeout": 60})
    async with Twilio(desk.dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        async with call.stream():
            await call.echo()
            assert len([*desk.shelf.glob("generations/*/*/agent.py")]) == 1
            desk.dialogd.signal(signal.SIGTERM)
            await desk.dialogd.logged(event="stopping")
            assert await desk.refusal() == "dialogd is stopping, and does not reload any more"
            desk.dialogd.signal(signal.SIGTERM)
            assert await desk.dialogd.exited() == 0
    assert [*desk.shelf.rglob("*")] == [desk.shelf / "generations"]
