"""A run and its directory: configuration, checkpoints, journal, and the processes that share the directory."""
