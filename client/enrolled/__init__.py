"""A device that belongs to a server: joining, its directory, its part in a run."""
