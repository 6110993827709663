"""Whether the documentation is true: its code runs, its tables and quotes are what the project really has and says."""
