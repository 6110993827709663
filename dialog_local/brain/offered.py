"""The tools that a request offers, as a script can use them: found by their names' words, called as their schema says."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

_SYNONYMS = {
    "people": {"people", "persons", "guests", "party", "party_size", "seats"},
    "time": {"time", "at", "hour"},
    "day": {"day", "weekday"},
}
_WORD = re.compile(r"[A-Z]?[a-z]+")


class Tool(msgspec.Struct, frozen=True):
    """A function of the request's `tools`; `parameters` is its JSON schema."""

    name: str
    parameters: dict[str, Any] | None = None

    @property
    def words(self) -> set[str]:
        """What its name is made of, be it `hang_up` or `hangUp`."""
        return {word.lower() for word in _WORD.findall(self.name)}

    @property
    def properties(self) -> list[str]:
        """The names of its parameters."""
        return list((self.parameters or {}).get("properties", ()))

    def unknown(self, known: Mapping[str, Any]) -> list[str]:
        """Return the required parameters that cannot be given, each by what it means where that is understood."""
        required = [meaning(name) for name in (self.parameters or {}).get("required", ())]
        return [name for name in required if known.get(name) is None]

    def arguments(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is known of its parameters."""
        given = {name: known.get(meaning(name)) for name in self.properties}
        return {name: value for name, value in given.items() if value is not None}


def find(tools: Collection[Tool], kind: Collection[str]) -> Tool | None:
    """Return the first tool that has one of these words in its name."""
    return next((tool for tool in tools if not tool.words.isdisjoint(kind)), None)


def meaning(parameter: str) -> str:
    """Return what a parameter is understood to be, or its own name."""
    return next((meant for meant, names in _SYNONYMS.items() if parameter.lower() in names), parameter)
