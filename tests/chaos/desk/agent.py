"""The agent that is called: it tells the opening hours, and breaks in the way that the key stands for which is pressed."""

import json
import os
import socket
import time
from collections.abc import Callable

import trio

from dialog_worker import Agent, CartesiaTTS, DeepgramSTT, Dtmf, Media, Message, OpenAIAgent, VoIP, tool
from dialog_worker.voip import VoIPProxy

HOURS = json.loads(os.environ["HOURS"])  # what is said of each day of the week
PROCESSES = 6  # generations of a fork bomb: 64 processes; more would be felt by whoever else uses the machine
EAR_S = 8.0  # for the recogniser, which ten callers share: late is not gone
FLOOD_TEXT = "x" * 100


class TimedLine(VoIPProxy):
    """A line that tells when each message's first audio came from the voice."""

    _begun: frozenset[str] = frozenset()

    def post(self, message: Message[bytes]) -> None:
        if message.uuid not in self._begun:
            self._begun |= {message.uuid}
            self.trace("voiced", f"{time.monotonic():.6f}")
        super().post(message)


class Deaf(TimedLine):
    """A line that is read no further."""

    async def listen(self, hear: Callable[[Media], None]) -> None:
        await trio.sleep_forever()


class Clerk(OpenAIAgent):
    """Tells the opening hours."""

    greeting = "Good morning."

    @tool
    async def opening_hours(self, day: str) -> str:
        """Return the opening hours of a day of the week."""
        return str(HOURS[day])

    async def inference(self, message: Message[str]) -> None:
        self.voip.trace("thinks", f"{time.monotonic():.6f}")
        await super().inference(message)

    async def on_dtmf(self, dtmf: Dtmf) -> None:
        await FAULTS[dtmf.digit](self)

    async def fail(self) -> None:
        raise RuntimeError("the agent's own mistake")

    async def loop(self) -> None:
        while True:
            pass

    async def eat_memory(self) -> None:
        eaten = []
        while True:
            eaten.append(bytearray(1 << 20))

    async def fork(self) -> None:
        for _ in range(PROCESSES):
            os.fork()
        time.sleep(60)  # noqa: ASYNC251 - as authors do

    async def leak(self) -> None:
        leaked = []
        while True:
            leaked.append(socket.socket())

    async def flood(self) -> None:
        while True:
            self.voip.trace("flood", FLOOD_TEXT)
            await self.voip.room()

    async def garbage(self) -> None:
        self._socket().send(b"\xff" * 64)

    async def exit(self) -> None:
        os._exit(0)

    async def go_deaf(self) -> None:
        line = self.voip
        assert isinstance(line, VoIPProxy)
        line.__class__ = Deaf
        VoIPProxy.post(line, Message("the last", b"", done=True))  # it is told that this was played, and reads no more

    async def leave(self) -> None:
        self.nursery.cancel_scope.cancel()

    def _socket(self) -> socket.socket:
        assert isinstance(self.voip, VoIPProxy)
        return self.voip._link._sock


FAULTS = {
    "1": Clerk.fail,
    "2": Clerk.loop,
    "3": Clerk.eat_memory,
    "4": Clerk.fork,
    "5": Clerk.leak,
    "6": Clerk.flood,
    "7": Clerk.garbage,
    "8": Clerk.exit,
    "9": Clerk.go_deaf,
    "0": Clerk.leave,
}


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    voip.__class__ = TimedLine
    return Clerk(
        voip=voip,
        stt=DeepgramSTT(stall_s=EAR_S),
        tts=CartesiaTTS("joe"),
        model="scripted-receptionist",
    )
