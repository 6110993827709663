"""Options that several benches have."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import cyclopts
from cyclopts import Parameter

from scripts.benches.stage import BenchFailed

Results = TypeVar("Results")


def _numbers(_type: object, tokens: Sequence[cyclopts.Token]) -> tuple[int, ...]:
    return tuple(sorted({int(number) for token in tokens for number in token.value.split(",")}))


Numbers = Annotated[tuple[int, ...], Parameter(converter=_numbers, n_tokens=1, negative=())]
"""Numbers of calls, as in 10,40; each once, in order."""


def complaint(calls: Sequence[int], seconds: float, rounds: int) -> str:
    """Return what is wrong with these options, "" for nothing."""
    if min(calls) < 1 or seconds <= 0 or rounds < 1:
        return f"--calls {','.join(map(str, calls))} --seconds {seconds:g} --rounds {rounds}: must be positive"
    return ""


def measured(wrong: str, measure: Callable[[], Results]) -> Results:
    """Return what was measured, or leave with the reason: 2 for options that are `wrong`, 1 for a bench that failed."""
    if wrong:
        print(f"bench: {wrong}", file=sys.stderr)
        raise SystemExit(2)
    try:
        return measure()
    except BenchFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
