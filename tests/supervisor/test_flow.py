"""How much a worker may say: a voice in advance at once, a chatterer more slowly, a flood not for long."""

import pytest

from dialog_supervisor.flow import FLOOD_S, MESSAGES_PER_S, REMIND_EVERY_S, Flood, Flow, Reminder


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def send(flow: Flow, clock: Clock, messages: int, per_s: float) -> float:
    """Send so many messages at a rate, waiting whenever told to; return how long was waited."""
    waited = 0.0
    for _ in range(messages):
        clock.now += 1 / per_s
        pause = flow.took()
        clock.now += pause
        waited += pause
    return waited


@pytest.mark.parametrize("per_s", [50, 500, MESSAGES_PER_S * 0.99])
def test_a_conversation_never_waits(per_s: float) -> None:
    clock = Clock()
    assert send(Flow(clock), clock, 10_000, per_s) == 0


def test_a_minute_of_audio_at_once_is_read_within_two_seconds() -> None:
    clock = Clock()
    assert send(Flow(clock), clock, 60 * 50, 1e6) < 2


def test_more_than_that_is_read_no_faster_than_it_may_be() -> None:
    clock = Clock()
    began_at = clock.now
    send(Flow(clock), clock, 4 * MESSAGES_PER_S, 1e6)
    assert clock.now - began_at == pytest.approx(4, abs=0.1)


def test_who_goes_on_like_that_is_a_flood() -> None:
    clock = Clock()
    began_at = clock.now
    flow = Flow(clock)
    with pytest.raises(Flood, match="it has sent 2000 messages a second, and more, for 5 s"):
        send(flow, clock, 20 * MESSAGES_PER_S, 1e6)
    assert clock.now - began_at == pytest.approx(FLOOD_S, abs=0.2)


def test_bursts_with_pauses_between_them_are_none() -> None:
    clock = Clock()
    flow = Flow(clock)
    for _ in range(20):
        send(flow, clock, 3 * MESSAGES_PER_S, 1e6)
        clock.now += 1
    send(flow, clock, 1, 1)


def test_what_happens_all_the_time_is_told_at_once_and_then_once_a_second() -> None:
    clock = Clock()
    reminder = Reminder(clock)
    told = []
    for _ in range(1000):
        told += [clock.now] if reminder.due() else []
        clock.now += REMIND_EVERY_S / 100
    assert told[0] == 100
    assert len(told) == pytest.approx(10, abs=1)
