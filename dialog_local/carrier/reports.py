"""What the customer is told of a call besides its webhooks: signed posts that nobody in the call waits for.

Twilio docs, "Recording status callbacks", "Real-Time Transcriptions", TwiML <Stream> statusCallback, Call StatusCallback.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import trio

from dialog_local.carrier.twiml import Reference
from dialog_local.carrier.webhooks import WebhookFailed, Webhooks


def iso_now() -> str:
    """Return the time as reports on streams and transcriptions have it: ISO 8601, in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Reports:
    """The reports on one call. `failed` hears of those that the customer did not take."""

    def __init__(self, account_sid: str, call_sid: str, webhooks: Webhooks, failed: Callable[[WebhookFailed], None]) -> None:
        self._identity = {"AccountSid": account_sid, "CallSid": call_sid}
        self._webhooks = webhooks
        self._failed = failed
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Take reports inside the block, and leave it when the last has been told or has failed."""
        async with trio.open_nursery() as self._nursery:
            yield

    def start(self, task: Callable[[], Awaitable[object]]) -> None:
        """Run what has more than one report to tell, each in its time."""
        assert self._nursery is not None, "reports are taken while the call runs"
        self._nursery.start_soon(task)

    def soon(self, to: Reference | None, fields: Mapping[str, str]) -> None:
        """Tell something as soon as possible; two that follow each other closely may overtake."""
        self.start(lambda: self.tell(to, fields))

    async def tell(self, to: Reference | None, fields: Mapping[str, str]) -> None:
        """Tell something; to nobody, if no address was given."""
        if to is None:
            return
        try:
            await self._webhooks.ask(to.url, self._identity | dict(fields), to.method)
        except WebhookFailed as error:
            self._failed(error)
