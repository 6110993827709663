"""What survives this process: calls, for the dialogd that comes after a dead one."""
