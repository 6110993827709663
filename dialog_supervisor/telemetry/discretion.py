"""What of a call may be kept, or shown, where what is said may not: who spoke when, what was done, no words or numbers."""

from collections.abc import Mapping
from typing import Any

from dialog_supervisor.logs import mask
from dialog_supervisor.steps import OWN_STEPS

HIDDEN = "…"
_HARMLESS = {  # fields of messages and steps, by whatever message
    *("carrier", "stream_id", "encoding", "uuid", "track", "language", "engine", "model", "behavior", "channels"),
    *("status", "sid", "kind", "code", "reason", "message", "name", "interrupted", "participant", "call_id", "url", "path"),
}
_NUMBERS = {"caller", "callee", "destination"}


def discreet_step(kind: str, text: str, fields: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return a step's text and fields without what was said."""
    if kind in OWN_STEPS:
        return mask(text), {name: mask(value) for name, value in fields.items()}
    return HIDDEN * bool(text), discreet(fields)


def discreet(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message's fields without what was said, keys that were pressed, and numbers."""
    return {name: _discreet(name, value) for name, value in fields.items()}


def _discreet(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return discreet(value)
    if not isinstance(value, str) or not value:
        return value
    return mask(value) if name in _HARMLESS or name in _NUMBERS else HIDDEN
