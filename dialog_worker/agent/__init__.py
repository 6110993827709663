"""Agents: wiring and turns in `base`, what a caller heard in `utterance`, tools in `tools`, OpenAI's models in `openai`."""
