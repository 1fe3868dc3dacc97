"""A run's folder: its state after each round, going on with it, and its lock."""
