"""`examples/providers`: whichever ears and voice begin, the same conversation."""

from pathlib import Path

import pytest

from tests.examples.desk import place_call, remembered, serving


@pytest.mark.parametrize(("ears", "voice"), [("deepgram", "cartesia"), ("openai", "elevenlabs")])
async def test_a_call_with_each_ear_and_each_voice(server: str, tmp_path: Path, ears: str, voice: str) -> None:
    with serving("providers", tmp_path, server, STT=ears, TTS=voice) as dialogd:
        summary = await place_call(dialogd, server, "--say", "When are you open?", "--say", "Thank you, bye.")
    asked, _ = remembered(summary, "user")
    assert asked.lower().startswith("when are you open")
    answers = remembered(summary, "assistant")
    assert answers[0] == "Bella's, good evening. How can I help?"
    assert "noon until ten" in answers[1]
