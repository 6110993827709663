"""dialogd goes on as another version of itself: same process, same calls, and nobody at the other end of a line notices."""

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import AUTH_TOKEN, DIALOGCTL, Dialogd, write_agent, write_config
from tests.e2e.test_lifetime import run
from tests.e2e.test_reload import Desk
from tests.e2e.twilio_api import twilio_api
from tests.e2e.twilio_client import PhoneCall, Twilio, verbs


@asynccontextmanager
async def calls_under_way(dialogd: Dialogd, count: int) -> AsyncIterator[list[PhoneCall]]:
    """Have so many calls that stream, each with a worker that echoes."""
    async with Twilio(dialogd) as twilio, AsyncExitStack() as stack:
        calls = [await stack.enter_async_context(twilio.streaming()) for _ in range(count)]
        for call in calls:
            await call.echo()
        yield calls


async def upgraded(dialogd: Dialogd) -> dict[str, Any]:
    """Have dialogd go on as what is installed, and return what dialogctl says."""
    done = await dialogd.ctl("upgrade", "--json")
    assert done.returncode == 0, done.stderr + dialogd.text
    said: dict[str, Any] = json.loads(done.stdout)
    return said


async def worker(dialogd: Dialogd, call: PhoneCall) -> int:
    pid: int = (await dialogd.ask(f"/calls/{call.sid}"))["worker_pid"]
    return pid


async def test_calls_go_on_with_the_same_process_the_same_workers_and_the_same_sockets(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    async with calls_under_way(dialogd, 5) as calls:
        workers = [await worker(dialogd, call) for call in calls]
        before = await dialogd.ask("/status")
        said = await upgraded(dialogd)
        assert said["pid"] == dialogd.pid
        assert said["away_ms"] > 0
        for call in calls:
            await call.echo()
        assert [await worker(dialogd, call) for call in calls] == workers
        status = await dialogd.ask("/status")
        assert (status["calls"], status["workers"], status["upgrades"]) == (5, 5, 1)
        assert status["generation"] == before["generation"]
        assert status["uptime_s"] >= before["uptime_s"]


async def test_no_frame_is_lost_or_said_twice_while_it_changes(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    async with calls_under_way(dialogd, 2) as calls, trio.open_nursery() as nursery:
        heard: dict[str, list[bytes]] = {call.sid: [] for call in calls}
        said: dict[str, list[bytes]] = {call.sid: [] for call in calls}

        async def talk(call: PhoneCall) -> None:
            while True:
                frame = len(said[call.sid]).to_bytes(4, "big") * 40
                said[call.sid].append(frame)
                await call.say(frame)
                await trio.sleep(0.02)

        async def listen(call: PhoneCall) -> None:
            while True:
                heard[call.sid].append(await call.hear())

        with trio.CancelScope() as talking:
            async with trio.open_nursery() as talkers:
                for call in calls:
                    nursery.start_soon(listen, call)
                    talkers.start_soon(talk, call)
                for _ in range(2):
                    await upgraded(dialogd)
                talking.cancel()
        with trio.fail_after(5):
            while heard != said:  # noqa: ASYNC110 - another process
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert all(len(frames) > 50 for frames in said.values())


async def test_the_next_call_the_next_reload_and_the_end_are_as_ever(start_dialogd: StartDialogd, tmp_path: Path) -> None:
    desk = Desk.open(start_dialogd, tmp_path)
    async with Twilio(desk.dialogd) as twilio:
        async with twilio.streaming() as old:
            assert await desk.version_of(old) == "one"
            await upgraded(desk.dialogd)
            assert await desk.next_version(twilio) == "one"
            await desk.reload("two")
            assert await desk.next_version(twilio) == "two"
            await upgraded(desk.dialogd)
            assert await desk.version_of(old) == "one"
            assert await desk.next_version(twilio) == "two"
            await desk.dialogd.ask("/rollback", "POST")
            assert await desk.next_version(twilio) == "one"
        assert [one["calls"] for one in await desk.dialogd.ask("/generations")] == [0, 0]


async def test_a_canary_stays_on_trial_and_takes_its_share(start_dialogd: StartDialogd, tmp_path: Path) -> None:
    desk = Desk.open(start_dialogd, tmp_path, agent_keys={"canary": 50, "canary_calls": 100})
    async with Twilio(desk.dialogd) as twilio:
        await desk.reload("two")
        assert await desk.next_version(twilio) == "one"
        await upgraded(desk.dialogd)
        assert [await desk.next_version(twilio) for _ in range(3)] == ["two", "one", "two"]
        assert await desk.states() == ["current", "canary"]
        await desk.dialogd.ask("/promote", "POST")
        assert await desk.next_version(twilio) == "two"


async def test_a_worker_that_dies_after_it_is_followed_by_another_with_its_cause(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    async with calls_under_way(dialogd, 1) as [call]:
        await upgraded(dialogd)
        await call.press("3")
        died = await dialogd.logged(event="worker died in mid-call, and another takes over", call=call.sid)
        assert died["exit_code"] == 7
        await call.echo()


async def test_a_call_whose_socket_is_yet_to_be_opened_is_not_forgotten(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    async with Twilio(dialogd) as twilio:
        call = PhoneCall(twilio)
        await call.ring()
        await dialogd.step(call.sid, kind="worker")
        await upgraded(dialogd)
        async with call.stream():
            await call.echo()
        assert verbs(await call.after()) == ["Connect"]
        async with call.stream():
            await call.say(last := b"the last".ljust(160))
            while await call.hear() != last:  # what was not heard on the stream before comes first
                pass
            await call.stop()


async def test_a_hangup_that_waits_for_the_caller_to_have_heard_all_is_done_afterwards(start_dialogd: StartDialogd) -> None:
    with twilio_api() as api:
        dialogd = start_dialogd(twilio={"api_url": api.url})
        async with calls_under_way(dialogd, 1) as [call]:
            await call.say(bytes(24_000))  # 3 s that come back, and have to be heard: longer than an upgrade takes
            await call.press("5")
            await call.hear()
            while "goodbye" not in call.marks:
                message = await call.receive()
                if message["event"] == "mark":
                    call.marks.append(message["mark"]["name"])
            await upgraded(dialogd)
            await call.return_mark("goodbye")
            await dialogd.logged(event="call ended", call=call.sid, reason="the agent hung up")
            assert len(api.asked) == 1


def size(dialogd: Dialogd) -> tuple[int, int]:
    """Return how many descriptors and processes there are."""
    return dialogd.descriptors(), len(dialogd.processes())


async def test_a_call_that_is_ending_comes_to_its_end(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"ending_timeout": 5, "shutdown_grace": 5})
    async with Twilio(dialogd) as twilio:
        async with twilio.streaming() as call:
            await call.press("4")  # its worker does not leave
            await dialogd.step(call.sid, kind="stubborn")
            await call.stop()
            await call.closed()
        await upgraded(dialogd)
        assert (await dialogd.ended(call.sid))["reason"] == "the carrier stopped the stream"
        assert (await dialogd.ask("/status"))["workers"] == 0


async def test_upgrades_leave_nothing_behind(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    await upgraded(dialogd)
    before = size(dialogd)
    for _ in range(3):
        async with calls_under_way(dialogd, 2):
            await upgraded(dialogd)
    with trio.fail_after(15):
        while size(dialogd) > before:  # noqa: ASYNC110 - another process, which is asked over a connection for a while
            await trio.sleep(0.1)


# Refused, with nothing changed


async def test_a_configuration_that_cannot_be_used_is_refused_with_its_reason(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    good = dialogd.config.read_text()
    async with calls_under_way(dialogd, 1) as [call]:
        dialogd.config.write_text(good.replace("[calls]", "[calls]\nmax_cals = 5"))
        response = await dialogd.post("/upgrade")
        assert response.status_code == 409
        assert "calls.max_cals is not a known key; did you mean 'max_calls'?" in response.json()["error"]
        dialogd.config.write_text(good)
        await call.echo()
        assert (await dialogd.ask("/status"))["upgrades"] == 0


async def test_what_the_configuration_says_now_counts_from_then_on(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    async with calls_under_way(dialogd, 1) as [call]:
        dialogd.config.write_text(dialogd.config.read_text().replace("[calls]", "[calls]\nmax_calls = 1"))
        await upgraded(dialogd)
        await call.echo()
        async with Twilio(dialogd) as twilio:
            assert verbs(await PhoneCall(twilio).ring()) == ["Say", "Hangup"]


async def test_a_request_that_the_carrier_has_not_answered_is_waited_for(start_dialogd: StartDialogd) -> None:
    with twilio_api() as api:
        api.speaks.clear()
        dialogd = start_dialogd(twilio={"api_url": api.url})
        async with calls_under_way(dialogd, 2) as [call, other]:
            await call.press("6")
            with trio.fail_after(5):
                while not api.asked:  # noqa: ASYNC110 - another thread
                    await trio.sleep(0.01)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(upgraded, dialogd)
                await trio.sleep(1)  # and nothing happens
                assert (await dialogd.ask("/status"))["upgrades"] == 0
                await other.echo()
                api.speaks.set()
            await other.echo()
            await dialogd.logged(event="call ended", call=call.sid, reason="the agent hung up")
        assert len(api.asked) == 1


async def test_a_signal_that_comes_in_between_is_heeded_afterwards(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd(calls={"drain_timeout": 0.1})
    async with calls_under_way(dialogd, 1):
        response = await dialogd.post("/upgrade")
        assert response.status_code == 200
        await dialogd.logged(event="dialogd is executed anew")
        dialogd.signal(signal.SIGTERM)
        await dialogd.logged(event="stopping", signal="SIGTERM")


@pytest.mark.parametrize("option", ["--handover", "--check-handover"])
def test_a_state_that_is_none_is_told_in_one_sentence(tmp_path: Path, option: str) -> None:
    config = write_config(tmp_path, write_agent(tmp_path / "agent", "def create(voip): ...\n"))
    said = run(config, option, "99")
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith("dialogd: the state of the calls cannot be read by this version of dialogd: ")
    assert said.stderr.count("\n") == 1


async def test_whoever_follows_a_call_on_the_command_line_goes_on_following(start_dialogd: StartDialogd) -> None:
    dialogd = start_dialogd()
    async with calls_under_way(dialogd, 1) as [call]:
        command = [str(DIALOGCTL), "-c", str(dialogd.config), "call", call.sid, "--follow"]
        environ = os.environ | {"TWILIO_AUTH_TOKEN": AUTH_TOKEN}
        following = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, env=environ)
        assert following.stdout is not None
        with trio.fail_after(PATIENCE_S):
            said = b""
            while b"streaming" not in said:
                said += await following.stdout.receive_some()
            await upgraded(dialogd)
            said = b""
            while said.count(b"streaming") < 2:
                said += await following.stdout.receive_some()
        following.kill()
        await following.wait()
        await following.stdout.aclose()


async def test_a_call_that_there_is_not_is_not_followed(start_dialogd: StartDialogd) -> None:
    done = await start_dialogd().ctl("call", "CA1", "--follow")
    assert (done.returncode, done.stderr) == (1, "dialogctl: there is no call CA1; see dialogctl calls\n")
