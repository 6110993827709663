"""What the customer is told of a call besides its webhooks: signed posts that nobody in the call waits for.

Twilio docs, "Recording status callbacks", "Real-Time Transcriptions", TwiML <Stream> statusCallback, Call StatusCallback.
"""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import TypeAlias

import trio

from dialog_local.carrier.twiml import Reference
from dialog_local.carrier.webhooks import WebhookFailed, Webhooks

Report: TypeAlias = tuple[Reference, Mapping[str, str]]  # where to, and its fields


def iso_now() -> str:
    """Return the time as reports on streams and transcriptions have it: ISO 8601, in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def rfc_now() -> str:
    """Return the time as reports on calls and recordings have it: RFC 2822, in UTC."""
    return format_datetime(datetime.now(UTC))


class Reports:
    """The reports on one call. `failed` hears of those that the customer did not take."""

    def __init__(self, account_sid: str, call_sid: str, webhooks: Webhooks, failed: Callable[[WebhookFailed], None]) -> None:
        self._identity = {"AccountSid": account_sid, "CallSid": call_sid}
        self._webhooks = webhooks
        self._failed = failed
        self._nursery: trio.Nursery | None = None
        self._line_up: trio.MemorySendChannel[Report] | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Take reports inside the block, and leave it when the last has been told or has failed."""
        self._line_up, waiting = trio.open_memory_channel[Report](math.inf)  # a call's reports are few
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._tell_in_turn, waiting)
            with self._line_up:
                yield

    def start(self, task: Callable[[], Awaitable[object]]) -> None:
        """Run what has more than one report to tell, each in its time."""
        assert self._nursery is not None, "reports are taken while the call runs"
        self._nursery.start_soon(task)

    def soon(self, to: Reference | None, fields: Mapping[str, str]) -> None:
        """Tell something when what was to be told before it has been taken or has failed."""
        if to is not None:
            assert self._line_up is not None, "reports are taken while the call runs"
            with suppress(trio.BrokenResourceError):  # the call is being cancelled, and nothing is told any more
                self._line_up.send_nowait((to, fields))

    async def _tell_in_turn(self, waiting: trio.MemoryReceiveChannel[Report]) -> None:
        with waiting:
            async for to, fields in waiting:
                await self.tell(to, fields)

    async def tell(self, to: Reference | None, fields: Mapping[str, str]) -> None:
        """Tell something; to nobody, if no address was given."""
        if to is None:
            return
        try:
            await self._webhooks.ask(to.url, self._identity | dict(fields), to.method)
        except WebhookFailed as error:
            self._failed(error)
