"""What has to be there before anybody calls: the callers' sentences, and an agent's, as audio."""

from dialog_local.call.speech_client import SpeechClient
from tests.chaos.caller import Voices

MAX_CONTEXTS = 50  # at the voice: more than ten calls and their next workers have


async def synthesised(server: str) -> Voices:
    """Have everything spoken that will be said."""
    async with SpeechClient(f"http://{server}") as speech:
        return Voices.of({text: await speech.say(text) for text in Voices.texts()})
