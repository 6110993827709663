"""Speech to text: the contract in `base`, and a file a provider."""
