"""Each misbehaviour of each provider in mid-call: no word is lost or the agent is told, and nobody sits in silence."""

from collections.abc import Callable

import msgspec
import pytest

from tests.conftest import StartDialogd, local_providers
from tests.e2e.misbehaviour.calls import AT_ONCE, Row, place_all
from tests.e2e.misbehaviour.cases import CASES, Case, in_turns

AGAIN_AT_ONCE = 2
AGAIN_LIMIT = 8  # rows; more that are wrong are no accident of a busy machine


@pytest.fixture(scope="module")
def rows(start_shared_dialogd: StartDialogd) -> dict[Case, Row]:
    """The table. A few rows that are wrong are called for once more, with less beside them, and say so."""
    with local_providers("--max-contexts", str(AT_ONCE)) as server:
        placed = place_all(server, start_shared_dialogd, in_turns(), AT_ONCE)
    wrong = [case for case in CASES if placed[case].wrong]
    if 0 < len(wrong) <= AGAIN_LIMIT:
        with local_providers("--max-contexts", str(AT_ONCE)) as server:
            again = place_all(server, start_shared_dialogd, wrong, AGAIN_AT_ONCE)
        placed |= {case: msgspec.structs.replace(row, call=2) for case, row in again.items()}
    return placed


@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_a_misbehaving_provider(case: Case, rows: dict[Case, Row], record_property: Callable[[str, object], None]) -> None:
    record_property("misbehaviour", rows[case].cells())
    assert rows[case].wrong == [], rows[case].detail
