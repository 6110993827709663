"""`dialogctl load`: many calls at once to an agent that echoes, and what they cost the server."""
