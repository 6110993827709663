"""What is told of calls while they go on and afterwards: figures for Prometheus, and an event log for each."""
