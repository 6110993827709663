"""The calls of a soak: placed, held and reported on as the carrier does it, so that each comes to its end in order."""

from collections import Counter
from datetime import UTC, datetime
from email.utils import format_datetime

import msgspec
import trio

from dialog_local.carrier.reports import iso_now
from dialog_local.load.callers import LoadCall, Meter, Pacer
from dialog_local.load.wire import CallFailed, Target, ask

ARRIVAL_S = (
    0.107  # from one caller to the next at the start: no whole number of frames, so that they are spread over the 20 ms
)
_STATUS_PATH = "/twilio/status"  # which a number's settings name, and no TwiML


class Line:
    """Places calls, and knows what became of them."""

    def __init__(self, target: Target) -> None:
        self.placed = 0
        self.faults: Counter[str] = Counter()
        self.meter = Meter()
        self.meter.open()
        self._pacer = Pacer()
        self._target = target

    async def hold(self, count: int, at_once: int, seconds: float) -> None:
        """Place so many calls, so many of them at a time, and hold each for so long."""
        left = iter(range(count))

        async def caller(number: int) -> None:
            await trio.sleep(number * ARRIVAL_S)
            for _ in left:
                await self._call(seconds)

        async with trio.open_nursery() as pacing:
            pacing.start_soon(self._pacer.run)
            async with trio.open_nursery() as talking:
                for number in range(at_once):
                    talking.start_soon(caller, number)
            pacing.cancel_scope.cancel()

    async def _call(self, seconds: float) -> None:
        """Place a call that lasts so long from its first echo, and report on it."""
        self.placed += 1
        call = LoadCall(self._target, self.meter, self._pacer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call.run, trio.current_time())
            await call.settled.wait()
            if not call.error:
                await self._report(call, "stream-started")
                await trio.sleep(seconds)
                await call.finish()
        if call.error:
            self.faults[call.error] += 1
        else:
            await self._end(call)

    async def _end(self, call: LoadCall) -> None:
        """Tell all that the carrier tells of a caller who has hung up (Twilio docs: <Stream>, <Connect>, call status)."""
        assert call.verb is not None
        await self._report(call, "stream-stopped")
        if call.verb.action is not None:
            await self._tell(call.verb.action.url, call, {"CallStatus": "completed"})
        completed = {"CallStatus": "completed", "CallDuration": "1", "Timestamp": format_datetime(datetime.now(UTC))}
        await self._tell(self._target.url.replace("/twilio/voice", _STATUS_PATH), call, completed)

    async def _report(self, call: LoadCall, event: str) -> None:
        if call.verb is not None and call.verb.status_callback is not None and call.stream is not None:
            fields = {"StreamSid": call.stream.stream_sid, "StreamEvent": event, "Timestamp": iso_now()}
            await self._tell(call.verb.status_callback.url, call, fields)

    async def _tell(self, url: str, call: LoadCall, fields: dict[str, str]) -> None:
        try:
            await ask(
                msgspec.structs.replace(self._target, url=url),
                {"CallSid": call.sid, "AccountSid": self._target.account_sid, **fields},
            )
        except (CallFailed, OSError) as error:
            self.faults[f"a report was not taken: {error}"] += 1
