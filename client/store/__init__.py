"""The files of a device: its home, the sealed vault and its key."""
