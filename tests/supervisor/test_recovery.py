"""What a call's next worker is told, and that it is the same when another dialogd's memory begins where one ended."""

from collections.abc import Iterator

import msgspec
import pytest

from dialog_supervisor.recovery import CallState, Recovery
from protocol.messages import (
    Checkpoint,
    Dtmf,
    Event,
    Media,
    MessageDispatched,
    Metadata,
    Restored,
    StreamingStarted,
)

METADATA = Metadata("CA1", "twilio", "+14155550123", "+14155550199", {"AccountSid": "AC1"})
STARTED = StreamingStarted("MZ1")
FRAME = b"\x55" * 160
RESTARTS, WINDOW_S = 3, 60.0


def recovery(state: CallState | None = None, *, restarts: int = RESTARTS, now: float = 0.0) -> Recovery:
    made = Recovery(METADATA, restarts, WINDOW_S)
    if state is not None:
        made.take_up(state, now)
    return made


def through_bytes(state: CallState) -> CallState:
    return msgspec.json.decode(msgspec.json.encode(state), type=CallState)


@pytest.fixture
def experienced() -> Recovery:
    """The memory of a call in which a good deal has happened since its checkpoint."""
    made = recovery()
    made.told(STARTED)
    made.saved(Checkpoint(b"\x00state\xff"))
    made.told(MessageDispatched("u1", 800, 1200, interrupted=True))
    made.missed(Dtmf("5"))
    for number in range(20):
        made.heard(Media(20 * number, FRAME))
    assert made.may_restart(10.0)
    return made


def introductions(*memories: Recovery) -> Iterator[list[Event]]:
    for memory in memories:
        yield list(memory.introduction({"u2": 300}))


def test_a_state_with_the_audio_brings_a_worker_the_same_introduction(experienced: Recovery) -> None:
    copy = recovery(through_bytes(experienced.state(12.0, audio=True)), now=12.0)
    mine, other = introductions(experienced, copy)
    assert mine == other
    assert mine[:2] == [METADATA, Restored(b"\x00state\xff", {"u1": 800, "u2": 300})]
    assert sum(len(event.payload) for event in mine if isinstance(event, Media)) == 20 * len(FRAME)


def test_without_the_audio_it_brings_all_else(experienced: Recovery) -> None:
    copy = recovery(through_bytes(experienced.state(12.0, audio=False)))
    mine, other = introductions(experienced, copy)
    assert other == [event for event in mine if not isinstance(event, Media)]


def test_a_state_taken_up_and_taken_out_again_is_the_same(experienced: Recovery) -> None:
    state = experienced.state(12.0, audio=True)
    assert recovery(state, now=5000.0).state(5000.0, audio=True) == state


def test_a_call_without_a_stream_brings_no_stream() -> None:
    assert list(recovery(recovery().state(0.0, audio=True)).introduction({})) == [METADATA, Restored(b"")]


def test_deaths_count_in_another_process_whose_clock_is_another(experienced: Recovery) -> None:
    copy = recovery(experienced.state(12.0, audio=False), now=5000.0)
    assert [copy.may_resume(5000.0 + after) for after in (0.0, 1.0, 2.0)] == [True, True, False]


def test_old_deaths_count_no_more(experienced: Recovery) -> None:
    copy = recovery(experienced.state(12.0, audio=False), now=5000.0)
    assert [copy.may_resume(5000.0 + after) for after in (0.0, 1.0, 59.0)] == [True, True, True]


def test_where_no_worker_may_follow_none_follows_a_supervisor_either() -> None:
    assert not recovery(restarts=0).may_resume(0.0)


def test_a_state_that_a_worker_dies_of_is_left_out_the_second_time() -> None:
    memory = recovery()
    memory.saved(Checkpoint(b"state"))
    given = []
    for death in (0.0, 1.0):
        assert memory.may_restart(death)
        given.append(list(memory.introduction({}))[1])
    assert given == [Restored(b"state"), Restored(b"")]
    assert not memory.may_restart(2.0)


def test_a_supervisors_death_is_not_held_against_the_state_and_a_workers_after_it_is() -> None:
    memory = recovery()
    memory.saved(Checkpoint(b"state"))
    for death in (0.0, 1.0):
        assert memory.may_resume(death)
        assert list(memory.introduction({}))[1] == Restored(b"state")
    assert memory.may_restart(2.0)
    assert list(memory.introduction({}))[1] == Restored(b"")
