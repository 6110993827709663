"""A receptionist: greets, listens, answers, and books a table."""

import os

from dialog_worker import Agent, CartesiaTTS, DeepgramSTT, OpenAIAgent, VoIP, tool


class Receptionist(OpenAIAgent):
    """Answers the phone of a restaurant."""

    system = "You answer the phone at Bella's, an Italian restaurant. One or two short sentences."
    greeting = "Bella's, good evening. How can I help?"

    @tool
    async def book_table(self, people: int, time: str) -> str:
        """Book a table. `time` is like "19:30"."""
        return f"booked: a table for {people} at {time}"

    @tool
    async def hang_up(self) -> str:
        """End the call, after saying goodbye."""
        await self.hangup()
        return "the call is over"


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    return Receptionist(
        voip=voip,
        stt=DeepgramSTT(),
        tts=CartesiaTTS(voice=os.environ["CARTESIA_VOICE"]),
        model=os.environ["OPENAI_MODEL"],
    )
