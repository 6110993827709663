"""The faults, and how they are written: `close=1011,2,times=1` in a URL, the same fields as JSON in a control call."""

from typing import Annotated, Any, ClassVar, TypeAlias

import msgspec
from msgspec import Meta, Struct

LONGEST_S = 3600.0  # an hour outlasts every call that is made to be broken
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=LONGEST_S)]
Times: TypeAlias = Annotated[int, Meta(ge=1)]

_SYNTAX = "refuse[=STATUS], drop[=N], stall[=N], garbage[=N], close=CODE[,N], slow=N, each with or without ,times=K"
_NEVER_SENT = frozenset({1004, 1005, 1006, 1015})  # RFC 6455, 7.4.1: no frame carries them
_LONGEST_REASON = 123  # bytes; a control frame has 125, two of which are the code (RFC 6455, 5.5)


class Unreadable(Exception):
    """What asks for no fault that there is; the message says what there is."""


class Refuse(Struct, frozen=True, tag_field="what", tag="refuse", forbid_unknown_fields=True):
    """Answer with an HTTP status instead of serving."""

    values: ClassVar = ("status",)
    status: Annotated[int, Meta(ge=400, le=599)] = 503
    times: Times | None = None


class Drop(Struct, frozen=True, tag_field="what", tag="drop", forbid_unknown_fields=True):
    """Reset the connection."""

    values: ClassVar = ("after_s",)
    after_s: Seconds = 0.0
    times: Times | None = None


class Stall(Struct, frozen=True, tag_field="what", tag="stall", forbid_unknown_fields=True):
    """Send nothing any more."""

    values: ClassVar = ("after_s",)
    after_s: Seconds = 0.0
    times: Times | None = None


class Garbage(Struct, frozen=True, tag_field="what", tag="garbage", forbid_unknown_fields=True):
    """Send what cannot be read before every message."""

    values: ClassVar = ("after_s",)
    after_s: Seconds = 0.0
    times: Times | None = None


class Close(Struct, frozen=True, tag_field="what", tag="close", forbid_unknown_fields=True):
    """Close the WebSocket with a code; without a reason, the provider's own is given."""

    values: ClassVar = ("code", "after_s")
    code: Annotated[int, Meta(ge=1000, le=4999)]
    after_s: Seconds = 1.0
    reason: str | None = None
    times: Times | None = None

    def __post_init__(self) -> None:
        if self.code in _NEVER_SENT:
            raise ValueError(f"code {self.code} is never sent; use drop for a close without a frame")
        if len((self.reason or "").encode()) > _LONGEST_REASON:
            raise ValueError(f"the reason is over {_LONGEST_REASON} bytes; shorten it")


class Slow(Struct, frozen=True, tag_field="what", tag="slow", forbid_unknown_fields=True):
    """Wait before each answer."""

    values: ClassVar = ("delay_s",)
    delay_s: Seconds
    times: Times | None = None


Fault: TypeAlias = Refuse | Drop | Stall | Garbage | Close | Slow
_KINDS: tuple[type[Fault], ...] = (Refuse, Drop, Stall, Garbage, Close, Slow)
_VALUES: dict[str, tuple[str, ...]] = {str(kind.__struct_config__.tag): kind.values for kind in _KINDS}


def parse_spec(spec: str) -> Fault:
    """Read a URL's form. Raises `Unreadable`."""
    first, *rest = spec.split(",")
    what, equals, value = first.partition("=")
    given = [value, *rest] if equals else rest
    plain = [item for item in given if "=" not in item]
    names = _VALUES.get(what, ())
    if what in _VALUES and len(plain) > len(names):
        raise _unreadable(spec, f"{what} takes {' and '.join(names)}, and no value more")
    named = dict(item.split("=", 1) for item in given if "=" in item)
    return _fault(spec, {**named, "what": what, **dict(zip(names, plain, strict=False))}, strict=False)


def parse_fields(fields: dict[str, Any]) -> Fault:
    """Read a control call's form. Raises `Unreadable`."""
    return _fault(msgspec.json.encode(fields).decode(), fields, strict=True)


def _fault(written: str, fields: dict[str, Any], *, strict: bool) -> Fault:
    try:
        fault: Fault = msgspec.convert(fields, Fault, strict=strict)
    except msgspec.ValidationError as error:
        raise _unreadable(written, str(error)) from error
    return fault


def _unreadable(written: str, reason: str) -> Unreadable:
    return Unreadable(f"misbehaviour {written}: {reason}; expected {_SYNTAX}")
