"""A call's event log, played against the agent's code as it is now."""
