"""What the worker threads of Dialog for TypeScript became: every call runs `create` in a process of its own."""

import os

from dialog_worker import Agent, CartesiaTTS, DeepgramSTT, OpenAIAgent, VoIP, tool


class Receptionist(OpenAIAgent):
    """Answers the phone of a restaurant. What it keeps in `self`, or anywhere else, is this call's alone."""

    system = "You answer the phone at Bella's, an Italian restaurant. One or two short sentences."
    greeting = "Bella's, good evening. How can I help?"

    @tool
    async def hang_up(self) -> str:
        """End the call, after saying goodbye."""
        await self.hangup()
        return "the call is over"


def create(voip: VoIP) -> Agent:
    """Make the agent of one call. `voip` stands where TwilioVoIPProxy stood: the line, at the other end of a pipe."""
    return Receptionist(
        voip=voip,
        stt=DeepgramSTT(),
        tts=CartesiaTTS(voice=os.environ["CARTESIA_VOICE"]),
        model=os.environ["OPENAI_MODEL"],
    )
