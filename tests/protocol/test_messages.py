"""The vocabulary of the pipe: what is said arrives as it was said, and says the same to a newer or older reader."""

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given

from protocol.framing import FrameDecoder, encode
from protocol.messages import Command, Event, Failure, Message, Post, Reply, Request
from tests.protocol.strategies import any_of, commands, events, kinds

ALL_KINDS = [*kinds(Event), *kinds(Command)]


def round_trip(message: msgspec.Struct, union: Any) -> Any:
    decoder: FrameDecoder[Any] = FrameDecoder(union)
    [received] = decoder.feed(bytes(encode(message)))
    return received


@given(events)
def test_every_event_arrives_as_it_was_sent(event: msgspec.Struct) -> None:
    received = round_trip(event, Event)
    assert received == event
    assert type(received) is type(event)


@given(commands)
def test_every_command_arrives_as_it_was_sent(command: msgspec.Struct) -> None:
    received = round_trip(command, Command)
    assert received == command
    assert type(received) is type(command)


def test_a_post_carries_its_audio_as_bytes() -> None:
    message = Post(Message("u", bytes(range(256)), done=True))
    assert round_trip(message, Command) == message


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.__name__)
def test_every_message_is_frozen_and_tagged_by_its_name(kind: type[msgspec.Struct]) -> None:
    config = kind.__struct_config__
    assert config.frozen
    assert config.array_like
    assert config.tag == kind.__name__


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.__name__)
def test_no_field_is_a_sequence_or_anything_at_all(kind: type[msgspec.Struct]) -> None:
    """Because a decoder that believes an announced length can be made to allocate gigabytes."""
    assert list(_announced_lengths(kind)) == []


def _announced_lengths(kind: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            yield from _announced_lengths(field.type)
    elif kind is Any or kind in (list, tuple, set, frozenset):
        yield kind
    else:
        for part in get_args(kind):
            if not isinstance(part, str):
                yield from _announced_lengths(part)


@given(events)
def test_a_field_that_a_newer_side_added_at_the_end_is_ignored(event: msgspec.Struct) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(event))
    longer = msgspec.msgpack.encode([*fields, {"new": [1, None, "x"]}])
    assert msgspec.msgpack.decode(longer, type=Event) == event


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.__name__)
def test_fields_with_a_default_come_last_so_that_an_older_side_may_leave_them_out(kind: type[msgspec.Struct]) -> None:
    required = [field.required for field in msgspec.structs.fields(kind)]
    assert required == sorted(required, reverse=True)


def test_a_reply_of_an_older_side_has_no_value() -> None:
    [reply] = FrameDecoder[Reply](Event).feed(_frame(msgspec.msgpack.encode(["Reply", 7, None])))
    assert reply == Reply(7, None, "")


@given(any_of(Failure))
def test_a_failure_keeps_the_carriers_code_and_status(failure: Failure) -> None:
    assert round_trip(Reply(1, failure), Event).failure == failure


def test_every_request_begins_with_its_id_and_deadline() -> None:
    requests = [kind for kind in kinds(Command) if issubclass(kind, Request)]
    assert len(requests) == 11
    assert all(kind.__struct_fields__[:2] == ("id", "timeout_s") for kind in requests)


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body
