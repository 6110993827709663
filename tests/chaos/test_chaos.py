"""The faults that matter most, once each, with real calls that talk; `scripts/chaos` plays them all, ten times each."""

import signal

import pytest
import trio

from tests.chaos.batch import Row, play
from tests.chaos.caller import Voices
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.rehearsal import MAX_CONTEXTS, synthesised
from tests.chaos.strikes import at_a_moment, cut, one_each, send
from tests.conftest import local_providers

ONE = Fault(
    "a fault of its own for each of three calls",
    one_each(
        at_a_moment(send(signal.SIGSTOP), "agent", 2, after_s=0.8),
        at_a_moment(cut, "agent", 2, after_s=0.8),
        at_a_moment(send(signal.SIGSEGV), "caller", 1, after_s=0.4),
    ),
    "own",
    may_log=tuple(
        {line for fault in FAULTS if fault.name in ("SIGSTOP", "SIGSEGV", "carrier socket cut") for line in fault.may_log}
    ),
)
PLAYED = (ONE, *(fault for fault in FAULTS if fault.name in ("template killed", "supervisor SIGKILL")))
CALLS = {"own": 3, "next": 1, "dialogd": 2}  # by scope
APART_S = 3.0  # so that not all speak at once


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """The rows, played side by side on a dialogd each."""
    found: dict[str, Row] = {}

    async def one(fault: Fault, server: str, voices: Voices) -> None:
        directory = tmp_path_factory.mktemp("chaos")
        found[fault.name] = await play(fault, directory, server, voices, struck=1, calls=CALLS[fault.scope])

    async def all_of_them(server: str) -> None:
        voices = await synthesised(server)
        async with trio.open_nursery() as nursery:
            for fault in PLAYED:
                nursery.start_soon(one, fault, server, voices)
                await trio.sleep(APART_S)

    with local_providers("--max-contexts", str(MAX_CONTEXTS)) as server:
        trio.run(all_of_them, server)
    return found


@pytest.mark.parametrize("name", [fault.name for fault in PLAYED])
def test_conversations_go_on_others_notice_nothing_and_nothing_is_left(rows: dict[str, Row], name: str) -> None:
    row = rows[name]
    assert (row.complaints, row.leftovers) == ((), ())
