"""A device's files: its home, the sealed vault and its key."""
