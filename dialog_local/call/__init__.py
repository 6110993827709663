"""`dialogctl call`: place a call, and show the conversation as it happens."""
