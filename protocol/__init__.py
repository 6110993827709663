"""What crosses the pipe between the supervisor and a call's worker, and nothing else."""
