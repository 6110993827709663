"""Whole calls against a real `dialogd`, and what they need: the process, Twilio's side, raw sockets, a REST server."""
