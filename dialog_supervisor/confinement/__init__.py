"""What agent code and its processes may do and take, and what keeps them to it."""
