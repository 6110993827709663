"""A chat-completions endpoint (`completions`) with a scripted receptionist behind it, which is no language model."""
