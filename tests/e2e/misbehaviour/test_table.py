"""Each misbehaviour of each provider in mid-call: no word is lost or the agent is told, and nobody sits in silence."""

from collections.abc import Callable

import pytest

from tests.conftest import StartDialogd, local_providers
from tests.e2e.misbehaviour.calls import AT_ONCE, Row, place_all
from tests.e2e.misbehaviour.cases import CASES, Case, in_turns

LONGEST_SILENCE_S = 5.0


@pytest.fixture(scope="module")
def rows(start_shared_dialogd: StartDialogd) -> dict[Case, Row]:
    with local_providers("--max-contexts", str(AT_ONCE)) as server:
        return place_all(server, start_shared_dialogd, in_turns())


@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_a_misbehaving_provider(case: Case, rows: dict[Case, Row], record_property: Callable[[str, object], None]) -> None:
    row = rows[case]
    record_property("misbehaviour", row.cells())
    assert row.outcome == case.outcome, row.detail
    assert case.told in {code.rstrip("!") for code in row.told} | {""}, row.detail
    assert row.silence_s <= LONGEST_SILENCE_S, row.detail
    if case.outcome == "goes on":
        assert row.lost <= 1, row.detail
