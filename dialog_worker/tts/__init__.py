"""Text to speech: the contract in `base`, and a file a provider."""
