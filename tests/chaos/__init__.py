"""Breaks the real thing in a running dialogd with calls that talk, and judges what their callers noticed."""
