"""An agent that thinks in its own way: it puts the time before each thing the caller says, and keeps its own history."""

import logging
import os
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import openai

from dialog_worker import Agent, CartesiaTTS, DeepgramSTT, Message, OpenAIAgent, StreamingStarted, VoIP

log = logging.getLogger("agent")


class Timekeeper(OpenAIAgent):
    """Knows when each thing was said, and what of its own words the caller heard."""

    system = (
        "You answer the phone at Bella's, an Italian restaurant. One or two short sentences. Before each thing that the "
        "caller says stands the time, in UTC."
    )
    greeting = "Bella's, good evening. How can I help?"

    async def on_streaming_started(self, started: StreamingStarted) -> None:
        """Greet, to the end even if the caller speaks meanwhile."""
        entry = {"role": "assistant", "content": self.greeting}
        self.history.append(entry)
        entry["content"] = await self.dispatch_message(
            Message(str(uuid4()), self.greeting, done=True), allow_interrupt=False
        )

    async def inference(self, message: Message[str]) -> None:
        """Ask the model with the whole conversation, say its answer as it comes, and remember what was heard of it."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.history.append({"role": "user", "content": f"{now}\n{message.data}"})
        request: dict[str, Any] = {"model": self.model, "messages": self.messages(), **self.options}
        try:
            stream = await self.openai.chat.completions.create(**request, stream=True)
            heard = await self.dispatch_stream(message.uuid, stream)
        except openai.APIError as error:
            log.error("the model failed: %s", error)
            heard = await self.dispatch_message(Message(str(uuid4()), self.apology, done=True))
        self.history.append({"role": "assistant", "content": heard})


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    return Timekeeper(
        voip=voip,
        stt=DeepgramSTT(),
        tts=CartesiaTTS(voice=os.environ["CARTESIA_VOICE"]),
        model=os.environ["OPENAI_MODEL"],
    )
