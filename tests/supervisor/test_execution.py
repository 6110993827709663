"""What one version of dialogd can read of another's state, how it is started, and how long it waits to be still."""

import os
import sys

import msgspec
import pytest
from trio.testing import MockClock

from dialog_supervisor.upgrade.execution import UpgradeFailed, command, read, still
from dialog_supervisor.upgrade.handover import VERSION, Handover
from protocol.messages import PROTOCOL_VERSION


def refusal(data: bytes) -> str:
    """Return why a state that is these bytes is not gone on with."""
    fd = os.memfd_create("state")
    try:
        os.write(fd, data)
        with pytest.raises(UpgradeFailed) as refused:
            read(fd)
    finally:
        os.close(fd)
    return str(refused.value)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"version": "one"})])
def test_what_is_no_state_is_refused(data: bytes) -> None:
    assert refusal(data).startswith("the state of the calls cannot be read by this version of dialogd: ")


def test_another_versions_state_is_refused_with_both_versions() -> None:
    said = refusal(msgspec.msgpack.encode({"version": VERSION + 1, "protocol": PROTOCOL_VERSION, "news": []}))
    assert said == (
        f"calls under way are in versions {VERSION + 1} (state) and {PROTOCOL_VERSION} (pipe), and this dialogd speaks "
        f"{VERSION} and {PROTOCOL_VERSION}; restart it instead: the calls are then resumed from the store"
    )


def test_a_state_with_what_this_version_does_not_know_is_refused() -> None:
    said = refusal(msgspec.msgpack.encode({"version": VERSION, "protocol": PROTOCOL_VERSION, "news": []}))
    assert "cannot be read by this version" in said


def test_the_next_version_is_started_as_this_one_was_but_for_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "dialogd", "--handover", "7", "-c", "dialog.toml"])
    assert command("--check-handover", 9) == [sys.executable, "dialogd", "-c", "dialog.toml", "--check-handover", "9"]


async def test_what_is_never_still_is_given_up_with_what_stands_in_the_way(autojump_clock: MockClock) -> None:
    def capture() -> Handover | str:
        return "2 calls begin"

    with pytest.raises(UpgradeFailed, match="after 15 s still 2 calls begin; try again"):
        await still(capture)
