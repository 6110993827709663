"""`dialogd --watch`: whoever saves a file is answered by it on the next call."""

from pathlib import Path

import pytest
import trio

from dialog_supervisor.autoreload import LOOK_EVERY_S
from tests.conftest import StartDialogd
from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import write_agent
from tests.e2e.test_reload import Desk, write_version
from tests.e2e.twilio_client import Twilio


@pytest.fixture(scope="module")
def desk(start_shared_dialogd: StartDialogd, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A desk whose dialogd watches the agent's directory."""
    desk = Desk.open(start_shared_dialogd, tmp_path_factory.mktemp("watched"), options=["--watch"])
    desk.dialogd.expects_traceback = True  # the author's
    return desk


async def loaded(desk: Desk, version: str) -> None:
    """Wait until new calls get a version."""
    async with Twilio(desk.dialogd) as twilio:
        with trio.fail_after(PATIENCE_S):
            while await desk.next_version(twilio) != version:  # noqa: ASYNC110 - another process's doing
                await trio.sleep(0.1)


async def test_what_is_saved_serves_the_next_call_and_calls_under_way_keep_theirs(desk: Desk) -> None:
    async with Twilio(desk.dialogd) as twilio, twilio.streaming() as call:
        before = await desk.version_of(call)
        write_version(desk.agent, "saved")
        await loaded(desk, "saved")
        assert before == "one"
        assert (await desk.dialogd.logged(event="the agent's directory has changed"))["files"]
        await call.echo()


async def test_code_that_fails_is_logged_and_the_old_serves_until_it_is_mended(desk: Desk) -> None:
    before = (await desk.dialogd.ask("/status"))["generation"]
    write_agent(desk.agent, "import no_such_module\n")
    failed = await desk.dialogd.logged(event="the reload failed; the old generation serves on")
    assert failed["generation"] == before
    assert "No module named 'no_such_module'" in failed["reason"]
    assert (await desk.dialogd.ask("/status"))["generation"] == before
    write_version(desk.agent, "mended")
    await loaded(desk, "mended")


async def test_a_directory_that_vanishes_for_a_moment_is_watched_on(desk: Desk, tmp_path: Path) -> None:
    away = desk.agent.rename(tmp_path / "away")
    write_version(tmp_path / "another", "checked out")
    await trio.sleep(2 * LOOK_EVERY_S)  # as a rule it is seen to be gone; the rest is to hold either way
    (tmp_path / "another").rename(desk.agent)
    await loaded(desk, "checked out")
    assert away.is_dir()
    write_version(desk.agent, "and edited")
    await loaded(desk, "and edited")
