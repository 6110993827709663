"""What of this dialogd goes to the next, which is the same process executed anew, and what comes from the one before."""

import time
from collections.abc import Callable

import structlog
import trio

from dialog_supervisor.call import Call, MakeLeg
from dialog_supervisor.connections import Listener
from dialog_supervisor.generations import Generations
from dialog_supervisor.switchboard import Switchboard
from dialog_supervisor.upgrade.execution import UpgradeFailed, check, execute, still
from dialog_supervisor.upgrade.handover import Handover
from protocol.messages import Metadata

_ANSWER_S = 0.1  # for the answer to whoever asked to be on its way

log = structlog.get_logger("dialogd")


class Succession:
    """Hands everything over, and takes it over. `handed` is what came from the dialogd before, if there was one."""

    def __init__(self, switchboard: Switchboard, generations: Generations, handed: Handover | None) -> None:
        self.count = 0 if handed is None else handed.upgrades + 1
        self.away_ms = 0  # for which nobody read what callers said
        self.failed = ""  # why this process is still the same, when it should be another
        self.under_way = False
        self.began_at = trio.current_time()
        self._switchboard = switchboard
        self._generations = generations
        self._handed = handed
        self._calls: list[Call] = []

    # From the one before

    def take_over(self, line: Callable[[Metadata], MakeLeg]) -> None:
        """Before the generations run: build up what was handed over."""
        handed, admission = self._handed, self._switchboard.admission
        if handed is None:
            return
        at = trio.current_time() - (time.monotonic() - handed.at)
        self.began_at = at - handed.uptime_s
        admission.draining = handed.draining
        admission.refused.update(handed.refused)
        self._generations.take_over(handed.generations, at)
        for transit in handed.calls:
            self._calls.append(self._switchboard.take_over(transit, line(transit.metadata), at))

    def go_on(self, listener: Listener) -> None:
        """Have the calls live on, and their sockets be read."""
        handed, self._handed = self._handed, None
        if handed is None:
            return
        self._switchboard.go_on(self._calls)
        for call, transit in zip(self._calls, handed.calls, strict=True):
            if transit.leg.socket is not None:
                listener.take_over_media(transit.leg.socket, call.stream)
        listener.take_over(handed.connections)
        self.away_ms = round((time.monotonic() - handed.at) * 1000)
        log.info("dialogd goes on as another version", calls=len(self._calls), upgrades=self.count, away_ms=self.away_ms)
        self._calls.clear()

    # To the next

    async def try_out(self, listener: Listener) -> None:
        """Have the version that is installed now read all that it would be handed. Raises `UpgradeFailed`."""
        self.failed, self.under_way = "", True
        try:
            async with self._generations.unchanged():
                with listener.paused():
                    handover = await still(lambda: self._hand_over(listener))
                await check(handover)
        except UpgradeFailed as error:
            self._give_up(error)
            raise

    async def run(self, listener: Listener) -> None:
        """Become the version that is installed now. Returns only when that fails."""
        await trio.sleep(_ANSWER_S)
        try:
            async with self._generations.unchanged():
                with listener.paused():
                    handover = await still(lambda: self._hand_over(listener))
                    log.info("dialogd is executed anew", calls=len(handover.calls))
                    execute(handover)
        except UpgradeFailed as error:
            self._give_up(error)

    def _give_up(self, error: UpgradeFailed) -> None:
        self.failed, self.under_way = str(error), False
        log.error("the upgrade failed, and nothing has changed", reason=str(error))

    def _hand_over(self, listener: Listener) -> Handover | str:
        """Return everything for the next version, or what stands in the way of that. Raises `UpgradeFailed`."""
        now, admission = trio.current_time(), self._switchboard.admission
        if admission.stopping:
            raise UpgradeFailed("a signal came first")
        calls = {call.id: call.hand_over(now) for call in self._switchboard.calls.values()}
        told = tuple(transit for transit in calls.values() if transit is not None)
        if len(told) < len(calls):
            untold = [call_id for call_id, transit in calls.items() if transit is None]
            return f"{len(untold)} calls begin, end, or wait for the carrier ({', '.join(untold[:3])})"
        connections = listener.hand_over()
        if connections is None or len(connections) + sum(one.leg.socket is not None for one in told) < listener.connections:
            return "a connection is being opened, answered or closed"
        generations = self._generations.hand_over(now)
        if generations is None:
            return "a version of the agent's code is being started or ended"
        return Handover(
            at=time.monotonic(),
            uptime_s=now - self.began_at,
            upgrades=self.count,
            listener=listener.fd,
            connections=connections,
            draining=admission.draining,
            refused=dict(admission.refused),
            lease=self._switchboard.keeper.lease,
            generations=generations,
            calls=told,
        )
