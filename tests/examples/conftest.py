"""What the examples' tests share."""

import pytest

from dialog_worker import testing


@pytest.fixture
def quick_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scripted voice that nobody waits for long."""
    monkeypatch.setattr(testing, "CHARACTER_S", 0.001)
