"""The process that owns the phone lines."""
