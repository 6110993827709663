"""The list of those whom an agent may have its caller connected to."""

import pytest

from dialog_supervisor.transfer import is_allowed, is_pattern

LIST = ("+15551234567", "+4930*", "sip:desk@example.com", "sips:*@phones.example.com")


@pytest.mark.parametrize(
    "destination",
    ["+15551234567", "+4930123456", "sip:desk@example.com", "SIP:Desk@Example.com", "sips:anyone@phones.example.com"],
)
def test_what_the_list_covers_is_allowed(destination: str) -> None:
    assert is_allowed(destination, LIST)


@pytest.mark.parametrize(
    "destination",
    [
        "+15551234568",
        "+155512345670",
        "+4940123456",
        "15551234567",
        "+1555 123 4567",
        "",
        "*",
        "+4930*",
        "sip:other@example.com",
        "sip:anyone@phones.example.com",
        "sips:a@b@phones.example.com",
        "sips:anyone@phones.example.com.evil.example",
        "client:somebody",
        "+15551234567\n+881234567",
    ],
)
def test_everything_else_is_refused(destination: str) -> None:
    assert not is_allowed(destination, LIST)


@pytest.mark.parametrize("destination", ["+15551234567", "sip:desk@example.com"])
def test_an_empty_list_allows_nobody(destination: str) -> None:
    assert not is_allowed(destination, ())


@pytest.mark.parametrize("pattern", ["*", "+*", "1555*", "sip:*", "sip:*@*", "+1555*7", "desk@example.com"])
def test_a_pattern_that_would_allow_too_much_or_means_nothing_is_no_pattern(pattern: str) -> None:
    assert not is_pattern(pattern)
