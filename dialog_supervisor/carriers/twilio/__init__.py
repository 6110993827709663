"""Twilio: webhooks and TwiML in `gateway`, media messages in `wire`, one call's line in `voip`, the REST API in `rest`."""
