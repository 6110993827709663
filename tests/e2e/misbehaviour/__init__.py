"""Each misbehaviour of each provider in mid-call: real calls, a row each, and one table that the suite prints at its end."""
