"""Ears and a voice: the protocols of Deepgram (`listen`) and OpenAI (`dictation`) in front of Moonshine, those of Cartesia
(`speak`) and ElevenLabs (`multistream`) in front of Piper.
"""
