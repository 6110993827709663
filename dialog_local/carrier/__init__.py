"""A phone company: `company` knows the calls and serves the REST API, `phonecall` is one call and follows its TwiML.

It is written from Twilio's documentation, and shares nothing with the gateway that it calls.
"""
