"""Any message of the pipe's vocabulary, for Hypothesis: built from the fields' types, so that a new message is included."""

import types
import typing
from typing import Annotated, Any, Literal, Union

import msgspec
from hypothesis import strategies as st
from msgspec import Struct

from protocol.messages import Command, Event

_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    bytes: st.binary(max_size=64),
    float: st.floats(allow_nan=False),
    int: st.integers(-(2**63), 2**64 - 1),
    str: st.text(max_size=32),
    type(None): st.none(),
}


def kinds(union: Any) -> tuple[type[Struct], ...]:
    """Return the messages of a union."""
    return typing.get_args(union)


def any_of(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for values of a field's type, or for messages of a kind."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind]
    if origin is Annotated:  # with a limit that is wider than what is drawn here
        return any_of(arguments[0])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is dict:
        return st.dictionaries(any_of(arguments[0]), any_of(arguments[1]), max_size=4)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(any_of, arguments))
    fields = msgspec.structs.fields(kind)  # also of a generic such as Message[bytes]
    return st.builds(origin or kind, *(any_of(field.type) for field in fields))


events = any_of(Event)
commands = any_of(Command)
