"""How the bench of turns pairs what left a provider with what came of it, and reads frames off a wire. Without I/O."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Opcode
from websockets.utils import apply_mask

from scripts.benches.turn_shares import Share, Shares, figure
from scripts.benches.turn_websocket import Frames, frame


def test_a_share_is_the_time_from_its_beginning_to_its_end() -> None:
    shares = Shares()
    shares.begin(Share.REQUEST, "a", 10.0)
    assert shares.end(Share.REQUEST, "a", 10.002)
    assert shares.taken[Share.REQUEST] == [pytest.approx(0.002)]
    assert shares.missing(Share.REQUEST) == 0


def test_what_had_not_begun_does_not_end() -> None:
    shares = Shares()
    shares.begin(Share.REQUEST, "a", 10.0)
    assert not shares.end(Share.CLEAR, "a", 10.1)
    assert not shares.end(Share.REQUEST, "b", 10.1)
    assert shares.missing(Share.REQUEST) == 1


def test_what_began_twice_cannot_be_told_apart_and_counts_not() -> None:
    shares = Shares()
    shares.begin(Share.AUDIO, b"silence", 10.0)
    shares.begin(Share.AUDIO, b"silence", 10.1)
    assert not shares.end(Share.AUDIO, b"silence", 10.2)
    assert shares.taken[Share.AUDIO] == []
    shares.begin(Share.AUDIO, b"silence", 11.0)
    assert shares.end(Share.AUDIO, b"silence", 11.1)


def test_what_an_interruption_threw_away_is_not_missing() -> None:
    shares = Shares()
    shares.begin(Share.AUDIO, b"a", 10.0)
    shares.forget(Share.AUDIO, b"a")
    assert shares.missing(Share.AUDIO) == 0


def test_percentiles_are_measured_values() -> None:
    found = figure([number / 1000 for number in range(1, 101)])
    assert (found.count, found.p50, found.p95, found.p99, found.worst) == (100, 50.0, 95.0, 99.0, 100.0)
    assert math.isnan(figure([]).p99)


@given(st.lists(st.binary(max_size=70_000), max_size=4), st.integers(1, 4096))
def test_frames_are_read_however_they_are_split(payloads: list[bytes], size: int) -> None:
    wire = b"".join(frame(payload, Opcode.BINARY) for payload in payloads)
    frames = Frames()
    read = [one for at in range(0, len(wire), size) for one in frames.receive(wire[at : at + size])]
    assert read == [(Opcode.BINARY, payload) for payload in payloads]


def test_a_clients_frame_is_unmasked() -> None:
    mask = b"\x01\x02\x03\x04"
    wire = bytes([0x80 | Opcode.TEXT, 0x80 | 5]) + mask + apply_mask(b"hello", mask)
    assert list(Frames().receive(wire)) == [(Opcode.TEXT, b"hello")]
