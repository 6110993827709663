"""Every adapter with its options and formats. STT and TTS choose who is first; the other takes over if that one fails."""

import os
from collections.abc import Callable

from dialog_worker import (
    STT,
    TTS,
    Agent,
    CartesiaTTS,
    DeepgramSTT,
    ElevenLabsTTS,
    OpenAIAgent,
    OpenAISTT,
    VoIP,
    tool,
)

# The phone line is mu-law at 8 kHz, and so is every default below: no audio is converted anywhere. Constructing an adapter
# does no I/O; keys come from the environment (DEEPGRAM_API_KEY, …) unless given as api_key=, addresses likewise (url=).


def deepgram() -> STT:
    """Deepgram Nova. What has no option of its own goes into `options`, as Deepgram's API reference names it."""
    return DeepgramSTT(
        model="nova-3",
        language="en",  # or "multi"
        encoding="mulaw",  # or "alaw", "linear16" with its sample_rate
        sample_rate=8000,
        endpointing_ms=300,  # silence that ends an utterance; None: only utterance_end_ms does
        utterance_end_ms=1000,  # time without words that ends it in spite of noise
        smart_format=True,
        keyterms=["Bella's", "minestrone"],  # names that it should know (Nova-3)
        options={"numerals": True, "mip_opt_out": True},
        queue_size_limit=240_000,  # bytes of the caller's audio kept while Deepgram is away: 30 s
    )


def openai() -> STT:
    """OpenAI realtime transcription."""
    return OpenAISTT(
        model="gpt-live-transcribe",  # takes no turn_detection; gpt-4o-transcribe does
        language="en",
        prompt=None,  # e.g. "A restaurant. Minestrone, risotto, tiramisu.", where the model takes one
        encoding="mulaw",  # or "alaw"
        turn_detection=None,  # {"type": "server_vad", "silence_duration_ms": 500} or {"type": "semantic_vad"}
        silence_ms=500,  # that ends an utterance where turn_detection is None
        noise_reduction={"type": "near_field"},  # or far_field, for a loudspeaker telephone
        queue_size_limit=240_000,
    )


def cartesia() -> TTS:
    """Cartesia Sonic."""
    return CartesiaTTS(
        voice=os.environ["CARTESIA_VOICE"],
        model_id="sonic-3.5",
        language="en",
        encoding="pcm_mulaw",  # or "pcm_alaw", "pcm_s16le" with its sample_rate
        sample_rate=8000,
        speed=1.0,  # 0.6 to 1.5
        volume=1.0,  # 0.5 to 2
        emotion=None,  # such as "calm"
        add_timestamps=True,  # when each word is said: the history then ends at the word that was cut
        timeout_s=2.0,  # of silence in an utterance; then the rest is said again, and then by another voice
        queue_size_limit=64,  # pieces of text waiting to be spoken
    )


def elevenlabs() -> TTS:
    """ElevenLabs, on the multi-context socket."""
    return ElevenLabsTTS(
        voice_id=os.environ["ELEVENLABS_VOICE"],
        model_id="eleven_flash_v2_5",
        output_format="ulaw_8000",  # or "alaw_8000", "pcm_16000"
        language_code="en",
        voice_settings={"stability": 0.5, "similarity_boost": 0.75, "speed": 1.0},
        query={"apply_text_normalization": "auto"},  # the endpoint's other parameters
        timeout_s=2.0,
        queue_size_limit=64,
    )


class Receptionist(OpenAIAgent):
    """Answers the phone of a restaurant, by whatever ears and voice it is given."""

    system = "You answer the phone at Bella's, an Italian restaurant. One or two short sentences."
    greeting = "Bella's, good evening. How can I help?"

    @tool
    async def hang_up(self) -> str:
        """End the call, after saying goodbye."""
        await self.hangup()
        return "the call is over"


EARS: dict[str, Callable[[], STT]] = {"deepgram": deepgram, "openai": openai}
VOICES: dict[str, Callable[[], TTS]] = {"cartesia": cartesia, "elevenlabs": elevenlabs}


def create(voip: VoIP) -> Agent:
    """Make the agent of one call."""
    first_ear, first_voice = os.environ.get("STT", "deepgram"), os.environ.get("TTS", "cartesia")
    return Receptionist(
        voip=voip,
        stt=[EARS[name]() for name in sorted(EARS, key=lambda name: name != first_ear)],
        tts=[VOICES[name]() for name in sorted(VOICES, key=lambda name: name != first_voice)],
        model=os.environ["OPENAI_MODEL"],
        # Whatever the model takes goes into every request as it is.
        options={"temperature": 0.5},
    )
