"""What the tests of the local providers and of the phone company share."""

from collections.abc import AsyncIterator

import httpx
import pytest

from dialog_local.carrier.company import PhoneCompany
from tests.local.customer import SID, TOKEN, Customer, open_customer
from tests.local.sockets import BOOKING, CARTESIA, MULAW


@pytest.fixture(scope="session")
def spoken_booking(server: str) -> bytes:
    """`BOOKING` in mu-law, as the voice says it."""
    body = {"model_id": "sonic", "voice": {"id": "v"}, "transcript": BOOKING, "output_format": MULAW}
    response = httpx.post(f"http://{server}/tts/bytes", json=body, headers=CARTESIA, trust_env=False, timeout=30)
    assert response.status_code == 200
    return response.content


@pytest.fixture
async def customer() -> AsyncIterator[Customer]:
    async with open_customer() as opened:
        yield opened


@pytest.fixture
def company() -> PhoneCompany:
    return PhoneCompany(SID, TOKEN)
