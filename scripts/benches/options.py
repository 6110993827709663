"""Options that several benches have."""

from collections.abc import Sequence
from typing import Annotated

import cyclopts
from cyclopts import Parameter


def _numbers(_type: object, tokens: Sequence[cyclopts.Token]) -> tuple[int, ...]:
    return tuple(sorted({int(number) for token in tokens for number in token.value.split(",")}))


Numbers = Annotated[tuple[int, ...], Parameter(converter=_numbers, n_tokens=1, negative=())]
"""Numbers of calls, as in 10,40; each once, in order."""


def complaint(calls: Sequence[int], seconds: float, rounds: int) -> str:
    """Return what is wrong with these options, "" for nothing."""
    if min(calls) < 1 or seconds <= 0 or rounds < 1:
        return f"--calls {','.join(map(str, calls))} --seconds {seconds:g} --rounds {rounds}: must be positive"
    return ""
