"""The private listener: what an operator sees and does, over a unix socket."""
