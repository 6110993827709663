"""How the commands of this room end: an exit code, and on failure one sentence on stderr."""

import sys
from typing import Any


def complain(command: str, reason: str, code: int) -> int:
    """Say why a command ends with this exit code, and return it."""
    print(f"{command}: {reason}", file=sys.stderr)
    return code


def first_of(group: BaseExceptionGroup[Any]) -> BaseException:
    """Return one exception of a group of expected ones: they have the same cause."""
    found = group.exceptions[0]
    return first_of(found) if isinstance(found, BaseExceptionGroup) else found
