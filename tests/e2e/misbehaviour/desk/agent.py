"""The agent that is called: with whom it hears, speaks and thinks, the plan says for the number that was called."""

import json
import os
from collections.abc import AsyncIterator

import trio

from dialog_worker import (
    STT,
    TTS,
    Agent,
    CartesiaTTS,
    DeepgramSTT,
    ElevenLabsTTS,
    Message,
    Metadata,
    OpenAIAgent,
    OpenAISTT,
    ProviderError,
    VoIP,
    tool,
)

PLAN = json.loads(os.environ["PLAN"])  # by number: the URLs of each `ear`, each `voice` and the model, by provider
DISHES = ("Today we have a soup with beans. ", "Then there is pasta. ", "And a lemon tart.")
WRITING_S = 0.9  # between two sentences, of a model that writes slowly: so a fault can strike between and within them


class Receptionist(OpenAIAgent):
    """Books tables, and tells whoever watches what went wrong."""

    greeting = "Good evening."

    @tool
    async def book_table(self, people: int, time: str) -> str:
        """Book a table."""
        return f"booked: {people} at {time}"

    @tool
    async def hang_up(self) -> str:
        """End the call, after saying goodbye."""
        await self.hangup()
        return "the call is over"

    async def on_provider_error(self, error: ProviderError) -> None:
        await super().on_provider_error(error)
        self.voip.trace("told", error.message, {"code": error.code, "fatal": str(error.fatal)})


class Clerk(Receptionist):
    """Hangs up when a table is booked."""

    async def inference(self, message: Message[str]) -> None:
        await super().inference(message)
        if any(entry["role"] == "tool" for entry in self.history):
            await self.hangup()


class Waiter(Receptionist):
    """Reads the menu slowly, whatever it is asked, and hangs up."""

    async def inference(self, message: Message[str]) -> None:
        await self.dispatch_text(message.uuid, slowly())
        await self.hangup()


async def slowly() -> AsyncIterator[str]:
    """Write one sentence after another."""
    for dish in DISHES:
        yield dish
        await trio.sleep(WRITING_S)


EARS: dict[str, type[DeepgramSTT | OpenAISTT]] = {"deepgram": DeepgramSTT, "openai-realtime": OpenAISTT}
VOICES: dict[str, type[CartesiaTTS | ElevenLabsTTS]] = {"cartesia": CartesiaTTS, "elevenlabs": ElevenLabsTTS}

AGENTS: dict[str, type[Receptionist]] = {"receptionist": Receptionist, "clerk": Clerk, "waiter": Waiter}


class Switchboard:
    """Waits for the number that was called, and has an agent answer it that knows nothing of all this."""

    def __init__(self, voip: VoIP) -> None:
        self._voip = voip

    async def run(self) -> None:
        """Serve the call."""
        metadata = await anext(self._voip)
        assert isinstance(metadata, Metadata)
        await desk(self._voip, PLAN[metadata.callee]).run()


def desk(voip: VoIP, plan: dict[str, dict[str, str]]) -> Agent:
    """Return the agent that a plan describes."""
    ears: list[STT] = [EARS[name]("local", url=url) for name, url in plan["ears"].items()]
    voices: list[TTS] = [VOICES[name]("joe", "local", url=url) for name, url in plan["voices"].items()]
    [(model, url)] = plan["model"].items()
    return AGENTS[model](voip=voip, stt=ears, tts=voices, model=model, api_key="local", base_url=url)


def create(voip: VoIP) -> Switchboard:
    """Make the agent of one call."""
    return Switchboard(voip)
