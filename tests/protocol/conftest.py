"""Hypothesis without a stopwatch: the machine is shared, and a slow example is no wrong one."""

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
