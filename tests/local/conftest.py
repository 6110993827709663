"""The local providers as a real process, with their models loaded once."""

import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from dialog_local.carrier.company import PhoneCompany
from tests.local.customer import SID, TOKEN, Customer, open_customer
from tests.local.sockets import BOOKING, CARTESIA, MAX_CONTEXTS, MULAW


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """`python -m dialog_local` with its models loaded; gives host and port. It must end cleanly on SIGTERM."""
    command = [sys.executable, "-m", "dialog_local", "--listen", "127.0.0.1:0", "--max-contexts", str(MAX_CONTEXTS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().removeprefix("listening on http://").strip()
        assert re.fullmatch(r"loading the recogniser … \d+\.\d s\n", process.stderr.readline())
        assert re.fullmatch(r"loading the voice … \d+\.\d s\n", process.stderr.readline())
        try:
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
    assert (process.returncode, rest) == (0, "")


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
