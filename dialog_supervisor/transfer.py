"""Whom an agent may have its caller connected to. The list is the operator's, and empty it allows nobody.

A language model chooses destinations by what callers tell it; a number that costs by the minute is one sentence away.
"""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"\+[1-9]\d{6,14}")  # E.164
_SIP = re.compile(r"sips?:[\w.+~-]+@[\w.-]+(:\d{1,5})?", re.IGNORECASE)
_NUMBERS = re.compile(r"\+[1-9]\d{0,13}\*")
_SIP_DOMAIN = re.compile(r"sips?:\*@[\w.-]+(:\d{1,5})?", re.IGNORECASE)

PATTERN_FORMS = '"+15551234567", "+1555*", "sip:desk@example.com" or "sip:*@example.com"'


def is_pattern(text: str) -> bool:
    """Whether an entry of the list can be understood."""
    return any(form.fullmatch(text) for form in (_NUMBER, _NUMBERS, _SIP, _SIP_DOMAIN))


def is_allowed(destination: str, patterns: Sequence[str]) -> bool:
    """Whether a destination is a telephone number or SIP address that an entry of the list covers."""
    if _NUMBER.fullmatch(destination):
        return any(destination == one or (one.endswith("*") and destination.startswith(one[:-1])) for one in patterns)
    if _SIP.fullmatch(destination):
        scheme, _, address = destination.lower().partition(":")
        domain = f"{scheme}:*@{address.rpartition('@')[2]}"
        return any(one.lower() in (destination.lower(), domain) for one in patterns)
    return False
